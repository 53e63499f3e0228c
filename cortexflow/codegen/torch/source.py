"""The source of a module: a table of weights, the functions it calls, `Policy` with a method for each stage."""

from __future__ import annotations

import inspect
import keyword
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from cortexflow.codegen.torch.rules import INFIX, RULES, closing, constant
from cortexflow.errors import TargetError
from cortexflow.ir.core import Block, Func, Module, Op, Value, uses
from cortexflow.kernels.torch import functions

_KEEP_BYTES = 1 << 16  # smaller values are left to the end of the method
_WIDTH = 120  # longer lists of names are wrapped

_HEAD = '''"""{title}

Generated; it needs torch alone. `Policy(weights)` takes a tensor for each key of WEIGHTS.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

'''


def emit_source(module: Module) -> str:
    """The source of a module: weights table, the functions it needs, `Policy` with a method for each stage."""
    keys = list(module.weight_types())
    buffers = {key: f"w{i}" for i, key in enumerate(keys)}
    names = method_names(module)
    methods = [_Method(stage, names[stage.name], buffers).text() for stage in module.stages]
    body = "\n\n".join([*methods, _forward(module)])
    family = module.meta.get("family")
    title = f"{family or 'A module'}: " + ", ".join(
        f"{k}={v}" for k, v in module.meta.items() if k not in ("family", "keep")
    )
    title = re.sub(r'[\\"]', "'", title)  # it stands in a docstring
    table = "\n".join(f"    {key!r}: {name!r},  # {module.weight_types()[key]}" for key, name in buffers.items())
    return (
        _HEAD.format(title=title.rstrip(": "))
        + f"WEIGHTS = {{\n{table}\n}}\n\n\n"
        + _used_functions(body)
        + _CLASS
        + body
        + "\n"
    )


def method_names(module: Module) -> dict[str, str]:
    """The method of each stage: the stage's name, where Python and `nn.Module` leave it free."""
    taken = _Names({*dir(nn.Module), "forward", "device", *(f"w{i}" for i in range(len(module.weight_types())))})
    return {stage.name: taken.new(stage.name) for stage in module.stages}


_CLASS = '''class Policy(nn.Module):
    """One method for each stage, and `forward` through all of them."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for key, name in WEIGHTS.items():
            self.register_buffer(name, weights[key])
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.anchor.device

'''


def _used_functions(body: str) -> str:
    """The text of the functions that the source calls, callees first."""
    texts = {n: inspect.getsource(f) for n, f in vars(functions).items() if inspect.isfunction(f)}
    wanted = {n for n in texts if _calls(n, body)}
    wanted |= {n for n in texts for w in wanted if n != w and _calls(n, texts[w])}
    return "".join(f"{text}\n\n" for n, text in texts.items() if n in wanted)


def _calls(name: str, text: str) -> bool:
    return re.search(rf"(?<![\w.]){name}\(", text) is not None


def _forward(module: Module) -> str:
    methods, taken = method_names(module), _Names({"self"})
    names: dict[str, str] = {}
    for name in (*module.inputs, *(n for stage in module.stages for n in stage.results)):
        names[name] = names.get(name) or taken.new(name)
    args = ["self", *(f"{names[n]}: Tensor" for n in module.inputs)]
    lines = _wrapped("    def forward(", args, ") -> dict[str, Tensor]:")
    for stage in module.stages:
        given, made = ([names[n] for n in part] for part in (stage.args, stage.results))
        *results, last = _wrapped("        (", made, closing(made) + " = ") if made else ["        "]
        lines += [*results, *_wrapped(f"{last}self.{methods[stage.name]}(", given, ")", "        ")]
    return "\n".join([*lines, *_wrapped("        return {", [f"{n!r}: {names[n]}" for n in module.outputs], "}")])


def _wrapped(head: str, items: list[str], tail: str, indent: str | None = None) -> list[str]:
    """`head item, item tail` on one line, or the items on lines of their own where that is too long."""
    indent = re.match(r" *", head)[0] if indent is None else indent  # type: ignore[index]
    if len(head) + len(tail) + sum(len(i) + 2 for i in items) <= _WIDTH:
        return [head + ", ".join(items) + tail]
    lines = [f"{indent}    "]
    for item in items:
        if len(lines[-1]) + len(item) + 2 > _WIDTH:
            lines.append(f"{indent}    ")
        lines[-1] += f"{item}, "
    lines[-1] = lines[-1].rstrip(", ")
    return [head, *(line.rstrip() for line in lines), indent + tail]


# what the source itself says: a value of such a name would hide it
_RESERVED = {*keyword.kwlist, *vars(functions), "nn", "Policy", "WEIGHTS", "range", "bool", "int", "tuple", "dict"}


class _Names:
    """Python names, each given once."""

    def __init__(self, taken: Iterable[str]) -> None:
        self.taken = set(taken)

    def new(self, wish: str) -> str:
        """The wished name where it is a free Python name, else one like it."""
        stem = re.sub(r"\W", "_", wish, flags=re.ASCII)
        stem = re.sub("^__+", "_", f"_{stem}" if not stem or stem[0].isdigit() else stem)  # in a class, __x is mangled
        name, n = stem, 1
        while name in self.taken or name in _RESERVED:
            n += 1
            name = f"{stem}_{n}"
        self.taken.add(name)
        return name


class _Method:
    """One stage as a method: names for values, lines of code, and when a value may go."""

    def __init__(self, func: Func, title: str, buffers: Mapping[str, str]) -> None:
        self.func, self.title, self.buffers = func, title, buffers
        self.names: dict[Value, str] = {}
        self.taken = _Names({"self"})
        self.lines: list[str] = []
        self.left = uses(func.block)

    def text(self) -> str:
        """The method's source."""
        args = ["self", *(f"{self.name(a)}: Tensor" for a in self.func.block.args)]
        head = _wrapped(f"    def {self.title}(", args, ") -> tuple[Tensor, ...]:")
        self.block(self.func.block, "        ", set(self.func.block.args), [])
        return "\n".join([*head, *self.lines])

    def name(self, v: Value) -> str:
        """The value's own name where it is free, else a number."""
        if v not in self.names:
            self.names[v] = self.taken.new(v.name or f"t{len(self.names)}")
        return self.names[v]

    def block(self, block: Block, indent: str, own: set[Value], carried: list[str]) -> None:
        """Emit the ops of a body. `own` are the values that this body may let go."""
        for op in block.ops:
            if _is_scalar(op):
                continue  # written where it is read
            if op.name == "weight":
                self.names[op.out] = f"self.{self.buffers[op.attrs['key']]}"
            elif op.name == "return":
                results = [self.operand(v, op) for v in op.inputs]
                self.lines += _wrapped(f"{indent}return (", results, closing(results))
            elif op.name == "yield":
                self.end_of_step(op, indent, own, carried)
            elif op.name == "loop":
                own.update(op.outputs)
                self.loop(op, indent, own)
            else:
                own.update(op.outputs)
                self.statement(op, indent)
                self.let_go(op.inputs, own, indent, op.outputs)

    def statement(self, op: Op, indent: str) -> None:
        """One op, one line."""
        rule = RULES.get(op.name)
        if rule is None:
            raise TargetError(f"target 'torch' has no rule for op {op.name!r}{f' at {op.note}' if op.note else ''}")
        expression = rule(op, *[self.operand(v, op) for v in op.inputs])
        self.lines.append(f"{indent}{self.name(op.out)} = {expression}  # {op.out.type}  {_line(op.note)}".rstrip())

    def operand(self, v: Value, reader: Op) -> str:
        """How an operand is written: by name, a scalar constant as a number where Python's arithmetic allows it."""
        if v.op is None or not _is_scalar(v.op):
            return self.name(v)
        others = [i for i in reader.inputs if i is not v]
        plain = reader.name in INFIX and others and not any(o.op and _is_scalar(o.op) for o in others)
        # number / tensor is number * (1 / tensor) in torch: not the same quotient
        plain = plain and not (reader.name == "div" and reader.inputs[0] is v)
        if plain and v.type.dtype in ("f32", "i32") and abs(v.op.attrs["value"]) < 3e38:
            return f"({v.op.attrs['value']!r})" if v.op.attrs["value"] < 0 else repr(v.op.attrs["value"])
        return constant(v.op)

    def loop(self, op: Op, indent: str, own: set[Value]) -> None:
        """A counted loop that reassigns its carried names."""
        assert op.body is not None
        step, *args = op.body.args
        carried = [self.name(a) for a in args]
        if carried:
            self.assign(carried, [self.operand(v, op) for v in op.inputs], indent)
            self.let_go(op.inputs, own, indent)
        counter = self.taken.new(f"{self.name(step)}_number")
        self.lines.append(f"{indent}for {counter} in range({op.attrs['trips']}):  # {_line(op.note)}".rstrip(" #"))
        inner = indent + "    "
        if all(o.name in ("gather", "cache_update") and o.inputs[-1] is step for o in _readers_of(step, op.body)):
            self.names[step] = counter
        else:
            self.lines.append(
                f"{inner}{self.name(step)} = torch.tensor({counter}, dtype=torch.int32, device=self.device)"
            )
        self.block(op.body, inner, set(args), carried)
        for out, name in zip(op.outputs, carried, strict=True):
            self.names[out] = name
        self.let_go([], own, indent, [*uses(op.body), *op.outputs])

    def assign(self, names: list[str], values: list[str], indent: str) -> None:
        """Give several names their values at once."""
        line = f"{indent}{', '.join(names)} = {', '.join(values)}"
        if len(line) <= _WIDTH:
            self.lines.append(line)
        else:
            *first, last = _wrapped(f"{indent}(", names, f"{closing(names)} = (")
            self.lines += [*first, *_wrapped(last, values, closing(values), indent)]

    def end_of_step(self, op: Op, indent: str, own: set[Value], carried: list[str]) -> None:
        """Hand the yielded values to the next step, and stop where the body says so."""
        names = [self.operand(v, op) for v in op.inputs]
        stop = names.pop(0) if len(names) > len(carried) else None
        if stop in carried:  # it is about to be reassigned
            self.lines.append(f"{indent}{(stopping := self.taken.new('stop'))} = {stop}")
            stop = stopping
        if carried:
            self.assign(carried, names, indent)
        self.let_go(op.inputs, {v for v in own if self.names.get(v) not in (*carried, stop)}, indent)
        if stop:
            self.lines += [f"{indent}if bool({stop}):", f"{indent}    break"]
        if not carried and not stop:
            self.lines.append(f"{indent}pass")

    def let_go(self, read: Iterable[Value], own: set[Value], indent: str, others: Iterable[Value] = ()) -> None:
        """Delete the large values among those just read, and among others, that nothing reads any more."""
        reads = Counter(read)
        self.left.subtract(reads)
        large = [v for v in dict.fromkeys([*reads, *others]) if v in own and v.type.nbytes >= _KEEP_BYTES]
        if gone := [self.names[v] for v in large if self.left[v] <= 0]:
            self.lines.append(f"{indent}del {', '.join(gone)}")


def _line(note: str) -> str:
    return " ".join(note.split())


def _is_scalar(op: Op) -> bool:
    return op.name == "const" and op.attrs["shape"] == ()


def _readers_of(v: Value, block: Block) -> list[Op]:
    return [op for op in block.walk() if v in op.inputs]
