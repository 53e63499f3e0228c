"""Attention of many queries: blocks of keys under a running softmax in float32.

The query heads of one key head are rows of one matrix (row = token · heads of the group + head), so a
block of keys is read once for all of them. Queries, keys and values may be slices of one wide buffer.

Three choices of a `Config` matter on Hopper. `late` weighs a block's values one block later, so that the
tensor cores work while the next softmax is computed. `descriptors` lets the card's copy engine (TMA) fetch keys and
values, which costs neither registers nor instructions. `split` gives the keys of one tile to several
programs, for shapes with fewer tiles than the card has processors.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from cortexflow.kernels.triton.common import let_next_start, overlaps, shared_memory, wait_for_previous
from triton.tools.tensor_descriptor import TensorDescriptor


class Config(NamedTuple):
    """How a tile of queries is computed."""

    rows: int  # of a tile: tokens times query heads of one key head
    keys: int  # of a block
    warps: int
    stages: int  # blocks of keys and values in flight
    split: int = 1  # programs that share the keys of a tile
    late: bool = False  # values follow their keys by one block
    descriptors: bool = False  # keys and values fetched by tensor memory descriptors


@triton.jit
def _rows(line, there, d, END: tl.constexpr, EXACT: tl.constexpr, RAGGED: tl.constexpr):
    """A tile of rows, zero beyond entry END of a row and where there is no row; masked only where it must be."""
    if EXACT and RAGGED:
        return tl.load(line, mask=there[:, None], other=0.0)
    elif EXACT:
        return tl.load(line)
    elif RAGGED:
        return tl.load(line, mask=there[:, None] & (d < END)[None, :], other=0.0)
    else:
        return tl.load(line, mask=(d < END)[None, :], other=0.0)


@triton.jit
def _block(
    x, x_token, batch, group, at, first, end, D: tl.constexpr, FROM: tl.constexpr, WIDE: tl.constexpr,
    KEYS: tl.constexpr, TMA: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Entries FROM … FROM + WIDE of the keys or values at … at + KEYS, zero where there are none."""
    if TMA:
        return x.load([batch, group, at, FROM]).reshape(KEYS, WIDE)
    else:
        n, d = at + tl.arange(0, KEYS), FROM + tl.arange(0, WIDE)
        there = (n >= first) & (n < end)
        return _rows(x + n[:, None] * x_token + d[None, :], there, d, D, FROM + WIDE <= D, RAGGED)


@triton.jit
def _finish(place, valid, d, acc, total, END: tl.constexpr, EXACT: tl.constexpr):
    """Weighted sums over their weights, rounded once."""
    there = valid[:, None] if EXACT else valid[:, None] & (d < END)[None, :]
    tl.store(place + d[None, :], (acc * (1 / total)[:, None]).to(place.dtype.element_ty), mask=there)


@triton.jit
def _combine(
    place, valid, parts, sums, FROM: tl.constexpr, WIDE: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The parts' weighted sums of some of a head's entries, brought to one maximum and added in the keys' order."""
    row, d = tl.arange(0, ROWS), FROM + tl.arange(0, WIDE)
    best = tl.full((ROWS,), -1.0e30, tl.float32)
    for i in tl.static_range(SPLIT):
        best = tl.maximum(best, tl.load(sums + (i * ROWS + row) * 2, cache_modifier=".cg"))
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDE), tl.float32)
    for i in tl.static_range(SPLIT):
        share = tl.exp2(tl.load(sums + (i * ROWS + row) * 2, cache_modifier=".cg") - best)
        total += share * tl.load(sums + (i * ROWS + row) * 2 + 1, cache_modifier=".cg")
        line = parts + (i * ROWS + row)[:, None] * STRIDE + d[None, :]
        acc += share[:, None] * tl.load(line, cache_modifier=".cg")
    _finish(place, valid, d, acc, total, D, FROM + WIDE <= D)


@triton.jit
def attention_kernel(
    q, k, v, k_tail, v_tail, mask, out, parts, counters,
    q_batch, q_token, k_batch, k_token, v_batch, v_token, out_batch, out_token, mask_batch, mask_row, M, N,
    SCALE: tl.constexpr, GROUPS: tl.constexpr, PER: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, LATE: tl.constexpr, TMA: tl.constexpr,
    MASK: tl.constexpr, RAGGED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one sample and one key head against one part of the keys; the last part to end combines them.

    A head is one power of two wide, or two (A and B) where that pads less. SCALE is the logits' scale times log2 e.
    MASK: 0 none, 1 a row of keys for a sample, 2 a row for each query, 3 causal, the last query sees all keys.
    RAGGED: keys may end within a block.
    """
    LOW: tl.constexpr = q.dtype.element_ty
    batch, group = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // PER, group * PER + row % PER
    valid = token < M
    d, e = tl.arange(0, A), A + tl.arange(0, B if B > 0 else 16)
    each = tl.cdiv(N, KEYS * SPLIT) * KEYS
    first = tl.program_id(2) * each
    end = min(first + each, N)
    if MASK == 3:  # what the tile's last token sees
        end = min(end, (tl.program_id(0) * ROWS + ROWS - 1) // PER + N - M + 1)
    if not TMA:
        k += batch.to(tl.int64) * k_batch + group * D
        v += batch.to(tl.int64) * v_batch + group * D
        k_tail, v_tail = k, v
    mask += batch.to(tl.int64) * mask_batch
    wait_for_previous()

    place = q + batch.to(tl.int64) * q_batch + (token * q_token + head * D)[:, None]
    q1 = _rows(place + d[None, :], valid, d, D, A <= D, True)
    if B > 0:
        q2 = _rows(place + e[None, :], valid, e, D, A + B <= D, True)
    top = tl.full((ROWS,), -1.0e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    fade = tl.zeros((ROWS,), tl.float32)
    p = tl.zeros((ROWS, KEYS), tl.float32)
    acc = tl.zeros((ROWS, A), tl.float32)
    if B > 0:
        tail = tl.zeros((ROWS, B), tl.float32)
    none = 0  # as the compiler cannot know
    for at in range(first, end + KEYS * LATE, KEYS):
        none = min(none, at)
        n = at + tl.arange(0, KEYS)
        if MASK == 1:  # fetched while the product runs
            seen = tl.load(mask + n, mask=n < end, other=1)
        k1 = _block(k, k_token, batch, group, at, first, end, D, 0, A, KEYS, TMA, RAGGED)
        logits = tl.dot(q1, tl.trans(k1), input_precision=EXACT)
        if B > 0:
            k2 = _block(k_tail, k_token, batch, group, at, first, end, D, A, B, KEYS, TMA, RAGGED)
            logits = tl.dot(q2, tl.trans(k2), logits, input_precision=EXACT)
        if LATE:  # p stays float32 until here: its registers may not change under a running product
            v1 = _block(v, v_token, batch, group, at - KEYS, first, end, D, 0, A, KEYS, TMA, RAGGED)
            acc = tl.dot(p.to(LOW), v1, acc * fade[:, None], input_precision=EXACT)
            if B > 0:
                v2 = _block(v_tail, v_token, batch, group, at - KEYS, first, end, D, A, B, KEYS, TMA, RAGGED)
                tail = tl.dot(p.to(LOW), v2, tail * fade[:, None], input_precision=EXACT)
        logits = logits * SCALE
        if MASK == 1:
            logits = logits + tl.where(seen == 0, -1.0e30, tl.where(n < end, 0.0, float("-inf")))[None, :]
        else:
            if MASK == 2:
                both = valid[:, None] & (n < end)[None, :]
                seen = tl.load(mask + token[:, None] * mask_row + n[None, :], mask=both, other=0)
                logits = tl.where(seen != 0, logits, -1.0e30)
            if MASK == 3:
                logits = tl.where(n[None, :] <= (token + N - M)[:, None], logits, -1.0e30)
            if RAGGED:
                logits = logits + tl.where(n < end, 0.0, float("-inf"))[None, :]
        new = tl.maximum(top, tl.max(logits, axis=1))
        p = tl.exp2(logits - new[:, None])
        fade = tl.exp2(top - new)
        total = total * fade + tl.sum(p, axis=1)
        top = new
        if not LATE:
            v1 = _block(v, v_token, batch, group, at, first, end, D, 0, A, KEYS, TMA, RAGGED)
            acc = tl.dot(p.to(LOW), v1, acc * fade[:, None], input_precision=EXACT)
            if B > 0:
                v2 = _block(v_tail, v_token, batch, group, at, first, end, D, A, B, KEYS, TMA, RAGGED)
                tail = tl.dot(p.to(LOW), v2, tail * fade[:, None], input_precision=EXACT)

    let_next_start()  # not before: see `product_kernel`
    row = (tl.program_id(0) + none) * ROWS + tl.arange(0, ROWS)  # found anew: not held through the loop
    token, head = row // PER, group * PER + row % PER
    valid = token < M
    place = out + batch.to(tl.int64) * out_batch + (token * out_token + head * D)[:, None]
    if SPLIT == 1:
        _finish(place, valid, d, acc, total, D, A <= D)
        if B > 0:
            _finish(place, valid, e, tail, total, D, A + B <= D)
    else:
        part, tile = tl.program_id(2), tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tiles = tl.num_programs(0) * tl.num_programs(1)
        sums = parts + tiles.to(tl.int64) * (SPLIT * ROWS * (A + B)) + tile * (SPLIT * ROWS * 2)
        parts += tile.to(tl.int64) * (SPLIT * ROWS * (A + B))
        mine = part * ROWS + tl.arange(0, ROWS)
        tl.store(parts + mine[:, None] * (A + B) + d[None, :], acc)
        if B > 0:
            tl.store(parts + mine[:, None] * (A + B) + e[None, :], tail)
        tl.store(sums + mine * 2, top)
        tl.store(sums + mine * 2 + 1, total)
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT - 1:
            PIECE: tl.constexpr = 32 if A > 32 else A
            for i in tl.static_range(A // PIECE):
                _combine(place, valid, parts, sums, i * PIECE, PIECE, A + B, D, ROWS, SPLIT)
            if B > 0:
                _combine(place, valid, parts, sums, A, B, A + B, D, ROWS, SPLIT)
            tl.store(counters + tile, 0)


class Card(NamedTuple):
    """What a tile must fit: compute capability times ten, bytes of shared memory of a block."""

    capability: int
    shared: int


@cache
def card() -> Card:
    """The current card; where there is none, the smallest that is supported."""
    if not torch.cuda.is_available():
        return Card(89, shared_memory())
    major, minor = torch.cuda.get_device_capability()
    return Card(10 * major + minor, shared_memory())


def candidates(m: int, n: int, per: int, d: int, on: Card) -> list[Config]:
    """Tiles worth measuring in 16-bit types for m queries and n keys, `per` query heads a key head of d entries.

    All fit the card, and none spills registers for heads of at most 256 entries.
    """
    if on.capability // 10 != 9:
        return [default(d, False, False, on)]
    if d > 128:
        tiles = [
            Config(64, 64, 4, 3, late=True, descriptors=True),
            Config(64, 64, 4, 3, descriptors=True),
            Config(64, 32, 4, 2, split=2, descriptors=True),
            Config(64, 32, 4, 2, split=3, descriptors=True),
            Config(128, 64, 8, 2, split=2, late=True, descriptors=True),
            Config(128, 64, 8, 2, split=3, late=True, descriptors=True),
        ]
    else:
        tiles = [
            Config(64, 64, 4, 3),
            Config(64, 64, 4, 3, descriptors=True),
            Config(64, 64, 4, 3, late=True, descriptors=True),
            Config(64, 128, 4, 2, descriptors=True),
            Config(128, 128, 8, 2, descriptors=True),
        ]
    return [t for t in tiles if t.rows <= max(64, m * per) and (t.keys <= 64 or n % t.keys == 0)]


def default(d: int, exact: bool, pairs: bool, on: Card) -> Config:
    """A tile that launches on the card without spilling registers, for heads of d entries.

    `exact` where products are float32, `pairs` where each query has a mask of its own, be it the causal one.
    """
    if exact:
        return Config(32, 32, 8, 1) if d <= 128 else Config(32, 16, 8, 1)
    if on.capability // 10 == 9:
        if d > 128 and pairs:
            return Config(64, 32, 8, 3, descriptors=True)
        return Config(64, 64, 4, 3, descriptors=True)
    if d > 128 or pairs:
        return Config(64, 32, 8, 2)
    return Config(64, 64, 4, 3 if on.shared > 150_000 else 2)


def scratch_size(b: int, m: int, heads: int, groups: int, d: int, config: Config) -> tuple[int, int]:
    """Float32 entries and int32 counters (zero before the first launch) that a config with a split needs."""
    if config.split == 1:
        return 0, 0
    tiles = triton.cdiv(m * heads // groups, config.rows) * b * groups
    return tiles * config.split * config.rows * (sum(_widths(d)) + 2), tiles


def _widths(d: int) -> tuple[int, int]:
    """A head's entries as one power of two, or as two where that pads less; at least 16 each."""
    whole = max(16, triton.next_power_of_2(d))
    rest = max(16, triton.next_power_of_2(d - whole // 2))
    return (whole // 2, rest) if whole > 16 and whole // 2 + rest < whole else (whole, 0)


def _described(x: Tensor, keys: int, wide: int) -> TensorDescriptor:
    """Keys or values [b, n, groups, d] as the copy engine sees them: [b, groups, n, d], fetched [keys, wide]."""
    b, n, groups, d = x.shape
    strides = [x.stride(0) if b > 1 else n * x.stride(1), d, x.stride(1), 1]
    return TensorDescriptor(x, [b, groups, n, d], strides, [1, 1, keys, wide])


def _describable(x: Tensor) -> bool:
    """Whether the copy engine can address keys or values: everything but the last axis steps by 16 bytes."""
    strides = (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1), x.shape[-1])
    return x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in strides)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    scale: float,
    mask: Tensor | None = None,
    config: tuple | None = None,
    scratch: tuple[Tensor, Tensor] | None = None,
    causal: bool = False,
) -> None:
    """out [b, m, heads, d] from q [b, m, heads, d], k and v [b, n, groups, d]; heads and d dense, the rest strided.

    `mask` bool [b|1, m|1, n]: a key that is not seen weighs nothing, unless a query sees none. `causal`, in place of a
    mask: query i sees the keys up to n - m + i. `config`: a `Config`, or its leading entries. `scratch`: float32 and
    int32 of at least `scratch_size`, which a split needs.
    """
    b, m, heads, d = q.shape
    n, groups = k.shape[1:3]
    exact = q.dtype == torch.float32
    pairs = mask is not None and mask.shape[1] > 1
    c = Config(*config) if config else default(d, exact, pairs or causal, card())
    tma = c.descriptors and _describable(k) and _describable(v)
    if config is None and not tma:
        c = c._replace(late=False)  # pointers and late values need more registers than there are
    needed = scratch_size(b, m, heads, groups, d, c)
    if c.split > 1 and (scratch is None or any(s.numel() < size for s, size in zip(scratch, needed, strict=True))):
        raise ValueError(f"attention split in {c.split} needs scratch of {needed[0]} float32 and {needed[1]} int32")
    seen = q if mask is None else mask.view(torch.uint8)
    at = (0, 0) if mask is None else [s * (e > 1) for s, e in zip(mask.stride()[:2], mask.shape[:2], strict=True)]
    a, tail = _widths(d)
    blocks = [_described(x, c.keys, w) if tma and w else x for w in (a, tail) for x in (k, v)]
    parts, counters = scratch or (q, q)
    attention_kernel[(triton.cdiv(m * heads // groups, c.rows), b * groups, c.split)](
        q, *blocks, seen, out, parts, counters, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        v.stride(0), v.stride(1), out.stride(0), out.stride(1), at[0], at[1], m, n,
        SCALE=scale * math.log2(math.e), GROUPS=groups, PER=heads // groups, D=d, A=a, B=tail, ROWS=c.rows,
        KEYS=c.keys, SPLIT=c.split, LATE=c.late, TMA=tma,
        MASK=3 if causal else 0 if mask is None else 2 if pairs else 1,
        RAGGED=c.late or n % c.keys != 0, EXACT="ieee" if exact else "tf32",
        num_warps=c.warps, num_stages=c.stages, launch_pdl=overlaps(),
    )  # fmt: skip
