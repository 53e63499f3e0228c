"""What waits for what: kernels that read before their turn, and launches that run beside others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

Scratch = tuple[Tensor, Tensor]  # for parts of a result, and for counters


class Plan(Protocol):
    """A launch plan as it runs: the scratch at hand; a second one, and a stream, for what runs beside."""

    scratch: Scratch
    other: Scratch
    stream: torch.cuda.Stream | None  # None on a CPU


def settle(scratch: Scratch) -> None:
    """Wait for everything before: a kernel behind this may read it before it waits for its turn."""
    scratch[1][-1:].zero_()


@contextmanager
def beside(plan: Plan) -> Iterator[None]:
    """What is launched within runs beside what follows, over a scratch of its own, until `join`."""
    before, stream = plan.scratch, plan.stream
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    plan.scratch = plan.other
    try:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            settle(plan.scratch)
            yield
    finally:
        plan.scratch = before


def meet(plan: Plan) -> None:
    """Wait for what was launched `beside`; enough before a stage, which begins with `settle`."""
    if plan.stream is not None:
        torch.cuda.current_stream().wait_stream(plan.stream)


def join(plan: Plan) -> None:
    """Wait for what was launched `beside`, before kernels that may read it before their turn."""
    meet(plan)
    settle(plan.scratch)
