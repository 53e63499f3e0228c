"""The order of passes, in one list, and what surrounds each: dump, verification, check.

CORTEXFLOW_DUMP=dir writes the numbered listing after each pass; CORTEXFLOW_VERIFY=1 runs the verifier
after each; CORTEXFLOW_CHECK=1 runs the interpreter before and after each and reports how far the
result moved.
"""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cortexflow.ir.core import Module, Op, clone
from cortexflow.ir.fused import FUSED
from cortexflow.ir.text import dump
from cortexflow.ir.verifier import verify
from cortexflow.passes.absorb import absorb
from cortexflow.passes.canonicalize import canonicalize
from cortexflow.passes.check import Check
from cortexflow.passes.cse import cse
from cortexflow.passes.dce import dce
from cortexflow.passes.fold import fold
from cortexflow.passes.fuse import fuse
from cortexflow.passes.hoist import hoist
from cortexflow.passes.layout import layout
from cortexflow.passes.legalize import legalize
from cortexflow.passes.merge import merge
from cortexflow.passes.predicate import predicate

Fired = int | Counter[str]
Pass = Callable[[Module], Fired]

PIPELINE: tuple[tuple[str, Pass], ...] = (
    ("canonicalize", canonicalize),
    ("fold", fold),
    ("dce", dce),
    ("absorb", absorb),
    ("layout", layout),
    ("cse", cse),
    ("dce", dce),
    ("merge", merge),
    ("canonicalize", canonicalize),
    ("hoist", hoist),
    ("dce", dce),
    ("canonicalize", canonicalize),
    ("predicate", predicate),
    ("fuse", fuse),
    ("cse", cse),
    ("dce", dce),
)


SWITCHES: Mapping[str, str] = {  # what may be left out, and the module still computes the same
    "absorb": "scales and biases go into the weights next to them",
    "layout": "a convolution over patches is a product, for targets that want it so",
    "merge": "products of one input are one product",
    "hoist": "what depends on weights alone is computed once, when they are loaded",
    "cse": "what is computed twice is computed once",
    "fuse": "ops that one kernel can do become one op",
    **{f"fuse.{f.__name__}": (f.__doc__ or "").splitlines()[0] for f in FUSED},
}


ON_REQUEST = frozenset({"layout", "predicate"})  # for the targets that want them; others know better


def pipeline(wants: Collection[str] = ()) -> tuple[tuple[str, Pass], ...]:
    """The passes for a target that wants these of `ON_REQUEST`."""
    return tuple(p for p in PIPELINE if p[0] not in ON_REQUEST or p[0] in wants)


def switched(passes: Sequence[tuple[str, Pass]], without: Collection[str]) -> tuple[tuple[str, Pass], ...]:
    """The passes less those named in `without`; `fuse.NAME` leaves out one fused op."""
    fewer = partial(fuse, fused_ops=[f for f in FUSED if f"fuse.{f.__name__}" not in without])
    return tuple((name, fewer if run is fuse else run) for name, run in passes if name not in without)


@dataclass(frozen=True)
class Step:
    """One pass of a finished run."""

    name: str
    fired: Fired
    seconds: float
    module: Module
    moved: float | None  # largest change of an output, relative to its largest entry; None where unchecked

    @property
    def count(self) -> int:
        """How often the pass fired."""
        return sum(self.fired.values()) if isinstance(self.fired, Counter) else self.fired


@contextmanager
def _uncollected() -> Iterator[None]:
    """Python's collector of cycles rests: a graph is full of them, all alive; to look takes as long."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@_uncollected()
def run_passes(
    module: Module,
    claims: Callable[[Op], bool] | None = None,
    passes: Sequence[tuple[str, Pass]] = PIPELINE,
    keep: bool = True,
) -> tuple[Module, list[Step]]:
    """Run the pipeline, then `legalize` for a target that claims some fused ops.

    Returns the rewritten module (the one given is left alone) and what each pass did, with a snapshot
    of the module after it where `keep` is set.
    """
    passes = (*passes, ("legalize", lambda m: legalize(m, claims)), ("dce", dce)) if claims else passes
    current = clone(module)
    folder = os.environ.get("CORTEXFLOW_DUMP")
    verifying = os.environ.get("CORTEXFLOW_VERIFY") == "1"
    check = Check(module) if os.environ.get("CORTEXFLOW_CHECK") == "1" else None
    steps = [Step("input", 0, 0.0, module, None)]
    if folder:
        _write(folder, 0, steps[0])
    for name, run in passes:
        start = time.perf_counter()
        fired = run(current)
        seconds = time.perf_counter() - start
        if verifying:
            verify(current)
        moved = check.after(name, current) if check else None
        steps.append(Step(name, fired, seconds, clone(current) if keep else current, moved))
        if folder:
            _write(folder, len(steps) - 1, steps[-1])
    return current, steps


def report(steps: list[Step]) -> str:
    """A table of what each pass did."""
    lines = [f"{'pass':<14}{'fired':>7}{'ms':>9}{'moved':>11}  detail"]
    for s in steps[1:]:
        moved = "" if s.moved is None else f"{s.moved:.1e}"
        detail = (
            ", ".join(f"{k.removeprefix('fused.')} {n}" for k, n in s.fired.items())
            if isinstance(s.fired, Counter)
            else ""
        )
        lines.append(f"{s.name:<14}{s.count:>7}{s.seconds * 1e3:>9.1f}{moved:>11}  {detail}".rstrip())
    return "\n".join(lines)


def _write(folder: str, number: int, step: Step) -> None:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{number:02d}_{step.name}.ir").write_text(dump(step.module))
