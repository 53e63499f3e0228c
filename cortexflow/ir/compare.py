"""Structural equality of functions, for tests and for passes that promise to undo one another."""

from __future__ import annotations

from collections import Counter
from typing import Any

from cortexflow.ir.core import Block, Func, Value


def same_func(a: Func, b: Func) -> bool:
    """Whether two functions hold the same ops on the same values, each equally often.

    Names of inner values, notes and the order of ops do not count; the order of operands does, and so
    do the names of arguments and results. Every op is numbered by what it is and by the numbers of what
    it reads: equal ops get equal numbers in both functions.
    """
    numbers: dict[Any, int] = {}
    same_args = [(n, v.type) for n, v in a.args.items()] == [(n, v.type) for n, v in b.args.items()]
    return same_args and _block(a.block, {}, 0, numbers) == _block(b.block, {}, 0, numbers)


def _block(block: Block, outer: dict[Value, Any], depth: int, numbers: dict[Any, int]) -> Any:
    """What a block is: its arguments' types, and how often each op stands in it. `outer` is what it may read."""
    env = outer | {arg: ("argument", depth, i) for i, arg in enumerate(block.args)}
    ops: Counter[int] = Counter()
    for op in block.ops:
        body = _block(op.body, env, depth + 1, numbers) if op.body else None
        types = tuple(v.type for v in op.outputs)
        # repr tells 1 from True and 0.0 from -0.0, which compare equal
        key = (op.name, tuple(env[v] for v in op.inputs), repr(sorted(op.attrs.items())), types, body)
        number = numbers.setdefault(key, len(numbers))
        env.update({v: (number, i) for i, v in enumerate(op.outputs)})
        ops[number] += 1
    return tuple(arg.type for arg in block.args), frozenset(ops.items())
