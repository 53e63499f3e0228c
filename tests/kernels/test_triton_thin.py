"""Small products: under Triton's interpreter, on a GPU in every mix of dtypes, and compiled for every card."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")  # the interpreter looks for this name beside a kernel

from cortexflow.kernels.triton import thin as room  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F32: 1e-5, F16: 1e-3, BF16: 6e-3}  # by the dtype of the result, which is rounded once
PAD = 5  # columns behind every row, which nothing may touch
ACTS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@triton.jit
def nothing():
    """Stands in for the instructions that overlap launches: the interpreter has none."""
    pass


class Case(NamedTuple):
    """One product; dtypes of x, w, out, bias and residual."""

    m: int
    k: int
    n: int
    bias: bool = False
    residual: bool = False
    in_place: bool = False
    act: str = "none"
    dtypes: tuple[torch.dtype, ...] = (F32,) * 5


def run(case: Case, device: str, seed: int) -> tuple[float, bool, bool]:
    """‖found - expected‖ / ‖expected‖ in float64, nothing written outside of the output, and identical bits."""
    generator = torch.Generator().manual_seed(seed)
    m, k, n = case.m, case.k, case.n

    def strided(rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Random rows, slices of longer ones that hold NaN, and NaN below them."""
        whole = torch.full((rows + 2, width + PAD), float("nan"), device=device, dtype=dtype)
        whole[:rows, :width] = torch.randn(rows, width, generator=generator).to(device, dtype)
        return whole[:rows, :width]

    of_x, of_w, of_out, of_bias, of_residual = case.dtypes
    x, w, residual = strided(m, k, of_x), strided(k, n, of_w), strided(m, n, of_residual)
    bias = torch.randn(n, generator=generator).to(device, of_bias)
    y = x.double() @ w.double()
    y = ACTS[case.act](y + bias.double() if case.bias else y)
    y = y + residual.double() if case.residual else y

    def launch() -> tuple[Tensor, bool]:
        whole = torch.full((m + 2, n + PAD), float("nan"), device=device, dtype=of_out)
        out = whole[:m, :n]
        if case.in_place:
            out.copy_(residual)
        before = out if case.in_place else residual
        ends = {"bias": bias if case.bias else None, "residual": before if case.residual else None}
        room.thin(x, w, out, act=case.act, **ends)
        return out, bool(whole[m:].isnan().all()) and bool(whole[:, n:].isnan().all())

    found, contained = launch()
    same = all(torch.equal(found, launch()[0]) for _ in range(1 if device == "cpu" else 20))
    return float((found.double() - y).norm() / y.norm()), contained, same


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
}


# ---- under Triton's interpreter ----------------------------------------------------------------------


def interpret() -> None:
    """Run the small cases and print what they measured."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:  # numpy no longer turns an array of one entry into an index
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    room.let_next_start = room.wait_for_previous = nothing
    print(json.dumps({name: run(case, "cpu", 0) for name, case in SMALL.items()}))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, tuple[float, bool, bool]]:
    """What the small cases measured, in a process whose Triton interprets from its import on."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], check=False, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SMALL)
def test_small_cases(name: str, interpreted: dict[str, tuple[float, bool, bool]]) -> None:
    error, contained, same = interpreted[name]
    assert error < TOLERANCE[SMALL[name].dtypes[2]]  # NaN left over from the poison fails too
    assert contained, "wrote outside of its output"
    assert same


# ---- on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", MIXES, ids=lambda d: " ".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_on_a_gpu(name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    case = (SMALL | LARGE)[name]._replace(dtypes=dtypes)
    if case.in_place:
        case = case._replace(dtypes=(*dtypes[:4], dtypes[2]))
    error, contained, same = run(case, "cuda", seed)
    assert error < TOLERANCE[dtypes[2]], f"seed {seed}"
    assert contained, "wrote outside of its output"
    assert same, "other bits the second time"


# ---- compiled without a GPU --------------------------------------------------------------------------

SHARED = {80: 166912, 89: 101376, 90: 232448, 120: 101376}  # bytes of shared memory that a block may ask for


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("name", LARGE)
def test_compiles_for_every_card(name: str, arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It fits, and before it waits for the kernel ahead it reads its weight and its bias alone."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.language import target_info

    def target() -> GPUTarget:
        return GPUTarget("cuda", arch, 32)

    target.__triton_builtin__ = True  # as the function that it replaces
    monkeypatch.setattr(target_info, "current_target", target)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    taken: dict[str, Any] = {}

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: taken.update(args=args, options=options)

    fresh = triton.jit(room.thin_kernel.fn)  # remembers nothing of what its helpers were
    monkeypatch.setattr(room, "thin_kernel", Recorder())
    monkeypatch.setattr(room, "overlaps", lambda: arch >= 90)
    run(LARGE[name], "cpu", 0)
    options = {k: v for k, v in taken["options"].items() if k in ("num_warps", "launch_pdl")}
    constants = {k: v for k, v in taken["options"].items() if k not in options}
    values = dict(zip(fresh.arg_names, taken["args"], strict=False))
    signature = {n: "constexpr" if n in constants else "i32" for n in fresh.arg_names}
    signature |= {n: "*fp32" for n, v in values.items() if isinstance(v, Tensor)}
    made = triton.compile(ASTSource(fresh, signature, constants), target=target(), options=options)
    assert made.metadata.shared <= SHARED[arch]
    code = made.asm["ptx"]
    if arch < 90:
        assert "griddepcontrol" not in code
        return
    start, wait = code.index("griddepcontrol.launch_dependents"), code.index("griddepcontrol.wait")
    assert start < wait and not re.search(r"\b(ld|st)\.global", code[:start])
    assert not re.search(r"\bst\.global", code[:wait]) and re.search(r"\bld\.global", code[wait:])


if __name__ == "__main__":
    interpret()
