"""The primitive ops: type rule, meaning in torch, and cost of each, side by side.

Meaning: floating-point ops compute in their operands' dtype, except where a rule says 'in float32',
which then means: in float32, or float64 for float64 operands, and the result is rounded once.
The ops of `layers` and the dtypes are offered here too.
"""
# ruff: noqa: PLC0414

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cortexflow.ir.builder import OPS, Cost, OpDef, building, define, emit, no_traffic, op, per_element, traffic
from cortexflow.ir.core import FLOATS, INTEGERS, Block, Op, Type, Value
from cortexflow.ir.dtypes import TORCH_DTYPES as TORCH_DTYPES
from cortexflow.ir.dtypes import wide as wide
from cortexflow.ir.layers import attention as attention
from cortexflow.ir.layers import conv2d as conv2d
from cortexflow.ir.layers import layer_norm as layer_norm
from cortexflow.ir.layers import matmul as matmul
from cortexflow.ir.layers import relative_position_bias as relative_position_bias
from cortexflow.ir.layers import rms_norm as rms_norm
from cortexflow.ir.layers import rope as rope
from cortexflow.ir.layers import softmax as softmax
from cortexflow.ir.shapes import (
    axis_of,
    broadcast,
    floating,
    integer,
    numeric,
    reduced,
    require,
    same_dtype,
    slice_bounds,
    with_axis,
)

Builder = Callable[..., Value]
NUMBERS = FLOATS + INTEGERS


# ---- element by element ---------------------------------------------------------------------------


def _unary(name: str, fn: Callable[[Tensor], Tensor], operations: int, doc: str) -> Builder:
    def rule(x: Type) -> Type:
        floating(x)
        return x

    rule.__name__, rule.__doc__ = name, doc
    return op(evaluate=fn, cost=per_element(operations))(rule)


def _binary(
    name: str, fn: Callable[[Tensor, Tensor], Tensor], doc: str, *, of: Sequence[str], result: str | None = None
) -> Builder:
    def rule(a: Type, b: Type) -> Type:
        common = same_dtype(a, b)
        require(common in of, f"operands must be {', '.join(of)}; found {a} and {b}")
        return Type(result or common, broadcast(a.shape, b.shape))

    rule.__name__, rule.__doc__ = name, doc
    return op(evaluate=fn, cost=per_element(1))(rule)


neg = _unary("neg", torch.neg, 1, "-x")
exp = _unary("exp", torch.exp, 4, "e to the x")
log = _unary("log", torch.log, 4, "natural logarithm")
sqrt = _unary("sqrt", torch.sqrt, 2, "square root")
rsqrt = _unary("rsqrt", torch.rsqrt, 2, "1 / sqrt(x)")
sin = _unary("sin", torch.sin, 8, "sine, x in radians")
cos = _unary("cos", torch.cos, 8, "cosine, x in radians")
abs_ = _unary("abs_", torch.abs, 1, "absolute value")
floor = _unary("floor", torch.floor, 1, "largest integer not above x")
add = _binary("add", torch.add, "a + b, broadcasting", of=NUMBERS)
sub = _binary("sub", torch.sub, "a - b, broadcasting", of=NUMBERS)
mul = _binary("mul", torch.mul, "a * b, broadcasting", of=NUMBERS)
div = _binary("div", torch.div, "a / b, broadcasting; floating point", of=FLOATS)
max_ = _binary("max_", torch.maximum, "the larger of a and b", of=NUMBERS)
min_ = _binary("min_", torch.minimum, "the smaller of a and b", of=NUMBERS)
pow_ = _binary("pow_", torch.pow, "a to the b; floating point", of=FLOATS)
lt = _binary("lt", torch.lt, "a < b", of=NUMBERS, result="bool")
le = _binary("le", torch.le, "a <= b", of=NUMBERS, result="bool")
eq = _binary("eq", torch.eq, "a == b", of=(*NUMBERS, "bool"), result="bool")


def _logical(name: str, fn: Callable[..., Tensor], arity: int, doc: str) -> Builder:
    def rule(*xs: Type) -> Type:
        require(len(xs) == arity, f"takes {arity} operands, found {len(xs)}")
        require(all(x.dtype == "bool" for x in xs), f"expected bool operands, found {', '.join(map(str, xs))}")
        return Type("bool", broadcast(*[x.shape for x in xs]))

    rule.__name__, rule.__doc__ = name, doc
    return op(evaluate=fn, cost=per_element(1))(rule)


and_ = _logical("and_", torch.logical_and, 2, "a and b")
or_ = _logical("or_", torch.logical_or, 2, "a or b")
not_ = _logical("not_", torch.logical_not, 1, "not a")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@op(evaluate=lambda x, kind: ACTIVATIONS[kind](x), cost=per_element(8))
def act(x: Type, *, kind: str) -> Type:
    """An activation: `gelu` (erf), `gelu_tanh`, `silu`, `relu`, `sigmoid` or `tanh`."""
    require(kind in ACTIVATIONS, f"unknown activation {kind!r}; there are {', '.join(ACTIVATIONS)}")
    floating(x)
    return x


@op(evaluate=lambda x, dtype: x.to(TORCH_DTYPES[dtype]), cost=per_element(0))
def cast(x: Type, *, dtype: str) -> Type:
    """x in another dtype: rounds to nearest even, truncates towards zero to integers."""
    return Type(dtype, x.shape)


@op(evaluate=torch.where, cost=per_element(1))
def where(condition: Type, a: Type, b: Type) -> Type:
    """a where the condition holds, else b; broadcasting."""
    require(condition.dtype == "bool", f"the condition must be bool, found {condition}")
    return Type(same_dtype(a, b), broadcast(condition.shape, a.shape, b.shape))


# ---- sources --------------------------------------------------------------------------------------


@op(cost=no_traffic)
def weight(*, key: str, type: Type) -> Type:
    """A tensor of the checkpoint (or one that `prepare` made), by name."""
    return type


def _constant(value: Any, dtype: str, shape: tuple[int, ...]) -> Tensor:
    return torch.tensor(value, dtype=TORCH_DTYPES[dtype]).reshape(shape)


@op(evaluate=_constant, cost=no_traffic)
def const(*, value: Any, dtype: str, shape: tuple[int, ...] = ()) -> Type:
    """A scalar, or a small array given as a flat tuple."""
    found = len(value) if isinstance(value, tuple) else 1
    require(isinstance(value, tuple) == (shape != ()), f"a scalar has shape (), an array a tuple; found {value!r}")
    require(Type(dtype, shape).size == found, f"{found} values do not fill shape {shape}")
    return Type(dtype, shape)


@op(evaluate=lambda size, dtype: torch.arange(size, dtype=TORCH_DTYPES[dtype]))
def iota(*, size: int, dtype: str = "i32") -> Type:
    """0, 1, ..., size - 1."""
    require(dtype in NUMBERS, f"counts in numbers, not in {dtype}")
    return Type(dtype, (size,))


def scalar(value: float | int | bool, like: Value | str) -> Value:
    """A scalar constant in the dtype of a value, or in a dtype given by name."""
    return const(value=value, dtype=like if isinstance(like, str) else like.type.dtype)


# ---- shape ----------------------------------------------------------------------------------------


@op(evaluate=lambda x, shape: x.reshape(shape), cost=no_traffic, view=True)
def reshape(x: Type, *, shape: tuple[int, ...]) -> Type:
    """The same elements, row major, in another shape."""
    out = Type(x.dtype, shape)
    require(out.size == x.size, f"{x} has {x.size} elements, shape {shape} has {out.size}")
    return out


@op(evaluate=lambda x, perm: x.permute(perm))
def transpose(x: Type, *, perm: tuple[int, ...]) -> Type:
    """Axis i of the result is axis perm[i] of x."""
    require(sorted(perm) == list(range(len(x.shape))), f"{perm} does not permute the axes of {x}")
    return Type(x.dtype, tuple(x.shape[p] for p in perm))


@op(evaluate=lambda x, shape: x.expand(shape), cost=no_traffic)
def broadcast_to(x: Type, *, shape: tuple[int, ...]) -> Type:
    """x repeated along new and unit axes."""
    require(broadcast(x.shape, shape) == shape, f"{x} does not broadcast to {shape}")
    return Type(x.dtype, shape)


def _concat(*xs: Tensor, axis: int) -> Tensor:
    """With axes in the order in which those of the first operand lie: rows of memory are copied whole."""
    strides = xs[0].stride()
    order = sorted(range(len(strides)), key=lambda i: -strides[i])
    joined = torch.cat([x.permute(order) for x in xs], order.index(axis % len(strides)))
    return joined.permute([order.index(i) for i in range(len(strides))])


@op(evaluate=_concat)
def concat(*xs: Type, axis: int) -> Type:
    """The operands one after another along an axis."""
    require(len(xs) > 0, "takes at least one operand")
    same_dtype(*xs)
    at = axis_of(xs[0], axis)
    rest = {with_axis(x.shape, at, 0) if len(x.shape) > at else x.shape for x in xs}
    require(len(rest) == 1, f"operands differ off axis {axis}: {', '.join(map(str, xs))}")
    return Type(xs[0].dtype, with_axis(xs[0].shape, at, sum(x.shape[at] for x in xs)))


def _slice(x: Tensor, axis: int, start: int, stop: int | None, step: int) -> Tensor:
    index = [slice(None)] * x.ndim
    index[axis] = slice(start, stop, step)
    return x[tuple(index)]


@op(evaluate=_slice, cost=no_traffic)
def slice_(x: Type, *, axis: int, start: int = 0, stop: int | None = None, step: int = 1) -> Type:
    """x[start:stop:step] along an axis; `stop=None` is the end."""
    at = axis_of(x, axis)
    begin, end = slice_bounds(x.shape[at], start, stop, step)
    return Type(x.dtype, with_axis(x.shape, at, -(-(end - begin) // step)))


def _pad(x: Tensor, pads: Sequence[tuple[int, int]], value: float) -> Tensor:
    return F.pad(x, [n for pair in reversed(pads) for n in pair], value=value)


@op(evaluate=_pad)
def pad(x: Type, *, pads: tuple[tuple[int, int], ...], value: float = 0.0) -> Type:
    """x with (before, after) elements of a constant added on every axis."""
    require(len(pads) == len(x.shape), f"one pair for each axis of {x}, found {len(pads)}")
    require(all(a >= 0 and b >= 0 for a, b in pads), f"pads are not negative, found {pads}")
    return Type(x.dtype, tuple(d + a + b for d, (a, b) in zip(x.shape, pads, strict=True)))


# ---- reading and writing by index -----------------------------------------------------------------


def _gather(table: Tensor, index: Tensor, axis: int) -> Tensor:
    at = axis % table.ndim
    picked = table.index_select(at, index.reshape(-1).long())
    return picked.reshape((*table.shape[:at], *index.shape, *table.shape[at + 1 :]))


def _gather_cost(o: Op) -> Cost:
    out = o.outputs[0].type.nbytes  # only the rows that are picked are read
    return Cost(0, out + o.inputs[1].type.nbytes, out)


@op(evaluate=_gather, cost=_gather_cost)
def gather(table: Type, index: Type, *, axis: int = 0) -> Type:
    """The entries of `table` along an axis at each index; a scalar index drops the axis."""
    integer(index)
    at = axis_of(table, axis)
    return Type(table.dtype, table.shape[:at] + index.shape + table.shape[at + 1 :])


def _cache_update(cache: Tensor, new: Tensor, index: Tensor, axis: int) -> Tensor:
    out = cache.clone()
    out.narrow(axis % cache.ndim, int(index), new.shape[axis]).copy_(new)
    return out


def _cache_cost(o: Op) -> Cost:
    return Cost(0, o.inputs[1].type.nbytes, o.inputs[1].type.nbytes)  # in place: only `new` moves


@op(evaluate=_cache_update, cost=_cache_cost)
def cache_update(cache: Type, new: Type, index: Type, *, axis: int) -> Type:
    """The cache with `new` written at a scalar index along an axis; the planner does it in place."""
    same_dtype(cache, new)
    integer(index)
    at = axis_of(cache, axis)
    require(index.shape == (), f"the index must be a scalar, found {index}")
    require(
        len(new.shape) == len(cache.shape)
        and with_axis(new.shape, at, 0) == with_axis(cache.shape, at, 0)
        and new.shape[at] <= cache.shape[at],
        f"{new} does not fit into {cache} along axis {axis}",
    )
    return cache


# ---- reductions -----------------------------------------------------------------------------------


def _reduction(name: str, fn: Callable[..., Tensor], doc: str, *, of: Sequence[str]) -> Builder:
    def rule(x: Type, *, axes: tuple[int, ...], keepdims: bool = False) -> Type:
        require(x.dtype in of, f"the operand must be {', '.join(of)}; found {x}")
        return Type(x.dtype, reduced(x, axes, keepdims))

    def evaluate(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
        return fn(wide(x) if x.is_floating_point() else x, axes, keepdims).to(x.dtype)

    rule.__name__, rule.__doc__ = name, doc
    return op(evaluate=evaluate, cost=lambda o: traffic(o, o.inputs[0].type.size))(rule)


reduce_sum = _reduction("reduce_sum", torch.sum, "The sum over some axes, in float32.", of=NUMBERS)
reduce_mean = _reduction("reduce_mean", torch.mean, "The mean over some axes, in float32.", of=FLOATS)
reduce_max = _reduction("reduce_max", torch.amax, "The largest element; of bools: any.", of=(*NUMBERS, "bool"))


@op(
    evaluate=lambda x, axis, keepdims: x.argmax(axis, keepdim=keepdims).to(torch.int32),
    cost=lambda o: traffic(o, o.inputs[0].type.size),
)
def argmax(x: Type, *, axis: int, keepdims: bool = False) -> Type:
    """The first position of the largest element along an axis, as i32."""
    numeric(x)
    return Type("i32", reduced(x, (axis,), keepdims))


def _cumsum(x: Tensor, axis: int) -> Tensor:
    return (wide(x) if x.is_floating_point() else x).cumsum(axis).to(x.dtype)


@op(evaluate=_cumsum, cost=per_element(1))
def cumsum(x: Type, *, axis: int) -> Type:
    """The inclusive running sum along an axis, in float32."""
    numeric(x)
    axis_of(x, axis)
    return x


# ---- control --------------------------------------------------------------------------------------


def _terminator_types(*_: Type, **__: Any) -> list[Type]:
    return []


def _check_return(*types: Type, names: tuple[str, ...]) -> list[Type]:
    require(len(names) == len(types), f"{len(types)} values are returned under {len(names)} names")
    require(len(set(names)) == len(names), f"result names repeat: {', '.join(names)}")
    return []


def _loop_types(*init: Type, trips: int, early_stop: bool, body: Block) -> list[Type]:
    yielded = [v.type for v in body.ops[-1].inputs]
    require(trips >= 1, f"trips must be positive, found {trips}")
    require(body.ops[-1].name == "yield", "the body must end in yield")
    if early_stop:
        require(
            bool(yielded) and yielded[0] == Type("bool", ()),
            "with early_stop the body yields a bool scalar first: stop after this step",
        )
        yielded = yielded[1:]
    args = [a.type for a in body.args]
    require(args[:1] == [Type("i32", ())], "the body's first argument is the step, i32[]")
    require(
        list(init) == args[1:] == yielded,
        f"carries [{', '.join(map(str, init))}], takes [{', '.join(map(str, args[1:]))}], "
        f"yields [{', '.join(map(str, yielded))}]",
    )
    return list(init)


def _loop_cost(o: Op) -> Cost:
    assert o.body is not None
    return sum((OPS[i.name].cost(i) for i in o.body.ops), Cost()) * o.attrs["trips"]


define(OpDef("return", _check_return, cost=no_traffic, defaults={}, required=("names",), doc="End of a function."))
define(OpDef("yield", _terminator_types, cost=no_traffic, defaults={}, doc="End of a loop body."))
define(
    OpDef(
        "loop",
        _loop_types,
        cost=_loop_cost,
        defaults={"early_stop": False},
        required=("trips",),
        doc="Run the body `trips` times: (step, carried...) → carried; with `early_stop`, a bool first ends it.",
    )
)


def loop(
    init: Sequence[Value], trips: int, body: Callable[..., Sequence[Value]], early_stop: bool = False
) -> list[Value]:
    """Carry values through `trips` steps of a body, and return them.

    `body(step, *carried)` returns the next carried values, with `early_stop` behind a bool scalar
    that ends the loop after this step. The body may read outer values.
    """
    block = Block([Value(Type("i32", ()), "step"), *[Value(v.type, v.name) for v in init]])
    with building(block):
        emit("yield", list(body(*block.args)), {})
    return emit("loop", init, {"trips": trips, "early_stop": early_stop}, block)


def axis_name(t: Type, axis: int) -> int:
    """The canonical name of an axis: -1 for the last, otherwise not negative."""
    at = axis_of(t, axis)
    return -1 if at == len(t.shape) - 1 else at
