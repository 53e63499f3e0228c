"""The launch plan as source: every buffer with its offset, then one method a stage, a line a launch."""

from __future__ import annotations

import re

from cortexflow.codegen.torch import RULES as TORCH_RULES
from cortexflow.codegen.triton.rules import RULES
from cortexflow.errors import TargetError
from cortexflow.ir.core import Block, Func, Module, Op, Value
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.passes.plan_buffers import Plan, dense

_HEAD = '''"""{title}

Generated. WEIGHTS: key, the form it is stored in. BUFFERS: offset in the arena, dtype, shape, strides.
A method runs one stage's launches.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cortexflow.kernels.gluon import streaming, warpgroup
from cortexflow.kernels.torch.functions import *
from cortexflow.kernels.triton import prefill_attention, product
from cortexflow.kernels.triton.gather import embed
from cortexflow.kernels.triton.rows import epilogue, glu, layer_norm, modulated_norm, rms_norm, rope, rope_and_cache
from cortexflow.kernels.triton.segment_attention import Config, Split, segment_attention
from cortexflow.kernels.triton.skinny import skinny
from cortexflow.kernels.triton.thin import thin


def rows(x: Tensor) -> Tensor:
    """A matrix of the last axis' rows, to write to; never a copy."""
    return x.view(-1, x.shape[-1])


def flat(x: Tensor) -> Tensor:
    """The same to read from; a copy where the rows are not evenly spaced."""
    return x.reshape(-1, x.shape[-1])


def settle(scratch: tuple[Tensor, Tensor]) -> None:
    """Wait for everything before: a kernel behind this may read it before it waits for its turn."""
    scratch[1][-1:].zero_()


'''

_CLASS = '''
class Policy:
    """The launches of every stage, over one arena."""

    def __init__(self, weights: dict[str, Tensor], arena: Tensor, scratch: tuple[Tensor, Tensor]) -> None:
        self.device, self.scratch = arena.device, scratch
        for name in WEIGHTS:
            setattr(self, name, weights[name])
        for name, (value, dtype, shape) in CONSTANTS.items():
            setattr(self, name, torch.tensor(value, dtype=dtype, device=self.device).reshape(shape))
        for name, (offset, dtype, shape, strides) in BUFFERS.items():
            typed = arena[offset:].view(dtype) if (arena.numel() - offset) % dtype.itemsize == 0 else None
            setattr(self, name, typed.as_strided(shape, strides))

'''


_SILENT = ("weight", "const")  # ops without a launch


class Stage:
    """Names and lines of one stage's method."""

    def __init__(self, program: Program, func: Func) -> None:
        self.program, self.func = program, func
        self.direct: dict[Value, str] = {}
        self.lines: list[str] = []
        self.done: set[Op] = set()  # launched together with an op before
        self.rotated = {} if "joined" in program.without else joined_rotations(func.block, program.plan)
        self.done |= {v.op for _, k, v in self.rotated.values() for v in (k, v) if v.op is not None}
        self.after: dict[Op, list[Op]] = {}  # the ops behind each, in its block

    def text(self) -> str:
        """The method's source."""
        self.block(self.func.block, "        ")
        start = [f"    def {self.func.name}(self) -> None:", "        settle(self.scratch)"]
        return "\n".join([*start, *self.lines, "        return None"])

    def name(self, v: Value) -> str:
        """How a value is written; a weight is stored as it is only if a line says so."""
        if v.op is not None and v.op.name == "weight":
            return self.weight(v, "plain")
        if v.op is not None and self.of_table(v.op):
            return f"{self.name(v.op.inputs[0])}[{self.direct[v.op.inputs[1]]}]"
        return self.direct.get(v) or self.program.buffer(v)

    def read(self, v: Value, axes: int = 1) -> str:
        """A value for a kernel that wants its last axes dense; a copy where the plan has them otherwise."""
        tail = list(zip(v.type.shape, self.program.plan.layout(v).strides, dense(v.type.shape), strict=True))[-axes:]
        return self.name(v) + ("" if all(d == 1 or s == w for d, s, w in tail) else ".contiguous()")

    def weight(self, w: Value, form: str) -> str:
        """A weight in one of `placement.FORMS`."""
        assert w.op is not None
        return f"self.{self.program.weight(w.op.attrs['key'], form)}"

    def settled(self, *values: Value | None) -> list[str]:
        """What must be launched before a kernel that reads these values before it waits; nothing for what is there.

        Weights and their tables' rows are, and a stage's arguments: a stage begins when those before it have ended.
        """
        return [] if all(v is None or self._there(v) for v in values) else ["settle(self.scratch)"]

    def _there(self, v: Value) -> bool:
        while v.op is not None and v in self.program.plan.layouts:
            v = v.op.inputs[0]
        if v.op is None:
            return v in self.func.args.values()
        return v.op.name in _SILENT or self.of_table(v.op)

    def of_table(self, op: Op) -> bool:
        """Whether an op is the current step's row of a table: no launch, a name."""
        return op.name == "gather" and op.inputs[1] in self.direct and op.inputs[1] in self.program.steps

    def following(self, op: Op, names: tuple[str, ...]) -> Op | None:
        """The op of one of these names that reads the result of `op` and is launched next, to be launched with it.

        Its result must have a place that `op` does not read.
        """
        if "joined" in self.program.without:
            return None
        for other in self.after[op]:
            if other.name in _SILENT or self.program.plan.layouts.keys() & set(other.outputs) or self.of_table(other):
                continue
            fits = other.name in names and other.inputs[0] is op.out and other not in self.done
            return other if fits and not self.program.overlap(other.out, op.inputs[0]) else None
        return None

    def block(self, block: Block, indent: str) -> None:
        """One line an op, or nothing for a view."""
        self.after |= {op: block.ops[i + 1 :] for i, op in enumerate(block.ops)}
        for op in block.ops:
            if op.name == "const":
                self.direct[op.out] = f"self.{self.program.constant(op)}"
            elif op.name == "loop":
                self.loop(op, indent)
            elif op.name not in ("weight", "return", "yield"):
                self.launch(op, indent)

    def launch(self, op: Op, indent: str) -> None:
        """Run one op, unless the plan made its result a view or it is a row of a table."""
        self.copies(op, False, indent)
        if self.of_table(op) or op.out in self.program.plan.layouts or op in self.done:
            return
        out = self.name(op.out)
        rule = RULES.get(op.name)
        for line in rule(self, op, out) if rule else self.copied(op, out):
            self.lines.append(f"{indent}{line}  # {op.note}".rstrip(" #"))

    def copied(self, op: Op, out: str) -> list[str]:
        """An op off the hot path, by the torch target's rule."""
        if op.name not in TORCH_RULES:
            raise TargetError(f"target 'triton' has no rule for op {op.name!r}{f' at {op.note}' if op.note else ''}")
        return [f"{out}.copy_({TORCH_RULES[op.name](op, *map(self.name, op.inputs))})"]

    def loop(self, op: Op, indent: str) -> None:
        """A counted loop; carried values stay in their buffers."""
        assert op.body is not None
        if op.attrs["early_stop"] and not op.attrs["settled"]:
            raise TargetError("target 'triton' captures one CUDA graph and cannot stop a loop early")
        step = op.body.args[0]
        self.copies(op, False, indent)
        self.program.steps.add(step)
        self.direct[step] = "step"
        self.lines.append(f"{indent}for step in range({op.attrs['trips']}):  # {op.note}".rstrip(" #"))
        others = [o for o in op.body.walk() if step in o.inputs and not (o.name == "gather" and o.inputs[1] is step)]
        if others:
            raise TargetError(f"target 'triton': op {others[0].name!r} reads a loop's step other than as a table's row")
        self.block(op.body, indent + "    ")
        self.copies(op, True, indent + "    ")

    def copies(self, op: Op, each: bool, indent: str) -> None:
        """The plan's copies that belong here."""
        for copy in self.program.plan.copies:
            if copy.op is op and copy.each_iteration == each:
                self.lines.append(f"{indent}{self.program.buffer(copy.target)}.copy_({self.name(copy.source)})")


class Program:
    """Tables that all stages share: weights, constants, buffers; and what rules are to do without, or may measure."""

    def __init__(
        self,
        module: Module,
        plan: Plan,
        without: frozenset[str] = frozenset(),
        tune: bool = False,
        capability: int = 90,
    ) -> None:
        self.module, self.plan, self.without, self.tune, self.capability = module, plan, without, tune, capability
        self.weights: dict[tuple[str, str], str] = {}
        self.constants: dict[str, str] = {}
        self.buffers: dict[tuple[int, str, tuple[int, ...], tuple[int, ...]], str] = {}
        self.steps: set[Value] = set()

    def weight(self, key: str, form: str) -> str:
        """The attribute that holds a weight in a form."""
        return self.weights.setdefault((key, form), f"w{len(self.weights)}{'' if form == 'plain' else form[0]}")

    def overlap(self, a: Value, b: Value) -> bool:
        """Whether two values share bytes of the arena."""
        if a not in self.plan.offsets or b not in self.plan.offsets:
            return False
        (x, y), (m, n) = (self.plan.offsets[a], self.plan.offsets[b]), (a.type.nbytes, b.type.nbytes)
        return x < y + n and y < x + m

    def constant(self, op: Op) -> str:
        """The attribute that holds a constant."""
        value, dtype, shape = op.attrs["value"], TORCH_DTYPES[op.attrs["dtype"]], op.attrs["shape"]
        text = re.sub(r"\b(inf|nan)\b", r"math.\1", repr(value))
        return self.constants.setdefault(f"({text}, {dtype}, {shape!r})", f"c{len(self.constants)}")

    def buffer(self, v: Value) -> str:
        """The attribute that is a value's place in the arena."""
        if v not in self.plan.offsets:
            raise TargetError(f"target 'triton': value %{v.name or '?'} ({v.type}) has no place in the arena")
        entry = (self.plan.offsets[v], v.type.dtype, v.type.shape, self.plan.layout(v).strides)
        return f"self.{self.buffers.setdefault(entry, f'b{len(self.buffers)}')}"

    def text(self) -> str:
        """The whole source."""
        methods = "\n\n".join(Stage(self, stage).text() for stage in self.module.stages)
        title = ", ".join(f"{k}={v}" for k, v in self.module.meta.items() if k != "keep") or "A module"
        weights = "".join(f"    {n!r}: ({k!r}, {f!r}),\n" for (k, f), n in self.weights.items())
        constants = "".join(f"    {n!r}: {text},\n" for text, n in self.constants.items())
        buffers = "".join(
            f"    {n!r}: ({o}, {TORCH_DTYPES[d]}, {s!r}, {st!r}),\n" for (o, d, s, st), n in self.buffers.items()
        )
        tables = f"WEIGHTS = {{\n{weights}}}\n\nCONSTANTS = {{\n{constants}}}\n\nBUFFERS = {{\n{buffers}}}\n\n"
        return _HEAD.format(title=title) + tables + _CLASS + methods + "\n"


def joined_rotations(block: Block, plan: Plan) -> dict[Op, tuple[Value, Value, Value]]:
    """Rotations of queries that a kernel can do with their keys' rotation and their values' move to the cache.

    By the queries' rotation: the product whose columns they are, the rotated keys, the moved values. Nothing else is
    launched between the three.
    """
    found: dict[Op, tuple[Value, Value, Value]] = {}
    launched = [op for op in block.ops if op.name not in _SILENT and not plan.layouts.keys() & set(op.outputs)]
    for move, queries, keys in zip(launched, launched[1:], launched[2:], strict=False):
        if (
            move.name != "slice"
            or queries.name != "rope"
            or keys.name != "rope"
            or queries.inputs[1:] != keys.inputs[1:]
        ):
            continue
        parts = [_columns(queries.inputs[0]), _columns(keys.inputs[0]), _columns(move.out)]
        if None in parts:
            continue
        (base, q, heads), (other, k, groups), (last, v, width) = parts  # type: ignore[misc]
        whole = (q, k, v) == (0, heads, heads + groups) and base.type.shape[-1] == heads + groups + width
        if base is other is last and whole and groups == width and len(base.type.shape) == 3:
            found[queries] = (base, keys.out, move.out)
    return found


def _columns(v: Value) -> tuple[Value, int, int] | None:
    """The matrix that a value is some columns of, where they begin, and how many they are."""
    op = v.op
    if op is not None and op.name == "reshape" and len(v.type.shape) == 4:
        op = op.inputs[0].op
    if op is None or op.name != "slice" or op.attrs["axis"] not in (-1, len(op.out.type.shape) - 1):
        return None
    return op.inputs[0], op.attrs.get("start", 0) or 0, op.out.type.shape[-1]
