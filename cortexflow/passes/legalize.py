"""Legalisation: a fused op that a target cannot run is expanded, one level at a time."""

from __future__ import annotations

from collections.abc import Callable

from cortexflow.ir.builder import OPS
from cortexflow.ir.core import Module, Op, Value
from cortexflow.passes.rewrite import rewrite


def legalize(module: Module, claims: Callable[[Op], bool]) -> int:
    """Expand every fused op that `claims` refuses; returns how many expansions it took."""

    def expand(op: Op) -> Value | None:
        body = OPS[op.name].decompose
        return None if body is None or claims(op) else body(*op.inputs, **op.attrs)

    return rewrite(module, expand)
