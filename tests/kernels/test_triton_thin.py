"""Small products: under Triton's interpreter, on a GPU in every mix of dtypes, and compiled for every card."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cortexflow.kernels.triton import thin as room
from tests.kernels.builds import SHARED, around_wait, check_fits, record
from tests.kernels.numerics import ACTS, BF16, F16, F32, NAN, ROUNDED_ONCE, Draw, Measured, check, interpret, measure


class Case(NamedTuple):
    """One product; dtypes of x, w, out, bias and residual. `squares`: sums of the result's are wanted beside it."""

    m: int
    k: int
    n: int
    bias: bool = False
    residual: bool = False
    in_place: bool = False
    act: str = "none"
    dtypes: tuple[torch.dtype, ...] = (F32,) * 5
    squares: bool = False


def run(case: Case, device: str, seed: int) -> Measured:
    draw = Draw(device, F32, seed, pad=5)
    m, k, n = case.m, case.k, case.n
    of_x, of_w, of_out, of_bias, of_residual = case.dtypes
    x, w, residual = draw.rows(m, k, dtype=of_x), draw.rows(k, n, dtype=of_w), draw.rows(m, n, dtype=of_residual)
    bias = draw.normal(n, dtype=of_bias)
    y = x.double() @ w.double()
    y = ACTS[case.act](y + bias.double() if case.bias else y)
    y = y + residual.double() if case.residual else y

    def launch() -> list[tuple[Tensor, Tensor]]:
        out = draw.poisoned(m, n, dtype=of_out)
        if case.in_place:
            out.copy_(residual)
        before = out if case.in_place else residual
        ends = {"bias": bias if case.bias else None, "residual": before if case.residual else None}
        if not case.squares:
            room.thin(x, w, out, act=case.act, **ends)
            return [(out, y)]
        sums = torch.full((m + 1, room.square_sums(n)), NAN, device=device)
        draw.margins = [*draw.margins[:2], sums[m:]]
        room.thin(x, w, out, act=case.act, squares=sums[:m], **ends)
        return [(out, y), (sums[:m].sum(1), out.double().square().sum(1))]

    return measure(launch, draw)


SMALL = {
    "one entry": Case(1, 1, 1),
    "one row": Case(1, 5, 3, bias=True),
    "few columns": Case(5, 37, 7, bias=True, residual=True),
    "more than a program's columns": Case(3, 33, 65),
    "columns in pieces": Case(2, 32, 131, bias=True),
    "k in pieces": Case(2, 600, 8, residual=True),
    "k and columns in pieces": Case(3, 77, 150, bias=True, residual=True),
    "in place": Case(4, 35, 20, bias=True, residual=True, in_place=True),
    **{f"act {a}": Case(3, 33, 21, bias=True, residual=True, act=a) for a in ACTS},
    "squares of a row in pieces": Case(3, 33, 300, bias=True, squares=True),
    "squares of few columns": Case(2, 5, 20, squares=True),
    "float16 rows": Case(5, 37, 7, bias=True, residual=True, dtypes=(F16, F32, F32, F16, F32)),
    "float16 result": Case(5, 37, 7, bias=True, residual=True, dtypes=(F32, F32, F16, F32, F16)),
}
MIXES = [(F32,) * 5, (BF16,) * 5, (F16,) * 5, (BF16, F32, F32, F32, F32), (F32, BF16, F32, BF16, F32),
         (F32, F32, BF16, F32, BF16), (F16, F32, F16, F32, F32)]  # fmt: skip
LARGE = {
    "into the model": Case(50, 32, 1024, bias=True),
    "out of the model": Case(50, 1024, 32, bias=True, residual=True, in_place=True),
    "odd": Case(61, 333, 77, bias=True, residual=True),
    "act": Case(10, 32, 1023, bias=True, act="silu"),
    "squares": Case(10, 32, 1024, bias=True, squares=True),
}


# ---- under Triton's interpreter ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_small_cases(name: str, interpreted: dict[str, Measured]) -> None:
    check(interpreted[name], ROUNDED_ONCE[SMALL[name].dtypes[2]])


# ---- on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", MIXES, ids=lambda d: " ".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_on_a_gpu(name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    case = (SMALL | LARGE)[name]._replace(dtypes=dtypes)
    if case.in_place:
        case = case._replace(dtypes=(*dtypes[:4], dtypes[2]))
    check(run(case, "cuda", seed), ROUNDED_ONCE[dtypes[2]], f"seed {seed}")


# ---- compiled without a GPU --------------------------------------------------------------------------


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("name", LARGE)
def test_compiles_for_every_card(name: str, arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It fits, and before it waits for the kernel ahead it reads its weight and its bias alone."""
    recorder = record(room, "thin_kernel", arch, monkeypatch)
    run(LARGE[name], "cpu", 0)
    built = recorder.compile()
    check_fits(built, arch, tmp_path)
    ahead, behind = around_wait(built, arch)
    assert not re.search(r"\bst\.global", ahead)
    assert arch < 90 or re.search(r"\bld\.global", behind)


if __name__ == "__main__":
    interpret(lambda: {name: run(case, "cpu", 0) for name, case in SMALL.items()}, room)
