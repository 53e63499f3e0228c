"""Attention of many queries to at most 256 keys, as image towers have it (`attention.cu`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cortexflow.kernels.cuda.launch import heads, launch
from cortexflow.kernels.cuda.nvrtc import multiply
from cortexflow.kernels.triton.common import overlaps, processors

KEYS = 256
ROWS = 64  # queries of a program
WIDE, NARROW = 64, 16  # the pieces of a head
SHARED_BYTES = 103 << 10
ALONE_BYTES = 116 << 10
"""What a program is given where each has a multiprocessor: two would share one while another has none."""


def fits(n: int, groups: bool, d: int) -> bool:
    """Whether the kernel can attend to n keys by heads of d numbers; `groups`: key heads serve several query heads."""
    return n <= KEYS and not groups and WIDE <= d <= WIDE + NARROW and d % 8 == 0


def attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
    """out [b, m, heads, d] from q [b, m, heads, d], k and v [b, n, heads, d], as `fits` allows; bf16 or f16.

    Heads and d are dense, the rest is strided by multiples of 16 bytes.
    """
    (b, m, count, d), n = q.shape, k.shape[1]
    if not fits(n, k.shape[2] != count, d):
        raise ValueError(f"{n} keys, {k.shape[2]} heads for {count}, of {d} numbers: expected at most {KEYS}, as many, "
                         f"and a multiple of 8 from {WIDE} to {WIDE + NARROW}")  # fmt: skip
    macros = {"HALF": q.dtype == torch.float16, "WIDTH": d, "RAGGED": n < KEYS}
    blocks = [(x, rows, width) for x, rows in ((q, ROWS), (k, 128), (v, 128)) for width in (WIDE, NARROW)]
    maps = [heads(x, rows, width, swizzle=2 * width) for x, rows, width in blocks]
    tiles = -(-m // ROWS)
    shared = ALONE_BYTES if tiles * count * b <= processors() else SHARED_BYTES
    fragments = {
        "LOGITS": multiply(128, q.dtype),
        "WIDE": multiply(WIDE, q.dtype, registers=True),
        "NARROW": multiply(NARROW, q.dtype, registers=True),
    }
    launch(
        "attention", macros, fragments, grid=tiles * count * b, block=128, shared=shared,
        early=overlaps(), arguments=[*maps, heads(out, ROWS, d, swizzle=0), n, count, tiles, scale * math.log2(math.e)],
    )  # fmt: skip
