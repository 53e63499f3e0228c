"""The order of ops in a block: after ops were moved or added, definitions before uses again."""

from __future__ import annotations

from cortexflow.ir.core import Block, Op, Value


def sort_block(block: Block) -> None:
    """Order a block's ops so that definitions precede uses, otherwise as they stand."""
    own = {op for op in block.ops}
    done: dict[Op, None] = {}
    for root in block.ops:
        pending = [root]
        while pending:
            op = pending[-1]
            missing = [d for v in reads(op) if (d := v.op) in own and d not in done and d is not None]
            if missing and op not in done:
                pending += missing
            else:
                done[op] = None
                pending.pop()
    block.ops = list(done)


def reads(op: Op) -> list[Value]:
    """The operands of an op and of everything in its body."""
    return op.inputs + [v for inner in (op.body.walk() if op.body else ()) for v in inner.inputs]
