"""Weights absorb what stands beside them: scales, shifts and neighbouring products become part of a product.

Each rule moves arithmetic from values of an inference to values that depend on weights (or on
weights and a loop's step) alone; `hoist` then computes those once.
"""

from __future__ import annotations

from collections.abc import Callable

from cortexflow.ir.core import FLOATS, Func, Module, Op, Value, readers
from cortexflow.ir.ops import (
    add,
    broadcast_to,
    cast,
    concat,
    conv2d,
    layer_norm,
    matmul,
    mul,
    reshape,
    rms_norm,
    slice_,
)
from cortexflow.passes.dce import sweep
from cortexflow.passes.dependence import Dependence, Level
from cortexflow.passes.rewrite import Rule, producer, rewrite_func


def absorb(module: Module) -> int:
    """Apply every rule below; returns how often they fired."""
    return sum(map(_absorb, module.funcs.values()))


def _absorb(func: Func) -> int:
    """Until nothing fires; who reads what is looked up anew each time, when replaced readers are gone."""
    total = 0
    while fired := rewrite_func(func, *_rules(func)):
        total += fired
        sweep(func)
    return total


def _rules(func: Func) -> list[Rule]:
    level = Dependence(func)
    read_by = readers(func.block)
    home = {op: block for block in func.block.blocks() for op in block.ops}

    def only(op: Op, reader: Op) -> bool:
        """Whether an op serves this reader alone, in the same block: else folding would do its work twice.

        Ops that came since `read_by` was made have to wait for their turn.
        """
        return read_by.get(op.out) == [reader] and home[op] is home[reader]

    def static(v: Value) -> bool:
        return level(v) == Level.STATIC

    def known(v: Value) -> bool:
        """Whether a value can be tabulated before an inference."""
        return level(v) <= Level.STEP

    def fits(op: Op, x: Value) -> bool:
        """Whether an op is x @ w with a static matrix w."""
        w = op.inputs[-1] if op.name == "matmul" and op.inputs[0] is x else None
        return w is not None and static(w) and len(w.type.shape) == 2

    def norm_factor(op: Op) -> Value | None:
        """norm(x)·g @ w = norm(x) @ (g·w), and a LayerNorm's shift b becomes the bias b @ w.

        Only where every reader of the norm is such a product: otherwise the norm would run twice.
        """
        if op.name != "matmul":
            return None
        x, w = op.inputs
        norm = producer(x, "rms_norm") or producer(x, "layer_norm")
        if norm is None or len(norm.inputs) == 1 or not all(map(static, norm.inputs[1:])):
            return None
        if op not in read_by.get(x, []) or not all(fits(r, x) and home[r] is home[norm] for r in read_by[x]):
            return None
        if len({v.type.dtype == "f64" for v in (w, *norm.inputs[1:])}) > 1:
            return None  # float64 beside narrower ones: no one precision to fold in
        eps, width = norm.attrs["eps"], x.type.shape[-1]
        factor = reshape(precise(norm.inputs[1]), shape=(width, 1))
        scaled = cast(mul(precise(w), factor), dtype=w.type.dtype)
        bare = (rms_norm if norm.name == "rms_norm" else layer_norm)(norm.inputs[0], eps=eps)
        y = matmul(bare, scaled, **op.attrs)
        if len(norm.inputs) == 2:
            return y
        shift = matmul(reshape(precise(norm.inputs[2]), shape=(1, width)), precise(w))
        return add(y, cast(reshape(shift, shape=w.type.shape[1:]), dtype=y.type.dtype))

    def product_scale(op: Op) -> Value | None:
        """(x @ w)·c = x @ (w·c) for a static c that is a scalar or one factor for each column."""
        if op.name != "mul" or not static(op.inputs[1]) or not _per_column(op.inputs[1], op.out):
            return None
        product = producer(op.inputs[0], "matmul")
        if product is None or not static(product.inputs[1]) or not only(product, op):
            return None
        x, w = product.inputs
        scaled = mul(precise(w), precise(op.inputs[1]))
        return (
            matmul(x, cast(scaled, dtype=w.type.dtype), **product.attrs) if scaled.type.shape == w.type.shape else None
        )

    def scale_of_sum(op: Op) -> Value | None:
        """(x @ w + b)·c = (x @ w)·c + b·c, so that the product and the bias can absorb c."""
        if op.name != "mul" or not static(op.inputs[1]) or not _per_column(op.inputs[1], op.out):
            return None
        total = producer(op.inputs[0], "add")
        product = producer(total.inputs[0], "matmul") if total else None
        if total is None or product is None or not known(total.inputs[1]) or not static(product.inputs[1]):
            return None
        if not only(total, op) or not only(product, total):
            return None
        a, b = total.inputs
        return add(mul(a, op.inputs[1]), _rounded_once(mul, b, op.inputs[1]))

    def sum_of_knowns(op: Op) -> Value | None:
        """(x + b) + c = x + (b + c) where b and c are known beforehand."""
        if op.name != "add" or not known(op.inputs[1]):
            return None
        inner = producer(op.inputs[0], "add")
        if inner is None or not known(inner.inputs[1]) or known(inner.inputs[0]):
            return None
        together = _rounded_once(add, _unrepeated(inner.inputs[1]), _unrepeated(op.inputs[1]))
        return add(inner.inputs[0], together) if inner.inputs[0].type == op.out.type else None

    def split_concat(op: Op) -> Value | None:
        """[a, b] @ w = a @ w₀ + b @ w₁ where b is known beforehand."""
        if op.name != "matmul" or not static(op.inputs[1]):
            return None
        x, w = op.inputs
        joined = producer(x, "concat")
        if joined is None or joined.attrs["axis"] != -1 or len(w.type.shape) != 2:
            return None
        rows: list[Value] = []
        at = 0
        for part in joined.inputs:
            rows.append(slice_(w, axis=0, start=at, stop=at + part.type.shape[-1]))
            at += part.type.shape[-1]
        pairs = list(zip(joined.inputs, rows, strict=True))
        early, late = [p for p in pairs if known(p[0])], [p for p in pairs if not known(p[0])]
        if not early or not late:
            return None
        return add(_product(late, op), _product(early, op))

    def narrow_broadcast(op: Op) -> Value | None:
        """A product of repeated rows is the repeated product."""
        if op.name != "matmul":
            return None
        wide = producer(op.inputs[0], "broadcast_to")
        if wide is None:
            return None
        x = wide.inputs[0]
        if x.type.shape[-1:] != wide.out.type.shape[-1:] or len(x.type.shape) < 2 or not known(x):
            return None
        return broadcast_to(matmul(x, op.inputs[1], **op.attrs), shape=op.out.type.shape)

    def chain(op: Op) -> Value | None:
        """(x @ u + b) @ w = x @ (u @ w) + b @ w where the folded matrix is less work than the two."""
        if op.name != "matmul" or not static(op.inputs[1]):
            return None
        total = producer(op.inputs[0], "add")
        first = producer(total.inputs[0] if total else op.inputs[0], "matmul")
        if first is None or not static(first.inputs[1]) or (total and not static(total.inputs[1])):
            return None
        if not only(first, total or op) or (total and not only(total, op)):
            return None
        u, w = first.inputs[1], op.inputs[1]
        if len(u.type.shape) != 2 or len(w.type.shape) != 2 or u.type.dtype != w.type.dtype:
            return None
        k, mid, n = *u.type.shape, w.type.shape[1]
        if k * n >= k * mid + mid * n:
            return None
        folded = cast(matmul(precise(u), precise(w)), dtype=w.type.dtype)
        y = matmul(first.inputs[0], folded, **op.attrs)
        if total is None:
            return y
        bias = total.inputs[1]
        if bias.type.shape != (mid,):
            return None
        shift = matmul(reshape(precise(bias), shape=(1, mid)), precise(w))
        return add(y, cast(reshape(shift, shape=(n,)), dtype=y.type.dtype))

    def conv_affine(op: Op) -> Value | None:
        """A static scale or shift per channel behind a convolution (an inference batch norm) moves into it."""
        if op.name not in ("mul", "add") or not static(op.inputs[1]):
            return None
        conv = producer(op.inputs[0], "conv2d")
        if conv is None or not all(map(static, conv.inputs[1:])) or not only(conv, op):
            return None
        c, channels = op.inputs[1], conv.out.type.shape[1]
        if c.type.shape not in ((channels, 1, 1), (1, channels, 1, 1)):
            return None
        x, w, *bias = conv.inputs
        per_channel = reshape(c, shape=(channels,))
        if op.name == "add":
            bias = [_rounded_once(add, bias[0], per_channel) if bias else per_channel]
        else:
            w = _rounded_once(mul, w, reshape(c, shape=(channels, 1, 1, 1)))
            bias = [_rounded_once(mul, b, per_channel) for b in bias]
        return conv2d(x, w, *bias, **conv.attrs)

    return [
        norm_factor,
        product_scale,
        scale_of_sum,
        split_concat,
        narrow_broadcast,
        chain,
        sum_of_knowns,
        conv_affine,
    ]


def precise(v: Value) -> Value:
    """A known value in float32, before it was rounded to the graph's precision; float64 stays."""
    if v.type.dtype == "f64":
        return v
    inner = producer(v, "cast")
    source = inner.inputs[0] if inner else v
    return source if source.type.dtype == "f32" else cast(v, dtype="f32")


def _rounded_once(op: Callable[[Value, Value], Value], a: Value, b: Value) -> Value:
    """The sum or product of two known values: folds are computed precisely and rounded once, at their end."""
    return cast(op(precise(a), precise(b)), dtype=a.type.dtype) if a.type.dtype in FLOATS else op(a, b)


def _product(pairs: list[tuple[Value, Value]], op: Op) -> Value:
    """The columns of a matmul's left operand that stand in these pairs, times their rows."""
    if len(pairs) == 1:
        return matmul(*pairs[0], **op.attrs)
    x, w = concat(*[p[0] for p in pairs], axis=-1), concat(*[p[1] for p in pairs], axis=0)
    return matmul(x, w, **op.attrs)


def _unrepeated(v: Value) -> Value:
    """A value before it was broadcast: an addition repeats it by itself."""
    op = producer(v, "broadcast_to")
    return op.inputs[0] if op else v


def _per_column(c: Value, out: Value) -> bool:
    """Whether c holds one number, or one for each entry of the last axis."""
    return c.type.size == 1 or (c.type.shape[-1:] == out.type.shape[-1:] and c.type.size == out.type.shape[-1])
