"""Common subexpressions: two ops with the same name, operands and attributes become one.

Stages that prepare the same weight in the same way then read one.
"""

from __future__ import annotations

from typing import Any

from cortexflow.ir.core import PREPARE, Block, Module, Op, Value, substitute


def cse(module: Module) -> int:
    """Merge equal ops, also with those of enclosing blocks; returns how many went."""
    removed = 0
    for func in module.funcs.values():  # `prepare` first: weights that turn out equal are one op in a stage
        removed += _block(func.block, {})
        removed += _one_name(module) if func.name == PREPARE else 0
    return removed


def _one_name(module: Module) -> int:
    """A weight that `prepare` returns under several names keeps the first; returns how many names went."""
    results, first = module.funcs[PREPARE].results, dict[Value, str]()
    kept = {name: first.setdefault(v, name) for name, v in results.items()}
    end = module.funcs[PREPARE].block.ops[-1]
    end.attrs, end.inputs = {**end.attrs, "names": tuple(first.values())}, list(first)
    for stage in module.stages:
        for op in stage.block.walk():
            if op.name == "weight" and op.attrs["key"] in kept:
                op.attrs["key"] = kept[op.attrs["key"]]
    return len(results) - len(first)


def _block(block: Block, seen: dict[Any, Op]) -> int:
    new: dict[Value, Value] = {}
    kept, removed = [], 0
    for op in block.ops:
        op.inputs = [new.get(v, v) for v in op.inputs]
        if op.body:
            substitute(op.body, new)
            removed += _block(op.body, dict(seen))
        elif op.outputs:
            # repr tells 1 from True and 0.0 from -0.0, which compare equal
            key = (op.name, tuple(map(id, op.inputs)), repr(op.attrs))
            if key in seen:
                for gone, same in zip(op.outputs, seen[key].outputs, strict=True):
                    new[gone] = same
                    same.name = same.name or gone.name
                removed += 1
                continue
            seen[key] = op
        kept.append(op)
    block.ops = kept
    return removed
