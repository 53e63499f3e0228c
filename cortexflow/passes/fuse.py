"""Fusion: every occurrence of a fused op's own body becomes that op.

The body is the pattern. When a pattern almost fits, the matcher can say what stood in its way.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cortexflow.ir.builder import OPS, WILD, building, building_pattern, emit, noted
from cortexflow.ir.core import Block, Func, Module, Op, Value, uses
from cortexflow.ir.fused import FUSED


@dataclass(frozen=True)
class _Wild:
    """Any attribute value; the same one wherever the name recurs."""

    name: str


@dataclass(frozen=True)
class Pattern:
    """A fused op, its operands as wildcards, and the value that its body returns."""

    name: str
    operands: list[Value]
    root: Value
    attrs: dict[str, _Wild]
    size: int


@dataclass
class Match:
    """What a pattern's wildcards stand for, and the ops it covers."""

    values: dict[Value, Value] = field(default_factory=dict)
    attrs: dict[str, object] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)


@dataclass(frozen=True)
class Miss:
    """A place where a pattern almost fitted."""

    fused: str
    note: str
    matched: int
    size: int
    why: str

    def __str__(self) -> str:
        return f"{self.fused} at {self.note or '?'}: {self.matched} of {self.size} ops fit, then {self.why}"


def fuse(module: Module, fused_ops: Sequence[Callable[..., Value]] = FUSED) -> Counter[str]:
    """Apply fused ops in the order given; returns how often each fired."""
    fired: Counter[str] = Counter()
    for pattern in map(pattern_of, fused_ops):
        for func in module.funcs.values():
            count = _fuse_func(func, pattern, None)
            if count:
                fired[pattern.name] += count
    return fired


def nearest_misses(module: Module, fused_op: Callable[..., Value]) -> list[Miss]:
    """Why a fused op did not fire: the places where most of its body fitted, best first."""
    pattern, misses = pattern_of(fused_op), list[Miss]()
    for func in module.funcs.values():
        _fuse_func(func, pattern, misses)
    return sorted(misses, key=lambda m: -m.matched)


def pattern_of(fused_op: Callable[..., Value]) -> Pattern:
    """The pattern that a fused op's body is."""
    name = f"fused.{fused_op.__name__}"
    body = OPS[name].decompose
    assert body is not None
    parameters = inspect.signature(body).parameters.values()
    operands = [Value(WILD, p.name) for p in parameters if p.kind is not p.KEYWORD_ONLY]
    attrs = {p.name: _Wild(p.name) for p in parameters if p.kind is p.KEYWORD_ONLY}
    with building_pattern() as block:
        root = body(*operands, **attrs)
    return Pattern(name, operands, root, attrs, len(block.ops))


def _fuse_func(func: Func, pattern: Pattern, misses: list[Miss] | None) -> int:
    """Apply one pattern to a function; with `misses`, change nothing and collect near misses instead."""
    fired, counts = 0, uses(func.block)
    for block in func.block.blocks():
        own = set(block.ops)
        gone: set[Op] = set()
        for at, op in enumerate(block.ops):
            if len(op.outputs) != 1 or op.name != pattern.root.op.name:  # type: ignore[union-attr]
                continue
            match = Match()
            why = _match(pattern.root, op.out, match) or _closed(match, own, gone, counts)
            if why:
                if misses is not None and len(match.ops) > 1:
                    misses.append(Miss(pattern.name, op.note, min(len(match.ops), pattern.size), pattern.size, why))
                continue
            fired += 1
            if misses is None:
                gone.update(match.ops[1:])
                block.ops[at] = _replacement(op, pattern, match)
        block.ops = [op for op in block.ops if op not in gone]
    return fired


def _match(pattern: Value, value: Value, match: Match) -> str:
    """Fit a pattern's value to one of the function; returns why not, or nothing."""
    seen = pattern in match.values
    bound = match.values.setdefault(pattern, value)
    if bound is not value:
        return f"%{pattern.name or 'an inner value'} stands for two values"
    op, wanted = value.op, pattern.op
    if wanted is None or seen:
        return ""
    if op is None or op.name != wanted.name:
        return f"{wanted.name} is wanted where {op.name if op else 'an argument'} stands"
    if len(op.inputs) != len(wanted.inputs):
        return f"{wanted.name} has {len(op.inputs)} operands instead of {len(wanted.inputs)}"
    if op in match.ops:
        return f"one {op.name} would stand for two"
    match.ops.append(op)
    for key, want in wanted.attrs.items():
        have = op.attrs.get(key)
        if isinstance(want, _Wild):
            if match.attrs.setdefault(want.name, have) != have:
                return f"attribute {want.name} is {match.attrs[want.name]!r} in one place and {have!r} in another"
        elif want != have:
            return f"{wanted.name} has {key}={have!r} instead of {want!r}"
    for p, v in zip(wanted.inputs, op.inputs, strict=True):
        if why := _match(p, v, match):
            return why
    return ""


def _closed(match: Match, own: set[Op], gone: set[Op], counts: Counter[Value]) -> str:
    """Whether the inner ops serve this match alone; returns why not, or nothing."""
    inside = Counter(v for op in match.ops for v in op.inputs)
    operands = {v for p, v in match.values.items() if p.op is None}
    for op in match.ops[1:]:
        if op in gone:
            return f"{op.name} is already part of another"
        if op not in own:
            return f"{op.name} stands outside the loop"
        if op.out in operands:
            return f"{op.name} is an operand as well"
        if counts[op.out] != inside[op.out]:
            return f"{op.name} has {counts[op.out]} readers"
    return ""


def _replacement(op: Op, pattern: Pattern, match: Match) -> Op:
    """The fused op, with the results of the op it replaces."""
    with noted(op.note), building(Block()) as emitted:
        emit(pattern.name, [match.values[v] for v in pattern.operands], {n: match.attrs[n] for n in pattern.attrs})
    new = emitted.ops[0]
    assert new.out.type == op.out.type, f"{pattern.name} gives {new.out.type}, its parts {op.out.type}"
    new.outputs, op.out.op = op.outputs, new
    return new
