"""Attention of few tokens to a cache and to themselves, beside the products of `streaming`.

The tokens are one sample's, their queries and keys rotated already; one key head serves all query heads, whose rows are
one matrix. Two kernels: weights of parts of 32 keys (`segment_weights.cu`), then the values (`segment_values.cu`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cortexflow.kernels.cuda.launch import SHARED_BYTES, launch
from cortexflow.kernels.triton.common import alike, overlaps

KEYS = 32  # of a part
ROWS = 16  # (token, head) of a program
COLUMNS = 16  # of the values, in a program
WARPS, LINE = 8, 48  # of such a program; bytes of a key's values there
MOST_PARTS = 64  # whose values a program's registers hold


def _extent(m: int, heads: int, n: int) -> tuple[int, int]:
    """Tiles of rows, and parts of keys; the last one is the tokens' own."""
    return -(-m * heads // ROWS), -(-n // KEYS) + 1


def fits(b: int, m: int, heads: int, d: int, n: int, room: int) -> bool:
    """Whether the kernels can attend to n keys; `room`: float32 numbers of the scratch."""
    _, parts = _extent(m, heads, n)
    fit = parts <= MOST_PARTS and _shared_bytes(parts) <= SHARED_BYTES and scratch_size(m, heads, n) <= room
    return b == 1 and m <= KEYS and d in (64, 128, 256) and fit


def _shared_bytes(parts: int) -> int:
    """Of a program that multiplies by the values: these, the warps' sums, and of each row shares, tops and totals."""
    return parts * KEYS * LINE + WARPS * ROWS * COLUMNS * 4 + (parts + 2 * WARPS) * ROWS * 4


def scratch_size(m: int, heads: int, n: int) -> int:
    """How many float32 numbers the scratch needs, for 16-bit weights and two numbers a row and part."""
    tiles, parts = _extent(m, heads, n)
    return tiles * ROWS * parts * (2 + KEYS // 2)


def segment_attention(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    cached_k: Tensor,
    cached_v: Tensor,
    mask: Tensor,
    out: Tensor,
    scale: float,
    scratch: Tensor,
) -> None:
    """out [1, m, heads, d] = attention of q to the cache and to the tokens' own keys, as `fits` allows; bf16 or f16.

    q [1, m, heads, d], own k and v [1, m, 1, d], cache [1, n, 1, d], mask bool [1, 1|m, n + m]. Tokens may be strided
    by multiples of 16 bytes, the heads of one are dense. The scratch, float32, needs no initial value. Raises
    ValueError for what the kernels cannot do.
    """
    (b, m, heads, d), n = q.shape, cached_k.shape[1]
    if not fits(b, m, heads, d, n, scratch.numel()):
        raise ValueError(
            f"{b} x {m} tokens with {heads} heads of {d} to {n} keys, scratch of {scratch.numel()}: expected one "
            f"sample, at most {KEYS} tokens, heads of 64, 128 or 256, {(MOST_PARTS - 1) * KEYS} keys, and a scratch of "
            f"{scratch_size(m, heads, n)}"
        )
    given = (q, own_k, own_v, cached_k, cached_v)
    if any(t.stride(1) * 2 % 16 or t.data_ptr() % 16 or t.stride(3) != 1 for t in given) or q.stride(2) != d:
        raise ValueError("expected dense heads, and tokens that begin at multiples of 16 bytes")
    tiles, parts = _extent(m, heads, n)
    stats, weights = scratch.view(-1)[: tiles * ROWS * parts * 2], scratch.view(-1)[tiles * ROWS * parts * 2 :]
    macros = {"HALF": q.dtype == torch.float16, "D": d, "HEADS": heads}
    launch(
        "segment_weights", macros, {}, grid=alike(tiles * parts), block=d // 2, shared=0, early=overlaps(),
        arguments=[q, own_k, cached_k, mask, weights, stats, m, n, tiles, parts, q.stride(1), own_k.stride(1),
                   cached_k.stride(1), mask.stride(1) if mask.shape[1] > 1 else 0, scale * math.log2(math.e)],
    )  # fmt: skip
    launch(
        "segment_values", macros | {"PARTS": parts}, {}, grid=alike(tiles * d // COLUMNS), block=WARPS * 32,
        shared=_shared_bytes(parts), early=overlaps(),
        arguments=[weights, stats, own_v, cached_v, out, m, n, tiles, own_v.stride(1), cached_v.stride(1),
                   out.stride(1)],
    )  # fmt: skip
