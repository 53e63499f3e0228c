"""Branches: a long chain of a stage that reads nothing of what follows it, and may run beside that.

Kernels on few rows leave most of a card idle and wait for each other; two chains of them, launched side by side, take
little longer than one. A branch begins where its first op stands and ends at its join, the op that reads both chains.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import NamedTuple

from cortexflow.ir.core import SOURCES, Block, Module, Op
from cortexflow.passes.schedule import reads

LEAST = 40  # ops of either chain, views among them. Chains of some hundred were measured, shorter ones were not
JOINS = ("add", "concat")


class Branch(NamedTuple):
    """A chain that runs beside the ops behind it, until `join`."""

    ops: tuple[Op, ...]  # one behind the other in their block, weights and constants between them left out
    join: Op


def find_branches(module: Module, least: int = LEAST) -> tuple[Branch, ...]:
    """The branches of every stage; no two at the same time, and no loops in them.

    `least`: how many ops a chain must have, and the one that it meets.
    """
    return tuple(branch for stage in module.stages for branch in _branches(stage.block, least))


def _branches(block: Block, least: int) -> list[Branch]:
    needs: list[int] = []  # by place in the block: the places of all ops that an op needs, and its own, as bits
    at = {op: i for i, op in enumerate(block.ops)}
    loops = sum(1 << i for op, i in at.items() if op.body)
    found: list[Branch] = []
    begin = 0  # behind the last join
    for i, op in enumerate(block.ops):
        behind = [needs[at[v.op]] if v.op in at else 0 for v in op.inputs]
        if op.name in JOINS and len(set(behind)) > 1:
            chains = [b & ~reduce(or_, behind[:k] + behind[k + 1 :], 0) for k, b in enumerate(behind)]
            long = sorted((c & -c, c) for c in chains if c.bit_count() >= least)
            if len(long) > 1 and (branch := _apart(block, long[0][1], begin, i, needs)) and not long[0][1] & loops:
                found.append(Branch(branch, op))
                begin = i
        needed = reduce(or_, (needs[at[v.op]] for v in reads(op) if v.op in at), 0)
        needs.append(0 if op.name in SOURCES else needed | 1 << i)
    return found


def _apart(block: Block, chain: int, begin: int, join: int, needs: list[int]) -> tuple[Op, ...] | None:
    """The ops of a chain, if they stand together and nobody reads them before the join."""
    first, last = (chain & -chain).bit_length() - 1, chain.bit_length() - 1
    ops = [op for op in block.ops[first : last + 1] if op.name not in SOURCES]
    alone = len(ops) == chain.bit_count() and not any(needs[j] & chain for j in range(last + 1, join))
    return tuple(ops) if alone and first >= begin else None
