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
from torch import Tensor

pytest.importorskip("triton")

from cortexflow.kernels.triton import product as room
from cortexflow.kernels.triton.product import Config
from tests.kernels import numerics
from tests.kernels.builds import ACCESS, SHARED, around_wait, check_fits, disassembler, record
from tests.kernels.numerics import ACTS, BF16, F16, F32, NAN, TOLERANCE, Draw, Measured, identity, interpret, measure


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
    pairs: bool = False
    in_place: bool = False


def run(case: Case, device: str, dtype: torch.dtype, seed: int) -> Measured:
    draw = Draw(device, dtype, seed)
    m, k, n = case.m, case.k, case.n
    wide = 2 * n if case.pairs else n
    x, w, bias = draw.rows(m, k), draw.weight(k, wide, k=k), draw.normal(wide)
    residual, gate = draw.rows(m, n), draw.normal(n)

    y = x.double() @ w.double()
    y = y + bias.double() if case.bias else y
    y = ACTS[case.act](y[:, ::2]) * y[:, 1::2] if case.pairs else ACTS[case.act](y)
    y = y * gate.double() if case.gate else y
    y = y + residual.double() if case.residual else y

    def launch() -> list[tuple[Tensor, Tensor]]:
        out = draw.poisoned(m, n)
        if case.in_place:
            out.copy_(residual)
        split = case.config.split if case.config else 1
        room.product(
            x, w, out, bias=bias if case.bias else None, act=case.act,
            residual=None if not case.residual else out if case.in_place else residual,
            gate=gate if case.gate else None, pairs=case.pairs,
            scratch=torch.full((split * m * n,), NAN, device=device), config=case.config,
        )  # fmt: skip
        return [(out, y)]

    return measure(launch, draw)


TINY = Config(16, 16, 16, 16)
SMALL = {
    "plain": Case(37, 24, 20, TINY),
    "transposed": Case(37, 24, 20, TINY._replace(swap=True)),
    "rows that are not aligned": Case(37, 21, 19, TINY),
    "one row": Case(1, 5, 3, TINY),
    "one piece, default tile": Case(5, 33, 20),
    "split": Case(37, 36, 20, TINY._replace(split=3), "silu", True, True, True),
    "split finer than its steps": Case(5, 20, 36, TINY._replace(split=4)),
    **{f"everything {a}": Case(9, 20, 12, TINY, a, True, True, True) for a in ACTS},
    "residual in place": Case(37, 24, 20, TINY, residual=True, in_place=True),
    "split, residual in place": Case(21, 24, 20, TINY._replace(split=2), gate=True, residual=True, in_place=True),
    "pairs": Case(37, 24, 20, TINY, "gelu_tanh", True, True, True, True),
    "pairs transposed": Case(37, 24, 20, TINY._replace(swap=True), "silu", True, pairs=True),
    "pairs, not aligned": Case(17, 21, 19, TINY, "silu", pairs=True),
}  # fmt: skip
LARGE = {
    "qkv": Case(560, 2048, 2560),
    "down": Case(560, 16384, 2048, residual=True, in_place=True),
    "gate and up": Case(560, 2048, 16384, None, "gelu_tanh", pairs=True),
    "fc1": Case(512, 1152, 4304, None, "gelu_tanh", True),
    "patches": Case(512, 588, 1152, bias=True),
    "split": Case(512, 4304, 1152, Config(64, 0, 64, 32, 3), bias=True, residual=True, in_place=True),
    "one row": Case(1, 4096, 12288),
    "one row, gate and up": Case(1, 4096, 11008, None, "silu", pairs=True),
    "one row, split": Case(1, 11008, 4096, Config(16, 0, 64, 32, 2, warps=4), residual=True, in_place=True),
    "few rows, odd": Case(13, 999, 777, None, "gelu", True, True, True),
    "odd": Case(77, 333, 451, None, "silu", True, True, True),
    "odd pairs": Case(77, 333, 451, None, "silu", True, pairs=True),
}
TILES = [*((c._replace(split=s), False) for c in room.PLAIN for s in (1, 3)), *((c, True) for c in room.PAIRS)]
FEW_TILES = [*((c, False) for c in room.FEW), *((c, True) for c in room.FEW_PAIRS)]


# ---- under Triton's interpreter ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_small_products(name: str, interpreted: dict[str, Measured]) -> None:
    numerics.check(interpreted[name], 1e-5)


# ---- what is refused, and what is proposed -----------------------------------------------------------


def test_refusals() -> None:
    x, w, out = torch.zeros(4, 64), torch.zeros(64, 32), torch.zeros(4, 16)
    with pytest.raises(ValueError, match="not split"):
        room.product(x, w, out, pairs=True, config=Config(split=2))
    with pytest.raises(ValueError, match="scratch"):
        room.product(x, w[:, :16], out, config=Config(split=2), scratch=torch.zeros(5))
    with pytest.raises(ValueError, match="dense"):
        room.product(x, torch.zeros(16, 64).t(), out)
    with pytest.raises(ValueError, match="no parts to hand on"):
        room.product(x, w[:, :16], out, config=Config(), finish=False)


@pytest.mark.parametrize("m", [1, 16, 512, 560, 968, 4480])
@pytest.mark.parametrize(("k", "n", "pairs"), [(2048, 16384, True), (16384, 2048, False), (588, 1152, False)])
def test_candidates(m: int, k: int, n: int, pairs: bool) -> None:
    found = room.candidates(m, n, k, pairs)
    assert 1 < len(found) <= 8
    assert len(set(found)) == len(found)
    assert not pairs or all(c.split == 1 for c in found)


# ---- on a GPU ----------------------------------------------------------------------------------------


def check(case: Case, dtype: torch.dtype, tolerance: float | None = None) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    numerics.check(run(case, "cuda", dtype, seed), tolerance or TOLERANCE[dtype], f"seed {seed}")


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
@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("shape", [(50, 1024, 1024), (17, 640, 96), (300, 588, 256)], ids=str)  # rows, depth, columns
def test_float32_loses_no_more_than_its_own_sums(shape: tuple[int, int, int], split: int) -> None:
    """One product of TF32 factors would be 1e-4 away."""
    m, k, n = shape
    tile = room.default(m, n, k, False, room.shared_memory(), 4)
    check(Case(m, k, n, tile._replace(split=split), bias=True), F32, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(("config", "pairs"), TILES, ids=str)
def test_tiles_on_a_gpu(config: Config, pairs: bool, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_properties(0).shared_memory_per_block_optin < SHARED[90]:
        pytest.skip("tiles for Hopper")
    check(Case(333, 1152, 584, config, "gelu_tanh", True, True, pairs=pairs), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize(("config", "pairs"), FEW_TILES, ids=str)
def test_tiles_of_few_rows_on_a_gpu(config: Config, pairs: bool, rows: int) -> None:
    if torch.cuda.get_device_properties(0).shared_memory_per_block_optin < SHARED[90]:
        pytest.skip("tiles for Hopper")
    check(Case(rows, 1152, 584, config, "silu", True, not pairs, pairs=pairs), BF16)


# ---- compiled without a GPU --------------------------------------------------------------------------

STACK = {80: 0, 89: 0, 90: 0, 120: 8}  # bytes a thread, spills not among them: descriptors take 8 on sm_120
LAUNCHES: dict[str, tuple[torch.dtype, Case]] = {
    "residual": (BF16, Case(65, 2048, 2048, bias=True, residual=True)),
    "pairs": (BF16, Case(65, 2048, 1024, None, "gelu_tanh", pairs=True)),
    "pairs, many rows": (BF16, Case(600, 256, 1024, None, "gelu_tanh", pairs=True)),
    "pairs, many rows that are not aligned": (BF16, Case(600, 333, 451, None, "silu", True, pairs=True)),
    "patches": (BF16, Case(65, 588, 1152, bias=True)),
    "few rows": (BF16, Case(3, 2048, 1024, residual=True)),
    "few rows, pairs": (BF16, Case(3, 2048, 1024, None, "silu", pairs=True)),
    "finish": (BF16, Case(65, 2048, 2048, Config(128, 0, 64, 32, split=4), residual=True)),
    "f32": (F32, Case(65, 64, 64, None, "gelu_tanh", True, True)),
}


def build(case: Case, dtype: torch.dtype, arch: int, monkeypatch: pytest.MonkeyPatch, part: str = "") -> Any:
    """What a product would launch on an architecture, compiled: its tiles, or what finishes their parts."""
    product, finish = (record(room, kernel, arch, monkeypatch) for kernel in ("product_kernel", "finish_kernel"))
    monkeypatch.setattr(room, "shared_memory", lambda: SHARED[arch])
    run(case, "cpu", dtype, 0)
    return (finish if part == "finish" else product).compile()


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_default_tiles_fit_their_card(launch: str, arch: int, monkeypatch: Any, tmp_path: Path) -> None:
    dtype, case = LAUNCHES[launch]
    built = build(case, dtype, arch, monkeypatch, launch)
    check_fits(built, arch, tmp_path, STACK[arch])
    ahead, _ = around_wait(built, arch, late=not launch.startswith("few") and launch != "finish")
    assert not re.search(ACCESS, ahead), "reads or writes before it waits"
    assert ("prefetch.global.L2" in ahead) == (launch.startswith("few") and arch >= 90)


QUICK = (room.PLAIN[0], False), (room.PAIRS[0], True)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("config", "pairs"),
    [pytest.param(*tile, marks=[] if tile in QUICK else [pytest.mark.slow]) for tile in TILES],
    ids=str,
)
def test_tiles_feed_the_tensor_cores_from_shared_memory(
    config: Config, pairs: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On Hopper: no spill, TMA loads, asynchronous products that nothing serialises."""
    case = Case(65, 2048, 256, config, "gelu_tanh" if pairs else "none", residual=not pairs, pairs=pairs)
    built = build(case, BF16, 90, monkeypatch)
    check_fits(built, 90, tmp_path)
    assert "cp.async.bulk.tensor" in built.asm["ptx"]
    assert "wgmma.mma_async" in built.asm["ptx"]
    code = disassembler("nvdisasm", built, tmp_path, "-c")
    if code is not None:
        assert code.count("WARPGROUP.DEPBAR") < 4 <= code.count("HGMMA") or config.depth == 32


if __name__ == "__main__":
    room.prefetch = identity  # the interpreter has no cache
    room.overlaps = lambda: True  # descriptors, except where rows are not aligned
    interpret(lambda: {name: run(case, "cpu", F32, 0) for name, case in SMALL.items()}, room)
