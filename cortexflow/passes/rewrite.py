"""The driver of local rewrites: give it rules, it says how often they fired.

A rule takes an op and returns what to read in place of its results, or None where it does not apply.
Ops that the rule emits land in front of the op, with its source note. Rules run until none fires.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cortexflow.errors import VerifyError
from cortexflow.ir.builder import building, noted
from cortexflow.ir.core import Block, Func, Module, Op, Value

Rule = Callable[[Op], Value | Sequence[Value] | None]
_ROUNDS = 20  # far beyond what any set of rules needs; reaching it means that two rules undo each other
_DEPTH = 100  # the same for rules that fire on what a rule has just emitted


def rewrite(module: Module, *rules: Rule) -> int:
    """Apply rules to every function until none fires; returns how often they fired."""
    return sum(rewrite_func(func, *rules) for func in module.funcs.values())


def rewrite_func(func: Func, *rules: Rule) -> int:
    """Apply rules to one function until none fires; returns how often they fired."""
    total = 0
    for _ in range(_ROUNDS):
        fired = _Sweep(rules).block(func.block)
        if not fired:
            return total
        total += fired
    raise VerifyError(f"@{func.name}: rewrites still fire after {_ROUNDS} rounds; do two rules undo each other?")


class _Sweep:
    """One walk over a function, in order, so that a rule sees operands that are already rewritten."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = rules
        self.new: dict[Value, Value] = {}
        self.fired = 0

    def block(self, block: Block) -> int:
        """Rewrite a block in place; returns how often rules fired so far."""
        ops, block.ops = block.ops, []
        for op in ops:
            self.visit(op, block.ops)
        return self.fired

    def visit(self, op: Op, done: list[Op], depth: int = 0) -> None:
        """Rewrite one op, and what its replacement is made of, into the list."""
        if depth > _DEPTH:
            raise VerifyError(f"{op.name}: rewrites still fire on their own results; do two rules undo each other?")
        op.inputs = [self.current(v) for v in op.inputs]
        if op.body:
            self.block(op.body)
        result, emitted = self.applied(op)
        if result is None:
            done.append(op)
            return
        self.fired += 1
        for inner in emitted:
            self.visit(inner, done, depth + 1)
        self.replace(op, [result] if isinstance(result, Value) else list(result))

    def applied(self, op: Op) -> tuple[Value | Sequence[Value] | None, list[Op]]:
        """What the first rule gives that applies, and the ops that it emitted."""
        with noted(op.note), building(Block()) as emitted:
            for rule in self.rules:
                result = rule(op)
                if result is not None:
                    return result, emitted.ops
                emitted.ops.clear()  # of a rule that began and found that it does not apply
        return None, []

    def replace(self, op: Op, results: list[Value]) -> None:
        """Read `results` wherever the op's results are read, and pass on their names."""
        for old, given in zip(op.outputs, results, strict=True):
            new = self.current(given)
            if new.type != old.type:
                raise VerifyError(f"a rewrite of {op.name} turns {old.type} into {new.type}")
            if old.name and not new.name and new.op is not None:
                new.name = old.name
            self.new[old] = new

    def current(self, value: Value) -> Value:
        """What stands in a value's place by now."""
        while value in self.new:
            value = self.new[value]
        return value


def producer(value: Value, name: str) -> Op | None:
    """The op that defines a value, if it has this name."""
    return value.op if value.op is not None and value.op.name == name else None


def constant(value: Value) -> object | None:
    """The number that a scalar constant holds, else None."""
    op = producer(value, "const")
    return op.attrs["value"] if op and op.attrs["shape"] == () else None
