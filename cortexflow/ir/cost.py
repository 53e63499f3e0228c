"""Roofline reports: operations and bytes of a module, from the ops' own cost rules."""

from __future__ import annotations

from collections import Counter

from cortexflow.ir.builder import OPS, Cost
from cortexflow.ir.core import SOURCES, Block, Func, Module


def block_cost(block: Block) -> Cost:
    """The sum over a body, loops counted at their trips."""
    return sum((OPS[op.name].cost(op) for op in block.ops), Cost())


def func_cost(func: Func) -> Cost:
    """What one run of a function costs if nothing is cached between ops."""
    return block_cost(func.block)


def weight_bytes(func: Func) -> int:
    """Bytes of the distinct weights that a function reads."""
    return sum({op.attrs["key"]: op.out.type.nbytes for op in func.block.walk() if op.name == "weight"}.values())


def cost_report(module: Module) -> str:
    """A table: for each stage, ops, operations, weights and bytes moved, and the ops that do most of the work."""
    lines = [f"{'stage':<22}{'ops':>7}{'GFLOP':>10}{'weights MB':>12}{'moved MB':>11}  most work in"]
    for func in module.stages:
        cost = func_cost(func)
        work: Counter[str] = Counter()
        _tally(func.block, 1, work)
        top = ", ".join(f"{name} {flops / max(cost.flops, 1):.0%}" for name, flops in work.most_common(3))
        count = sum(1 for op in func.block.walk() if op.name not in SOURCES)
        moved = (cost.read + cost.written) / 1e6
        lines.append(
            f"{func.name:<22}{count:>7}{cost.flops / 1e9:>10.3f}{weight_bytes(func) / 1e6:>12.1f}{moved:>11.1f}  {top}"
        )
    return "\n".join(lines)


def _tally(block: Block, times: int, work: Counter[str]) -> None:
    for op in block.ops:
        if op.body:
            _tally(op.body, times * op.attrs["trips"], work)
        else:
            work[op.name.removeprefix("fused.")] += OPS[op.name].cost(op).flops * times
