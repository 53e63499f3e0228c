"""Common subexpressions: two ops with the same name, operands and attributes become one."""

from __future__ import annotations

from typing import Any

from cortexflow.ir.core import Block, Module, Op, Value, substitute


def cse(module: Module) -> int:
    """Merge equal ops, also with those of enclosing blocks; returns how many went."""
    return sum(_block(f.block, {}) for f in module.funcs.values())


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
