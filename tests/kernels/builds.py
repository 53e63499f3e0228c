"""What a launch costs to hold, and does before it waits: recorded, and compiled for a card that is not there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import target_info
from triton.tools.tensor_descriptor import TensorDescriptor

SHARED = {80: 166912, 89: 101376, 90: 232448, 120: 101376}  # bytes of shared memory that a block may ask for
REGISTERS = 1 << 16  # of a multiprocessor
OVERLAP = 90  # programmatic dependent launch begins here
ACCESS = r"\b(ld|st)\.global|cp\.async|bulk\.tensor"
HOST_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl", "enable_fp_fusion")
NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8", torch.int32: "i32",
}  # fmt: skip


class Recorder:
    """Stands in for a kernel and keeps what its host function would launch."""

    def __init__(self, kernel: Any, arch: int) -> None:
        self.kernel, self.arch = kernel, arch
        self.grid: tuple[int, ...] = ()
        self.args: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.grid, self.args, self.options = grid, args, options

        return launch

    def compile(self) -> Any:
        """The launch as compiled for its architecture: arguments as the runtime would specialise them."""
        from triton.experimental import gluon
        from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

        in_gluon = isinstance(self.kernel, GluonJITFunction)
        fresh = (gluon if in_gluon else triton).jit(self.kernel.fn)  # remembers nothing of what its helpers were
        given = dict(zip(fresh.arg_names, self.args, strict=False)) | self.options
        options = {k: given.pop(k) for k in HOST_OPTIONS if given.get(k) is not None}
        signature, constants, attributes = {}, {}, {}
        for place, name in enumerate(fresh.arg_names):
            value = given[name]
            if name in self.options:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = f"*{NAMES[value.dtype]}" if isinstance(value, Tensor) else "i32"
                if isinstance(value, Tensor) or value % 16 == 0:
                    attributes[place,] = [["tt.divisibility", 16]]
        source = (GluonASTSource if in_gluon else ASTSource)(fresh, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)


def record(module: Any, kernel: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Put in a kernel's place what keeps its launches, on a card of an architecture as far as its module can see."""

    def target() -> GPUTarget:
        return GPUTarget("cuda", arch, 32)

    target.__triton_builtin__ = True  # type: ignore[attr-defined]  # as the function that it replaces
    recorder = Recorder(getattr(module, kernel), arch)
    monkeypatch.setattr(target_info, "current_target", target)
    monkeypatch.setattr(module, "overlaps", lambda: arch >= OVERLAP)
    monkeypatch.setattr(module, kernel, recorder)
    return recorder


def disassembler(name: str, built: Any, folder: Path, *flags: str) -> str | None:
    """What one of NVIDIA's tools says of a compiled launch, where it is at hand."""
    import triton.backends.nvidia as nvidia

    program, file = Path(nvidia.__file__).parent / "bin" / name, folder / "kernel.cubin"
    if not program.exists():
        return None
    file.write_bytes(built.asm["cubin"])
    return subprocess.run([program, *flags, file], capture_output=True, text=True, check=True).stdout


def check_fits(built: Any, arch: int, folder: Path, stack: int = 0) -> None:
    """A compiled launch can run on the card, and keeps nothing in memory that registers should hold.

    `stack`: bytes of a thread that are no spills.
    """
    assert built.metadata.shared <= SHARED[arch]
    usage = disassembler("cuobjdump", built, folder, "-res-usage")
    if usage is not None:
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found, usage
        assert int(found[1]) * 32 * built.metadata.num_warps <= REGISTERS
        assert int(found[2]) <= stack


def places(code: str, text: str) -> list[int]:
    """Where a text begins, each time."""
    return [found.start() for found in re.finditer(re.escape(text), code)]


def around_wait(built: Any, arch: int, late: bool = False) -> tuple[str, str]:
    """A launch's PTX until it waits for the kernel ahead, and behind that; empty where the card does not overlap.

    The next kernel may start first of all; `late`: only when the products are done.
    """
    code = built.asm["ptx"]
    if arch < OVERLAP:
        assert "griddepcontrol" not in code
        return "", ""
    start, (wait, *others) = code.index("griddepcontrol.launch_dependents"), places(code, "griddepcontrol.wait")
    if others and not re.search(ACCESS, code[wait : code.index("bra.uni", wait)]):
        wait = others[0]  # the first is of programs that do nothing else
    assert code.rindex("mma") < start if late else start < wait and not re.search(ACCESS, code[:start])
    return code[:wait], code[wait:]
