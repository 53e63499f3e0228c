"""Static buffers: where every temporary of an inference lives, in one arena.

The stages run one after another, so they are planned as one sequence of positions. Four steps:

1. *Contents.* What an op writes is a content, live from that op to its last reader. Views (`reshape`,
   `slice`, `broadcast_to`) are other readings of a content. They write after all where strides cannot
   express a reshape, and where a stage returns a part: it would keep the whole alive for later stages.
   What a loop body reads from outside is live until the loop ends, what a branch reads until its join, what an early
   function reads until its stage begins: it may run beside the first, or not before then.
2. *Buffers.* A content takes over the bytes of an operand that dies at its op, where the op may work
   in place (`IN_PLACE`). A loop's carry is one buffer for initial value, argument and result; what
   the body yields is put there directly, if nothing needs the old bytes any more, else copied.
3. *Offsets.* `offsets.py` places the buffers' intervals in the arena; those within a branch in a part of it that
   nobody else has meanwhile.
4. *Proof.* No arena is smaller than the live bytes at any one position: `Plan.lower_bound`.

Planning changes no op. `check_plan`, in a file of its own, finds every read of overwritten bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cortexflow.ir.builder import OPS
from cortexflow.ir.core import DTYPE_BYTES, SOURCES, Block, Module, Op, Value
from cortexflow.ir.shapes import Shape, slice_bounds
from cortexflow.passes.branches import Branch
from cortexflow.passes.offsets import offsets
from cortexflow.passes.plan import ALIGNMENT, Copy, Layout, Plan, dense, is_dense, profile

STRIDED = ("slice", "broadcast_to")  # views with strides; ops with `OpDef.view` are views as well

# Operands whose bytes the result may take over: element i of the result reads of that operand only
# element i. Norms, softmax and rope read a row or a pair, so they are not here. A fused residual add
# reads the residual in its epilogue, once, just before the same element is written.
_FIRST = ["neg", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "abs", "floor", "not", "act", "cast", "cache_update"]
_BOTH = ["add", "sub", "mul", "div", "max", "min", "pow", "lt", "le", "eq", "and", "or"]
_RESIDUAL = [f"fused.{name}" for name in ("matmul_residual", "linear_residual", "matmul_gated_residual")]
IN_PLACE: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(_FIRST + _RESIDUAL, (0,)),
    **dict.fromkeys(_BOTH, (0, 1)),
    "where": (0, 1, 2),
}


# ---- strides ---------------------------------------------------------------------------------------


def _restrided(shape: Shape, strides: tuple[int, ...], new: Shape) -> tuple[int, ...] | None:
    """The strides that show strided elements in another shape; None where there are none."""
    if is_dense(shape, strides):
        return dense(new)
    runs: list[tuple[int, int]] = []  # extent and innermost stride of axes that are one axis in memory
    for d, s in zip(shape, strides, strict=True):
        if runs and runs[-1][1] == d * s:
            runs[-1] = (runs[-1][0] * d, s)
        elif d != 1:
            runs.append((d, s))
    found, left, step = [], 1, 1
    for d in new:
        if d != 1 and left == 1:
            left, step = runs.pop(0)
        if left % d:
            return None
        left //= d
        found.append(left * step)
    return tuple(found)


# ---- contents and buffers --------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Content:
    """What one op writes, or a block argument holds, until its last reader."""

    value: Value
    first: int
    last: int
    loops: tuple[Op, ...]  # the loops around its definition, outermost first
    pinned: bool = False  # never overwritten in place: an input, a weight or a constant
    home: _Buffer | None = None  # None: outside the arena


@dataclass(eq=False, slots=True)
class _Buffer:
    """Bytes that hold one content after another."""

    contents: list[_Content] = field(default_factory=list)
    reserved: bool = False  # the carry of a loop being planned, kept for what the body yields

    def free_before(self, position: int) -> bool:
        return all(c.last < position for c in self.contents)


class _Planner:
    def __init__(
        self,
        module: Module,
        strided: Collection[str],
        in_place: Mapping[str, tuple[int, ...]],
        branches: Sequence[Branch],
        early: Mapping[str, str],
    ) -> None:
        self.strided, self.in_place = strided, in_place
        self.branches = {op: branch for branch in branches for op in branch.ops}
        self.at: dict[Op, int] = {}
        self.exit: dict[Op, int] = {}
        self.where: dict[Value, tuple[_Content, Layout]] = {}
        self.buffers: list[_Buffer] = []
        self.copies: list[Copy] = []
        self.materialised: set[Op] = set()
        self.want: dict[_Content, _Buffer] = {}
        self.stages: list[tuple[str, int, int]] = []
        self._contents(module, early)
        for stage in module.stages:
            self._settle_block(stage.block)

    # -- step 1: positions, contents, lifetimes

    def _contents(self, module: Module, early: Mapping[str, str]) -> None:
        end = 0
        for stage in module.stages:
            first, end = end + 1, self._number(stage.block, end)
            self.stages.append((stage.name, first, end))
            for v in stage.results.values():  # a strided result would keep all of its root from stage to stage
                while v.op and v.op.name not in self.strided and OPS[v.op.name].view:
                    v = v.op.inputs[0]
                self.materialised |= {v.op} if v.op else set()
        self.until = {op: at - 1 for s, at, _ in self.stages if s in early for op in module.funcs[early[s]].block.ops}
        wired: dict[str, Value] = {}
        for stage in module.stages:
            for name, arg in stage.args.items():
                if name in wired:
                    self.where[arg] = self.where[wired[name]]
                else:
                    wired[name] = arg
                    self._place(self._define(arg, 0, (), pinned=True), _Buffer())
            self._trace(stage.block, ())
            wired |= stage.results
        for name in module.outputs:
            self.where[wired[name]][0].last = end + 1

    def _number(self, block: Block, position: int) -> int:
        for op in block.ops:
            position += 1
            self.at[op] = position
            if op.body:
                position = self.exit[op] = self._number(op.body, position) + 1
        return position

    def _define(self, v: Value, first: int, loops: tuple[Op, ...], pinned: bool = False) -> _Content:
        content = _Content(v, first, first, loops, pinned)
        self.where[v] = content, Layout(0, dense(v.type.shape))
        return content

    def _trace(self, block: Block, loops: tuple[Op, ...]) -> None:
        for op in block.ops:
            if view := self._view(op):
                self.where[op.out] = view
                continue
            for v in op.inputs:
                content = self.where[v][0]
                around = loops[len(content.loops) :]  # loops that read it from outside, again and again
                content.last = max(content.last, self.exit[around[0]] if around else self.at[op], self.until.get(op, 0))
                branch = self.branches.get(op)
                if branch and content.value.op not in branch.ops:
                    content.last = max(content.last, self.at[branch.join])
            if op.body:
                for arg in op.body.args:
                    self._define(arg, self.at[op], (*loops, op))
                self.where[op.body.args[0]][0].last = self.exit[op]  # the step
                self._trace(op.body, (*loops, op))
            for out in op.outputs:
                self._define(out, self.exit.get(op, self.at[op]), loops, pinned=op.name in SOURCES)

    def _view(self, op: Op) -> tuple[_Content, Layout] | None:
        """What a view shows, and how; None for an op that writes."""
        if op in self.materialised or not (op.name in self.strided or OPS[op.name].view):
            return None
        x, shape = op.inputs[0], op.out.type.shape
        content, (start, strides) = self.where[x]
        if op.name == "slice":
            axis, step = op.attrs["axis"] % len(shape), op.attrs["step"]
            begin, _ = slice_bounds(x.type.shape[axis], op.attrs["start"], op.attrs["stop"], step)
            start += begin * strides[axis] * DTYPE_BYTES[x.type.dtype]
            return content, Layout(start, tuple(s * step if i == axis else s for i, s in enumerate(strides)))
        if op.name == "broadcast_to":
            new = len(shape) - len(strides)
            kept = (s if d == shape[new + i] else 0 for i, (d, s) in enumerate(zip(x.type.shape, strides, strict=True)))
            return content, Layout(start, (0,) * new + tuple(kept))
        restrided = _restrided(x.type.shape, strides, shape)
        return None if restrided is None else (content, Layout(start, restrided))

    # -- step 2: buffers

    def _place(self, content: _Content, home: _Buffer) -> None:
        if not home.contents:
            self.buffers.append(home)
        home.contents.append(content)
        content.home = home

    def _whole(self, v: Value) -> bool:
        """Whether the value is all of its content, in order."""
        content, layout = self.where[v]
        return v.type.nbytes == content.value.type.nbytes and is_dense(v.type.shape, layout.strides)

    def _dies(self, v: Value, position: int) -> bool:
        """Whether the bytes of the value may serve another from this position on."""
        content = self.where[v][0]
        return not content.pinned and content.last <= position and self._whole(v)

    def _candidates(self, op: Op) -> Iterator[_Content]:
        """The operands whose bytes the op's result may take over."""
        places = self.in_place.get(op.name, ())
        for k, v in enumerate(op.inputs):
            fits = k in places and (v.type.shape, v.type.nbytes) == (op.out.type.shape, op.out.type.nbytes)
            if fits and self._dies(v, self.at[op]):
                same = [j for j, w in enumerate(op.inputs) if self.where[w][0] is self.where[v][0]]
                if all(j in places and op.inputs[j].type == v.type and self._whole(op.inputs[j]) for j in same):
                    yield self.where[v][0]

    def _choose(self, content: _Content, candidates: Sequence[_Content]) -> None:
        """Give a content its buffer: the wanted one, else an operand's, else a new one."""
        wanted = self.want.get(content)
        homes = [c.home for c in candidates if c.home]
        open_ = [h for h in homes if not h.reserved]
        if wanted and (wanted in homes or wanted.free_before(content.first)):
            self._place(content, wanted)
        else:
            self._place(content, min(open_, key=lambda h: h.contents[0].first) if open_ else _Buffer())

    def _wish(self, content: _Content, carry: _Buffer) -> None:
        """Ask that a content, and what it may be computed in place from, be put into a carry's buffer."""
        loops, todo = content.loops, [content]
        while todo:
            c = todo.pop()
            op = c.value.op
            if c in self.want or op is None or c.loops != loops:
                continue
            self.want[c] = carry
            if op.body:
                init = op.inputs[op.outputs.index(c.value)]
                todo += [self.where[init][0]] if self._dies(init, self.at[op]) else []
            else:
                todo += self._candidates(op)

    def _settle_block(self, block: Block) -> None:
        for op in block.ops:
            if op.body:
                self._settle_loop(op, op.body)
            elif op.outputs and op.name not in SOURCES and self.where[op.out][0].value is op.out:
                content = self.where[op.out][0]
                self._choose(content, list(self._candidates(op)))
                if op.name == "cache_update" and self.where[op.inputs[0]][0].home is not content.home:
                    self.copies.append(Copy(op, op.inputs[0], op.out, False))

    def _settle_loop(self, op: Op, body: Block) -> None:
        results = [self.where[v][0] for v in op.outputs]
        args = [self.where[v][0] for v in body.args]
        self._place(args.pop(0), _Buffer())
        taken: set[_Content] = set()
        for init, arg, result in zip(op.inputs, args, results, strict=True):
            content = self.where[init][0]
            free = content not in taken and self._dies(init, self.at[op])
            if result in self.want:
                self.want[arg] = self.want[result]
            self._choose(arg, [content] if free else [])
            if free and arg.home is content.home:
                taken.add(content)
            else:
                self.copies.append(Copy(op, init, arg.value, False))
        yielded = body.ops[-1].inputs[int(op.attrs["early_stop"]) :]
        homes = [arg.home for arg in args if arg.home]
        before = [home.reserved for home in homes]
        for v, arg, home in zip(yielded, args, homes, strict=True):
            content = self.where[v][0]
            inner = content.loops == arg.loops and not content.pinned  # else it is copied at the end in any case
            made = inner and content.value.op is not None and self._whole(v)
            home.reserved = inner and content not in self.want and (not made or arg.last <= content.first)
            if made:
                self._wish(content, home)
        self._settle_block(body)
        self._end_iteration(op, body.ops[-1], list(zip(yielded, body.args[1:], strict=True)))
        for result, home, was in zip(results, homes, before, strict=True):
            home.reserved = was
            self._place(result, home)

    def _end_iteration(self, op: Op, end: Op, moves: list[tuple[Value, Value]]) -> None:
        """Copy what is not yet in its carry's buffer, all at once: no copy overwrites another's source."""

        def home(v: Value) -> _Buffer | None:
            return self.where[v][0].home

        moves = [(s, t) for s, t in moves if home(s) is not home(t) or not self._whole(s)]
        while moves:
            ready = (m for m in moves if all(home(s) is not home(m[1]) for s, _ in moves))
            move = next(ready, None)
            if move:
                moves.remove(move)
            else:  # a cycle: one of its values steps aside
                (source, target), aside = moves[0], Value(moves[0][0].type, "aside")
                self._place(self._define(aside, self.at[end], self.where[target][0].loops), _Buffer())
                move, moves[0] = (source, aside), (aside, target)
            self.copies.append(Copy(op, *move, True))


def plan_buffers(
    module: Module,
    strided: Collection[str] = STRIDED,
    in_place: Mapping[str, tuple[int, ...]] = IN_PLACE,
    branches: Sequence[Branch] = (),
    early: Mapping[str, str] | None = None,
) -> Plan:
    """Plan the buffers of all stages. The module is not changed; the same module gives the same plan.

    Whether a `slice`, `broadcast_to` or `reshape` runs is the plan's to say: it does unless `layouts`
    has its result. Results of stages are dense. A target whose kernels read only dense operands passes
    `strided=()`; one whose kernels may write over fewer or more operands passes its own `in_place`.
    """
    planner = _Planner(module, strided, in_place, branches, early or {})
    root = {b: b.contents[0].value for b in planner.buffers}
    sizes = {r: -(-r.type.nbytes // ALIGNMENT) * ALIGNMENT for r in root.values()}
    spans = {r: (b.contents[0].first, max(c.last for c in b.contents)) for b, r in root.items()}
    outer: dict[Value | Branch, tuple[int, tuple[int, int]]] = {r: (sizes[r], spans[r]) for r in sizes}
    within: dict[Value, tuple[Branch, int]] = {}  # of buffers that nobody reads outside their branch: where in its part
    for branch in branches:
        first, join = planner.at[branch.ops[0]], planner.at[branch.join]
        own = [r for b, r in root.items() if planner.branches.get(r.op) is branch and spans[r][1] < join]  # type: ignore[arg-type]
        at, _ = _offsets({r: outer.pop(r) for r in own})
        within |= {r: (branch, at[r]) for r in own}
        outer[branch] = max((at[r] + sizes[r] for r in own), default=0), (first, join)
    placed, lower_bound = _offsets(outer)
    at = {r: placed[within[r][0]] + within[r][1] if r in within else placed[r] for r in sizes}
    roots = {v: root[c.home] if c.home else c.value for v, (c, _) in planner.where.items()}
    return Plan(
        offsets={v: at[r] + planner.where[v][1].start for v, r in roots.items() if r in at},
        sizes=sizes,
        alias_of={v: r for v, r in roots.items() if v is not r},
        layouts={v: layout for v, (c, layout) in planner.where.items() if v is not c.value},
        copies=tuple(planner.copies),
        peak=max((at[r] + n for r, n in sizes.items()), default=0),
        lower_bound=lower_bound,
        spans=spans,
        stages=tuple(planner.stages),
        branches=tuple(branches),
        early=early or {},
    )


def _offsets(buffers: Mapping[Any, tuple[int, tuple[int, int]]]) -> tuple[dict[Any, int], int]:
    """Where each buffer (size, span) is to lie; and the lower bound of an arena that holds them."""
    live = profile({b: size for b, (size, _) in buffers.items()}, {b: span for b, (_, span) in buffers.items()})
    sizes = np.array([size for size, _ in buffers.values()], np.int64)
    spans = np.array([span for _, span in buffers.values()], np.int64).reshape(-1, 2)
    return dict(zip(buffers, offsets(sizes, spans, live).tolist(), strict=True)), int(live.max(initial=0))
