"""Lanes: a long chain of a stage that reads nothing of what follows it, and may run beside that.

Kernels on few rows leave most of a card idle and wait for each other; two chains of them, launched side by side, take
little longer than one. A lane begins where its first op stands and ends at its join, the op that reads both chains.
"""

from __future__ import annotations

from typing import NamedTuple

from cortexflow.ir.builder import OPS
from cortexflow.ir.core import Block, Module, Op

LEAST = 24  # ops: below that the second stream costs more than it brings
JOINS = ("add", "concat")
_SOURCES = ("weight", "const")
_VIEWS = ("slice", "broadcast_to")


class Lane(NamedTuple):
    """A chain that runs beside the ops behind it, until `join`."""

    ops: tuple[Op, ...]  # one behind the other in their block, weights and constants between them left out
    join: Op


def find_lanes(module: Module, least: int = LEAST) -> tuple[Lane, ...]:
    """The lanes of every stage; no two at the same time, and no loops in them.

    `least`: how many ops that compute a chain must have, and the one that it meets.
    """
    return tuple(lane for stage in module.stages for lane in _lanes(stage.block, least))


def _lanes(block: Block, least: int) -> list[Lane]:
    needs: list[int] = []  # by place in the block: the places of all ops that an op needs, and its own, as bits
    at = {op: i for i, op in enumerate(block.ops)}
    computing = sum(1 << i for op, i in at.items() if op.name not in (*_SOURCES, *_VIEWS) and not OPS[op.name].view)
    loops = sum(1 << i for op, i in at.items() if op.body)
    found: list[Lane] = []
    begin = 0  # behind the last join
    for i, op in enumerate(block.ops):
        behind = [needs[at[v.op]] if v.op in at else 0 for v in op.inputs]
        if op.name in JOINS and len(set(behind)) > 1:
            chains = [b & ~_union(behind[:k] + behind[k + 1 :]) for k, b in enumerate(behind)]
            long = sorted((c & -c, c) for c in chains if (c & computing).bit_count() >= least)
            if len(long) > 1 and (lane := _apart(block, long[0][1], begin, i, needs)) and not long[0][1] & loops:
                found.append(Lane(lane, op))
                begin = i
        inner = [needs[at[v.op]] for o in (op.body.walk() if op.body else ()) for v in o.inputs if v.op in at]
        needs.append(0 if op.name in _SOURCES else _union(behind + inner) | 1 << i)
    return found


def _apart(block: Block, chain: int, begin: int, join: int, needs: list[int]) -> tuple[Op, ...] | None:
    """The ops of a chain, if they stand together and nobody reads them before the join."""
    first, last = (chain & -chain).bit_length() - 1, chain.bit_length() - 1
    ops = [op for op in block.ops[first : last + 1] if op.name not in _SOURCES]
    alone = len(ops) == chain.bit_count() and not any(needs[j] & chain for j in range(last + 1, join))
    return tuple(ops) if alone and first >= begin else None


def _union(masks: list[int]) -> int:
    total = 0
    for mask in masks:
        total |= mask
    return total
