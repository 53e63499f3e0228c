"""The launch plan as source: every buffer with its offset, then one method a stage, a line a launch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

from cortexflow.codegen.torch import RULES as TORCH_RULES
from cortexflow.codegen.triton.chains import find_chains, launched
from cortexflow.codegen.triton.claims import has_table
from cortexflow.codegen.triton.products import can_rotate, is_thin
from cortexflow.codegen.triton.rules import RULES, concatenates_rows
from cortexflow.errors import TargetError
from cortexflow.ir.core import SOURCES, Block, Func, Module, Op, Value
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.passes.plan import Plan, is_dense

_HEAD = '''"""{title}

Generated. WEIGHTS: key, the form it is stored in. BUFFERS: offset in the arena, dtype, shape, strides.
SUMS: of which weight's rows. A method runs one stage's launches; `early_STAGE`, those that the stage needs and that
read only inputs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cortexflow.kernels.cuda import attention as tiled_attention
from cortexflow.kernels.cuda import product as tiled
from cortexflow.kernels.cuda import segment_attention as resident_attention
from cortexflow.kernels.cuda import streaming as resident
from cortexflow.kernels.gluon import streaming, warpgroup
from cortexflow.kernels.torch import functions
from cortexflow.kernels.torch.functions import *
from cortexflow.kernels.triton import prefill_attention, product
from cortexflow.kernels.triton.gather import embed
from cortexflow.kernels.triton.pointwise import pointwise
from cortexflow.kernels.triton.rows import argmax, epilogue, glu, layer_norm, modulated_norm, rms_norm
from cortexflow.kernels.triton.rows import rope, rope_and_cache, summed_norm
from cortexflow.kernels.triton.segment_attention import Config, Split, segment_attention
from cortexflow.kernels.triton.skinny import skinny
from cortexflow.kernels.triton.streams import beside, join, settle
from cortexflow.kernels.triton.thin import thin
from cortexflow.kernels.triton.token_attention import token_attention
from cortexflow.kernels.triton.views import flat, halves, rows

'''

_CLASS = '''
class Policy:
    """The launches of every stage, over one arena."""

    def __init__(self, weights: dict[str, Tensor], arena: Tensor, *scratch: tuple[Tensor, Tensor]) -> None:
        self.device, self.scratch, self.other = arena.device, scratch[0], scratch[-1]
        self.stream = torch.cuda.Stream(self.device) if len(scratch) > 1 and arena.is_cuda else None
        for name in WEIGHTS:
            setattr(self, name, weights[name])
        for name, (value, dtype, shape) in CONSTANTS.items():
            setattr(self, name, torch.tensor(value, dtype=dtype, device=self.device).reshape(shape))
        for name, (offset, dtype, shape, strides) in BUFFERS.items():
            typed = arena[offset:].view(dtype) if (arena.numel() - offset) % dtype.itemsize == 0 else None
            setattr(self, name, typed.as_strided(shape, strides))
        for name, weight in SUMS.items():
            setattr(self, name, torch.empty(weights[weight].shape[0], dtype=torch.float32, device=self.device))

    def add_up(self) -> None:
        """To be called when the weights are there."""
        for name, weight in SUMS.items():
            torch.sum(getattr(self, weight), dim=1, dtype=torch.float32, out=getattr(self, name))

'''


class Stage:
    """Names and lines of one stage's method."""

    def __init__(self, program: Program, func: Func) -> None:
        self.program, self.func = program, func
        self.direct: dict[Value, str] = {}
        self.lines: list[str] = []
        self.done: set[Op] = set()  # launched together with an op before
        self.rotated = {} if "joined" in program.without else joined_rotations(func.block, program.plan)
        self.done |= {op for joined in self.rotated.values() for op in joined.ops}
        self.rotating = {} if "joined" in program.without else rotating_products(self, func.block)
        self.chains = {} if "chains" in program.without else find_chains(func.block, program.plan)
        self.casts = {} if "joined" in program.without else absorbed_casts(self, func.block)
        self.after: dict[Op, list[Op]] = {}  # the ops behind each, in its block
        self.squares: dict[Op, int] = {}  # a norm's product: how many sums of a row's squares it is handed
        self.folded: dict[Value, tuple[Value, str]] = {}  # a norm in the product that reads it: of what, its stats
        self.branches = {branch.ops[0]: branch for branch in program.plan.branches}
        self.joins = {branch.join for branch in program.plan.branches}

    def text(self) -> str:
        """The method's source."""
        self.block(self.func.block, "        ")
        if any("self.scratch" in line and "settle(" not in line for line in self.lines):
            self.program.busy.add(self.func.name)
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
        strides = self.program.plan.layout(v).strides
        return self.name(v) + ("" if is_dense(v.type.shape[-axes:], strides[-axes:]) else ".contiguous()")

    def flat(self, v: Value) -> str:
        """A value as a matrix of its last axis."""
        return f"flat({self.read(v)})"

    def row(self, v: Value) -> str:
        """A value as one vector."""
        return f"{self.read(v)}.view(-1)"

    def weight(self, w: Value, form: str) -> str:
        """A weight in one of `placement.FORMS`."""
        assert w.op is not None
        return f"self.{self.program.weight(w.op.attrs['key'], form)}"

    def slot(self, op: Op) -> str:
        """The place in a cache that the current step's `cache_update` writes."""
        axis, extent = op.attrs["axis"], op.inputs[1].type.shape[op.attrs["axis"]]
        return f"{self.name(op.out)}.narrow({axis}, {self.direct[op.inputs[2]]}, {extent})"

    def settled(self, *values: Value | None) -> list[str]:
        """What must be launched before a kernel that reads these values before it waits; nothing for what is there.

        Weights and their tables' rows are, and a stage's arguments: a stage begins when those before it have ended.
        """
        return [] if all(v is None or self._there(v) for v in values) else ["settle(self.scratch)"]

    def _there(self, v: Value) -> bool:
        v = self.program.plan.shown(v)
        if v.op is None:
            return v in self.func.args.values()
        return v.op.name in SOURCES or self.of_table(v.op)

    def of_table(self, op: Op) -> bool:
        """Whether an op is the current step's row of a table: no launch, a name."""
        return op.name == "gather" and op.inputs[1] in self.direct and op.inputs[1] in self.program.steps

    def take_norm(self, op: Op, *names: str) -> Op | None:
        """The norm of one of these names that reads the sum `op` and is launched next: it is launched with it, if any.

        Its result must have a place that the sum does not read, once the product behind it is done.
        """
        if "joined" in self.program.without:
            return None
        other = next(self.behind(op), op)
        fits = other.name in names and other.inputs[0] is op.out and other not in self.done
        read = (op.inputs[0], *op.inputs[3:])  # the residual; gate or bias
        fits = fits and not any(self.program.plan.meet(other.out, v) for v in read)
        if not fits or other.out.type.dtype != op.out.type.dtype:
            return None
        self.done.add(other)
        return other

    def behind(self, op: Op) -> Iterator[Op]:
        """What is launched behind an op, in its block."""
        views = self.program.plan.layouts.keys()
        return (o for o in self.after[op] if not (o.name in SOURCES or views & set(o.outputs) or self.of_table(o)))

    def share_scratch(self, a: Op, b: Op) -> bool:
        """Whether two ops are of one branch, or of none: each branch has a scratch of its own."""
        return all((a in branch.ops) == (b in branch.ops) for branch in self.program.plan.branches)

    def block(self, block: Block, indent: str) -> None:
        """One line an op, or nothing for a view."""
        self.after |= {op: block.ops[i + 1 :] for i, op in enumerate(block.ops)}
        beside: tuple[Op, ...] = ()  # the branch at hand
        for op in block.ops:
            if op in self.branches:
                beside = self.branches[op].ops
                self.lines.append(f"{indent}with beside(self):")
            if op in self.joins:
                self.lines.append(f"{indent}join(self)")
            if op in beside:
                self.launch(op, indent + "    ")
            elif op.name == "const":
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
        other = self.casts.get(op)
        if other is not None and op.name == "cast":
            self.direct[op.out] = self.name(op.inputs[0])
            return
        if other is not None:
            self.done.add(other)
        out = self.name(op.out if other is None else other.out)
        rule = RULES.get(op.name)
        for line in self.chain(op) or (rule(self, op, out) if rule else self.copied(op, out)):
            self.lines.append(f"{indent}{line}  # {op.note}".rstrip(" #"))

    def chain(self, first: Op) -> list[str]:
        """The launch of a run of small ops, where one begins."""
        if first not in self.chains:
            return []
        ops, text, sources, targets = self.chains[first]
        self.done |= set(ops)
        given = [self.name(v) + (f".expand({s})" if s != v.type.shape else "") for v, s in sources]
        places = ", ".join(f"{name!r}: {self.name(v)}" for name, v in targets.items())
        return [f"pointwise({text!r}, [{', '.join(given)}], {{{places}}})"]

    def copied(self, op: Op, out: str) -> list[str]:
        """An op off the hot path, by the torch target's rule."""
        if op.name not in TORCH_RULES:
            raise TargetError(f"target 'triton' has no rule for op {op.name!r}{f' at {op.note}' if op.note else ''}")
        given = list(map(self.name, op.inputs))
        if op.name == "cast":
            return [f"{out}.copy_({given[0]})"]
        if op.name == "concat":
            return [f"torch.cat(({', '.join(given)},), dim={op.attrs['axis']}, out={out})"]
        return [f"{out}.copy_({TORCH_RULES[op.name](op, *given)})"]

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
        places = {"gather": 1, "cache_update": 2}  # where an op may have the step: a row of a table, a slot of a cache
        others = [o for o in op.body.walk() if step in o.inputs and o.inputs.index(step) != places.get(o.name)]
        if others:
            raise TargetError(f"target 'triton': op {others[0].name!r} reads a loop's step other than as a place")
        self.block(op.body, indent + "    ")
        self.copies(op, True, indent + "    ")

    def copies(self, op: Op, each: bool, indent: str) -> None:
        """The plan's copies that belong here, in its order; last, in one launch, those of what is not in the arena."""
        due = [c for c in self.program.plan.copies if c.op is op and c.each_iteration == each]
        outside = [c for c in due if c.source.op is not None and c.source.op.name in SOURCES]
        place = self.program.buffer
        self.lines += [f"{indent}{place(c.target)}.copy_({self.name(c.source)})" for c in due if c not in outside]
        if outside:
            targets = ", ".join(place(c.target) for c in outside)
            sources = ", ".join(self.name(c.source) for c in outside)
            self.lines.append(f"{indent}torch._foreach_copy_([{targets}], [{sources}])")


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
        self.sums: dict[str, str] = {}  # by weight, of the form `rows`
        self.steps: set[Value] = set()
        self.busy: set[str] = set()  # functions that keep parts of results in a scratch

    def weight(self, key: str, form: str) -> str:
        """The attribute that holds a weight in a form."""
        return self.weights.setdefault((key, form), f"w{len(self.weights)}{'' if form == 'plain' else form[0]}")

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
        sums = "".join(f"    {n!r}: {w!r},\n" for w, n in self.sums.items())
        tables = {"WEIGHTS": weights, "SUMS": sums, "CONSTANTS": constants, "BUFFERS": buffers}
        text = "".join(f"{name} = {{\n{lines}}}\n\n" for name, lines in tables.items())
        return _HEAD.format(title=title) + text + _CLASS + methods + "\n"


class Joined(NamedTuple):
    """A rotation of queries, their keys' rotation and the move of both to a cache, as one launch."""

    source: Value  # whose columns are queries, keys and values
    moves: tuple[Op, Op]  # what writes the keys, and the values
    ops: tuple[Op, ...]  # done with it
    shape: tuple[int, ...]  # of the keys


def joined_rotations(block: Block, plan: Plan, step: Value | None = None) -> dict[Op, Joined]:
    """By the queries' rotation. Nothing else is launched between the ops.

    Keys and values go to places of their own (a slice moves the values, before the rotations), or into the caches of
    the loop whose `step` is given (`cache_update`, behind them), where these need not be copied first. In a layer whose
    result nobody reads there are keys and values alone.
    """
    found: dict[Op, Joined] = {}
    for op in block.ops:
        if op.body:
            found |= joined_rotations(op.body, plan, op.body.args[0])
    work = launched(block, plan)
    copied = {copy.op for copy in plan.copies}
    for i, queries in enumerate(work):
        taken = any(queries in joined.ops for joined in found.values())
        if queries.name != "rope" or taken or not has_table(*queries.inputs[:2]):
            continue
        keys, *behind = work[i + 1 : i + 4] or [queries]
        if keys.name != "rope" or queries.inputs[1:] != keys.inputs[1:]:
            keys, behind = queries, []
        into = [op for op in behind if op.name == "cache_update" and op.attrs["axis"] == 1 and op.inputs[2] is step]
        before = work[i - 1] if i else queries
        if len(into) == 2 and into[0].inputs[1] is keys.out and not copied & set(into):
            moves, moved, ops = (into[0], into[1]), into[1].inputs[1], (keys, *into)
        elif before.name == "slice":
            moves, moved, ops = (keys, before), before.out, (before,) if keys is queries else (keys, before)
        else:
            continue
        base = _whole(*dict.fromkeys((queries.inputs[0], keys.inputs[0])), moved)
        if base and len(base.type.shape) == 3 and keys.out.type.size == moved.type.size:
            found[queries] = Joined(base, moves, ops, keys.out.type.shape)
    return found


def rotating_products(stage: Stage, block: Block) -> dict[Op, Op]:
    """By each other: attention that can take rotated queries and keys, and the product that can rotate its columns."""
    found: dict[Op, Op] = {}
    for op in block.ops:
        if op.body:
            found |= rotating_products(stage, op.body)
        if op.name != "fused.rotated_attention_segments":
            continue
        given = (op.inputs[0], *op.inputs[3:5])
        base = _whole(*given)
        if base is None or base.op not in block.ops or not can_rotate(stage, base.op, op):
            continue
        between = {w for v in given for w in (v, v.op and v.op.inputs[0])} - {base}  # views that nobody else may read
        reads = [v for other in block.walk() for v in other.inputs if v is base or v in between]
        ahead = block.ops[: block.ops.index(base.op)]
        if len(reads) == len(between) + 3 and all(v.op in ahead or v.op not in block.ops for v in op.inputs[5:7]):
            found |= {op: base.op, base.op: op}
    return found


def absorbed_casts(stage: Stage, block: Block) -> dict[Op, Op]:
    """A cast and the small product that reads what is cast, or an op and the cast of its result: by the first of both.

    Such an op's kernel reads and stores any float dtype. Nothing is launched between the two, and nobody else reads
    what the first one makes. The second one's result takes no place that the first one, or the pair, still reads.
    """
    plan, found = stage.program.plan, dict[Op, Op]()
    for op in block.ops:
        if op.body:
            found |= absorbed_casts(stage, op.body)
    apart = {op for chain in stage.chains.values() if len(chain.ops) > 1 for op in chain.ops}
    apart |= {op for branch in plan.branches for op in (branch.ops[0], branch.ops[-1], branch.join)}
    for first, second in pairwise(launched(block, plan)):
        cast, other = (first, second) if first.name == "cast" else (second, first)
        suits = is_thin(stage, other) or (cast is second and concatenates_rows(other))
        if cast.name != "cast" or not suits or {cast, other} & (apart | set(found.values())):
            continue
        given, reads = cast.inputs[0], cast.inputs if cast is first else other.inputs
        strides = plan.layout(given).strides, plan.layout(cast.out).strides
        fits = cast is second or all(d == 1 or s == t for d, s, t in zip(given.type.shape, *strides, strict=True))
        fits = fits and {given.type.dtype, cast.out.type.dtype} <= {"f32", "bf16", "f16"}
        fits = fits and first.out in second.inputs and not any(plan.meet(second.out, v) for v in reads)
        if fits and sum(first.out is v for op in stage.func.block.walk() for v in op.inputs) == 1:
            found[first] = second
    return found


def _whole(*values: Value) -> Value | None:
    """The matrix whose columns these values are, one behind the other."""
    parts = [part for v in values if (part := _columns(v))]
    ends = list(accumulate(width for _, _, width in parts))
    base = parts[0][0] if len(parts) == len(values) else None
    whole = base and [begin for _, begin, _ in parts] == [0, *ends[:-1]] and base.type.shape[-1] == ends[-1]
    return base if whole and all(b is base for b, _, _ in parts) else None


def _columns(v: Value) -> tuple[Value, int, int] | None:
    """The matrix that a value is some columns of, where they begin, and how many they are."""
    op = v.op
    if op is not None and op.name == "reshape" and len(v.type.shape) == 4:
        op = op.inputs[0].op
    if op is None or op.name != "slice" or op.attrs["axis"] not in (-1, len(op.out.type.shape) - 1):
        return None
    return op.inputs[0], op.attrs.get("start", 0) or 0, op.out.type.shape[-1]
