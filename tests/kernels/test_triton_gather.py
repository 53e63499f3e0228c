"""Rows of a table by number, from the card's memory and from pinned host memory, against an indexing in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cortexflow.kernels.triton import gather
from tests.kernels.builds import SHARED, around_wait, check_fits, record
from tests.kernels.numerics import Draw, interpret

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of one rounding
SCALE = 45.25
SHAPES = [(50, 24, 7), (9, 1, 1), (33, 1030, 5), (1000, 2048, 200)]  # vocabulary, width, tokens


def difference(
    vocabulary: int, width: int, n: int, dtype: torch.dtype, device: str = "cpu", pinned: bool = False
) -> float:
    """Largest difference of an entry, relative down to the smallest normal number; infinite where a margin was written.

    Below that numbers are equally far apart, so that a rounding there is a larger share of the entry.
    """
    draw = Draw(device, dtype, 0, pad=8)
    table = torch.randn(vocabulary, width + 8).to(dtype)
    table = (table.pin_memory() if pinned else table.to(device))[:, :width]
    tokens = torch.randint(0, vocabulary, (n,), dtype=torch.int32)
    out = draw.poisoned(n, width)
    gather.embed(table, tokens.to(device), out, SCALE)
    wanted = table.cpu()[tokens.long()].double() * SCALE
    far = ((out.cpu().double() - wanted).abs() / wanted.abs().clamp_min(torch.finfo(dtype).tiny)).max()
    return far.item() if draw.contained() else float("inf")


def test_rows_under_the_interpreter(interpreted: list[float]) -> None:
    assert max(interpreted) < 1e-6  # NaN is not below anything


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True], ids=["card", "pinned"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype, pinned: bool) -> None:
    assert difference(*shape, dtype, "cuda", pinned) < TOLERANCE[dtype]


@pytest.mark.gpu
def test_a_captured_launch_reads_the_table_anew() -> None:
    """Tokens and a pinned table are read when the graph runs, not when it was captured."""
    table = torch.randn(64, 256).to(torch.bfloat16).pin_memory()
    tokens = torch.zeros(5, device="cuda", dtype=torch.int32)
    out = torch.full((5, 256), float("nan"), device="cuda", dtype=torch.bfloat16)
    gather.embed(table, tokens, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather.embed(table, tokens, out)
    for _ in range(3):
        table.copy_(torch.randn(64, 256))
        chosen = torch.randint(0, 64, (5,), dtype=torch.int32)
        tokens.copy_(chosen)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out.cpu(), table[chosen.long()])


@pytest.mark.gpu
def test_an_unpinned_host_table_is_refused() -> None:
    out: Tensor = torch.empty(3, 64, device="cuda")
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        gather.embed(torch.randn(9, 64), torch.zeros(3, device="cuda", dtype=torch.int32), out)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("arch", SHARED)
def test_compiles_with_wide_loads(arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """16 bytes a thread, which is what a bus wants; the launch overlaps where the card can."""
    recorder = record(gather, "embed_kernel", arch, monkeypatch)
    table, out = torch.empty(2, 9, 2048, dtype=torch.bfloat16)
    gather.embed(table, torch.zeros(9, dtype=torch.int32), out, SCALE)
    built = recorder.compile()
    check_fits(built, arch, tmp_path)
    around_wait(built, arch)
    code = built.asm["ptx"]
    assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code
    assert built.metadata.shared == 0


if __name__ == "__main__":
    interpret(lambda: [difference(*shape, torch.float32) for shape in SHAPES[:3]], gather)
