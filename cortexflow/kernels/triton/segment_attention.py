"""Attention of a few queries to a cached prefix and to themselves, for latency: nothing is combined through atomics.

Query heads of one key head are rows of one matrix, one for each sample of a batch. Two kernels: the first, spread
over keys, writes each tile's weights exp2(logit - largest of the tile) with that largest logit and their sum; the
second, spread over the values' columns, brings the tiles to one scale and multiplies by the values. Each has its
part of the cache, which was written long ago, before it waits for the kernel ahead, so that one round trip to memory
is left after the wait. A `Split` as `config` asks for Hopper's warpgroup instructions, which suit more rows
(kernels/gluon/split_attention.py).
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from cortexflow.kernels.gluon import split_attention as split
from cortexflow.kernels.gluon.split_attention import Split
from cortexflow.kernels.triton.common import let_next_start, overlaps, per_sample, shared_memory, wait_for_previous


class Config(NamedTuple):
    """Tiles of the two kernels; all powers of two."""

    rows: int
    """Rows (token, head) of a program that computes weights, at least 16."""
    keys: int
    """Keys of such a program, at least 16."""
    warps: int
    """Warps of such a program."""
    value_rows: int
    """Rows of a program that multiplies by the values, at least 16."""
    columns: int
    """Columns of the values in such a program, at most d."""
    value_warps: int
    """Warps of such a program."""


FEW = (Config(16, 64, 8, 16, 32, 2), Config(16, 64, 8, 16, 32, 4), Config(16, 64, 4, 16, 32, 4))
MANY = (Config(64, 64, 8, 16, 64, 8), Config(64, 32, 4, 16, 64, 4), Config(32, 128, 8, 16, 32, 4))
SPLITS = (Split(64), Split(128), Split(32))  # the last has too many parts where keys are many
MOST_BLOCKS = 96  # of 64 keys. 126 of them take the room in which the next products fetch their weights


def candidates(b: int, m: int, heads: int, d: int, n: int) -> list[Config | Split]:
    """At most five configurations worth timing for 16-bit floats, the one that needs no timing first."""
    few = m * heads <= 128 and b < 4  # small tiles occupy the card, which four samples do with large ones
    splits = [c for c in SPLITS if _has_warpgroups() and split.fits(m, heads, d, n, c)]
    if b * split.tiles(m, heads) * split.parts(m, n, SPLITS[0]) > MOST_BLOCKS:
        splits.sort(key=lambda c: -c.keys)
    known = FEW if few else [c for c in MANY if _has_warpgroups() or c.rows < 64]  # 64 rows are for warp groups
    tiles = list(dict.fromkeys(_narrowed(c, m, d, n) for c in known))
    return ([*tiles, *splits] if few else [*splits[:1], *tiles])[:5]


def _narrowed(config: Config, m: int, d: int, n: int) -> Config:
    """The configuration with as many columns as there are, and as fit into shared memory with all keys."""
    columns, keys = min(config.columns, d), triton.cdiv(n, config.keys) + triton.cdiv(m, config.keys)
    while columns > 16 and keys * config.keys * (columns + config.value_rows) * 2 + 4096 > shared_memory():
        columns //= 2
    return config._replace(columns=columns)


def default(b: int, m: int, heads: int, d: int, n: int, room: int | None = None) -> Config | Split:
    """The configuration for 16-bit floats where nothing was timed; `room`: numbers that its scratch may have."""
    offered = candidates(b, m, heads, d, n)
    fitting = [c for c in offered if room is None or scratch_size(b, m, heads, n, c) <= room]
    if not fitting:
        least = min(scratch_size(b, m, heads, n, c) for c in offered)
        raise ValueError(f"attention of {b} x {m} queries to {n} keys needs a scratch of {least} numbers, not {room}")
    return fitting[0]


def scratch_size(b: int, m: int, heads: int, n: int, config: Config | Split) -> int:
    """How many float32 numbers `segment_attention` needs in `scratch[0]`, whatever the dtype."""
    if isinstance(config, Split):
        return b * split.scratch_size(m, heads, n, config)
    tiles, padded = _extent(m, heads, n, config)
    return b * padded * tiles * (config.keys + 2)


def _extent(m: int, heads: int, n: int, config: Config) -> tuple[int, int]:
    """Tiles of keys, and rows with padding."""
    rows = max(config.rows, config.value_rows)
    return triton.cdiv(n, config.keys) + triton.cdiv(m, config.keys), triton.cdiv(m * heads, rows) * rows


@cache
def _has_warpgroups() -> bool:
    """Whether the card has Hopper's warpgroup instructions."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@triton.jit
def settle(x):
    """The same 16-bit numbers, computed where they were loaded and not once in each warp that multiplies by them."""
    if x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    else:
        return x


@triton.jit
def _halves(x, place, cosine, sine, angle, there, HALF: tl.constexpr, dtype: tl.constexpr):
    """Rotated halves of rows at `x + place`, zero where a row is not there."""
    x1 = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    x2 = tl.load(x + place + HALF, mask=there, other=0.0).to(tl.float32)
    c = tl.load(cosine + angle, mask=there, other=0.0)
    s = tl.load(sine + angle, mask=there, other=0.0)
    return settle((x1 * c - x2 * s).to(dtype)), settle((x2 * c + x1 * s).to(dtype))


@triton.jit
def _weigh(q1, q2, k1, k2, seen, there, SCALE: tl.constexpr):
    """Weights of a tile of keys [rows, keys], its largest logit (base 2) and the weights' sum [rows]."""
    first = tl.dot(q1, tl.trans(k1), input_precision="ieee") * SCALE  # two sums, so that neither waits for the other
    second = tl.dot(q2, tl.trans(k2), input_precision="ieee") * SCALE
    logits = tl.where(seen != 0, first + second, -1.0e30)  # unseen: nothing beside one that is seen
    logits = tl.where(there[None, :], logits, float("-inf"))
    top = tl.max(logits, axis=1)
    p = tl.exp2(logits - top[:, None])
    return p, top, tl.sum(p, axis=1)


@triton.jit
def weights_kernel(
    q, own_k, cached_k, cosine, sine, mask, weights, stats, q_token, k_token, cached_token, mask_row,
    q_sample, k_sample, cached_sample, angle_sample, mask_sample,
    SCALE: tl.constexpr, M: tl.constexpr, PREFIX: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CACHED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BATCHED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows and KEYS keys of a sample, of the cache (the first CACHED tiles) or of its own tokens.

    weights [b, PADDED, WIDTH], stats f32 [b, 2, WIDTH / KEYS, PADDED]: largest logits, sums.
    """
    let_next_start()
    tile, part = tl.program_id(0), tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64) if BATCHED else 0
    q += sample * q_sample
    own_k += sample * k_sample
    cached_k += sample * cached_sample
    cosine += sample * angle_sample
    sine += sample * angle_sample
    mask += sample * mask_sample
    weights += sample * (PADDED * WIDTH)
    stats += sample * (2 * (WIDTH // KEYS) * PADDED)
    HALF: tl.constexpr = D // 2
    row = tile * ROWS + tl.arange(0, ROWS)
    token = row // HEADS
    valid = row < M * HEADS
    d = tl.arange(0, HALF)
    at = q_token * token[:, None] + (row % HEADS)[:, None] * D + d[None, :]
    angle = token[:, None] * HALF + d[None, :]
    key = tl.arange(0, KEYS)
    target = weights + row[:, None] * WIDTH + part * KEYS + key[None, :]
    dtype: tl.constexpr = weights.dtype.element_ty
    if part < CACHED:
        n = part * KEYS + key
        there = n < PREFIX
        line = cached_k + n[:, None] * cached_token + d[None, :]
        k1 = tl.load(line, mask=there[:, None], other=0.0)
        k2 = tl.load(line + HALF, mask=there[:, None], other=0.0)
        wait_for_previous()
        look = mask + token[:, None] * mask_row + n[None, :]
        seen = tl.load(look, mask=valid[:, None] & there[None, :], other=0)
        q1, q2 = _halves(q, at, cosine, sine, angle, valid[:, None], HALF, dtype)
        p, top, total = _weigh(q1, q2, k1, k2, seen, there, SCALE)
        tl.store(target, p.to(dtype))
        tl.store(stats + part * PADDED + row, top)
        tl.store(stats + (WIDTH // KEYS + part) * PADDED + row, total)
    else:
        wait_for_previous()
        m = (part - CACHED) * KEYS + key
        mine = m < M
        look = mask + token[:, None] * mask_row + PREFIX + m[None, :]
        seen = tl.load(look, mask=valid[:, None] & mine[None, :], other=0)
        own = m[:, None] * k_token + d[None, :]
        k1, k2 = _halves(own_k, own, cosine, sine, m[:, None] * HALF + d[None, :], mine[:, None], HALF, dtype)
        q1, q2 = _halves(q, at, cosine, sine, angle, valid[:, None], HALF, dtype)
        p, top, total = _weigh(q1, q2, k1, k2, seen, mine, SCALE)
        tl.store(target, p.to(dtype))
        tl.store(stats + part * PADDED + row, top)
        tl.store(stats + (WIDTH // KEYS + part) * PADDED + row, total)


@triton.jit
def values_kernel(
    weights, stats, own_v, cached_v, out, v_token, cached_token, out_token, v_sample, cached_sample, out_sample,
    M: tl.constexpr, PREFIX: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, CACHED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    BATCHED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows and COLUMNS columns of a sample's values; the tiles' products are added in their order."""
    let_next_start()
    sample = tl.program_id(2).to(tl.int64) if BATCHED else 0
    own_v += sample * v_sample
    cached_v += sample * cached_sample
    out += sample * out_sample
    weights += sample * (PADDED * WIDTH)
    stats += sample * (2 * (WIDTH // KEYS) * PADDED)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    key = tl.arange(0, KEYS)
    values = ()
    for part in tl.static_range(CACHED):
        n = part * KEYS + key
        place = cached_v + n[:, None] * cached_token + column[None, :]
        values += (tl.load(place, mask=(n < PREFIX)[:, None], other=0.0),)
    wait_for_previous()

    TILES: tl.constexpr = WIDTH // KEYS
    for part in tl.static_range(CACHED, TILES):
        m = (part - CACHED) * KEYS + key
        place = own_v + m[:, None] * v_token + column[None, :]
        values += (tl.load(place, mask=(m < M)[:, None], other=0.0),)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    tops, sums, ps = (), (), ()
    for part in tl.static_range(TILES):
        tops += (tl.load(stats + part * PADDED + row),)
        sums += (tl.load(stats + (TILES + part) * PADDED + row),)
        ps += (tl.load(weights + row[:, None] * WIDTH + part * KEYS + key[None, :]),)
    for part in tl.static_range(TILES):
        best = tl.maximum(best, tops[part])
    for part in tl.static_range(TILES):
        share = tl.exp2(tops[part] - best)
        total += share * sums[part]
        acc += share[:, None] * tl.dot(ps[part], values[part], input_precision="ieee")
    target = out + (row // HEADS)[:, None] * out_token + (row % HEADS)[:, None] * D + column[None, :]
    tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=(row < M * HEADS)[:, None])


def segment_attention(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    cached_k: Tensor,
    cached_v: Tensor,
    cosine: Tensor,
    sine: Tensor,
    mask: Tensor,
    out: Tensor,
    scale: float,
    scratch: tuple[Tensor, Tensor],
    config: Config | Split,
    rotated: bool = False,
) -> None:
    """out [b, m, heads, d] = attention of rotated q to the cache and to the tokens' own rotated keys.

    q [b, m, heads, d], own k and v [b, m, 1, d], cache [b, n, 1, d] (rotated), angles f32 [1|b, m, d/2], dense, mask
    bool [1|b, 1|m, n + m]; d a power of two from 32. Tokens may be strided, the heads of one are contiguous.
    `scratch[0]`, float32, holds weights and sums in between (`scratch_size` numbers); it needs no initial value.
    `rotated`: q and own k are rotated already, which a `Split` can take.
    """
    b, m, heads, d = q.shape
    n = cached_k.shape[1]
    needed = scratch_size(b, m, heads, n, config)
    if scratch[0].numel() < needed:
        raise ValueError(f"scratch of {scratch[0].numel()} numbers where {needed} are needed")
    if isinstance(config, Split):
        split.split_attention(
            q, own_k, own_v, cached_k, cached_v, cosine, sine, mask, out, scale, scratch[0], config, rotated
        )
        return
    if rotated:
        raise ValueError(f"{config} rotates what it reads: hand it unrotated queries and keys, or a Split")
    tiles, padded = _extent(m, heads, n, config)
    stats = scratch[0].view(-1)[: b * 2 * tiles * padded]
    weights = scratch[0].view(-1)[stats.numel() :].view(q.dtype)
    shape = {
        "M": m, "PREFIX": n, "HEADS": heads, "D": d, "KEYS": config.keys, "CACHED": triton.cdiv(n, config.keys),
        "WIDTH": tiles * config.keys, "PADDED": padded, "BATCHED": b > 1,
    }  # fmt: skip
    weights_kernel[(triton.cdiv(m * heads, config.rows), tiles, b)](
        q, own_k, cached_k, cosine, sine, mask.view(torch.uint8), weights, stats,
        q.stride(1), own_k.stride(1), cached_k.stride(1), mask.stride(1) if mask.shape[1] > 1 else 0,
        *map(per_sample, (q, own_k, cached_k, cosine, mask)),
        SCALE=scale * math.log2(math.e), ROWS=config.rows, **shape, num_warps=config.warps, launch_pdl=overlaps(),
    )  # fmt: skip
    values_kernel[(triton.cdiv(m * heads, config.value_rows), d // config.columns, b)](
        weights, stats, own_v, cached_v, out, own_v.stride(1), cached_v.stride(1), out.stride(1),
        *map(per_sample, (own_v, cached_v, out)),
        ROWS=config.value_rows, COLUMNS=config.columns, **shape,
        num_warps=config.value_warps, launch_pdl=overlaps(),
    )  # fmt: skip


__all__ = ["Config", "Split", "candidates", "default", "scratch_size", "segment_attention"]
