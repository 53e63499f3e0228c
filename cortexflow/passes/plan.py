"""A buffer plan: where the values of a module live in one arena. `plan_buffers` makes it, targets ask it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from cortexflow.ir.core import DTYPE_BYTES, Op, Value
from cortexflow.ir.shapes import Shape
from cortexflow.passes.branches import Branch

ALIGNMENT = 256  # bytes: what GPU allocators give, and enough for every vector load and TMA descriptor


class Layout(NamedTuple):
    """How a view reads its root: from this byte on, with these strides in elements."""

    start: int
    strides: tuple[int, ...]


class Copy(NamedTuple):
    """`source` goes to `target`'s bytes: before `op` runs or, for a loop, at the end of every iteration."""

    op: Op
    source: Value
    target: Value
    each_iteration: bool


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Where the values of a module live.

    `offsets` has every value with bytes in the arena, views included (their first element).
    `alias_of` leads from a value that shares bytes to its root: the first value in that buffer, or
    the weight or constant that it is a view of. `sizes` and `spans` (first and last position) belong
    to roots. Copies of one op stand in the order in which they must run; a loop's stop flag is read
    before them. A loop's step is written at the start of each iteration. `branches` may run beside what follows them,
    `early` functions beside the first stage, or each right before its own.
    """

    offsets: Mapping[Value, int]
    sizes: Mapping[Value, int]
    alias_of: Mapping[Value, Value]
    layouts: Mapping[Value, Layout]  # of views; all other values are dense from their root's first byte
    copies: tuple[Copy, ...]
    peak: int
    lower_bound: int
    spans: Mapping[Value, tuple[int, int]]
    stages: tuple[tuple[str, int, int], ...]  # name, first and last position
    branches: tuple[Branch, ...]
    early: Mapping[str, str]  # stage → function

    def layout(self, value: Value) -> Layout:
        """Byte start within the root, and strides in elements, of any value."""
        return self.layouts.get(value) or Layout(0, dense(value.type.shape))

    def shown(self, value: Value) -> Value:
        """What a view shows, through other views; other values as they are."""
        while value in self.layouts and value.op is not None:
            value = value.op.inputs[0]
        return value

    def meet(self, a: Value, b: Value) -> bool:
        """Whether two values share bytes of the arena, from the first to the last that each has."""
        if a not in self.offsets or b not in self.offsets:
            return False
        ends = []
        for v in (a, b):
            reach = sum((d - 1) * s for d, s in zip(v.type.shape, self.layout(v).strides, strict=True)) + 1
            ends.append(self.offsets[v] + reach * DTYPE_BYTES[v.type.dtype])
        return self.offsets[a] < ends[1] and self.offsets[b] < ends[0]

    def report(self, rows: int = 12) -> str:
        """A table: peak, lower bound, the peak of each stage, the largest buffers at the peak."""
        live = profile(self.sizes, self.spans)
        at = int(live.argmax()) if live.size else 0
        here = sorted((r for r, (a, b) in self.spans.items() if a <= at <= b), key=lambda r: -self.sizes[r])
        padding = sum(self.sizes[r] - r.type.nbytes for r in here)
        total = sum(self.sizes.values())
        lines = [
            f"arena         {_bytes(self.peak)}",
            f"lower bound   {_bytes(self.lower_bound)}  (arena / bound = {self.peak / max(self.lower_bound, 1):.4f};"
            f" {padding:,} bytes of it are padding to {ALIGNMENT})",
            f"without reuse {_bytes(total)}  ({len(self.sizes):,} buffers, {len(self.offsets):,} values,"
            f" {len(self.copies)} copies)",
            "",
            *(f"@{name:24} {_bytes(int(live[a : b + 1].max()))}" for name, a, b in self.stages),
            "",
            f"live at the peak, position {at} of {live.size}:",
            *(f"  {_bytes(self.sizes[r])} at {self.offsets[r]:>13,}  {described(r)}" for r in here[:rows]),
        ]
        return "\n".join(lines + [f"  and {len(here) - rows} smaller"] * (len(here) > rows))

    def interference(self) -> Any:
        """A networkx graph: one node a root, one edge where two are live at the same position."""
        import networkx as nx

        graph = nx.Graph()
        for r, (first, last) in self.spans.items():
            meets = [q for q in graph if self.spans[q][0] <= last and self.spans[q][1] >= first]
            graph.add_node(r, label=described(r), size=self.sizes[r], offset=self.offsets[r])
            graph.add_edges_from((q, r) for q in meets)
        return graph


def profile(sizes: Mapping[Any, int], spans: Mapping[Any, tuple[int, int]]) -> np.ndarray:
    """Live bytes at every position."""
    change = np.zeros(max((last for _, last in spans.values()), default=0) + 2, np.int64)
    for root, (first, last) in spans.items():
        change[first] += sizes[root]
        change[last + 1] -= sizes[root]
    return change.cumsum()[:-1]


def _bytes(n: int) -> str:
    return f"{n:>14,} bytes"


def described(v: Value) -> str:
    """A value as reports and errors name it."""
    made = "argument" if v.op is None else v.op.name + (f"  # {v.op.note}" if v.op.note else "")
    return f"{'%' + v.name + ': ' if v.name else ''}{v.type} {made}"


def dense(shape: Shape) -> tuple[int, ...]:
    """Row-major strides."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def is_dense(shape: Shape, strides: tuple[int, ...]) -> bool:
    """Whether strides are row-major where they matter."""
    return all(d == 1 or s == w for d, s, w in zip(shape, strides, dense(shape), strict=True)) or 0 in shape
