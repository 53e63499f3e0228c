"""Predication: a loop that may end early as one that runs to its end, for targets whose loops cannot stop.

Once the body has said stop, every result that somebody reads keeps its value; what the remaining steps compute
beside it goes nowhere. Ops are pure, so that is all the same to a reader.
"""

from __future__ import annotations

from collections.abc import Sequence

from cortexflow.ir.builder import adopt
from cortexflow.ir.core import Module, Op, Value, clone_op
from cortexflow.ir.ops import loop, or_, scalar, where
from cortexflow.passes.rewrite import rewrite


def predicate(module: Module) -> int:
    """Rewrite every loop with an early stop; returns how many there were."""
    read = {v for f in module.funcs.values() for op in f.block.walk() for v in op.inputs}
    return rewrite(module, lambda op: _whole(op, read))


def _whole(op: Op, read: set[Value]) -> Sequence[Value] | None:
    if op.name != "loop" or not op.attrs["early_stop"]:
        return None
    assert op.body is not None
    old = op.body

    def body(step: Value, ended: Value, *carried: Value) -> list[Value]:
        env = dict(zip(old.args, (step, *carried), strict=True))
        for inner in old.ops[:-1]:
            adopt(clone_op(inner, env))
        stop, *new = (env.get(v, v) for v in old.ops[-1].inputs)
        kept = zip(op.outputs, carried, new, strict=True)
        return [or_(ended, stop), *(where(ended, before, after) if v in read else after for v, before, after in kept)]

    return loop([scalar(False, "bool"), *op.inputs], op.attrs["trips"], body)[1:]
