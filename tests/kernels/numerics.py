"""What a launch computes and where it writes: random inputs, poisoned outputs, distances from float64.

On a GPU, or in a process of its own whose Triton interprets from its import on (`interpret`, and in `conftest.py` the
fixture `interpreted`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl  # noqa: F401  (the interpreter looks for this name beside a kernel)
from torch import Tensor

from cortexflow.ir import ops
from cortexflow.ir.builder import OPS

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 1e-4, F16: 2e-3, BF16: 1e-2}
ROUNDED_ONCE = {F32: 1e-5, F16: 1e-3, BF16: 6e-3}  # sums in float32 of what the inputs hold, one rounding at the end
EPS = 1e-6
NAN = float("nan")
ACTS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, **ops.ACTIVATIONS}
Measured = tuple[float, bool, bool]  # the largest distance, nothing written beside outputs, identical bits every time
Launch = Callable[[], list[tuple[Tensor, Tensor]]]  # found, in outputs poisoned anew, and expected


class Draw:
    """Random inputs on one device, of one dtype unless told; around rows of inputs and of outputs lies NaN.

    `pad`: columns behind every row. Nothing may touch those, and the rows beyond the last, of outputs.
    """

    def __init__(self, device: str, dtype: torch.dtype, seed: int, pad: int = 16) -> None:
        self.device, self.dtype, self.pad = device, dtype, pad
        self.generator = torch.Generator().manual_seed(seed)
        self.margins: list[Tensor] = []

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def weight(self, *shape: int, k: int) -> Tensor:
        """Sums of k of its entries times normal ones are of the order of 1."""
        return (torch.randn(shape, generator=self.generator) * k**-0.5).to(self.device, self.dtype)

    def visible(self, *shape: int) -> Tensor:
        """A bool mask that shows about half of the keys."""
        return (torch.rand(shape, generator=self.generator) < 0.5).to(self.device)

    def _inside(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """What holds NaN in rows and columns to spare, and a view of the shape in it."""
        size = math.prod(shape[:-1]) + 3, shape[-1] + self.pad
        whole = torch.full(size, NAN, device=self.device, dtype=dtype or self.dtype)
        return whole, whole[:-3, : shape[-1]].unflatten(0, shape[:-1])

    def rows(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random rows that are slices of longer ones."""
        _, inside = self._inside(shape, dtype)
        return inside.copy_(self.normal(*shape, dtype=dtype))

    def poisoned(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An output that holds NaN."""
        whole, inside = self._inside(shape, dtype)
        self.margins += [whole[-3:], whole[:, shape[-1] :]]
        return inside

    def contained(self) -> bool:
        """Whether nothing was written outside of the outputs."""
        return all(bool(margin.isnan().all()) for margin in self.margins)


def rms(x: Tensor) -> Tensor:
    return x.double() * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()


def meaning(name: str, *inputs: Tensor, **attrs: Any) -> Tensor:
    """The op's evaluation rule in float64."""
    rule = OPS[name].evaluate
    assert rule is not None
    return rule(*[x.double() if x.is_floating_point() else x for x in inputs], **attrs)


def distance(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ in float64; NaN left over from the poison stays NaN."""
    return float((found.double() - expected).norm() / expected.norm())


def measure(launch: Launch, draw: Draw) -> Measured:
    """A launch repeated: once where Triton is interpreted, twenty times on a GPU."""
    first = launch()
    runs = 1 if draw.device == "cpu" else 20
    same = all(torch.equal(a, b) for _ in range(runs) for (a, _), (b, _) in zip(first, launch(), strict=True))
    return torch.tensor([distance(*pair) for pair in first]).max().item(), draw.contained(), same


def check(measured: tuple[Any, ...], tolerance: float, about: str = "") -> None:
    """`measured`: as `measure` gives it, or without the repetition."""
    error, contained, *same = measured
    assert error < tolerance, f"{error} is not below {tolerance} {about}"  # NaN is not below anything
    assert contained, f"wrote outside of its output {about}"
    assert all(same), f"other bits the second time {about}"


# ---- under Triton's interpreter ----------------------------------------------------------------------


@triton.jit
def nothing():
    """Stands in for the instructions that overlap launches: the interpreter has none."""
    pass


@triton.jit
def identity(x):
    """Stands in for an instruction that only moves numbers."""
    return x


def interpret(measured: Callable[[], Any], *modules: Any) -> None:
    """Print what is measured with the kernels of some modules, without the instructions that only a GPU has."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:  # numpy no longer turns an array of one entry into an index
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    for module in modules:
        module.let_next_start = module.wait_for_previous = nothing
    print(json.dumps(measured()))
