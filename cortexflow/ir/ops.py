"""The primitive ops: type rule, meaning in torch, and cost of each, side by side.

Meaning: floating-point ops compute in their operands' dtype, except where a rule says 'in float32',
which then means: in float32, or float64 for float64 operands, and the result is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cortexflow.ir.builder import OPS, Cost, OpDef, building, define, emit, op, traffic
from cortexflow.ir.core import Block, Op, Type, Value
from cortexflow.ir.shapes import (
    axis_of,
    broadcast,
    floating,
    integer,
    reduced,
    require,
    same_dtype,
    slice_bounds,
    window,
    with_axis,
)

TORCH_DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "u8": torch.uint8,
    "bool": torch.bool,
}

Builder = Callable[..., Value]


def wide(x: Tensor) -> Tensor:
    """The operand in the precision in which statistics are taken: float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def _per_element(operations: int) -> Callable[[Op], Cost]:
    return lambda o: traffic(o, operations * o.outputs[0].type.size)


def _no_traffic(_: Op) -> Cost:
    return Cost()


# ---- element by element ---------------------------------------------------------------------------


def _unary(name: str, fn: Callable[[Tensor], Tensor], operations: int, doc: str) -> Builder:
    def rule(x: Type) -> Type:
        floating(x)
        return x

    rule.__name__, rule.__doc__ = name, doc
    return op(evaluate=fn, cost=_per_element(operations))(rule)


def _binary(name: str, fn: Callable[[Tensor, Tensor], Tensor], result: str | None, doc: str) -> Builder:
    def rule(a: Type, b: Type) -> Type:
        common = same_dtype(a, b)
        return Type(result or common, broadcast(a.shape, b.shape))

    rule.__name__, rule.__doc__ = name, doc
    return op(evaluate=fn, cost=_per_element(1))(rule)


neg = _unary("neg", torch.neg, 1, "-x")
exp = _unary("exp", torch.exp, 4, "e to the x")
log = _unary("log", torch.log, 4, "natural logarithm")
sqrt = _unary("sqrt", torch.sqrt, 2, "square root")
rsqrt = _unary("rsqrt", torch.rsqrt, 2, "1 / sqrt(x)")
sin = _unary("sin", torch.sin, 8, "sine, x in radians")
cos = _unary("cos", torch.cos, 8, "cosine, x in radians")
abs_ = _unary("abs_", torch.abs, 1, "absolute value")
floor = _unary("floor", torch.floor, 1, "largest integer not above x")
add = _binary("add", torch.add, None, "a + b, broadcasting")
sub = _binary("sub", torch.sub, None, "a - b, broadcasting")
mul = _binary("mul", torch.mul, None, "a * b, broadcasting")
div = _binary("div", torch.div, None, "a / b, broadcasting; floating point")
max_ = _binary("max_", torch.maximum, None, "the larger of a and b")
min_ = _binary("min_", torch.minimum, None, "the smaller of a and b")
pow_ = _binary("pow_", torch.pow, None, "a to the b")
lt = _binary("lt", torch.lt, "bool", "a < b")
le = _binary("le", torch.le, "bool", "a <= b")
eq = _binary("eq", torch.eq, "bool", "a == b")


def _logical(name: str, fn: Callable[..., Tensor], arity: int, doc: str) -> Builder:
    def rule(*xs: Type) -> Type:
        require(len(xs) == arity, f"takes {arity} operands, found {len(xs)}")
        require(all(x.dtype == "bool" for x in xs), f"expected bool operands, found {', '.join(map(str, xs))}")
        return Type("bool", broadcast(*[x.shape for x in xs]))

    rule.__name__, rule.__doc__ = name, doc
    return op(evaluate=fn, cost=_per_element(1))(rule)


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


@op(evaluate=lambda x, kind: ACTIVATIONS[kind](x), cost=_per_element(8))
def act(x: Type, *, kind: str) -> Type:
    """An activation: `gelu` (erf), `gelu_tanh`, `silu`, `relu`, `sigmoid` or `tanh`."""
    require(kind in ACTIVATIONS, f"unknown activation {kind!r}; there are {', '.join(ACTIVATIONS)}")
    floating(x)
    return x


@op(evaluate=lambda x, dtype: x.to(TORCH_DTYPES[dtype]), cost=_per_element(0))
def cast(x: Type, *, dtype: str) -> Type:
    """x in another dtype: rounds to nearest even, truncates towards zero to integers."""
    return Type(dtype, x.shape)


@op(evaluate=torch.where, cost=_per_element(1))
def where(condition: Type, a: Type, b: Type) -> Type:
    """a where the condition holds, else b; broadcasting."""
    require(condition.dtype == "bool", f"the condition must be bool, found {condition}")
    return Type(same_dtype(a, b), broadcast(condition.shape, a.shape, b.shape))


# ---- sources --------------------------------------------------------------------------------------


@op(cost=_no_traffic)
def weight(*, key: str, type: Type) -> Type:
    """A tensor of the checkpoint (or one that `prepare` made), by name."""
    return type


def _constant(value: Any, dtype: str, shape: tuple[int, ...]) -> Tensor:
    return torch.tensor(value, dtype=TORCH_DTYPES[dtype]).reshape(shape)


@op(evaluate=_constant, cost=_no_traffic)
def const(*, value: Any, dtype: str, shape: tuple[int, ...] = ()) -> Type:
    """A scalar, or a small array given as a flat tuple."""
    found = len(value) if isinstance(value, tuple) else 1
    require(isinstance(value, tuple) == (shape != ()), f"a scalar has shape (), an array a tuple; found {value!r}")
    require(Type(dtype, shape).size == found, f"{found} values do not fill shape {shape}")
    return Type(dtype, shape)


@op(evaluate=lambda size, dtype: torch.arange(size, dtype=TORCH_DTYPES[dtype]))
def iota(*, size: int, dtype: str = "i32") -> Type:
    """0, 1, ..., size - 1."""
    return Type(dtype, (size,))


def scalar(value: float | int | bool, like: Value | str) -> Value:
    """A scalar constant in the dtype of a value, or in a dtype given by name."""
    return const(value=value, dtype=like if isinstance(like, str) else like.type.dtype)


# ---- shape ----------------------------------------------------------------------------------------


@op(evaluate=lambda x, shape: x.reshape(shape), cost=_no_traffic, view=True)
def reshape(x: Type, *, shape: tuple[int, ...]) -> Type:
    """The same elements, row major, in another shape."""
    out = Type(x.dtype, shape)
    require(out.size == x.size, f"{x} has {x.size} elements, shape {shape} has {out.size}")
    return out


@op(evaluate=lambda x, perm: x.permute(perm).contiguous())
def transpose(x: Type, *, perm: tuple[int, ...]) -> Type:
    """Axis i of the result is axis perm[i] of x."""
    require(sorted(perm) == list(range(len(x.shape))), f"{perm} does not permute the axes of {x}")
    return Type(x.dtype, tuple(x.shape[p] for p in perm))


@op(evaluate=lambda x, shape: x.expand(shape), cost=_no_traffic)
def broadcast_to(x: Type, *, shape: tuple[int, ...]) -> Type:
    """x repeated along new and unit axes."""
    require(broadcast(x.shape, shape) == shape, f"{x} does not broadcast to {shape}")
    return Type(x.dtype, shape)


@op(evaluate=lambda *xs, axis: torch.cat(xs, dim=axis))
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


@op(evaluate=_slice, cost=_no_traffic)
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
    return picked.reshape(*table.shape[:at], *index.shape, *table.shape[at + 1 :])


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


def _reduction(name: str, fn: Callable[..., Tensor], doc: str) -> Builder:
    def rule(x: Type, *, axes: tuple[int, ...], keepdims: bool = False) -> Type:
        return Type(x.dtype, reduced(x, axes, keepdims))

    def evaluate(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
        return fn(wide(x), axes, keepdims).to(x.dtype) if x.is_floating_point() else fn(x, axes, keepdims).to(x.dtype)

    rule.__name__, rule.__doc__ = name, doc
    return op(evaluate=evaluate, cost=lambda o: traffic(o, o.inputs[0].type.size))(rule)


reduce_sum = _reduction("reduce_sum", torch.sum, "The sum over some axes, in float32.")
reduce_mean = _reduction("reduce_mean", torch.mean, "The mean over some axes, in float32.")
reduce_max = _reduction("reduce_max", torch.amax, "The largest element over some axes.")


@op(
    evaluate=lambda x, axis, keepdims: x.argmax(axis, keepdim=keepdims).to(torch.int32),
    cost=lambda o: traffic(o, o.inputs[0].type.size),
)
def argmax(x: Type, *, axis: int, keepdims: bool = False) -> Type:
    """The first position of the largest element along an axis, as i32."""
    return Type("i32", reduced(x, (axis,), keepdims))


@op(evaluate=lambda x, axis: x.cumsum(axis, dtype=x.dtype), cost=_per_element(1))
def cumsum(x: Type, *, axis: int) -> Type:
    """The inclusive running sum along an axis."""
    require(x.dtype != "bool", f"expected numbers, found {x}; cast first")
    axis_of(x, axis)
    return x


# ---- the semantic ops of transformers and convolutional towers -------------------------------------


def _matmul(x: Tensor, w: Tensor, dtype: str | None) -> Tensor:
    out = x @ w
    return out if dtype is None else out.to(TORCH_DTYPES[dtype])


def _matmul_cost(o: Op) -> Cost:
    return traffic(o, 2 * o.outputs[0].type.size * o.inputs[0].type.shape[-1])


@op(evaluate=_matmul, cost=_matmul_cost)
def matmul(x: Type, w: Type, *, dtype: str | None = None) -> Type:
    """x @ w over the last two axes, leading axes broadcast, sums in float32.

    x [..., m, k], w [..., k, n] → [..., m, n]; `dtype` is the result's, by default the operands'.
    """
    floating(x, w)
    require(len(x.shape) >= 2 and len(w.shape) >= 2, f"operands need two axes, found {x} @ {w}")
    require(x.shape[-1] == w.shape[-2], f"inner extents differ: {x} @ {w}")
    common = same_dtype(x, w)
    batch = broadcast(x.shape[:-2], w.shape[:-2])
    return Type(dtype or common, (*batch, x.shape[-2], w.shape[-1]))


@op(evaluate=lambda x, axis: torch.softmax(wide(x), axis).to(x.dtype), cost=_per_element(6))
def softmax(x: Type, *, axis: int = -1) -> Type:
    """exp(x) / sum(exp(x)) along an axis, in float32."""
    floating(x)
    axis_of(x, axis)
    return x


def _rms_norm(x: Tensor, g: Tensor | None = None, *, eps: float) -> Tensor:
    y = wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if g is None else y * wide(g)).to(x.dtype)


@op(evaluate=_rms_norm, cost=_per_element(5))
def rms_norm(x: Type, *scale: Type, eps: float) -> Type:
    """x * rsqrt(mean(x²) + eps) over the last axis, in float32, times a scale [n] where given."""
    floating(x, *scale)
    require(len(scale) <= 1, "takes x and at most a scale")
    require(all(s.shape == x.shape[-1:] for s in scale), f"the scale must be {x.shape[-1:]}")
    return x


def _layer_norm(x: Tensor, g: Tensor | None = None, b: Tensor | None = None, *, eps: float) -> Tensor:
    y = wide(x)
    return F.layer_norm(y, y.shape[-1:], *(None if p is None else wide(p) for p in (g, b)), eps=eps).to(x.dtype)


@op(evaluate=_layer_norm, cost=_per_element(8))
def layer_norm(x: Type, *affine: Type, eps: float) -> Type:
    """(x - mean) * rsqrt(var + eps) over the last axis, in float32; then scale [n] and shift [n] where given."""
    floating(x, *affine)
    require(len(affine) in (0, 2), "takes x alone, or x, scale and shift")
    require(all(p.shape == x.shape[-1:] for p in affine), f"scale and shift must be {x.shape[-1:]}")
    return x


def _rope(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    first, second = wide(x).chunk(2, dim=-1)
    c, s = wide(c).unsqueeze(-2), wide(s).unsqueeze(-2)
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x.dtype)


@op(evaluate=_rope, cost=_per_element(3))
def rope(x: Type, cosine: Type, sine: Type) -> Type:
    """Rotate the two halves of each head: x [..., s, heads, d]; cosine and sine [..., s, d/2], in float32."""
    floating(x, cosine, sine)
    require(len(x.shape) >= 3 and x.shape[-1] % 2 == 0, f"expected [..., s, heads, even d], found {x}")
    require(cosine == sine, f"cosine and sine must agree, found {cosine} and {sine}")
    table = (*cosine.shape[:-1], 1, cosine.shape[-1])
    half = (*x.shape[:-1], x.shape[-1] // 2)
    require(broadcast(table, half) == half, f"the table {cosine} does not fit {x}")
    return x


def _attention(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor, scale: float, causal: bool) -> Tensor:
    b, m, heads, d = q.shape
    n, groups = k.shape[1], k.shape[2]
    rows = wide(q).reshape(b, m, groups, heads // groups, d)
    logits = torch.einsum("bmghd,bngd->bghmn", rows, wide(k)).reshape(b, heads, m, n) * scale
    for e in extra:
        if e.dtype != torch.bool:
            logits = logits + wide(e)
    for e in extra:
        if e.dtype == torch.bool:
            logits = logits.masked_fill(~e.unsqueeze(1), torch.finfo(torch.float32).min)
    if causal:
        later = torch.ones(m, n, dtype=torch.bool, device=q.device).triu(n - m + 1)
        logits = logits.masked_fill(later, torch.finfo(torch.float32).min)
    weights = torch.softmax(logits, -1).reshape(b, groups, heads // groups, m, n)
    return torch.einsum("bghmn,bngd->bmghd", weights, wide(v)).reshape(b, m, heads, v.shape[-1]).to(q.dtype)


def _attention_cost(o: Op) -> Cost:
    (b, m, heads, d), (_, n, _, dv) = o.inputs[0].type.shape, o.inputs[2].type.shape
    return traffic(o, 2 * b * heads * m * n * (d + dv) + 6 * b * heads * m * n)


@op(evaluate=_attention, cost=_attention_cost)
def attention(q: Type, k: Type, v: Type, *extra: Type, scale: float, causal: bool = False) -> Type:
    """softmax(q·k * scale + bias) v, logits and softmax in float32; grouped heads.

    q [b, m, heads, d], k [b, n, groups, d], v [b, n, groups, dv] → [b, m, heads, dv]; heads is a
    multiple of groups. Further operands: a bool mask [b|1, m|1, n] (true: may look) and a float bias
    [b|1, heads|1, m|1, n]. A query that may look nowhere attends uniformly. `causal` lets query i
    see the keys up to n - m + i.
    """
    floating(q, k, v)
    same_dtype(q, k, v)
    require(len(q.shape) == len(k.shape) == len(v.shape) == 4, f"expected four axes each, found {q}, {k}, {v}")
    b, m, heads, d = q.shape
    n, groups = k.shape[1:3]
    require(k.shape[0] == v.shape[0] == b and v.shape[1:3] == (n, groups), f"k {k} and v {v} do not pair with q {q}")
    require(k.shape[3] == d and heads % groups == 0, f"heads of q {q} and k {k} do not group")
    require(len({e.dtype == "bool" for e in extra}) == len(extra), "at most one bool mask and one float bias")
    for e in extra:
        full = (b, m, n) if e.dtype == "bool" else (b, heads, m, n)
        fits = len(e.shape) == len(full) and broadcast(e.shape, full) == full and e.shape[-1] == n
        require(fits, f"{'mask' if e.dtype == 'bool' else 'bias'} {e} does not broadcast to {full}")
    return Type(q.dtype, (b, m, heads, v.shape[3]))


def _conv2d(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    padded = F.pad(x, (*padding[1], *padding[0]))
    return F.conv2d(padded, w, b, stride=stride, dilation=dilation, groups=groups)


def _conv2d_cost(o: Op) -> Cost:
    return traffic(o, 2 * o.outputs[0].type.size * math.prod(o.inputs[1].type.shape[1:]))


@op(evaluate=_conv2d, cost=_conv2d_cost)
def conv2d(
    x: Type,
    w: Type,
    *bias: Type,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Type:
    """A 2-D convolution: x [n, c, h, w], w [o, c/groups, kh, kw], bias [o] where given.

    `padding` is ((top, bottom), (left, right)), in zeros, so that every framework's rule can be written.
    """
    floating(x, w, *bias)
    same_dtype(x, w, *bias)
    require(len(x.shape) == len(w.shape) == 4, f"expected [n,c,h,w] and [o,c/g,kh,kw], found {x}, {w}")
    out, fan = w.shape[:2]
    require(fan * groups == x.shape[1] and out % groups == 0, f"{groups} groups do not fit {x} and {w}")
    require(len(bias) <= 1 and all(t.shape == (out,) for t in bias), f"the bias must be {(out,)}")
    spatial = [window(x.shape[2 + i], w.shape[2 + i], stride[i], padding[i], dilation[i]) for i in range(2)]
    return Type(x.dtype, (x.shape[0], out, *spatial))


def _relative_bias(table: Tensor, q: Tensor, k: Tensor, bidirectional: bool, max_distance: int) -> Tensor:
    buckets = table.shape[0]
    distance = k[None, :].long() - q[:, None].long()
    base = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        base = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return table[base + torch.where(distance < exact, distance, far)].permute(2, 0, 1).contiguous()


@op(evaluate=_relative_bias)
def relative_position_bias(
    table: Type, queries: Type, keys: Type, *, bidirectional: bool, max_distance: int = 128
) -> Type:
    """T5's bias: table [buckets, heads], positions [m] and [n] → [heads, m, n].

    Source: transformers `mt5/modeling_mt5.py`, `_relative_position_bucket`. The relative position is
    key - query; half of the buckets are exact distances, the others grow with the logarithm up to
    `max_distance`; `bidirectional` gives each sign its own half.
    """
    floating(table)
    integer(queries, keys)
    require(len(table.shape) == 2 and table.shape[0] % 4 == 0, f"the table must be [4·n, heads], found {table}")
    require(len(queries.shape) == len(keys.shape) == 1, f"positions must be vectors, found {queries}, {keys}")
    return Type(table.dtype, (table.shape[1], *queries.shape, *keys.shape))


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


define(OpDef("return", _check_return, cost=_no_traffic, defaults={}, required=("names",), doc="End of a function."))
define(OpDef("yield", _terminator_types, cost=_no_traffic, defaults={}, doc="End of a loop body."))
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

