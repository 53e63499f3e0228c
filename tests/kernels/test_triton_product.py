"""Products with many rows: what they compute, where they write, and what they cost to hold.

Under Triton's interpreter, in a process of its own, tiny odd sizes are compared in float32 with float64; on a GPU,
realistic and odd sizes in every dtype; and without a GPU the launches' own arguments are compiled for several cards.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from cortexflow.kernels.triton import product as room
from cortexflow.kernels.triton.product import Config
from tests.kernels import numerics
from tests.kernels.builds import ACCESS, SHARED, around_wait, check_fits, disassembler, record
from tests.kernels.numerics import ACTS, BF16, EPS, F16, F32, NAN, TOLERANCE, Draw, Measured, interpret, measure, rms


class Case(NamedTuple):
    """One product: extents, what stands around it, and its tiles."""

    m: int
    k: int
    n: int
    config: Config | None = None
    act: str = "none"
    bias: bool = False
    residual: bool = False
    gate: bool = False
    glu: str = "none"  # halves or pairs
    norm: str = "none"  # rms or layer
    in_place: bool = False
    then: str = "none"  # the norm of the result: rms or layer


def run(case: Case, device: str, dtype: torch.dtype, seed: int) -> Measured:
    draw = Draw(device, dtype, seed)
    m, k, n = case.m, case.k, case.n
    wide = n if case.glu == "none" else 2 * n
    x, w, bias = draw.rows(m, k), draw.weight(k, wide, k=k), draw.normal(wide)
    if case.norm == "layer":
        x += 1  # a mean that matters
    residual, gate = draw.rows(m, n), draw.normal(n)
    scales, means = torch.full((2, m), NAN, device=device)
    if case.norm != "none":
        room.row_scales(x, scales, EPS, means if case.norm == "layer" else None)

    y = x.double()
    if case.norm == "rms":
        y = rms(y)
    elif case.norm == "layer":
        y = F.layer_norm(y, (k,), eps=EPS)
    y = y @ w.double()
    y = y + bias.double() if case.bias else y
    if case.glu == "halves":
        y = ACTS[case.act](y[:, :n]) * y[:, n:]
    elif case.glu == "pairs":
        y = ACTS[case.act](y[:, ::2]) * y[:, 1::2]
    else:
        y = ACTS[case.act](y)
    y = y * gate.double() if case.gate else y
    y = y + residual.double() if case.residual else y

    behind = F.layer_norm(y, (n,), eps=EPS) if case.then == "layer" else rms(y)

    def launch() -> list[tuple[Tensor, Tensor]]:
        whole = draw.poisoned(m if case.then == "none" else 2 * m, n)
        out, normed = whole[:m], whole[m:]
        if case.in_place:
            out.copy_(residual)
        split = case.config.split if case.config else 1
        room.product(
            x, w, out, bias=bias if case.bias else None, act=case.act,
            residual=None if not case.residual else out if case.in_place else residual,
            gate=gate if case.gate else None, glu=case.glu == "halves", pairs=case.glu == "pairs",
            row_scale=None if case.norm == "none" else scales, row_mean=means if case.norm == "layer" else None,
            column_sums=w.float().sum(0) if case.norm == "layer" else None,
            normed=None if case.then == "none" else normed, eps=EPS, centred=case.then == "layer",
            scratch=torch.full((split * m * n,), NAN, device=device), config=case.config,
        )  # fmt: skip
        return [(out, y)] if case.then == "none" else [(out, y), (normed, behind)]

    return measure(launch, draw)


TINY = Config(16, 16, 16, 16)
SMALL = {
    "plain": Case(37, 24, 20, TINY),
    "transposed": Case(37, 24, 20, TINY._replace(swap=True)),
    "rows that are not aligned": Case(37, 21, 19, TINY),
    "one row": Case(1, 5, 3, TINY),
    "one piece, default tile": Case(5, 33, 20),
    "one tile after another": Case(37, 20, 36, TINY._replace(more=0, resident=1)),
    "split": Case(37, 36, 20, TINY._replace(split=3), "silu", True, True, True),
    "split finer than its steps": Case(5, 20, 36, TINY._replace(split=4)),
    **{f"everything {a}": Case(9, 20, 12, TINY, a, True, True, True) for a in ACTS},
    "residual in place": Case(37, 24, 20, TINY, residual=True, in_place=True),
    "split, residual in place": Case(21, 24, 20, TINY._replace(split=2), gate=True, residual=True, in_place=True),
    "halves": Case(37, 24, 20, TINY, "gelu_tanh", True, True, True, "halves"),
    "halves transposed": Case(37, 24, 20, TINY._replace(swap=True), "silu", True, glu="halves"),
    "pairs": Case(37, 24, 20, TINY, "gelu_tanh", True, glu="pairs"),
    "pairs, not aligned": Case(17, 21, 19, TINY, "silu", glu="pairs"),
    "rms norm": Case(37, 24, 20, TINY, norm="rms"),
    "layer norm": Case(37, 24, 20, TINY._replace(swap=True), bias=True, norm="layer"),
    "layer norm, split": Case(37, 24, 20, TINY._replace(split=2), "gelu_tanh", True, norm="layer"),
    "normed after": Case(9, 24, 20, TINY, residual=True, then="layer"),
    "normed after, split": Case(9, 36, 20, TINY._replace(split=3), residual=True, in_place=True, then="rms"),
    "centred after, split": Case(9, 36, 21, TINY._replace(split=2), "none", True, True, then="layer"),
    "rms norm, halves": Case(37, 24, 20, TINY, "silu", norm="rms", glu="halves"),
    "layer norm, pairs": Case(37, 24, 20, TINY, "silu", True, norm="layer", glu="pairs"),
}  # fmt: skip
LARGE = {
    "qkv": Case(560, 2048, 2560, norm="rms"),
    "down": Case(560, 16384, 2048, residual=True, in_place=True),
    "gate and up": Case(560, 2048, 16384, None, "gelu_tanh", glu="halves", norm="rms"),
    "fc1": Case(512, 1152, 4304, None, "gelu_tanh", True, norm="layer"),
    "patches": Case(512, 588, 1152, bias=True),
    "split and normed": Case(560, 2048, 2048, Config(64, 0, 64, 32, 3), residual=True, then="rms"),
    "split and centred": Case(
        512, 4304, 1152, Config(64, 0, 64, 32, 3), bias=True, residual=True, in_place=True, then="layer"
    ),
    "odd": Case(77, 333, 451, None, "silu", True, True, True),
    "odd halves": Case(77, 333, 451, None, "silu", True, glu="halves"),
}
TILES = [
    *((c._replace(split=s), "none") for c in room.PLAIN for s in (1, 3)),
    *((c, "halves") for c in room.HALVES),
    *((c, "pairs") for c in room.PAIRS),
]  # fmt: skip


# ---- under Triton's interpreter ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_small_products(name: str, interpreted: dict[str, Measured]) -> None:
    numerics.check(interpreted[name], 1e-5)


# ---- what is refused, and what is proposed -----------------------------------------------------------


def test_refusals() -> None:
    x, w, out = torch.zeros(4, 64), torch.zeros(64, 32), torch.zeros(4, 16)
    with pytest.raises(ValueError, match="not split"):
        room.product(x, w, out, glu=True, config=Config(split=2))
    with pytest.raises(ValueError, match="scratch"):
        room.product(x, w[:, :16], out, config=Config(split=2), scratch=torch.zeros(5))
    with pytest.raises(ValueError, match="dense"):
        room.product(x, torch.zeros(16, 64).t(), out)


@pytest.mark.parametrize("m", [1, 512, 560, 968, 4480])
@pytest.mark.parametrize(("k", "n", "glu"), [(2048, 16384, True), (16384, 2048, False), (588, 1152, False)])
def test_candidates(m: int, k: int, n: int, glu: bool) -> None:
    found = room.candidates(m, n, k, glu)
    assert 1 < len(found) <= 8
    assert len(set(found)) == len(found)
    assert not glu or all(c.split == 1 for c in found)


# ---- on a GPU ----------------------------------------------------------------------------------------


def check(case: Case, dtype: torch.dtype) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    numerics.check(run(case, "cuda", dtype, seed), TOLERANCE[dtype], f"seed {seed}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_small_products_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    case = SMALL[name]
    bare = case.config and case.config._replace(warps=4, rows=64, more=64 if case.config.more else 0, columns=64)
    check(case._replace(config=bare), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large_products_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    check(LARGE[name], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(("config", "glu"), TILES, ids=str)
def test_tiles_on_a_gpu(config: Config, glu: str, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_properties(0).shared_memory_per_block_optin < SHARED[90]:
        pytest.skip("tiles for Hopper")
    check(Case(333, 1152, 584, config, "gelu_tanh", True, True, glu=glu, norm="rms"), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("centred", [False, True])
def test_row_scales_on_a_gpu(centred: bool) -> None:
    x = torch.randn(333, 1160, device="cuda").add(1).to(BF16)[:, :1152]
    scales, means = torch.full((2, 333), float("nan"), device="cuda")
    room.row_scales(x, scales, EPS, means if centred else None)
    y = x.double()
    if centred:
        torch.testing.assert_close(means.double(), y.mean(-1), rtol=1e-5, atol=1e-5)
        y = y - y.mean(-1, keepdim=True)
    torch.testing.assert_close(scales.double(), (y.square().mean(-1) + EPS).rsqrt(), rtol=1e-5, atol=0)


# ---- compiled without a GPU --------------------------------------------------------------------------

STACK = {80: 0, 89: 0, 90: 0, 120: 8}  # bytes a thread, spills not among them: descriptors take 8 on sm_120
LAUNCHES: dict[str, tuple[torch.dtype, Case]] = {
    "residual": (BF16, Case(65, 2048, 2048, bias=True, residual=True)),
    "halves": (BF16, Case(65, 2048, 1024, None, "gelu_tanh", glu="halves", norm="rms")),
    "patches": (BF16, Case(65, 588, 1152, bias=True)),
    "finish": (BF16, Case(65, 2048, 2048, Config(128, 0, 64, 32, split=4), residual=True, then="rms")),
    "f32": (F32, Case(65, 64, 64, None, "gelu_tanh", True, True)),
}


def build(case: Case, dtype: torch.dtype, arch: int, monkeypatch: pytest.MonkeyPatch, part: str = "") -> Any:
    """What a product would launch on an architecture, compiled: its tiles, or what finishes their parts."""
    kernels = "product_kernel", "finish_kernel", "row_scales_kernel"
    product, finish, _ = (record(room, kernel, arch, monkeypatch) for kernel in kernels)
    monkeypatch.setattr(room, "_card", lambda device: (132, SHARED[arch]))
    run(case, "cpu", dtype, 0)
    return (finish if part == "finish" else product).compile()


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_default_tiles_fit_their_card(launch: str, arch: int, monkeypatch: Any, tmp_path: Path) -> None:
    dtype, case = LAUNCHES[launch]
    built = build(case, dtype, arch, monkeypatch, launch)
    check_fits(built, arch, tmp_path, STACK[arch])
    ahead, _ = around_wait(built, arch)
    assert not re.search(ACCESS, ahead), "reads or writes before it waits"


QUICK = [*room.PLAIN[:1], *room.HALVES[:1], *room.PAIRS[:1]]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("config", "glu"),
    [pytest.param(c, g, marks=[] if c in QUICK and c.split == 1 else [pytest.mark.slow]) for c, g in TILES],
    ids=str,
)
def test_tiles_feed_the_tensor_cores_from_shared_memory(
    config: Config, glu: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On Hopper: no spill, TMA loads, asynchronous products that nothing serialises."""
    case = Case(65, 2048, 256, config, residual=True)
    if glu != "none":
        case = case._replace(residual=False, act="gelu_tanh", glu=glu, norm="rms")
    built = build(case, BF16, 90, monkeypatch)
    check_fits(built, 90, tmp_path)
    assert "cp.async.bulk.tensor" in built.asm["ptx"]
    assert "wgmma.mma_async" in built.asm["ptx"]
    code = disassembler("nvdisasm", built, tmp_path, "-c")
    if code is not None:
        assert code.count("WARPGROUP.DEPBAR") < 4 <= code.count("HGMMA") or config.depth == 32


if __name__ == "__main__":
    room.overlaps = lambda: True  # descriptors, except where rows are not aligned
    interpret(lambda: {name: run(case, "cpu", F32, 0) for name, case in SMALL.items()}, room)
