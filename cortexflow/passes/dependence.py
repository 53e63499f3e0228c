"""What a value depends on: weights alone, also a loop's step, or an inference's inputs."""

from __future__ import annotations

from enum import IntEnum

from cortexflow.ir.core import Func, Op, Value


class Level(IntEnum):
    """From known when weights are loaded to known during an inference."""

    STATIC = 0  # weights and constants alone
    STEP = 1  # these and the induction variable of the loop around it
    DYNAMIC = 2


class Dependence:
    """Levels of a function's values, found when asked, so that rewrites may add values meanwhile."""

    def __init__(self, func: Func) -> None:
        self._steps = {op.body.args[0] for op in func.block.walk() if op.body and not _nested(op)}
        self._known: dict[Value, Level] = {}

    def __call__(self, value: Value) -> Level:
        """The level of a value."""
        pending = [value]
        while pending:
            v = pending[-1]
            if v in self._known:
                pending.pop()
            elif v.op is None:
                self._known[v] = Level.STEP if v in self._steps else Level.DYNAMIC
            elif v.op.body:
                self._known[v] = Level.DYNAMIC
            elif missing := [i for i in v.op.inputs if i not in self._known]:
                pending += missing
            else:
                self._known[v] = max((self._known[i] for i in v.op.inputs), default=Level.STATIC)
        return self._known[value]


def _nested(op: Op) -> bool:
    """Whether a loop holds another loop: then its step reaches into bodies that run more often."""
    assert op.body is not None
    return any(inner.body for inner in op.body.walk())
