"""Launching kernels of this folder through CUDA's driver: tensor maps, clusters, programmatic dependent launch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from cortexflow.kernels.cuda.nvrtc import compiled, source

PREPARING: ContextVar[Callable[[object, Callable[[], object]], None] | None] = ContextVar("preparing", default=None)
"""Where it is set, a launch hands it what its kernel is and what compiles it, and does nothing else."""

SHARED_BYTES = 227 << 10  # that a block may have on Hopper

_SHARED, _CARVEOUT = 8, 9  # CUfunction_attribute
_CLUSTER, _EARLY = 4, 6  # CUlaunchAttributeID
_MAP_BYTES = 128
_ROOMS: dict[torch.device, list[Tensor]] = {}  # what is left of the room for maps
_CODES = {torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType
_SWIZZLES = {0: 0, 32: 1, 128: 3}  # CUtensorMapSwizzle, by bytes of a row
_L2_LINE = 2  # CUtensorMapL2promotion: fetch 128 bytes


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("gap", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


def launch(
    name: str,
    macros: Mapping[str, int],
    fragments: Mapping[str, str],
    arguments: Sequence[Tensor | int | float | None],
    *,
    grid: int,
    block: int,
    shared: int,
    cluster: int = 1,
    early: bool = False,
) -> None:
    """Launch kernel `name` on the current stream; tensors are passed as pointers, numbers in 32 bits.

    `early`: it may become resident before the kernel ahead of it has ended, and waits for it itself.
    Raises RuntimeError with the driver's words where it cannot.
    """
    macro_items, fragment_items = tuple(macros.items()), tuple(fragments.items())
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    prepare = PREPARING.get()
    if prepare is not None:
        prepare((name, macro_items, shared), lambda: _function(name, macro_items, fragment_items, shared, device))
        return
    function = _function(name, macro_items, fragment_items, shared, device)
    values: list[ctypes._SimpleCData] = []  # type: ignore[type-arg]
    for a in arguments:
        if isinstance(a, float):
            values.append(ctypes.c_float(a))
        elif isinstance(a, int):
            values.append(ctypes.c_int(a))
        else:
            values.append(ctypes.c_void_p(0 if a is None else a.data_ptr()))
    places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    attributes = (_Attribute * 2)()
    count = 0
    for code, value in ((_CLUSTER, (cluster, 1, 1)), (_EARLY, (1, 0, 0))):
        if (code == _CLUSTER and cluster > 1) or (code == _EARLY and early):
            attributes[count].id = code
            attributes[count].value[:3] = value
            count += 1
    stream = torch.cuda.current_stream().cuda_stream
    config = _Launch((grid, 1, 1), (block, 1, 1), shared, stream, attributes, count)
    _check(_driver().cuLaunchKernelEx(ctypes.byref(config), function, places, None), f"launching kernel {name}")


def matrix(x: Tensor, rows: int, columns: int, swizzle: int) -> Tensor | None:
    """The copy engine's map of x [m, n] in blocks [rows, columns], in the card's memory."""
    return _mapped(x, (x.shape[1], x.shape[0]), (x.stride(0),), (columns, rows), swizzle)


def heads(x: Tensor, rows: int, columns: int, swizzle: int) -> Tensor | None:
    """The copy engine's map of x [b, n, heads, d] in blocks of one head's [rows, columns]."""
    b, n, count, d = x.shape
    strides = x.stride(2), x.stride(1), x.stride(0) if b > 1 else n * x.stride(1)
    return _mapped(x, (d, count, n, b), strides, (columns, 1, rows, 1), swizzle)


def _mapped(
    x: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...], swizzle: int
) -> Tensor | None:  # fmt: skip
    """Raises ValueError for what the copy engine cannot address. Nothing while kernels are only prepared."""
    if x.dtype not in _CODES:
        raise ValueError(f"expected bfloat16 or float16, found {x.dtype}")
    if x.stride(-1) != 1 or x.data_ptr() % 16 or any(s * x.element_size() % 16 for s in strides):
        raise ValueError(
            f"expected dense rows that begin at multiples of 16 bytes, found strides {x.stride()}, "
            f"place {x.data_ptr():#x}"
        )
    if PREPARING.get() is not None:
        return None
    return _map(x.device, x.data_ptr(), _CODES[x.dtype], sizes, strides, block, _SWIZZLES[swizzle])


@cache  # once, in the card's memory: among a launch's arguments maps are fetched anew each time
def _map(
    device: torch.device, place: int, code: int, sizes: tuple[int, ...], strides: tuple[int, ...],
    block: tuple[int, ...], swizzle: int,
) -> Tensor:  # fmt: skip
    """The map of a place in memory, whoever has it: it says nothing of what is there."""
    rank = len(sizes)
    room = ctypes.create_string_buffer(2 * _MAP_BYTES)
    at = (ctypes.addressof(room) + 63) // 64 * 64
    made = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), code, rank, ctypes.c_void_p(place), (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*(2 * s for s in strides)), (ctypes.c_uint32 * rank)(*block),
        (ctypes.c_uint32 * rank)(*([1] * rank)), 0, swizzle, _L2_LINE, 0,
    )  # fmt: skip
    _check(made, f"describing a matrix of {sizes[::-1]} in blocks of {block[::-1]}")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a kernel's tensor maps are made at its first launch: launch once before capturing a graph")
    found = _room(device)
    found.copy_(torch.frombuffer(bytearray(ctypes.string_at(at, _MAP_BYTES)), dtype=torch.uint8))
    return found


def _room(device: torch.device) -> Tensor:
    """Room for one more map in a device's memory, beside the others."""
    rooms = _ROOMS.setdefault(device, [])
    if not rooms:
        rooms += torch.empty(1 << 10, _MAP_BYTES, dtype=torch.uint8, device=device).unbind()
    return rooms.pop()


@cache
def _function(
    name: str, macros: tuple[tuple[str, int], ...], fragments: tuple[tuple[str, str], ...], shared: int,
    device: int | None,
) -> ctypes.c_void_p | None:  # fmt: skip
    """The kernel, compiled and, where there is a card, loaded there with so much shared memory."""
    code = compiled(name, source(name, dict(macros), dict(fragments)))
    if device is None:
        return None
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the context that the driver needs
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(module), code), f"loading kernel {name}")
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding kernel {name}")
        _check(_driver().cuFuncSetAttribute(function, _SHARED, shared), f"giving kernel {name} {shared} bytes to share")
        # As much for sharing as there is: a kernel that wants more is not resident beside one that was given less.
        _check(_driver().cuFuncSetAttribute(function, _CARVEOUT, 100), f"giving kernel {name} all memory to share")
    return function


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what}: the driver says {(text.value or b'unknown').decode()} ({status})")
