"""Constant folding: a small result of constants alone becomes a constant.

Large ones stay ops and are computed once, by `hoist`, so that listings stay readable.
"""

from __future__ import annotations

from cortexflow.ir.core import Module, Op, Value
from cortexflow.ir.interpreter import evaluate
from cortexflow.ir.ops import const
from cortexflow.passes.rewrite import producer, rewrite

SMALL = 16  # elements


def fold(module: Module) -> int:
    """Evaluate ops on constants; returns how often."""
    return rewrite(module, _fold)


def _fold(op: Op) -> Value | None:
    if not op.inputs or op.body or len(op.outputs) != 1 or op.out.type.size > SMALL:
        return None
    sources = [producer(v, "const") for v in op.inputs]
    found = [s for s in sources if s]
    if len(found) < len(sources):
        return None
    result = evaluate(op, [evaluate(s, []) for s in found])
    t = op.out.type
    value = result.item() if t.shape == () else tuple(result.reshape(-1).tolist())
    return const(value=value, dtype=t.dtype, shape=t.shape)
