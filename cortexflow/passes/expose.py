"""Expose named inner values as results, so that any target can show what happens inside.

A value inside a loop is recorded at every step: its result has a leading axis of `trips`.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from cortexflow.errors import InputError
from cortexflow.ir.builder import building, noted
from cortexflow.ir.core import Block, Module, Op, Type, Value
from cortexflow.ir.ops import broadcast_to, cache_update, const, reshape


def expose(module: Module, *patterns: str) -> list[str]:
    """Return every named value that a pattern (`prefix_layer_*`) matches; gives the names of the new results."""
    found: list[str] = []
    names = {n for stage in module.stages for n in (*stage.args, *stage.results)}  # these are wired already
    for stage in module.stages:
        ret = stage.block.ops[-1]
        for op in list(stage.block.ops):
            for v in _inside(op.body, patterns) if op.body else [v for v in op.outputs if _wanted(v, patterns)]:
                if v.name not in names:
                    names.add(v.name)
                    found.append(v.name)
                    ret.inputs.append(_recorded(stage.block, op, v) if op.body else v)
                    ret.attrs["names"] = (*ret.attrs["names"], v.name)
    if missing := [p for p in patterns if not any(fnmatchcase(n, p) for n in found)]:
        raise InputError(f"no value is named {', '.join(missing)}; named values are {', '.join(_all_names(module))}")
    module.meta["keep"] = (*module.meta.get("keep", ()), *found)
    return found


def _wanted(v: Value, patterns: tuple[str, ...]) -> bool:
    return bool(v.name) and any(fnmatchcase(v.name, p) for p in patterns)


def _inside(body: Block, patterns: tuple[str, ...]) -> list[Value]:
    values = [*body.args[1:], *(v for op in body.ops for v in op.outputs)]
    return [v for v in values if _wanted(v, patterns)]


def _recorded(block: Block, loop: Op, v: Value) -> Value:
    """Carry a table through the loop that receives the value at every step."""
    assert loop.body is not None
    body, table = loop.body, Type(v.type.dtype, (loop.attrs["trips"], *v.type.shape))
    with noted(loop.note), building(Block()) as before:
        zero = const(value=False if table.dtype == "bool" else 0.0 if "f" in table.dtype else 0, dtype=table.dtype)
        empty = broadcast_to(zero, shape=table.shape)
    at = block.ops.index(loop)
    block.ops[at:at] = before.ops
    carried = Value(table, f"{v.name}_steps")
    body.args.append(carried)
    with noted(loop.note), building(Block()) as inner:
        filled = cache_update(carried, reshape(v, shape=(1, *v.type.shape)), body.args[0], axis=0)
    body.ops[-1:-1] = inner.ops
    body.ops[-1].inputs.append(filled)
    loop.inputs.append(empty)
    loop.outputs.append(Value(table, f"{v.name}_record", loop))
    return loop.outputs[-1]


def _all_names(module: Module) -> list[str]:
    names: dict[str, None] = {}
    for stage in module.stages:
        for op in stage.block.walk():
            names |= {v.name: None for v in (*op.outputs, *(op.body.args[1:] if op.body else ())) if v.name}
    return list(names)
