"""Products of one value with several weights become one product with the weights side by side.

x @ w₀, x @ w₁ → slices of x @ [w₀ w₁]: queries, keys and values; gate and up; biases along.
"""

from __future__ import annotations

from cortexflow.ir.builder import building, named, noted
from cortexflow.ir.core import Block, Module, Op, Value, readers, substitute
from cortexflow.ir.ops import add, concat, matmul, slice_
from cortexflow.passes.dependence import Dependence, Level
from cortexflow.passes.schedule import sort_block


def merge(module: Module) -> int:
    """Merge products that share their left operand; returns how many products went."""
    fired = 0
    for func in module.funcs.values():
        level = Dependence(func)
        for block in func.block.blocks():
            fired += _merge_block(block, level, readers(func.block))
    return fired


def _merge_block(block: Block, level: Dependence, read_by: dict[Value, list[Op]]) -> int:
    groups: dict[object, list[Op]] = {}
    own = set(block.ops)
    for op in block.ops:
        if op.name == "matmul" and len(op.inputs[1].type.shape) == 2 and level(op.inputs[1]) == Level.STATIC:
            if level(op.inputs[0]) != Level.DYNAMIC:
                continue  # computed once: nothing to gain
            biased = _bias_of(op, read_by, level, own) is not None
            groups.setdefault((op.inputs[0], op.attrs["dtype"], biased), []).append(op)
    fired = 0
    new: dict[Value, Value] = {}
    for (_, _, biased), ops in [(k, v) for k, v in groups.items() if len(v) > 1]:  # type: ignore[misc]
        with noted(ops[0].note), building(Block()) as emitted:
            ends = [read_by[op.out][0] for op in ops] if biased else ops
            wide = matmul(ops[0].inputs[0], concat(*[op.inputs[1] for op in ops], axis=1), **ops[0].attrs)
            if biased:
                wide = add(wide, concat(*[end.inputs[1] for end in ends], axis=0))
            at = 0
            for end in ends:
                width = end.out.type.shape[-1]
                new[end.out] = named(slice_(wide, axis=-1, start=at, stop=at + width), end.out.name)
                at += width
        block.ops += emitted.ops
        fired += len(ops) - 1
    if fired:
        end = next(op for op in block.ops if op.name in ("return", "yield"))
        block.ops.remove(end)
        block.ops.append(end)
        substitute(block, new)
        sort_block(block)
    return fired


def _bias_of(op: Op, read_by: dict[Value, list[Op]], level: Dependence, own: set[Op]) -> Value | None:
    """The static vector that the only reader of a product, in the same block, adds to it."""
    reads = read_by.get(op.out, [])
    if len(reads) != 1 or reads[0] not in own or reads[0].name != "add" or reads[0].inputs[0] is not op.out:
        return None
    bias = reads[0].inputs[1]
    return bias if level(bias) == Level.STATIC and bias.type.shape == op.out.type.shape[-1:] else None
