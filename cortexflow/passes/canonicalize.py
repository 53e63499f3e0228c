"""One way to write each thing: no casts, reshapes or transposes without effect, operands in a fixed order."""

from __future__ import annotations

from cortexflow.ir.builder import emit
from cortexflow.ir.core import FLOATS, Block, Module, Op, Value
from cortexflow.ir.ops import axis_name, broadcast_to, cast, reshape, slice_, transpose
from cortexflow.ir.shapes import broadcast
from cortexflow.passes.dependence import Dependence, Level
from cortexflow.passes.rewrite import constant, producer, rewrite

COMMUTATIVE = {"add", "mul", "max", "min", "and", "or", "eq"}
_BINARY = COMMUTATIVE | {"sub", "div", "pow", "lt", "le", "where"}
_EXACT = {("bf16", "f32"), ("f16", "f32"), ("f32", "f64"), ("bf16", "f64"), ("f16", "f64"), ("i32", "i64")}
_NEUTRAL = {"add": 0, "mul": 1, "sub": 0, "div": 1}


def canonicalize(module: Module) -> int:
    """Rewrite to canonical form; returns how often a rule fired."""
    for func in module.funcs.values():
        for op in func.block.walk():
            if isinstance(op.attrs.get("axis"), int):
                op.attrs["axis"] = axis_name(op.inputs[0].type, op.attrs["axis"])
    fired = rewrite(module, _cast, _reshape, _transpose, _slice, _broadcast, _neutral, _of_one, _unneeded_broadcast)
    return fired + order_operands(module)


def order_operands(module: Module) -> int:
    """Commutative operands: what depends on inputs before what does not, then the earlier definition first."""
    fired = 0
    for func in module.funcs.values():
        level = Dependence(func)
        position: dict[Value, int] = {}
        _number(func.block, position)
        for op in func.block.walk():
            if op.name in COMMUTATIVE:
                ordered = sorted(op.inputs, key=lambda v: (level(v) != Level.DYNAMIC, level(v) == 0, position[v]))
                fired += ordered != op.inputs
                op.inputs = ordered
    return fired


def _number(block: Block, position: dict[Value, int]) -> None:
    for arg in block.args:
        position[arg] = len(position)
    for op in block.ops:
        if op.body:
            _number(op.body, position)
        for out in op.outputs:
            position[out] = len(position)


def _cast(op: Op) -> Value | None:
    if op.name != "cast":
        return None
    (x,), dtype = op.inputs, op.attrs["dtype"]
    if x.type.dtype == dtype:
        return x
    inner = producer(x, "cast")
    if inner:
        source = inner.inputs[0]
        if (source.type.dtype, x.type.dtype) in _EXACT and dtype in (*FLOATS, "i32", "i64"):
            return cast(source, dtype=dtype)
    return None


def _reshape(op: Op) -> Value | None:
    if op.name != "reshape":
        return None
    (x,) = op.inputs
    if x.type.shape == op.attrs["shape"]:
        return x
    inner = producer(x, "reshape")
    return reshape(inner.inputs[0], shape=op.attrs["shape"]) if inner else None


def _transpose(op: Op) -> Value | None:
    if op.name != "transpose":
        return None
    (x,), perm = op.inputs, op.attrs["perm"]
    if [p for p in perm if x.type.shape[p] != 1] == [i for i, d in enumerate(x.type.shape) if d != 1]:
        return reshape(x, shape=op.out.type.shape)  # only unit axes move
    inner = producer(x, "transpose")
    return transpose(inner.inputs[0], perm=tuple(inner.attrs["perm"][p] for p in perm)) if inner else None


def _slice(op: Op) -> Value | None:
    if op.name != "slice":
        return None
    (x,), a = op.inputs, op.attrs
    if op.out.type == x.type:
        return x
    extent = x.type.shape[a["axis"]]
    if a["stop"] == extent:  # the end is written None
        return slice_(x, axis=a["axis"], start=a["start"], step=a["step"])
    inner = producer(x, "slice")
    if inner and inner.attrs["axis"] == a["axis"] and inner.attrs["step"] == a["step"] == 1:
        start = inner.attrs["start"] + a["start"]
        return slice_(inner.inputs[0], axis=a["axis"], start=start, stop=start + op.out.type.shape[a["axis"]])
    joined = producer(x, "concat")
    if joined and joined.attrs["axis"] == a["axis"] and a["step"] == 1:
        return _slice_of_concat(joined, a["start"], extent if a["stop"] is None else a["stop"])
    return None


def _slice_of_concat(joined: Op, start: int, stop: int) -> Value | None:
    """A slice that lies in one operand of a concat reads that operand."""
    at = 0
    for part in joined.inputs:
        end = at + part.type.shape[joined.attrs["axis"]]
        if at <= start and stop <= end:
            return slice_(part, axis=joined.attrs["axis"], start=start - at, stop=stop - at)
        at = end
    return None


def _broadcast(op: Op) -> Value | None:
    if op.name == "concat" and len(op.inputs) == 1:
        return op.inputs[0]
    if op.name != "broadcast_to":
        return None
    (x,) = op.inputs
    if x.type == op.out.type:
        return x
    inner = producer(x, "broadcast_to")
    return broadcast_to(inner.inputs[0], shape=op.attrs["shape"]) if inner else None


def _neutral(op: Op) -> Value | None:
    """x + 0, x * 1, x - 0, x / 1."""
    if op.name not in _NEUTRAL:
        return None
    for i, j in ((0, 1), (1, 0)) if op.name in COMMUTATIVE else ((0, 1),):
        number = constant(op.inputs[j])
        if number is not None and number == _NEUTRAL[op.name] and op.inputs[i].type == op.out.type:
            return op.inputs[i]
    return None


def _of_one(op: Op) -> Value | None:
    """The sum, mean or maximum over axes that have one entry."""
    if op.name not in ("reduce_sum", "reduce_mean", "reduce_max") or op.out.type.size != op.inputs[0].type.size:
        return None
    return reshape(op.inputs[0], shape=op.out.type.shape)


def _unneeded_broadcast(op: Op) -> Value | None:
    """Elementwise ops broadcast by themselves."""
    if op.name not in _BINARY:
        return None
    bare = [b.inputs[0] if (b := producer(v, "broadcast_to")) else v for v in op.inputs]
    if bare == op.inputs or broadcast(*[v.type.shape for v in bare]) != op.out.type.shape:
        return None
    (out,) = emit(op.name, bare, op.attrs)
    return out
