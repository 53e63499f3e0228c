"""The launch plan as source: every buffer with its offset, then one method a stage, a line a launch."""

from __future__ import annotations

import re

from cortexflow.codegen.torch import RULES as TORCH_RULES
from cortexflow.codegen.triton.rules import RULES
from cortexflow.errors import TargetError
from cortexflow.ir.core import Block, Func, Module, Op, Value
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.passes.plan_buffers import Plan

_HEAD = '''"""{title}

Generated. BUFFERS: offset in the arena, dtype, shape, strides. A method runs one stage's launches.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cortexflow.kernels.torch.functions import *
from cortexflow.kernels.triton.decode_attention import decode_attention
from cortexflow.kernels.triton.prefill_attention import attention
from cortexflow.kernels.triton.rows import epilogue, glu, layer_norm, modulated_norm, rms_norm, rope
from cortexflow.kernels.triton.skinny import skinny


def rows(x: Tensor) -> Tensor:
    """A matrix of the last axis' rows, to write to; never a copy."""
    return x.view(-1, x.shape[-1])


def flat(x: Tensor) -> Tensor:
    """The same to read from; a copy where the rows are not evenly spaced."""
    return x.reshape(-1, x.shape[-1])


'''

_CLASS = '''
class Policy:
    """The launches of every stage, over one arena."""

    def __init__(self, weights: dict[str, Tensor], arena: Tensor, scratch: tuple[Tensor, Tensor]) -> None:
        self.device, self.scratch = arena.device, scratch
        for name, (key, transposed) in WEIGHTS.items():
            setattr(self, name, weights[key].t().contiguous() if transposed else weights[key])
        for name, (value, dtype, shape) in CONSTANTS.items():
            setattr(self, name, torch.tensor(value, dtype=dtype, device=self.device).reshape(shape))
        for name, (offset, dtype, shape, strides) in BUFFERS.items():
            typed = arena[offset:].view(dtype) if (arena.numel() - offset) % dtype.itemsize == 0 else None
            setattr(self, name, typed.as_strided(shape, strides))

'''


class Stage:
    """Names and lines of one stage's method."""

    def __init__(self, program: Program, func: Func) -> None:
        self.program, self.func = program, func
        self.direct: dict[Value, str] = {}
        self.lines: list[str] = []

    def text(self) -> str:
        """The method's source."""
        self.block(self.func.block, "        ")
        return "\n".join([f"    def {self.func.name}(self) -> None:", *self.lines, "        return None"])

    def name(self, v: Value) -> str:
        """How a value is written."""
        return self.direct.get(v) or self.program.buffer(v)

    def transposed(self, w: Value) -> str:
        """A weight stored [n, k]."""
        assert w.op is not None
        return f"self.{self.program.weight(w.op.attrs['key'], True)}"

    def block(self, block: Block, indent: str) -> None:
        """One line an op, or nothing for a view."""
        for op in block.ops:
            if op.name == "weight":
                self.direct[op.out] = f"self.{self.program.weight(op.attrs['key'], False)}"
            elif op.name == "const":
                self.direct[op.out] = f"self.{self.program.constant(op)}"
            elif op.name == "loop":
                self.loop(op, indent)
            elif op.name not in ("return", "yield"):
                self.launch(op, indent)

    def launch(self, op: Op, indent: str) -> None:
        """Run one op, unless the plan made its result a view or it is a row of a table."""
        self.copies(op, False, indent)
        if op.name == "gather" and op.inputs[1] in self.direct and op.inputs[1] in self.program.steps:
            self.direct[op.out] = f"{self.name(op.inputs[0])}[{self.direct[op.inputs[1]]}]"
            return
        if op.out in self.program.plan.layouts:
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
        if op.attrs["early_stop"]:
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
    """Tables that all stages share: weights, constants, buffers."""

    def __init__(self, module: Module, plan: Plan) -> None:
        self.module, self.plan = module, plan
        self.weights: dict[tuple[str, bool], str] = {}
        self.constants: dict[str, str] = {}
        self.buffers: dict[tuple[int, str, tuple[int, ...], tuple[int, ...]], str] = {}
        self.steps: set[Value] = set()

    def weight(self, key: str, transposed: bool) -> str:
        """The attribute that holds a weight, as it is or transposed."""
        return self.weights.setdefault((key, transposed), f"w{len(self.weights)}{'t' if transposed else ''}")

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
        weights = "".join(f"    {n!r}: ({k!r}, {t}),\n" for (k, t), n in self.weights.items())
        constants = "".join(f"    {n!r}: {text},\n" for text, n in self.constants.items())
        buffers = "".join(
            f"    {n!r}: ({o}, {TORCH_DTYPES[d]}, {s!r}, {st!r}),\n" for (o, d, s, st), n in self.buffers.items()
        )
        tables = f"WEIGHTS = {{\n{weights}}}\n\nCONSTANTS = {{\n{constants}}}\n\nBUFFERS = {{\n{buffers}}}\n\n"
        return _HEAD.format(title=title) + tables + _CLASS + methods + "\n"
