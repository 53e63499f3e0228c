"""Where things live: a weight once, in the form that the plan reads; large lookup tables and inputs by way of the host.

A table of which only rows are read, picked at run time, stays in pinned host memory. Inputs pass through pinned
buffers, so that their copies neither wait for the card nor make it wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from cortexflow.errors import InputError
from cortexflow.ir.core import Module, Op, Type
from cortexflow.ir.dtypes import TORCH_DTYPES

HOST_BYTES = 64 << 20  # a larger table read by rows alone stays on the host
ALIGNMENT = 256  # bytes

Forms = Mapping[str, dict[str, Tensor]]  # by key and form: a weight, where it is placed already


def _interleaved(made: Tensor) -> Tensor:
    """Rows of columns, with k in the order in which `kernels/gluon/warpgroup.py` loads its other operand."""
    n, k = made.shape
    return made.view(n, k // 32, 2, 2, 4, 2).permute(1, 4, 2, 3, 5, 0)


def _pairs(made: Tensor) -> Tensor:
    """The columns of both halves in turn: a gated unit's gate and up beside each other."""
    k, n = made.shape
    return made.view(k, n // 2, 2).transpose(1, 2)


# How a weight w [k, n] may be stored: whether as [n, k], and a view of the place that has the entries in w's order
# (its axes may be split): what is written through it fills the place, what is read through it is w again.
FORMS: Mapping[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "plain": (False, lambda made: made),
    "rows": (True, lambda made: made.t()),
    "interleaved": (True, _interleaved),
    "pairs": (False, _pairs),
}


def host_weights(module: Module) -> frozenset[str]:
    """The weights that may stay on the host: large matrices of which stages read only rows, picked at run time."""
    steps = {op.body.args[0] for f in module.stages for op in f.block.walk() if op.body}

    def by_row(op: Op, i: int) -> bool:
        return op.name == "gather" and i == 0 and op.attrs["axis"] == 0 and op.inputs[1] not in steps

    found = {k for k, t in module.weight_types().items() if t.nbytes > HOST_BYTES and len(t.shape) == 2}
    for op in (op for f in module.stages for op in f.block.walk()):
        found -= {v.op.attrs["key"] for i, v in enumerate(op.inputs) if _is_weight(v.op) and not by_row(op, i)}  # type: ignore[union-attr]
    return frozenset(found)


def _is_weight(op: Op | None) -> bool:
    return op is not None and op.name == "weight"


def allot(
    wanted: Mapping[tuple[str, str], str],
    types: Mapping[str, Type],
    device: torch.device,
    host: Iterable[str],
    forms: Forms,
    besides: int = 0,
) -> tuple[dict[str, Tensor], list[tuple[str, str, Tensor]], Tensor]:
    """Room for weights: (tensors by the plan's name, (key, form, place) of those still empty, bytes for other use).

    `wanted`: (key, form) → name. What `forms` holds is taken from there; `fill_new` puts there what is new. Those on
    the device share one allocation, and so do as many bytes as `besides` says: on its own something small may get a
    corner of a large block, which the allocator then cannot give back.
    """
    same = {key: id(forms[key]) for key, _ in wanted}  # weights that are made alike have one dictionary
    places = {(same[key], form): forms[key][form] for key, form in wanted if form in forms[key]}
    new: dict[tuple[int, str], str] = {}
    for key, form in wanted:
        if (same[key], form) not in places:
            new.setdefault((same[key], form), key)
    sizes = [besides, *(0 if k in host else types[k].nbytes for k in new.values())]
    begins = [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
    room = torch.empty(begins[-1], dtype=torch.uint8, device=device)
    empty = []
    for (place, key), begin in zip(new.items(), begins[1:], strict=False):
        t, form = types[key], place[1]
        shape, dtype = t.shape[::-1] if FORMS[form][0] else t.shape, TORCH_DTYPES[t.dtype]
        if key in host:
            made = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
        else:
            made = room[begin : begin + t.nbytes].view(dtype).view(shape)
        places[place] = made
        empty.append((key, form, made))
    return {name: places[same[key], form] for (key, form), name in wanted.items()}, empty, room[:besides]


def fill_new(empty: Iterable[tuple[str, str, Tensor]], weights: Mapping[str, Tensor], forms: Forms) -> None:
    """Fill what `allot` left empty: from another form of the weight where one is placed, or as `weights` gives it."""
    for key, form, place in empty:
        there = next(iter(forms[key].items()), None)
        fill(place, form, weights[key] if there is None else plain(*there))
        forms[key][form] = place  # not before it is filled: a build may fail, and the next one looks here


def fill(place: Tensor, form: str, w: Tensor) -> None:
    """Bring a weight [k, n] to its place in a form."""
    entries = FORMS[form][1](place)
    w = w.view(entries.shape)
    # The host reorders slowly: what lies in another order crosses as it is.
    entries.copy_(w if w.stride() == entries.stride() else w.to(place.device))


def plain(form: str, made: Tensor) -> Tensor:
    """A weight [k, n] from one of its forms, on the same device: a view where strides can say it, or a copy."""
    return FORMS[form][1](made).reshape(made.shape[::-1] if FORMS[form][0] else made.shape)


class Staging:
    """Pinned buffers for inputs that the caller holds in host memory."""

    def __init__(self, types: Mapping[str, Type], device: torch.device) -> None:
        self.pinned: dict[str, Tensor] = {}
        if device.type == "cuda":
            self.sent = torch.cuda.Event()
            for name, t in types.items():
                self.pinned[name] = torch.empty(t.shape, dtype=TORCH_DTYPES[t.dtype], pin_memory=True)

    def write(self, places: Iterable[tuple[str, Tensor]], inputs: Mapping[str, Tensor], what: str) -> None:
        """Copy inputs to their places; returns before the card has them. Raises `InputError` for a missing one."""
        if self.pinned:
            self.sent.synchronize()  # the buffers may be on their way still
        for name, place in places:
            x = inputs.get(name)
            if x is None:
                raise InputError(f"{what}: missing input {name!r} {tuple(place.shape)}")
            if name in self.pinned and not x.is_cuda:
                pinned = self.pinned[name]
                if x.dtype == pinned.dtype and x.shape == pinned.shape and x.is_contiguous():
                    np.copyto(pinned.numpy(), x.numpy())  # by this thread: waking others is what varies
                else:
                    pinned.copy_(x)
                x = pinned
            place.copy_(x, non_blocking=True)
        if self.pinned:
            self.sent.record()
