"""What kernels share: activations, and how a kernel overlaps its start with the one before it."""

from __future__ import annotations

from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

OVERLAP: ContextVar[bool] = ContextVar("overlap", default=True)  # false: the kernels launched here wait their turn


def overlaps() -> bool:
    """Whether a kernel may be launched before the one ahead of it has ended, and the card can (Hopper and later)."""
    return OVERLAP.get() and _launches_early()


@cache
def _launches_early() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@cache
def processors() -> int:
    """Multiprocessors of the card; without one, of an H100."""
    if not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def alike(programs: int, cluster: int = 1) -> int:
    """So many programs and those that only wait, until every multiprocessor has as many; whole clusters."""
    turn = processors() // cluster * cluster
    return triton.cdiv(programs, turn) * turn


def per_sample(x: Tensor) -> int:
    """Entries from one sample of x [b, ...] to the next; 0 where there is one, which all samples of a batch share."""
    return x.stride(0) if x.shape[0] > 1 else 0


@cache
def shared_memory() -> int:
    """Bytes that a block may have; without a card, what every supported one has."""
    if not torch.cuda.is_available():
        return 99 << 10
    return torch.cuda.get_device_properties(torch.cuda.current_device()).shared_memory_per_block_optin


@triton.jit
def activate(x, KIND: tl.constexpr):
    """An activation in float32; `none` is the identity."""
    if KIND == "gelu_tanh":  # 0.5 x (1 + tanh(y)) = x sigmoid(2 y)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "relu":
        return tl.maximum(x, 0.0)
    elif KIND == "sigmoid":
        return tl.sigmoid(x)
    elif KIND == "tanh":
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0
    else:
        return x


@triton.jit
def let_next_start():
    """Programmatic dependent launch: the next kernel may become resident now."""
    if cuda_capability_geq(9, 0):
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def wait_for_previous():
    """Programmatic dependent launch: everything that earlier kernels wrote is visible after this."""
    if cuda_capability_geq(9, 0):
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
