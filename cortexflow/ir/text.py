"""The text form: `dump` prints a module so that a person can read it, `parse` reads it back.

    %y = matmul(%x, %w) {dtype='f32'} : f32[1,4]  # layers.0.mlp

Attributes equal to their default, and types that the result type repeats, are not printed.
parse(dump(m)) prints as dump(m).
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from typing import Any

from cortexflow.errors import ParseError
from cortexflow.ir.builder import OPS
from cortexflow.ir.core import Block, Func, Module, Op, Type, Value

# ---- printing -------------------------------------------------------------------------------------


def dump(module: Module | Func) -> str:
    """The listing of a module or of one function."""
    if isinstance(module, Func):
        return "\n".join(_func_lines(module)) + "\n"
    parts = [f"module {_attrs(module.meta)}"] if module.meta else ["module {}"]
    parts += ["\n".join(_func_lines(f)) for f in module.funcs.values()]
    return "\n\n".join(parts) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, Type):
        return str(value)
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_literal, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)


def _attrs(attrs: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{k}={_literal(v)}" for k, v in attrs.items()) + "}"


def _shown(op: Op) -> dict[str, Any]:
    definition = OPS.get(op.name)
    defaults = (definition and definition.defaults) or {}
    hidden = {k for k, v in op.attrs.items() if k in defaults and defaults[k] == v and type(defaults[k]) is type(v)}
    if op.outputs:
        t = op.outputs[0].type
        hidden |= {k for k in ("type", "dtype", "shape") if k in op.attrs and op.attrs[k] == _implied(op, k, t)}
    return {k: v for k, v in op.attrs.items() if k not in hidden}


def _implied(op: Op, attribute: str, result: Type) -> Any:
    """What an attribute must be, judging by the result type that is printed anyway."""
    if attribute == "type":
        return result
    if attribute == "dtype" and op.name in ("cast", "const", "iota"):
        return result.dtype
    if attribute == "shape" and op.name in ("reshape", "broadcast_to", "const"):
        return result.shape
    return None


class _Names:
    """Unique printed names: a value's label where it has one, else its number."""

    def __init__(self) -> None:
        self.of: dict[Value, str] = {}
        self.taken: set[str] = set()

    def __call__(self, value: Value) -> str:
        if value not in self.of:
            name = stem = value.name or str(len(self.of))
            n = 0
            while name in self.taken:
                n += 1
                name = f"{stem}_{n}"
            self.taken.add(name)
            self.of[value] = name
        return "%" + self.of[value]


def _func_lines(func: Func) -> Iterator[str]:
    names = _Names()
    yield f"func @{func.name}({_typed(func.block.args, names)}) {{"
    yield from _block_lines(func.block, names, "  ")
    yield "}"


def _typed(values: list[Value], names: _Names) -> str:
    return ", ".join(f"{names(v)}: {v.type}" for v in values)


def _block_lines(block: Block, names: _Names, indent: str) -> Iterator[str]:
    for op in block.ops:
        operands = ", ".join(map(names, op.inputs))
        attrs = _shown(op)
        note = f"  # {op.note}" if op.note else ""
        head = f"{op.name}({operands})" + (f" {_attrs(attrs)}" if attrs else "")
        body = None
        if op.body:  # arguments are named before the results, and the body before both
            arguments = _typed(op.body.args, names)
            body = list(_block_lines(op.body, names, indent + "  "))
            head += f" do ({arguments}) {{"
        if op.outputs:
            results = ", ".join(map(names, op.outputs))
            types = ", ".join(str(v.type) for v in op.outputs)
            head = f"{results} = {head}" if body is not None else f"{results} = {head} : {types}"
        yield indent + head + note
        if body is not None:
            yield from body
            yield f"{indent}}} : {', '.join(str(v.type) for v in op.outputs)}"


# ---- parsing --------------------------------------------------------------------------------------

_TYPE = re.compile(r"(\w+)\[([\d,]*)\]$")
_NAME = r"%[\w.\-]+"
_FUNC = re.compile(r"func @([\w.]+)\((.*)\) \{$")
_OP = re.compile(
    rf"(?:(?P<out>{_NAME}(?:, {_NAME})*) = )?(?P<name>[\w.]+)\((?P<ins>[^)]*)\)"
    r"(?: \{(?P<attrs>.*?)\})?(?:(?: do \((?P<args>[^)]*)\) \{)|(?: : (?P<types>[\w\[\], ]+?)))?(?:  # (?P<note>.*))?$"
)
_CLOSE = re.compile(r"\}(?: : (?P<types>[\w\[\], ]+))?$")


def parse(text: str) -> Module:
    """The module that a listing describes. Raises `ParseError` with the line's number."""
    module = Module()
    lines = enumerate(text.splitlines(), 1)
    for number, raw in lines:
        line = raw.strip()
        if not line or line.startswith("//"):
            continue
        if line.startswith("module "):
            module.meta = _parse_attrs(line[len("module ") :].strip()[1:-1], number)
        elif m := _FUNC.match(line):
            env: dict[str, Value] = {}
            func = Func(m[1], Block(_parse_args(m[2], env, number)))
            _parse_block(func.block, env, lines, number)
            module.funcs[func.name] = func
        else:
            raise ParseError(f"line {number}: expected `module`, `func` or a comment, found {line[:80]!r}")
    return module


def _parse_block(block: Block, env: dict[str, Value], lines: Iterator[tuple[int, str]], start: int) -> str:
    """Read ops up to the closing brace; returns the result types printed behind it."""
    for number, raw in lines:
        line = raw.strip()
        if m := _CLOSE.match(line):
            return m["types"] or ""
        if not line or line.startswith("//"):
            continue
        op = _parse_op(line, env, lines, number)
        block.ops.append(op)
    raise ParseError(f"line {start}: the body that opens here is not closed")


def _parse_op(line: str, env: dict[str, Value], lines: Iterator[tuple[int, str]], number: int) -> Op:
    m = _OP.match(line)
    if not m:
        raise ParseError(f"line {number}: not an op: {line[:120]!r}")
    name, types = m["name"], m["types"] or ""
    if name not in OPS:
        raise ParseError(f"line {number}: unknown op {name!r}")
    inputs = [_lookup(n, env, number) for n in _split(m["ins"])]
    op = Op(name, inputs, _parse_attrs(m["attrs"] or "", number), note=m["note"] or "")
    if m["args"] is not None:
        op.body = Block(_parse_args(m["args"], env, number))
        types = _parse_block(op.body, env, lines, number)
    results = [_parse_type(t, number) for t in _split(types)]
    outs = _split(m["out"] or "")
    if len(outs) != len(results):
        raise ParseError(f"line {number}: {len(outs)} results but {len(results)} result types")
    op.attrs = _restore(op, results)
    op.outputs = [_define(n, t, env, number, op) for n, t in zip(outs, results, strict=True)]
    return op


def _restore(op: Op, results: list[Type]) -> dict[str, Any]:
    """The attributes with those that printing leaves out, in the order of the op's definition."""
    definition = OPS[op.name]
    attrs = {**(definition.defaults or {}), **op.attrs}
    for k in definition.required + tuple(definition.defaults or {}):
        if k not in op.attrs and results:
            implied = _implied(op, k, results[0])
            if implied is not None:
                attrs[k] = implied
    return {k: attrs[k] for k in (*(definition.defaults or {}), *definition.required, *attrs) if k in attrs}


def _define(name: str, t: Type, env: dict[str, Value], number: int, op: Op | None = None) -> Value:
    if name in env:
        raise ParseError(f"line {number}: {name} is defined twice")
    label = name[1:]
    env[name] = Value(t, "" if label.isdigit() else label, op)
    return env[name]


def _lookup(name: str, env: dict[str, Value], number: int) -> Value:
    if name not in env:
        raise ParseError(f"line {number}: {name} is not defined")
    return env[name]


def _parse_args(text: str, env: dict[str, Value], number: int) -> list[Value]:
    pairs = [part.rsplit(": ", 1) for part in _split(text)]
    if any(len(p) != 2 for p in pairs):
        raise ParseError(f"line {number}: expected `%name: type`, found {text[:80]!r}")
    return [_define(n, _parse_type(t, number), env, number) for n, t in pairs]


def _parse_type(text: str, number: int) -> Type:
    m = _TYPE.match(text.strip())
    if not m:
        raise ParseError(f"line {number}: not a type: {text!r}")
    return Type(m[1], tuple(int(d) for d in m[2].split(",") if d))


def _split(text: str) -> list[str]:
    """Split at the commas that stand outside brackets and quotes."""
    parts, depth, quote, last = [], 0, "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote and text[i - 1] != "\\" else quote
        elif c in "'\"":
            quote = c
        elif c in "[({":
            depth += 1
        elif c in "])}":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[last:i].strip())
            last = i + 1
    tail = text[last:].strip()
    return [*parts, tail] if tail else parts


def _parse_attrs(text: str, number: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in _split(text):
        key, sep, value = item.partition("=")
        if not sep:
            raise ParseError(f"line {number}: expected key=value, found {item!r}")
        found[key] = _parse_literal(value, number)
    return found


_SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _parse_literal(text: str, number: int) -> Any:
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _TYPE.match(text):
        return _parse_type(text, number)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ParseError(f"line {number}: not a literal: {text!r}") from None
