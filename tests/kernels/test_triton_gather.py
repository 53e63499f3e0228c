"""Rows of a table by number, from the card's memory and from pinned host memory, against an indexing in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")  # the interpreter looks for this name beside a kernel

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of one rounding
SCALE = 45.25
SHAPES = [(50, 24, 7), (9, 1, 1), (33, 1030, 5), (1000, 2048, 200)]  # vocabulary, width, tokens


@triton.jit
def nothing():
    """Stands in for the instructions that overlap launches: the interpreter has none."""
    pass


def difference(
    vocabulary: int, width: int, n: int, dtype: torch.dtype, device: str = "cpu", pinned: bool = False
) -> float:
    """Largest relative difference of an entry; infinite where a margin was written."""
    from cortexflow.kernels.triton import gather

    table = torch.randn(vocabulary, width + 8).to(dtype)
    table = (table.pin_memory() if pinned else table.to(device))[:, :width]
    tokens = torch.randint(0, vocabulary, (n,), dtype=torch.int32)
    whole = torch.full((n, width + 8), float("nan"), device=device, dtype=dtype)
    gather.embed(table, tokens.to(device), whole[:, :width], SCALE)
    whole = whole.cpu()
    wanted = table.cpu()[tokens.long()].double() * SCALE
    far = ((whole[:, :width].double() - wanted).abs() / wanted.abs().clamp_min(1e-30)).max()
    return far.item() if whole[:, width:].isnan().all() else float("inf")


def interpret() -> None:
    from cortexflow.kernels.triton import gather

    gather.let_next_start = gather.wait_for_previous = nothing
    print(json.dumps([difference(*shape, torch.float32) for shape in SHAPES[:3]]))


def test_rows_under_the_interpreter() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], check=False, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout.splitlines()[-1])) < 1e-6  # NaN is not below anything


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True], ids=["card", "pinned"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype, pinned: bool) -> None:
    assert difference(*shape, dtype, "cuda", pinned) < TOLERANCE[dtype]


@pytest.mark.gpu
def test_a_captured_launch_reads_the_table_anew() -> None:
    """Tokens and a pinned table are read when the graph runs, not when it was captured."""
    from cortexflow.kernels.triton import gather

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
    from cortexflow.kernels.triton import gather

    out: Tensor = torch.empty(3, 64, device="cuda")
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        gather.embed(torch.randn(9, 64), torch.zeros(3, device="cuda", dtype=torch.int32), out)


@pytest.mark.parametrize("arch", [80, 89, 90, 120])
def test_compiles_with_wide_loads(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bytes a thread, which is what a bus wants; the launch overlaps where the card can."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.language import target_info

    from cortexflow.kernels.triton import gather

    def target() -> GPUTarget:
        return GPUTarget("cuda", arch, 32)

    target.__triton_builtin__ = True  # type: ignore[attr-defined]  # as the function that it replaces
    monkeypatch.setattr(target_info, "current_target", target)
    kernel = triton.jit(gather.embed_kernel.fn)
    types = {"table": "*bf16", "tokens": "*i32", "out": "*bf16", "scale": "fp32", "BLOCK": "constexpr"}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    strides = {"table", "out", "table_row", "out_row", "WIDTH"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in strides}
    source = ASTSource(kernel, signature, {"BLOCK": 1024}, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
    code = built.asm["ptx"]
    assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code
    assert ("griddepcontrol.wait" in code) == (arch >= 90)
    assert built.metadata.shared == 0


if __name__ == "__main__":
    interpret()
