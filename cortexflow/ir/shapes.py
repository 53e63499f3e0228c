"""Shape arithmetic that type rules share. Every complaint is a `VerifyError`."""

from __future__ import annotations

from collections.abc import Sequence

from cortexflow.errors import VerifyError
from cortexflow.ir.core import FLOATS, INTEGERS, Type

Shape = tuple[int, ...]


def require(condition: bool, message: str) -> None:
    """Raise `VerifyError(message)` unless the condition holds."""
    if not condition:
        raise VerifyError(message)


def broadcast(*shapes: Shape) -> Shape:
    """The numpy broadcast of some shapes."""
    rank = max((len(s) for s in shapes), default=0)
    padded = [(1,) * (rank - len(s)) + s for s in shapes]
    out = tuple(next((d for d in dims if d != 1), 1) for dims in zip(*padded, strict=True))
    for shape in padded:
        require(
            all(d in (1, o) for d, o in zip(shape, out, strict=True)),
            f"shapes {', '.join(map(str, shapes))} do not broadcast",
        )
    return out


def same_dtype(*types: Type) -> str:
    """The common dtype of some types: nothing is promoted silently."""
    require(len({t.dtype for t in types}) == 1, f"operands must share a dtype, found {', '.join(map(str, types))}")
    return types[0].dtype


def floating(*types: Type) -> None:
    """Require floating-point operands."""
    for t in types:
        require(t.dtype in FLOATS, f"expected a floating-point operand, found {t}")


def integer(*types: Type) -> None:
    """Require integer operands."""
    for t in types:
        require(t.dtype in INTEGERS, f"expected an integer operand, found {t}")


def numeric(*types: Type) -> None:
    """Require numbers: floating-point or integer operands."""
    for t in types:
        require(t.dtype != "bool", f"expected numbers, found {t}; cast first")


def axis_of(t: Type, axis: int) -> int:
    """A possibly negative axis as a non-negative one."""
    require(-len(t.shape) <= axis < len(t.shape), f"axis {axis} is outside {t}")
    return axis % len(t.shape)


def axes_of(t: Type, axes: Sequence[int]) -> Shape:
    """Several axes, each once, in ascending order."""
    found = tuple(sorted(axis_of(t, a) for a in axes))
    require(len(found) > 0 and len(set(found)) == len(found), f"axes {tuple(axes)} repeat or are empty")
    return found


def reduced(t: Type, axes: Sequence[int], keepdims: bool) -> Shape:
    """The shape left by a reduction."""
    gone = axes_of(t, axes)
    return tuple(1 if i in gone else d for i, d in enumerate(t.shape) if keepdims or i not in gone)


def with_axis(shape: Shape, axis: int, extent: int) -> Shape:
    """The shape with one extent replaced."""
    return (*shape[:axis], extent, *shape[axis + 1 :])


def slice_bounds(extent: int, start: int, stop: int | None, step: int) -> tuple[int, int]:
    """Non-negative start and stop of a slice, both inside the extent; empty slices are refused."""
    end = extent if stop is None else stop
    require(step >= 1, f"a slice step is positive, found {step}")
    require(0 <= start < end <= extent, f"slice {start}:{stop} is empty or outside an extent of {extent}")
    return start, end


def window(extent: int, kernel: int, stride: int, pad: tuple[int, int], dilation: int) -> int:
    """Output extent of a convolution along one axis."""
    require(stride >= 1 and dilation >= 1, f"stride and dilation are positive, found {stride} and {dilation}")
    require(min(pad) >= 0, f"padding is not negative, found {pad}")
    span = extent + pad[0] + pad[1] - dilation * (kernel - 1) - 1
    require(span >= 0, f"a kernel of {kernel} (dilation {dilation}) is larger than the padded extent of {extent}")
    return span // stride + 1
