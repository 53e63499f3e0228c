"""Large weights made on a device, a slice at a time.

Most weights are a checkpoint's tensor scaled and rounded entry by entry. Such a tensor crosses to the device as it is
stored; there it is widened, scaled and rounded in slices, so that besides the result hardly anything needs room. The
bits are those of the same ops on the host: each entry is the work of its own, by operations that IEEE 754 defines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from cortexflow.errors import InputError
from cortexflow.ir import Op, Value
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.ir.interpreter import evaluate

Read = Callable[[str], Tensor]

SMALLEST, LARGEST = 1 << 20, 256 << 20  # bytes; a larger one would need as much room again beside its place
SLICE = 1 << 22  # entries
AHEAD, READERS = 16, 3  # tensors that are read before they are asked for, and by how many threads
_ENTRYWISE = ("add", "sub", "mul", "div", "cast")
_SMALL = (*_ENTRYWISE, "weight", "const", "reshape", "transpose", "slice")  # what makes scales along an axis


def fits(v: Value) -> bool:
    """Whether a result of `prepare` can be made here: entry by entry from weights, or such matrices side by side."""
    firsts = {_first_axis(u) for u in _beside(v)}
    return SMALLEST <= v.type.nbytes <= LARGEST and len(firsts) == 1 and None not in firsts


def sources(v: Value) -> list[str]:
    """The large tensors of the checkpoint that a value is made from, in the order in which they are read."""
    return [key for u in _beside(v) for key in _sources(u)]


def make(v: Value, read: Read, device: torch.device) -> Tensor:
    """The value, dense but for the order of its axes: its memory goes as that of what is stored.

    Raises `InputError` for a tensor of another shape than the graph names.
    """
    matrices = _beside(v)
    first = _first_axis(matrices[0])
    assert first is not None, "see fits()"
    order = sorted(range(len(v.type.shape)), key=lambda axis: axis != first)
    room = torch.empty([v.type.shape[i] for i in order], dtype=TORCH_DTYPES[v.type.dtype], device=device)
    made = room.permute([order.index(i) for i in range(len(order))])
    axis = _op(v).attrs["axis"] if len(matrices) > 1 else 0
    with torch.no_grad():
        for u, place in zip(matrices, made.split([u.type.shape[axis] for u in matrices], axis), strict=True):
            _fill(place, u, first, _OnDevice(read, device))
    return made


def read_ahead(weights: Mapping[str, Tensor], names: Iterable[str]) -> Read:
    """Reads tensors by name, the next few of `names` in other threads before they are asked for."""
    left, coming = deque(dict.fromkeys(names)), dict[str, Future[Tensor]]()
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="weights")

    def read(name: str) -> Tensor:
        found = coming.pop(name, None)
        while left and len(coming) < AHEAD:
            if (following := left.popleft()) != name:
                coming[following] = pool.submit(weights.__getitem__, following)
        return weights[name] if found is None else found.result()

    return read


class _OnDevice:
    """What one matrix is made from, on the device: tensors as they are stored, and small values."""

    def __init__(self, read: Read, device: torch.device) -> None:
        self.read, self.device = read, device
        self.found: dict[Value, Tensor] = {}

    def stored(self, v: Value, op: Op) -> Tensor:
        if v not in self.found:
            x = self.read(op.attrs["key"])
            if tuple(x.shape) != v.type.shape:
                raise InputError(f"weight {op.attrs['key']!r}: expected {v.type}, found shape {tuple(x.shape)}")
            self.found[v] = x.to(self.device)
        return self.found[v]

    def small(self, v: Value) -> Tensor:
        op = _op(v)
        if op.name == "weight":
            return self.stored(v, op).to(TORCH_DTYPES[v.type.dtype])
        return evaluate(op, [self.small(u) for u in op.inputs]).to(self.device)


def _op(v: Value) -> Op:
    assert v.op is not None
    return v.op


def _beside(v: Value) -> list[Value]:
    """The matrices that lie side by side in a value; itself, where it is one."""
    return [*v.op.inputs] if v.op is not None and v.op.name == "concat" else [v]


def _first_axis(v: Value) -> int | None:
    """Where the first axis of the stored tensor is, of a value that is made entry by entry from one or several."""
    op = v.op
    if op is None or op.body:
        return None
    if op.name == "weight":
        return 0
    if op.name == "transpose":
        first = _first_axis(op.inputs[0])
        return None if first is None else op.attrs["perm"].index(first)
    if op.name not in _ENTRYWISE or not all(u.type.shape == v.type.shape or _is_small(u) for u in op.inputs):
        return None
    found = {_first_axis(u) for u in op.inputs if u.type.shape == v.type.shape}
    return found.pop() if len(found) == 1 else None


def _is_small(v: Value) -> bool:
    op = v.op
    return op is not None and v.type.nbytes < SMALLEST and op.name in _SMALL and all(map(_is_small, op.inputs))


def _sources(v: Value) -> list[str]:
    op = _op(v)
    if op.name == "weight":
        return [op.attrs["key"]]
    return [key for u in op.inputs if op.name == "transpose" or u.type.shape == v.type.shape for key in _sources(u)]


def _fill(place: Tensor, v: Value, axis: int, found: _OnDevice) -> None:
    n = v.type.shape[axis]
    step = max(1, SLICE * n // v.type.size)
    for begin in range(0, n, step):
        size = min(step, n - begin)
        place.narrow(axis, begin, size).copy_(_slice(v, axis, begin, size, found))


def _slice(v: Value, axis: int, begin: int, size: int, found: _OnDevice) -> Tensor:
    """Some of a value's entries: `size` along an axis from `begin`."""
    op = _op(v)
    if op.name == "weight":
        return found.stored(v, op).narrow(axis, begin, size).to(TORCH_DTYPES[v.type.dtype])
    if op.name == "transpose":
        perm = op.attrs["perm"]
        return _slice(op.inputs[0], perm[axis], begin, size, found).permute(perm)
    operands = []
    for u in op.inputs:
        if u.type.shape == v.type.shape:
            operands.append(_slice(u, axis, begin, size, found))
        else:
            x, at = found.small(u), axis - len(v.type.shape)  # aligned from the last axis on
            operands.append(x.narrow(at, begin, size) if x.ndim >= -at and x.shape[at] != 1 else x)
    return evaluate(op, operands)
