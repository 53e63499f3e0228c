"""One rule for each op of the IR: the nodes of the standard opset that mean the same.

A rule gets the emitter, the op and its operands' names, and returns its result's name. Dtypes that
an operator of the opset does not take are computed in one that it does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cortexflow.codegen.onnx.emitter import RULES, Emitter
from cortexflow.errors import TargetError
from cortexflow.ir import OPS, Op, Type
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.ir.interpreter import evaluate

__all__ = ["RULES"]

Rule = Callable[..., str]
FILL = torch.finfo(torch.float32).min  # what a masked logit becomes: finite, so that a row without keys is uniform


def rule(fn: Rule) -> Rule:
    """Register the rule of the op that the function is named after."""
    RULES[fn.__name__.rstrip("_")] = fn
    return fn


def wide(dtype: str) -> str:
    """The dtype in which statistics are taken."""
    return "f64" if dtype == "f64" else "f32"


def dtype_of(op: Op) -> str:
    """The dtype of the first operand."""
    return op.inputs[0].type.dtype


# ---- element by element ---------------------------------------------------------------------------


def _plain(kind: str, via: Mapping[str, str] = {}) -> Rule:
    """One node; `via` says in which dtype to compute what the operator does not take."""

    def emit(g: Emitter, op: Op, *xs: str) -> str:
        dtype, result = dtype_of(op), op.out.type.dtype
        inner = via.get(dtype, dtype)
        y = g.node(kind, *[g.cast(x, dtype, inner) for x in xs])
        return g.cast(y, inner, dtype) if result == dtype else y

    return emit


_NO_BF16 = {"bf16": "f32"}
_NO_BYTES = {"u8": "i32", "bool": "i32"}
RULES |= {
    "neg": _plain("Neg"),
    "exp": _plain("Exp"),
    "log": _plain("Log"),
    "sqrt": _plain("Sqrt"),
    "sin": _plain("Sin", _NO_BF16),
    "cos": _plain("Cos", _NO_BF16),
    "abs": _plain("Abs"),
    "floor": _plain("Floor"),
    "add": _plain("Add", _NO_BYTES),
    "sub": _plain("Sub", _NO_BYTES),
    "mul": _plain("Mul", _NO_BYTES),
    "div": _plain("Div"),
    "max": _plain("Max", _NO_BYTES),
    "min": _plain("Min", _NO_BYTES),
    "pow": _plain("Pow"),
    "lt": _plain("Less"),
    "le": _plain("LessOrEqual"),
    "eq": _plain("Equal"),
    "and": _plain("And"),
    "or": _plain("Or"),
    "not": _plain("Not"),
}


@rule
def rsqrt(g: Emitter, op: Op, x: str) -> str:
    return g.node("Reciprocal", g.node("Sqrt", x))


ACTIVATIONS: dict[str, Callable[[Emitter, str], str]] = {
    "gelu": lambda g, x: g.node("Gelu", x),
    "gelu_tanh": lambda g, x: g.node("Gelu", x, approximate="tanh"),
    "silu": lambda g, x: g.node("Mul", x, g.node("Sigmoid", x)),
    "relu": lambda g, x: g.node("Relu", x),
    "sigmoid": lambda g, x: g.node("Sigmoid", x),
    "tanh": lambda g, x: g.node("Tanh", x),
}


@rule
def act(g: Emitter, op: Op, x: str) -> str:
    kind, dtype = op.attrs["kind"], dtype_of(op)
    if kind not in ACTIVATIONS:
        raise TargetError(f"target 'onnx': op 'act' has no activation {kind!r}; there are {', '.join(ACTIVATIONS)}")
    inner = wide(dtype) if dtype == "bf16" else dtype
    return g.cast(ACTIVATIONS[kind](g, g.cast(x, dtype, inner)), inner, dtype)


@rule
def cast(g: Emitter, op: Op, x: str) -> str:
    return g.cast(x, dtype_of(op), op.out.type.dtype)


@rule
def where(g: Emitter, op: Op, condition: str, a: str, b: str) -> str:
    if op.out.type.dtype != "bool":
        return g.node("Where", condition, a, b)
    return g.node("Or", g.node("And", condition, a), g.node("And", g.node("Not", condition), b))


# ---- sources --------------------------------------------------------------------------------------


@rule
def weight(g: Emitter, op: Op) -> str:
    return g.weight(op.attrs["key"], op.attrs["type"])


@rule
def const(g: Emitter, op: Op) -> str:
    return g.constant(evaluate(op, []))


RULES["iota"] = const


# ---- shape ----------------------------------------------------------------------------------------


@rule
def reshape(g: Emitter, op: Op, x: str) -> str:
    return x if op.inputs[0].type == op.out.type else g.reshape(x, *op.out.type.shape)


@rule
def transpose(g: Emitter, op: Op, x: str) -> str:
    return g.transpose(x, *op.attrs["perm"])


@rule
def broadcast_to(g: Emitter, op: Op, x: str) -> str:
    return x if op.inputs[0].type == op.out.type else g.node("Expand", x, g.ints(op.out.type.shape))


@rule
def concat(g: Emitter, op: Op, *xs: str) -> str:
    return xs[0] if len(xs) == 1 else g.node("Concat", *xs, axis=op.attrs["axis"])


def _slice(g: Emitter, x: str, axis: int, start: int, stop: int, step: int = 1) -> str:
    return g.node("Slice", x, *(g.ints([n]) for n in (start, stop, axis, step)))


@rule
def slice_(g: Emitter, op: Op, x: str) -> str:
    if op.inputs[0].type == op.out.type:
        return x
    axis, start, stop, step = (op.attrs[k] for k in ("axis", "start", "stop", "step"))
    return _slice(g, x, axis, start, op.inputs[0].type.shape[axis] if stop is None else stop, step)


@rule
def pad(g: Emitter, op: Op, x: str) -> str:
    if op.inputs[0].type == op.out.type:
        return x
    before, after = zip(*op.attrs["pads"], strict=True)
    return g.node("Pad", x, g.ints([*before, *after]), g.scalar(op.attrs["value"], dtype_of(op)))


# ---- reading and writing by index -----------------------------------------------------------------


def _index(g: Emitter, x: str, dtype: str) -> str:
    return g.cast(x, dtype, "i32") if dtype == "u8" else x


@rule
def gather(g: Emitter, op: Op, table: str, index: str) -> str:
    return g.node("Gather", table, _index(g, index, op.inputs[1].type.dtype), axis=op.attrs["axis"])


@rule
def cache_update(g: Emitter, op: Op, cache: str, new: str, index: str) -> str:
    old, written, at = (v.type for v in op.inputs)
    axis = op.attrs["axis"] % len(old.shape)
    lead = written.shape[: axis + 1]
    # The rows of `new` go to (i, j, ..., index + k): all coordinates but the last are known.
    rows = torch.cartesian_prod(*map(torch.arange, lead)).reshape(*lead, axis + 1)
    step = g.cast(index, at.dtype, "i64")
    if axis:
        step = g.node("Mul", step, g.ints([0] * axis + [1]))
    return g.node("ScatterND", cache, g.node("Add", g.constant(rows), step), new)


# ---- reductions -----------------------------------------------------------------------------------


def _reduction(kind: str, via: dict[str, str]) -> Rule:
    def emit(g: Emitter, op: Op, x: str) -> str:
        dtype = dtype_of(op)
        inner = via.get(dtype, dtype)
        axes, keep = g.ints(op.attrs["axes"]), int(op.attrs["keepdims"])
        return g.cast(g.node(kind, g.cast(x, dtype, inner), axes, keepdims=keep), inner, dtype)

    return emit


_STATISTICS = {"f16": "f32", "bf16": "f32", "u8": "i32", "bool": "i32"}
RULES["reduce_sum"] = _reduction("ReduceSum", _STATISTICS)
RULES["reduce_mean"] = _reduction("ReduceMean", _STATISTICS)
RULES["reduce_max"] = _reduction("ReduceMax", _NO_BYTES)


@rule
def argmax(g: Emitter, op: Op, x: str) -> str:
    y = g.node("ArgMax", x, axis=op.attrs["axis"], keepdims=int(op.attrs["keepdims"]))
    return g.cast(y, "i64", "i32")


@rule
def cumsum(g: Emitter, op: Op, x: str) -> str:
    dtype = dtype_of(op)
    inner = _STATISTICS.get(dtype, dtype)
    return g.cast(g.node("CumSum", g.cast(x, dtype, inner), g.scalar(op.attrs["axis"], "i64")), inner, dtype)


# ---- the semantic ops of transformers and convolutional towers -------------------------------------


@rule
def matmul(g: Emitter, op: Op, x: str, w: str) -> str:
    dtype, result = dtype_of(op), op.out.type.dtype
    inner = dtype if dtype == result else wide(dtype)  # another result is rounded once, from the sums
    return g.cast(g.node("MatMul", g.cast(x, dtype, inner), g.cast(w, dtype, inner)), inner, result)


@rule
def softmax(g: Emitter, op: Op, x: str) -> str:
    dtype = dtype_of(op)
    inner = wide(dtype)
    return g.cast(g.node("Softmax", g.cast(x, dtype, inner), axis=op.attrs["axis"]), inner, dtype)


@rule
def rms_norm(g: Emitter, op: Op, x: str, *scale: str) -> str:
    dtype = dtype_of(op)
    inner = wide(dtype)
    y = g.cast(x, dtype, inner)
    mean = g.node("ReduceMean", g.node("Pow", y, g.scalar(2.0, inner)), g.ints([-1]), keepdims=1)
    y = g.node("Div", y, g.node("Sqrt", g.node("Add", mean, g.scalar(op.attrs["eps"], inner))))
    if scale:
        y = g.node("Mul", y, g.cast(scale[0], op.inputs[1].type.dtype, inner))
    return g.cast(y, inner, dtype)


@rule
def layer_norm(g: Emitter, op: Op, x: str, *affine: str) -> str:
    t = op.out.type
    inner = t.dtype if all(v.type.dtype == t.dtype for v in op.inputs) else wide(t.dtype)
    y = g.cast(x, t.dtype, inner)
    params = [g.cast(p, v.type.dtype, inner) for p, v in zip(affine, op.inputs[1:], strict=True)]
    if not params:
        params = [g.constant(torch.ones(t.shape[-1], dtype=TORCH_DTYPES[inner]))]
    return g.cast(g.node("LayerNormalization", y, *params, axis=-1, epsilon=op.attrs["eps"]), inner, t.dtype)


@rule
def rope(g: Emitter, op: Op, x: str, cosine: str, sine: str) -> str:
    # x * (cos, cos) + (second half, first half) * (-sin, sin)
    dtype, table = dtype_of(op), op.inputs[1].type
    inner = "f64" if "f64" in (dtype, table.dtype) else "f32"
    c, s = (g.node("Unsqueeze", g.cast(t, table.dtype, inner), g.ints([-2])) for t in (cosine, sine))
    c, s = g.node("Concat", c, c, axis=-1), g.node("Concat", g.node("Neg", s), s, axis=-1)
    y = g.cast(x, dtype, inner)
    first, second = g.nodes("Split", [y], 2, axis=-1, num_outputs=2)
    swapped = g.node("Concat", second, first, axis=-1)
    return g.cast(g.node("Add", g.node("Mul", y, c), g.node("Mul", swapped, s)), inner, dtype)


@rule
def attention(g: Emitter, op: Op, q: str, k: str, v: str, *extra: str) -> str:
    """Query heads that share a key head are rows of one product: keys and values are never repeated."""
    (b, m, heads, d), (_, n, groups, dv) = op.inputs[0].type.shape, op.inputs[2].type.shape
    dtype, rows = dtype_of(op), heads // groups
    inner = wide(dtype)
    q, k, v = (g.cast(x, dtype, inner) for x in (q, k, v))
    if groups == 1:
        lead: tuple[int, ...] = (b,)
        q = g.reshape(q, b, m * heads, d)
        k, v = g.transpose(g.reshape(k, b, n, d), 0, 2, 1), g.reshape(v, b, n, dv)
    else:
        lead = (b, groups)
        k, v = g.transpose(k, 0, 2, 3, 1), g.transpose(v, 0, 2, 1, 3)
        if rows == 1:
            q = g.transpose(q, 0, 2, 1, 3)
        else:
            q = g.transpose(g.reshape(q, b, m, groups, rows, d), 0, 2, 1, 3, 4)
            q = g.reshape(q, *lead, m * rows, d)
    logits = g.node("Mul", g.node("MatMul", q, k), g.scalar(op.attrs["scale"], inner))
    operands = {o.type.dtype == "bool": (e, o.type) for e, o in zip(extra, op.inputs[3:], strict=True)}
    if operands or op.attrs["causal"]:
        logits = g.reshape(logits, b, groups, m, rows, n)
        logits = _masked(g, logits, op, operands.get(True), operands.get(False), inner)
        weights = g.reshape(g.node("Softmax", logits, axis=-1), *lead, m * rows, n)
    else:
        weights = g.node("Softmax", logits, axis=-1)
    y = g.node("MatMul", weights, v)
    if groups > 1 and rows > 1:
        y = g.reshape(y, b, groups, m, rows, dv)
    if groups > 1:
        y = g.transpose(y, *((0, 2, 1, 3) if rows == 1 else (0, 2, 1, 3, 4)))
    if groups == 1 or rows > 1:
        y = g.reshape(y, b, m, heads, dv)
    return g.cast(y, inner, dtype)


def _masked(
    g: Emitter, logits: str, op: Op, mask: tuple[str, Type] | None, bias: tuple[str, Type] | None, inner: str
) -> str:
    """Logits [b, groups, m, rows, n] with a bias [b, heads, m, n] added and a mask [b, m, n] applied."""
    m, heads, n, groups = *op.inputs[0].type.shape[1:3], *op.inputs[1].type.shape[1:3]
    if bias is not None:
        name, t = bias
        split = (groups, heads // groups) if t.shape[1] > 1 else (1, 1)
        name = g.reshape(g.cast(name, t.dtype, inner), t.shape[0], *split, *t.shape[2:])
        logits = g.node("Add", logits, g.transpose(name, 0, 1, 3, 2, 4))
    seen = g.reshape(mask[0], mask[1].shape[0], 1, mask[1].shape[1], 1, mask[1].shape[2]) if mask else None
    if op.attrs["causal"]:
        earlier = g.constant(torch.ones(m, n, dtype=torch.bool).tril(n - m).reshape(m, 1, n))
        seen = g.node("And", seen, earlier) if seen else earlier
    return g.node("Where", seen, logits, g.scalar(FILL, inner)) if seen else logits


@rule
def conv2d(g: Emitter, op: Op, *xs: str) -> str:
    dtype, padding = dtype_of(op), op.attrs["padding"]
    inner = _NO_BF16.get(dtype, dtype)
    y = g.node(
        "Conv",
        *[g.cast(x, dtype, inner) for x in xs],
        kernel_shape=list(op.inputs[1].type.shape[2:]),
        strides=list(op.attrs["stride"]),
        dilations=list(op.attrs["dilation"]),
        group=op.attrs["groups"],
        pads=[padding[0][0], padding[1][0], padding[0][1], padding[1][1]],
    )
    return g.cast(y, inner, dtype)


@rule
def relative_position_bias(g: Emitter, op: Op, table: str, queries: str, keys: str) -> str:
    """The bucket of each relative position stands in a constant, to beyond the distance where it is constant."""
    buckets, reach = op.inputs[0].type.shape[0], 2 * op.attrs["max_distance"]
    known = [g.known.get(v) for v in op.inputs[1:]]
    numbers = torch.arange(buckets, dtype=torch.float64).reshape(buckets, 1)

    def buckets_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        meaning: Any = OPS["relative_position_bias"].evaluate
        found: torch.Tensor = meaning(numbers, q, k, **op.attrs)[0].long()
        return found

    if known[0] is not None and known[1] is not None:
        index = g.constant(buckets_of(known[0], known[1]))
    else:
        q, k = (g.cast(x, v.type.dtype, "i64") for x, v in zip((queries, keys), op.inputs[1:], strict=True))
        distance = g.node("Sub", g.node("Unsqueeze", k, g.ints([0])), g.node("Unsqueeze", q, g.ints([1])))
        distance = g.node("Clip", distance, g.scalar(-reach, "i64"), g.scalar(reach, "i64"))
        every = buckets_of(torch.zeros(1, dtype=torch.int64), torch.arange(-reach, reach + 1)).reshape(-1)
        index = g.node("Gather", g.constant(every), g.node("Add", distance, g.scalar(reach, "i64")), axis=0)
    return g.node("Gather", g.transpose(table, 1, 0), index, axis=1)


# ---- control --------------------------------------------------------------------------------------


def _loop(g: Emitter, op: Op, *init: str) -> Sequence[str]:
    return g.loop(op, init)


RULES["loop"] = _loop
