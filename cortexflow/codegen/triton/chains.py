"""Ops that work entry by entry: those one behind the other as one launch of `kernels/triton/pointwise.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from cortexflow.ir.core import DTYPE_BYTES, SOURCES, Block, Op, Value
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.ir.shapes import Shape
from cortexflow.passes.plan import Plan, is_dense

OPS = ("add", "sub", "mul", "max", "min", "neg", "abs", "lt", "le", "eq", "and", "or", "not", "where", "cast")
DTYPES = ("f32", "bf16", "f16", "i32", "bool")
MOST_SOURCES, MOST_TARGETS = 6, 4  # of a launch

Readers = Mapping[Value, set[Op]]


class Chain(NamedTuple):
    """Ops that one launch does."""

    ops: tuple[Op, ...]
    text: str  # as the kernel reads it
    sources: tuple[tuple[Value, Shape], ...]  # each in the shape in which it is read
    targets: Mapping[str, Value]  # what is stored, by its name in the text


def launched(block: Block, plan: Plan) -> list[Op]:
    """The ops of a block that are work: not those that say what is there already, nor views."""
    return [op for op in block.ops if op.name not in SOURCES and not plan.layouts.keys() & set(op.outputs)]


def find_chains(block: Block, plan: Plan) -> dict[Op, Chain]:
    """The chains of a stage and of the loops in it, by their first op: what has no launch of another op in between."""
    readers: dict[Value, set[Op]] = {}
    for op in block.walk():
        for v in () if plan.layouts.keys() & set(op.outputs) else op.inputs:
            readers.setdefault(plan.shown(v), set()).add(op)
    return _find(block, plan, readers)


def _find(block: Block, plan: Plan, readers: Readers) -> dict[Op, Chain]:
    branches = {op: branch for branch in plan.branches for op in branch.ops}
    joins = {branch.join for branch in plan.branches}
    found: dict[Op, Chain] = {}
    runs: list[list[Op]] = [[]]
    for op in launched(block, plan):
        if op.body:
            found |= _find(op.body, plan, readers)
        fits = op.name in OPS and {v.type.dtype for v in (*op.inputs, op.out)} <= set(DTYPES)
        if not fits or op in joins or (runs[-1] and branches.get(runs[-1][-1]) is not branches.get(op)):
            runs.append([])
        if fits:
            runs[-1].append(op)
    for run in runs:
        while run:  # as many of its ops as one launch can do, then as many of the rest
            chains = (_chain(run[:n], plan, readers) for n in range(len(run), 0, -1))
            chain = next((c for c in chains if c), None)
            if chain:
                found[run[0]] = chain
            run = run[len(chain.ops) if chain else 1 :]
    return found


def _chain(ops: list[Op], plan: Plan, readers: Readers) -> Chain | None:
    """Ops as a chain; None where one launch cannot do them, or would read what it has written."""
    size, made = ops[0].out.type.size, {op.out for op in ops}
    inputs = {op: [_flat(v, made) for v in op.inputs] for op in ops}
    outside = [(v, op.out.type.shape) for op in ops for v in inputs[op] if v not in made and _number(v, plan) is None]
    sources = tuple(dict.fromkeys(outside))
    stored = [op.out for op in ops if readers.get(op.out, set()) - set(ops)]
    if any(op.out.type.size != size for op in ops) or not 0 < len(sources) <= MOST_SOURCES:
        return None
    if not 0 < len(stored) <= MOST_TARGETS or any(plan.shown(v) in made for v, _ in sources):
        return None
    if any(plan.meet(t, v) and not _same_place(t, v, plan) for t in stored for v, _ in sources):
        return None
    names = {op.out: f"v{len(sources) + i}" for i, op in enumerate(ops)}
    steps = []
    for op in ops:
        at = {v: f"v{sources.index((v, op.out.type.shape))}" for v in inputs[op] if (v, op.out.type.shape) in sources}
        operands = ", ".join(names.get(v) or at.get(v) or str(_number(v, plan)) for v in inputs[op])
        steps.append(f"{names[op.out]}: {op.out.type.dtype} = {op.name}({operands})")
    return Chain(tuple(ops), "; ".join(steps), sources, {names[v]: v for v in stored})


def _flat(v: Value, made: set[Value]) -> Value:
    """A value that a chain makes, where it is read in another shape: its entries stand in the same order."""
    shown = v
    while shown not in made and shown.op is not None and shown.op.name == "reshape":
        shown = shown.op.inputs[0]
    return shown if shown in made else v


def _number(v: Value, plan: Plan) -> str | None:
    """A constant that is one number, as it is in its dtype."""
    op = plan.alias_of.get(v, v).op
    if op is None or op.name != "const" or not isinstance(op.attrs["value"], (bool, int, float)):
        return None
    return repr(torch.tensor(op.attrs["value"], dtype=TORCH_DTYPES[op.attrs["dtype"]]).item())


def _same_place(a: Value, b: Value, plan: Plan) -> bool:
    """Whether entry i of one is where entry i of the other is."""
    alike = plan.offsets[a] == plan.offsets[b] and a.type.size == b.type.size
    alike = alike and DTYPE_BYTES[a.type.dtype] == DTYPE_BYTES[b.type.dtype]
    return alike and all(is_dense(v.type.shape, plan.layout(v).strides) for v in (a, b))
