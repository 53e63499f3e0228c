"""Is a buffer plan safe? The module runs on names in place of numbers, in an arena that remembers who wrote what.

Every read of bytes that something else has overwritten since is an error, and so is a byte that ops which may run side
by side have both touched, unless all only read it: a branch and those behind it, early functions and the first stage.
The simulation shares only tables and the plan itself with the planner, so that a mistake there shows here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from cortexflow.errors import VerifyError
from cortexflow.ir.builder import OPS
from cortexflow.ir.core import DTYPE_BYTES, SOURCES, Block, Module, Op, Value
from cortexflow.passes.branches import Branch
from cortexflow.passes.plan import ALIGNMENT, Copy, Plan, described
from cortexflow.passes.plan_buffers import IN_PLACE


def check_plan(module: Module, plan: Plan, in_place: Mapping[str, tuple[int, ...]] = IN_PLACE) -> None:
    """Raise `VerifyError` where the plan lets an op read bytes that something else has overwritten.

    Runs every op in order, and every loop body twice (a third iteration meets what the second met). Early functions run
    beside the first stage, and in a second simulation each right before its own.
    """
    for root, size in plan.sizes.items():
        if plan.offsets[root] % ALIGNMENT or size < root.type.nbytes:
            raise VerifyError(f"plan: {described(root)} is not aligned to {ALIGNMENT} bytes, or too small")
    early = {stage: module.funcs[name] for stage, name in plan.early.items()}
    in_turn = [*dict.fromkeys(f for s in module.stages if s not in early.values() for f in (early.get(s.name, s), s))]
    for order in (module.stages, in_turn) if plan.early else (in_turn,):
        run = _Simulation(plan, in_place)
        wired: dict[str, Value] = {}
        for name in module.inputs:  # all of them are there before the first stage starts
            run.write(wired.setdefault(name, next(s.args[name] for s in module.stages if name in s.args)))
        for stage in order:
            for name, arg in stage.args.items():
                run.hand_over([wired[name]], [arg], ())
            run.early = order is not in_turn and stage in early.values()
            run.block(stage.block)
            wired |= stage.results
            if not run.early:
                run.beside.clear()  # the second stage begins when all before have ended
        for name in module.outputs:
            run.read(wired[name], f"the caller reads %{name}")


class _Simulation:
    """Runs ops on names in place of numbers: which content each byte of the arena holds."""

    def __init__(self, plan: Plan, in_place: Mapping[str, tuple[int, ...]]) -> None:
        self.plan, self.in_place = plan, in_place
        self.content: dict[Value, int] = {}  # what a value is: an index into `names`
        self.names = ["nothing"]
        self.copies: dict[tuple[Op, bool], list[Copy]] = {}
        for copy in plan.copies:
            self.copies.setdefault((copy.op, copy.each_iteration), []).append(copy)
        edges = sorted({e for v in plan.offsets for e in self.span(v)})
        if edges and not 0 <= edges[0] <= edges[-1] <= plan.peak:
            raise VerifyError(f"plan: values lie in {edges[0]}..{edges[-1]}, outside an arena of {plan.peak} bytes")
        self.index = {e: i for i, e in enumerate(edges)}
        self.held = np.zeros(len(edges), np.int64)  # the content between one edge and the next
        self.branch_of = {op: branch for branch in plan.branches for op in branch.ops}
        self.early = False  # whether ops at hand run beside the first stage
        self.group: Branch | str = ""  # what the op at hand is of
        self.beside: dict[Branch | str, dict[str, np.ndarray]] = {}  # what may still be running: bytes that it touched

    def span(self, v: Value) -> tuple[int, int]:
        """First byte, and the one behind the last; of no bytes for a weight, a constant or a view of one."""
        root = self.plan.alias_of.get(v, v)
        if v not in self.plan.offsets:
            if root.op and root.op.name in SOURCES:
                return 0, 0
            raise VerifyError(f"plan: {described(v)} has no place")
        reach = sum((d - 1) * s for d, s in zip(v.type.shape, self.plan.layout(v).strides, strict=True)) + 1
        start = self.plan.offsets[v]
        return start, start + reach * DTYPE_BYTES[v.type.dtype] * (v.type.size > 0)

    def here(self, v: Value) -> slice:
        lo, hi = self.span(v)
        return slice(self.index[lo], self.index[hi]) if hi else slice(0)

    def touch(self, v: Value, how: str) -> None:
        """Note what an op reads or writes that others run beside: they must stay away from it until they meet."""
        here = self.here(v)
        for group, touched in self.beside.items():
            if group is self.group:
                touched[how][here] = True
            elif any(t[here].any() for k, t in touched.items() if "written" in (how, k)):
                what = group if isinstance(group, str) else "a branch"
                raise VerifyError(f"plan: {described(v)} is {how} beside {what} with its bytes, before they meet")

    def begin(self, op: Op) -> None:
        """Note at which op the simulation is: of what others run beside, or where a branch ends."""
        self.beside = {b: t for b, t in self.beside.items() if not isinstance(b, Branch) or b.join is not op}
        self.group = self.branch_of.get(op) or ("early functions" if self.early else "")
        if self.group and self.group not in self.beside:
            self.beside[self.group] = {how: np.zeros(len(self.held), bool) for how in ("read", "written")}

    def read(self, v: Value, why: str) -> None:
        self.touch(v, "read")
        held = self.held[self.here(v)]
        wrong = held[held != self.content.get(v, -1)]
        if wrong.size:
            raise VerifyError(f"plan: {why}, but {described(v)} was overwritten by {self.names[int(wrong[0])]}")

    def write(self, v: Value) -> None:
        """A new content in the value's bytes."""
        self.touch(v, "written")
        self.names.append(described(v))
        self.content[v] = len(self.names) - 1
        self.held[self.here(v)] = self.content[v]

    def place(self, v: Value) -> tuple[int | None, list[int]]:
        """Where the first element is, and the strides that matter."""
        strides = zip(v.type.shape, self.plan.layout(v).strides, strict=True)
        return self.plan.offsets.get(v), [s for d, s in strides if d != 1]

    def overlap(self, v: Value, w: Value) -> bool:
        (a, b), (c, d) = self.span(v), self.span(w)
        return a < d and c < b

    def hand_over(self, sources: Sequence[Value], targets: Sequence[Value], copies: Sequence[Copy]) -> None:
        """Each target becomes its source: by a copy, or because it is the same place already."""
        contents = [self.content[s] for s in sources]
        for copy in copies:
            self.read(copy.source, "a copy reads it")
            if self.overlap(copy.source, copy.target):
                raise VerifyError(f"plan: a copy to {described(copy.target)} overlaps its source")
            self.touch(copy.target, "written")
            self.held[self.here(copy.target)] = self.content[copy.source]
            if copy.target not in targets:  # a value that stepped aside
                self.content[copy.target] = self.content[copy.source]
        copied = {copy.target for copy in copies}
        for source, target, content in zip(sources, targets, contents, strict=True):
            if target not in copied and self.place(source) != self.place(target):
                raise VerifyError(f"plan: {described(target)} is not where {described(source)} is")
            self.content[target] = content  # whether the bytes still hold it shows when somebody reads them

    def block(self, block: Block) -> None:
        for op in block.ops:
            self.begin(op)
            if len(op.outputs) == 1 and op.out in self.plan.layouts:
                self.view(op)
                continue
            for v in op.inputs:
                self.read(v, f"{op.name} {op.note} reads it")
            if op.body:
                self.loop(op, op.body)
                continue
            if op.name == "cache_update":
                self.hand_over(op.inputs[:1], op.outputs, self.copies.get((op, False), ()))
            for out in op.outputs:
                for k, v in enumerate(op.inputs):
                    same = self.place(v) == self.place(out) and v.type.shape == out.type.shape
                    if self.overlap(v, out) and not (same and k in self.in_place.get(op.name, ())):
                        raise VerifyError(f"plan: {op.name} {op.note} writes over its operand {k}")
                self.write(out)

    def view(self, op: Op) -> None:
        """A view is where torch says that it is."""
        x, out, rule = op.inputs[0], op.out, OPS[op.name].evaluate
        (start, strides), (found_start, found) = self.plan.layout(x), self.plan.layout(out)
        base = torch.empty_strided(x.type.shape, strides, device="meta")
        shown = base.view(out.type.shape) if OPS[op.name].view or not rule else rule(base, **op.attrs)
        moved = shown.storage_offset() * DTYPE_BYTES[x.type.dtype]
        at = [self.plan.offsets.get(v, layout_start) for v, layout_start in ((x, start), (out, found_start))]
        same = all(d == 1 or a == b for d, a, b in zip(out.type.shape, shown.stride(), found, strict=True))
        if not same or found_start - start != moved or at[1] - at[0] != moved:
            raise VerifyError(f"plan: {described(out)} is not where its operand is, with strides {found}")
        self.content[out] = self.content[x]

    def loop(self, op: Op, body: Block) -> None:
        carries, sources, copies = body.args[1:], op.inputs, self.copies.get((op, False), ())
        for _ in range(min(op.attrs["trips"], 2)):
            self.hand_over(sources, carries, copies)
            self.write(body.args[0])
            self.block(body)
            sources, copies = body.ops[-1].inputs[int(op.attrs["early_stop"]) :], self.copies.get((op, True), ())
        self.hand_over(sources, carries, copies)
        self.hand_over(carries, op.outputs, ())
