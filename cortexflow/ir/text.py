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
from cortexflow.ir.core import DTYPE_BYTES, Block, Func, Module, Op, Type, Value

# ---- printing -------------------------------------------------------------------------------------


def dump(module: Module | Func) -> str:
    """The listing of a module or of one function."""
    if isinstance(module, Func):
        return "\n".join(_func_lines(module)) + "\n"
    parts = [f"module {_attrs(module.meta)}"] if module.meta else ["module {}"]
    parts += ["\n".join(_func_lines(f)) for f in module.funcs.values()]
    return "\n\n".join(parts) + "\n"


def _literal(value: Any) -> str:
    match value:
        case Type():
            return str(value)
        case tuple():
            return "(" + ", ".join(map(_literal, value)) + ("," if len(value) == 1 else "") + ")"
        case list():
            return "[" + ", ".join(map(_literal, value)) + "]"
        case dict():
            return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _attrs(attrs: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{k}={_literal(v)}" for k, v in attrs.items()) + "}"


def _shown(op: Op) -> dict[str, Any]:
    definition = OPS.get(op.name)
    defaults = (definition and definition.defaults) or {}
    hidden = {k for k, v in op.attrs.items() if k in defaults and _literal(defaults[k]) == _literal(v)}
    if op.outputs:
        implied = {k: _implied(op, k, op.outputs[0].type) for k in ("type", "dtype", "shape")}
        hidden |= {k for k, v in implied.items() if v is not None and op.attrs.get(k) == v}
    return {k: v for k, v in _ordered(op).items() if k not in hidden}


def _ordered(op: Op) -> dict[str, Any]:
    """The attributes in the order of the op's definition."""
    definition = OPS.get(op.name)
    known = (*definition.required, *(definition.defaults or ())) if definition else ()
    return {k: op.attrs[k] for k in (*known, *op.attrs) if k in op.attrs}


def _implied(op: Op, attribute: str, result: Type) -> Any:
    """What an attribute must be, judging by the result type that is printed anyway."""
    if attribute == "type":
        return result
    if attribute == "dtype" and op.name in ("cast", "const", "iota"):
        return result.dtype
    if attribute == "shape" and op.name in ("reshape", "broadcast_to", "const"):
        return result.shape
    return None


def _label(name: str) -> str:
    """A label as it is printed: names in the way of the syntax are bent, numbers are not labels."""
    return "" if name.isdecimal() else re.sub(r"[^\w.\-]", "_", name)


class _Names:
    """Unique printed names: a value's label where it has one that parses back, else its number."""

    def __init__(self) -> None:
        self.of: dict[Value, str] = {}
        self.taken: set[str] = set()

    def __call__(self, value: Value) -> str:
        if value not in self.of:
            name = stem = _label(value.name) or str(len(self.of))
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
        words = op.note.split()
        note = f"  # {' '.join(words)}" if words else ""
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

_TYPE = re.compile(r"(\w+)\[((?:\d+(?:,\d+)*)?)\]")
_NAME = r"%[\w.\-]+"
_FUNC = re.compile(r"func @([\w.\-]+)\((.*)\) \{")
_OP = re.compile(rf"(?:(?P<out>{_NAME}(?:, {_NAME})*) = )?(?P<name>[\w.]+)\((?P<ins>[^)]*)\)")  # then {attributes}
_REST = re.compile(r"(?: do \((?P<args>[^)]*)\) \{| : (?P<types>[\w\[\], ]+?))?(?: +# (?P<note>.*))?")
_CLOSE = re.compile(r"\}(?: : (?P<types>[\w\[\], ]+))?")


def parse(text: str) -> Module:
    """The module that a listing describes. Raises `ParseError` with the line's number."""
    module = Module()
    lines = enumerate(text.splitlines(), 1)
    for number, raw in lines:
        line = raw.strip()
        if not line or line.startswith("//"):
            continue
        if line.startswith("module {") and line.endswith("}"):
            module.meta = _parse_attrs(line[len("module {") : -1], number)
        elif m := _FUNC.fullmatch(line):
            env: dict[str, Value] = {}
            func = Func(m[1], Block(_parse_args(m[2], env, number)))
            if func.name in module.funcs:
                raise ParseError(f"line {number}: @{func.name} is defined twice")
            if types := _parse_block(func.block, env, lines, number):
                raise ParseError(f"line {number}: @{func.name} ends in result types {types!r}; its return has them")
            module.funcs[func.name] = func
        else:
            raise ParseError(f"line {number}: expected `module`, `func` or a comment, found {line[:80]!r}")
    return module


def _parse_block(block: Block, env: dict[str, Value], lines: Iterator[tuple[int, str]], start: int) -> str:
    """Read ops up to the closing brace; returns the result types printed behind it."""
    for number, raw in lines:
        line = raw.strip()
        if m := _CLOSE.fullmatch(line):
            return m["types"] or ""
        if not line or line.startswith("//"):
            continue
        op = _parse_op(line, env, lines, number)
        block.ops.append(op)
    raise ParseError(f"line {start}: the body that opens here is not closed")


def _parse_op(line: str, env: dict[str, Value], lines: Iterator[tuple[int, str]], number: int) -> Op:
    m = _OP.match(line)
    attrs, rest = _braced(line[m.end() :]) if m else ("", "")
    r = _REST.fullmatch(rest)
    if not m or not r:
        raise ParseError(f"line {number}: not an op: {line[:120]!r}")
    name, types = m["name"], r["types"] or ""
    if name not in OPS:
        raise ParseError(f"line {number}: unknown op {name!r}")
    inputs = [_lookup(n, env, number) for n in _split(m["ins"])]
    op = Op(name, inputs, _parse_attrs(attrs, number), note=r["note"] or "")
    if r["args"] is not None:
        op.body = Block(_parse_args(r["args"], env, number))
        types = _parse_block(op.body, env, lines, number)
    results = [_parse_type(t, number) for t in _split(types)]
    outs = _split(m["out"] or "")
    if len(outs) != len(results):
        raise ParseError(f"line {number}: {len(outs)} results but {len(results)} result types")
    _restore(op, results)
    op.outputs = [_define(n, t, env, number, op) for n, t in zip(outs, results, strict=True)]
    return op


def _restore(op: Op, results: list[Type]) -> None:
    """Add the attributes that printing leaves out."""
    definition = OPS[op.name]
    known = (*definition.required, *(definition.defaults or ()))
    implied = {k: _implied(op, k, results[0]) for k in known} if results else {}
    given = {k: v for k, v in implied.items() if v is not None} | op.attrs
    op.attrs = {**(definition.defaults or {}), **given}
    op.attrs = _ordered(op)


def _define(name: str, t: Type, env: dict[str, Value], number: int, op: Op | None = None) -> Value:
    if name in env:
        raise ParseError(f"line {number}: {name} is defined twice")
    env[name] = Value(t, _label(name[1:]), op)
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
    m = _TYPE.fullmatch(text.strip())
    if not m or m[1] not in DTYPE_BYTES:
        raise ParseError(f"line {number}: not a type: {text!r}")
    return Type(m[1], tuple(int(d) for d in m[2].split(",") if d))


def _outside(text: str) -> Iterator[tuple[int, str]]:
    """The characters that stand outside quotes and brackets, brackets themselves included, with their places."""
    depth, quote, escaped = 0, "", False
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote and not escaped else quote
            escaped = c == "\\" and not escaped
        elif c in "'\"":
            quote = c
        else:
            depth -= c in "])}"
            if depth == 0:
                yield i, c
            depth += c in "[({"


def _split(text: str, at: str = ",") -> list[str]:
    """Split at the commas that stand outside brackets and quotes."""
    parts, last = [], 0
    for i in [i for i, c in _outside(text) if c == at]:
        parts.append(text[last:i].strip())
        last = i + 1
    tail = text[last:].strip()
    return [*parts, tail] if tail else parts


def _braced(text: str) -> tuple[str, str]:
    """What stands in the braces that a text starts with, and what follows them."""
    if not text.startswith(" {"):
        return "", text
    end = next((i for i, c in _outside(text) if c == "}"), 0)
    return (text[2:end], text[end + 1 :]) if end else ("", text)


def _parse_attrs(text: str, number: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in _split(text):
        key, sep, value = item.partition("=")
        if not sep:
            raise ParseError(f"line {number}: expected key=value, found {item!r}")
        if key in found:
            raise ParseError(f"line {number}: {key} is given twice")
        found[key] = _parse_literal(value, number)
    return found


_SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _parse_literal(text: str, number: int) -> Any:
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _TYPE.fullmatch(text):
        return _parse_type(text, number)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        pass
    items = _split(text[1:-1])  # Python's own literals know neither types nor infinities
    match text[:1] + text[-1:]:
        case "()":
            return tuple(_parse_literal(i, number) for i in items)
        case "[]":
            return [_parse_literal(i, number) for i in items]
        case "{}" if all(len(_split(i, ":")) == 2 for i in items):
            pairs = (_split(i, ":") for i in items)
            return {_parse_literal(k, number): _parse_literal(v, number) for k, v in pairs}
    raise ParseError(f"line {number}: not a literal: {text!r}")
