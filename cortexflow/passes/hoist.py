"""Prepare once: what depends on weights alone moves into `prepare`.

What depends also on a loop's step becomes a table there, with a row for each step, filled by a loop
with the same body. From this one mechanism follow folded scales, concatenated weights, position
tables, and the modulation of every step of a flow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from cortexflow.ir.builder import adopt, building, emit, noted
from cortexflow.ir.core import PREPARE, SOURCES, Block, Func, Module, Op, Type, Value, clone_op
from cortexflow.ir.ops import broadcast_to, cache_update, const, gather, loop, reshape, weight
from cortexflow.passes.dce import sweep
from cortexflow.passes.dependence import Dependence, Level


def hoist(module: Module) -> int:
    """Move static values and step tables into `prepare`; returns how many weights it makes."""
    if PREPARE in module.funcs:
        return 0
    plan = _Prepare(module.weight_types())
    for stage in module.stages:
        plan.stage(stage)
    if not plan.results:
        return 0
    with building(plan.block):
        emit("return", list(plan.results.values()), {"names": tuple(plan.results)})
    module.funcs = {PREPARE: Func(PREPARE, plan.block), **module.funcs}
    return len(plan.results)


class _Prepare:
    """The function under construction, and where its values stand."""

    def __init__(self, given: Iterable[str]) -> None:
        self.given = set(given)  # names that are taken
        self.block = Block()
        self.env: dict[Value, Value] = {}  # a stage's static value → its copy in `prepare`
        self.results: dict[str, Value] = {}
        self.keys: dict[Value, str] = {}  # a stage's value → the weight it becomes

    def stage(self, func: Func) -> None:
        """Take what is static out of one stage."""
        level = Dependence(func)
        for op in list(func.block.walk()):
            if op.body:
                self.tables(op, level)
        sweep(func)  # what filled a table is dead, and must not ask for weights
        for block in func.block.blocks():
            self.replace(block, level)

    def replace(self, block: Block, level: Dependence) -> None:
        """Read prepared weights wherever an op of this block reads a static value of the stage."""
        done: list[Op] = []
        made: dict[Value, Value] = {}
        for op in block.ops:
            if not op.outputs or max(map(level, op.outputs)) > Level.STATIC:
                for i, v in enumerate(op.inputs):
                    if v.op is not None and v.op.name not in SOURCES and level(v) == Level.STATIC:
                        if v not in made:
                            made[v] = self.weight_for(v, done)
                        op.inputs[i] = made[v]
            done.append(op)
        block.ops = done

    def weight_for(self, v: Value, done: list[Op]) -> Value:
        """A `weight` op, put into the list, that reads what `prepare` makes of a static value."""
        if v not in self.keys:
            self.copy(v)
            self.keys[v] = self.result(_name(v), self.env[v])
        assert v.op is not None
        with noted(v.op.note), building(Block(ops=done)):
            return weight(key=self.keys[v], type=v.type)

    def result(self, stem: str, prepared: Value) -> str:
        """Return a value from `prepare` under this name, or this name with a number."""
        name = stem
        n = 1
        while name in self.results or name in self.given:
            n += 1
            name = f"{stem}#{n}"
        self.results[name] = prepared
        return name

    def copy(self, v: Value) -> None:
        """Copy a static value and all that it is made of."""
        pending = [v]
        while pending:
            op = pending[-1].op
            assert op is not None
            if pending[-1] in self.env:
                pending.pop()
            elif missing := [i for i in op.inputs if i not in self.env]:
                pending += missing
            else:
                self.block.ops.append(clone_op(op, self.env))

    def tables(self, op: Op, level: Dependence) -> None:
        """Tabulate what a loop's body computes from its step."""
        assert op.body is not None
        step, trips = op.body.args[0], op.attrs["trips"]
        if level(step) == Level.DYNAMIC:
            return
        wanted = _step_values(op.body, step, level)
        if not wanted:
            return
        for v in _static_inputs(wanted, level):
            self.copy(v)
        with building(self.block), noted(op.note):
            empty = [_zeros(Type(v.type.dtype, (trips, *v.type.shape))) for v in wanted]
            filled = loop(empty, trips, lambda i, *tables: self.fill(wanted, step, i, list(tables)))
        for v, table in zip(wanted, filled, strict=True):
            name = self.result(_table_name(v), table)
            _read_row(op.body, v, weight_key=name, table=table.type, step=step)

    def fill(self, wanted: list[Value], step: Value, i: Value, tables: list[Value]) -> list[Value]:
        """The body of the loop in `prepare`: compute each value at step i, write it into its table."""
        env = {**self.env, step: i}
        for op in _closure(wanted, env):
            adopt(clone_op(op, env))
        rows = [reshape(env[v], shape=(1, *v.type.shape)) for v in wanted]
        return [cache_update(t, r, i, axis=0) for t, r in zip(tables, rows, strict=True)]


def _step_values(body: Block, step: Value, level: Dependence) -> list[Value]:
    """Values that depend on the step and weights, and that something dynamic reads; rows of tables excepted."""
    found: dict[Value, None] = {}
    for op in body.walk():
        if op.outputs and max(map(level, op.outputs)) < Level.DYNAMIC:
            continue
        for v in op.inputs:
            if v.op is not None and level(v) == Level.STEP and not _is_row(v.op, step):
                found[v] = None
    return list(found)


def _is_row(op: Op, step: Value) -> bool:
    table = op.inputs[0].op if op.name == "gather" else None
    return table is not None and op.inputs[1] is step and table.name == "weight"


def _static_inputs(values: Iterable[Value], level: Dependence) -> list[Value]:
    """The static values that step-dependent ones are made of."""
    found: dict[Value, None] = {}
    pending, seen = list(values), set[Value]()
    while pending:
        v = pending.pop()
        if v in seen:
            continue
        seen.add(v)
        if level(v) == Level.STATIC:
            found[v] = None
        elif v.op is not None:
            pending += v.op.inputs
    return list(found)


def _closure(values: list[Value], known: dict[Value, Value]) -> list[Op]:
    """The ops that lead from known values to these, in order."""
    order: dict[Op, None] = {}
    pending = list(reversed(values))
    while pending:
        v = pending[-1]
        if v in known or v.op is None or v.op in order:
            pending.pop()
        elif missing := [i for i in v.op.inputs if i not in known and i.op is not None and i.op not in order]:
            pending += missing
        else:
            order[v.op] = None
    return list(order)


def _zeros(t: Type) -> Value:
    zero = const(value=False if t.dtype == "bool" else 0.0 if "f" in t.dtype else 0, dtype=t.dtype)
    return broadcast_to(zero, shape=t.shape)


def _read_row(body: Block, v: Value, weight_key: str, table: Type, step: Value) -> None:
    """Read a table's row in place of the value, just before its first reader."""
    assert v.op is not None
    with noted(v.op.note), building(Block()) as emitted:
        row = gather(weight(key=weight_key, type=table), step)
        row.name = v.name
    at = next(
        i for i, op in enumerate(body.ops) if any(v in o.inputs for o in (op, *(op.body.walk() if op.body else ())))
    )
    body.ops[at:at] = emitted.ops
    for op in body.walk():
        op.inputs = [row if i is v else i for i in op.inputs]


def _name(v: Value) -> str:
    """What a prepared weight is made of: `…self_attn.{q_proj,k_proj}.weight`, or the place of a constant."""
    keys = _keys(v)
    if not keys:
        op = v.op
        assert op is not None
        return f"{op.note}.{op.name}" if op.note else op.name
    if len(keys) == 1:
        return f"{keys[0]}*"
    head, *rest = (k.split(".") for k in keys)
    start = 0
    while all(start < min(len(r), len(head)) and r[start] == head[start] for r in rest):
        start += 1
    ends = [".".join(p[start:]) for p in (head, *rest)]
    shown = ",".join(ends[:4]) + (f",+{len(ends) - 4}" if len(ends) > 4 else "")
    return ".".join([*head[:start], "{" + re.sub(r"[\s{}]", "", shown) + "}"])


def _table_name(v: Value) -> str:
    """Where in the model a table of steps belongs, and what it holds."""
    assert v.op is not None
    return f"{v.op.note}.{v.name or v.op.name}[step]".lstrip(".")


def _keys(v: Value) -> list[str]:
    """The checkpoint names of the weights that a value is made of, in order."""
    found: dict[str, None] = {}
    pending, seen = [v], set[Value]()
    while pending:
        value = pending.pop()
        if value in seen or value.op is None:
            continue
        seen.add(value)
        if value.op.name == "weight":
            found[value.op.attrs["key"]] = None
        pending += reversed(value.op.inputs)
    return list(found)
