"""Ops that work entry by entry, one behind the other in one launch: a kernel generated from their text.

A chain is written as it is read: `v2: f32 = mul(v0, 0.5); v3: bf16 = add(v1, v2)`. Its sources are v0, v1, ...; a step
makes the next value, of the dtype behind its name, from values before it or from numbers of that value's kind. Floats
are computed in float32 and rounded at every step, so that a chain gives the bits of its ops one by one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor

import triton
import triton.language as tl
from cortexflow.kernels.triton.common import let_next_start, overlaps, wait_for_previous

MOST_SOURCES, MOST_TARGETS = 6, 4  # of a launch
STEPS = ("add", "sub", "mul", "max", "min", "neg", "abs", "lt", "le", "eq", "and", "or", "not", "where", "cast")
_STEP = re.compile(r"(v\d+): (\w+) = (\w+)\((.*)\)")


@triton.constexpr_function
def _at(table, *places):
    """An entry of nested tuples."""
    for place in places:
        table = table[place]
    return table


@triton.jit
def _offset(i, SHAPE: tl.constexpr, STRIDES: tl.constexpr):
    """Where entry i of a strided tensor is."""
    at = i * 0
    for n in tl.static_range(len(SHAPE) - 1):
        at += i % SHAPE[len(SHAPE) - 1 - n] * STRIDES[len(SHAPE) - 1 - n]
        i = i // SHAPE[len(SHAPE) - 1 - n]
    return at + i * STRIDES[0]


@triton.jit
def _as(x, DTYPE: tl.constexpr):
    """A value in a dtype; of numbers, whether they are not zero."""
    if DTYPE == "bool":
        return x != 0
    elif DTYPE == "i32":
        return x.to(tl.int32)
    elif DTYPE == "bf16":
        return x.to(tl.bfloat16)
    elif DTYPE == "f16":
        return x.to(tl.float16)
    else:
        return x.to(tl.float32)


@triton.jit
def _filled(BLOCK: tl.constexpr, NUMBER: tl.constexpr, DTYPE: tl.constexpr):
    """A number, as often as there are entries."""
    if DTYPE == "i32" or DTYPE == "bool":
        return tl.full((BLOCK,), NUMBER, tl.int32)
    else:
        return tl.full((BLOCK,), NUMBER, tl.float32)


@triton.jit
def _wide(x):
    """Floats as float32, others as they are."""
    if x.dtype.is_floating():
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _step(x, y, z, NAME: tl.constexpr):
    """One op, before it is rounded; of fewer operands than three, the last ones are not read."""
    if NAME == "add":
        return _wide(x) + _wide(y)
    elif NAME == "sub":
        return _wide(x) - _wide(y)
    elif NAME == "mul":
        return _wide(x) * _wide(y)
    elif NAME == "max":
        if x.dtype.is_floating():
            return tl.maximum(_wide(x), _wide(y), propagate_nan=tl.PropagateNan.ALL)
        else:
            return tl.maximum(x, y)
    elif NAME == "min":
        if x.dtype.is_floating():
            return tl.minimum(_wide(x), _wide(y), propagate_nan=tl.PropagateNan.ALL)
        else:
            return tl.minimum(x, y)
    elif NAME == "neg":
        return -_wide(x)
    elif NAME == "abs":
        return tl.abs(_wide(x))
    elif NAME == "lt":
        return _wide(x) < _wide(y)
    elif NAME == "le":
        return _wide(x) <= _wide(y)
    elif NAME == "eq":
        return _wide(x) == _wide(y)
    elif NAME == "and":
        return x & y
    elif NAME == "or":
        return x | y
    elif NAME == "not":
        return x == 0
    elif NAME == "where":
        return tl.where(x, y, z)
    else:
        tl.static_assert(NAME == "cast")
        return x


@triton.jit
def pointwise_kernel(
    s0, s1, s2, s3, s4, s5, t0, t1, t2, t3, SIZE, SOURCES: tl.constexpr, CHAIN: tl.constexpr, TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK entries. SOURCES: shape, strides; CHAIN: name, dtype, operands; TARGETS: which value, shape, strides."""
    let_next_start()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    sources, targets = (s0, s1, s2, s3, s4, s5), (t0, t1, t2, t3)
    wait_for_previous()
    values = ()
    for n in tl.static_range(len(SOURCES)):
        place = _offset(i, _at(SOURCES, n, 0), _at(SOURCES, n, 1))
        values += (tl.load(sources[n] + place, mask=inside),)
    for n in tl.static_range(len(CHAIN)):
        if _at(CHAIN, n, 0) == "number":
            values += (_as(_filled(BLOCK, _at(CHAIN, n, 2, 0), _at(CHAIN, n, 1)), _at(CHAIN, n, 1)),)
        else:
            x, y, z = values[_at(CHAIN, n, 2, 0)], values[_at(CHAIN, n, 2, 1)], values[_at(CHAIN, n, 2, 2)]
            values += (_as(_step(x, y, z, _at(CHAIN, n, 0)), _at(CHAIN, n, 1)),)
    for n in tl.static_range(len(TARGETS)):
        place = _offset(i, _at(TARGETS, n, 1), _at(TARGETS, n, 2))
        tl.store(targets[n] + place, values[_at(TARGETS, n, 0)], mask=inside)


Chain = tuple[tuple[str, str, tuple[Any, ...]], ...]


@cache
def parsed(text: str, sources: int) -> tuple[Chain, dict[str, int]]:
    """The steps of a chain as the kernel takes them, numbers as steps of their own; where each value then stands.

    Raises ValueError where a step cannot be read, or reads what is not there yet.
    """
    steps: list[tuple[str, str, tuple[Any, ...]]] = []
    at = {f"v{i}": i for i in range(sources)}

    def add(name: str, *step: Any) -> None:
        steps.append(step)
        at[name] = sources + len(steps) - 1

    for line in text.split("; "):
        found = _STEP.fullmatch(line)
        if not found or found[3] not in STEPS:
            raise ValueError(
                f"expected a step as 'v2: f32 = add(v0, v1)', by one of {', '.join(STEPS)}; found {line!r}"
            )
        name, dtype, op, operands = found.groups()
        places = []
        for operand in operands.split(", "):
            if operand in ("True", "False"):
                add(operand, "number", "bool", (int(operand == "True"),))
            elif re.fullmatch(r"-?\d+", operand):
                add(operand, "number", "i32", (int(operand),))
            elif operand not in at:
                add(operand, "number", "f32", (float(operand),))
            places.append(at[operand])
        add(name, op, dtype, (*places, places[0], places[0])[:3])
    return tuple(steps), at


def pointwise(chain: str, sources: Sequence[Tensor], targets: Mapping[str, Tensor]) -> None:
    """Run a chain on sources of one number of entries each, and store the values that `targets` names.

    Entry i of one tensor meets entry i of the others, whatever their shapes. All may be strided, sources broadcast by a
    stride of 0. A target may lie where a source does, if its entries lie as that one's. Raises ValueError for what does
    not fit.
    """
    steps, at = parsed(chain, len(sources))
    some = next(iter(targets.values()))
    size = some.numel()
    if len(sources) > MOST_SOURCES or len(targets) > MOST_TARGETS or any(x.numel() != size for x in sources):
        sizes = [x.numel() for x in (*sources, *targets.values())]
        raise ValueError(f"at most {MOST_SOURCES} sources and {MOST_TARGETS} targets of as many entries; found {sizes}")
    fill = [some] * (MOST_SOURCES - len(sources)), [some] * (MOST_TARGETS - len(targets))
    block = min(1024, triton.next_power_of_2(size))
    places = tuple((at[name], *_place(t)) for name, t in targets.items())
    pointwise_kernel[(triton.cdiv(size, block),)](
        *sources, *fill[0], *targets.values(), *fill[1], size,
        SOURCES=tuple(map(_place, sources)), CHAIN=steps, TARGETS=places,
        BLOCK=block, num_warps=max(1, min(4, block // 128)), enable_fp_fusion=False, launch_pdl=overlaps(),
    )  # fmt: skip


def _place(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides by which a tensor's entries are found; one axis where they lie one behind the other."""
    return ((x.numel(),), (1,)) if x.is_contiguous() or not x.dim() else (tuple(x.shape), x.stride())
