"""Attention of a few tokens to a cached prefix and to themselves in two kernels, by warpgroup instructions.

The first is spread over samples, tiles of 64 rows (token, head) and the keys: a block has its share of the
prefix's keys and of the tokens' own, and writes the average of their values for its rows, with the largest logit
and the weights' sum. The prefix's keys and values are on their way to shared memory before a block waits for the
kernel ahead; after the wait there is one round of loads. The second kernel brings the parts to one scale and adds
them, in their order: identical runs give identical bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cortexflow.kernels.gluon.common import barrier, let_next_start, wait_for_previous
from cortexflow.kernels.triton.common import overlaps, per_sample

ROWS = 64  # of one warpgroup instruction
OWN = 8  # places among a block's keys that are filled late: the tokens' own go there


class Split(NamedTuple):
    """How the two kernels share the work; powers of two."""

    keys: int = 64
    """Keys of a block, up to `OWN` of them the tokens' own."""
    rows: int = 4
    """Rows of a block that adds, one a warp."""


def fits(m: int, heads: int, d: int, n: int, config: Split) -> bool:
    """Whether there are layouts for the shape, and registers for all parts of a row at once."""
    return config.keys in (32, 64, 128) and ROWS % heads == 0 and d in (128, 256) and parts(m, n, config) <= 32


def parts(m: int, n: int, config: Split) -> int:
    """Blocks that share the keys of a tile of rows."""
    count = max(triton.cdiv(n + m, config.keys), triton.cdiv(m, OWN))
    while triton.cdiv(n, count) + triton.cdiv(m, count) > config.keys:
        count += 1
    return count


def tiles(m: int, heads: int) -> int:
    """Tiles of rows."""
    return triton.cdiv(m * heads, ROWS)


def _padded(m: int, heads: int) -> int:
    return tiles(m, heads) * ROWS


def scratch_size(m: int, heads: int, n: int, config: Split) -> int:
    """How many float32 numbers `split_attention` needs in between for each sample, at most."""
    return parts(m, n, config) * _padded(m, heads) * (256 // 2 + 2)


@gluon.constexpr_function
def _heads(tokens, half):
    """[tokens, heads, half] in vectors of eight; the heads of a token are in one thread, which has their angles."""
    lanes = half // 8
    few = min(tokens, 32 // lanes)
    over = min(tokens // few, 4)
    return gl.BlockedLayout([1, 1, 8], [few, 32 // lanes // few, lanes], [over, 4 // over, 1], [2, 1, 0])


@gluon.constexpr_function
def _lines(width):
    """Rows loaded in vectors of eight."""
    lanes = min(width // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def _rotated(x1, x2, c, s, dtype: gl.constexpr):
    """Both halves of rotated rows."""
    f1, f2 = x1.to(gl.float32), x2.to(gl.float32)
    return (f1 * c - f2 * s).to(dtype), (f2 * c + f1 * s).to(dtype)


@gluon.jit
def _rotate(
    q, own_k, own_v, cosine, sine, q1, q2, tile, own, d, k_there, v_there, q_token, k_token,
    M: gl.constexpr, HEADS: gl.constexpr, OWN: gl.constexpr, half: gl.constexpr, full: gl.constexpr,
):  # fmt: skip
    """Rotated queries to their places, behind all copies under way: (halves of rotated own keys, own values)."""
    HALF: gl.constexpr = q1.shape[1]
    D: gl.constexpr = 2 * HALF
    TOKENS: gl.constexpr = 64 // HEADS
    dtype: gl.constexpr = q1.dtype
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    cosines = gl.allocate_shared_memory(gl.float32, [OWN, HALF], plain)
    sines = gl.allocate_shared_memory(gl.float32, [OWN, HALF], plain)
    own1 = gl.allocate_shared_memory(dtype, [OWN, HALF], plain)
    own2 = gl.allocate_shared_memory(dtype, [OWN, HALF], plain)
    own3 = gl.allocate_shared_memory(dtype, [OWN, D], plain)
    triple: gl.constexpr = _heads(TOKENS, HALF)
    pair: gl.constexpr = gl.SliceLayout(1, triple)
    t = tile * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(1, gl.SliceLayout(2, triple)))
    h = gl.arange(0, HEADS, gl.SliceLayout(0, gl.SliceLayout(2, triple)))
    e = gl.arange(0, HALF, gl.SliceLayout(0, pair))
    place = q + t[:, None, None] * q_token + h[None, :, None] * D + e[None, None, :]
    t = tile * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(1, pair))
    q_angle = t[:, None] * HALF + e[None, :]
    q_there = (t < M)[:, None]
    async_copy.async_copy_global_to_shared(own1, own_k + own * k_token + d, mask=k_there)
    async_copy.async_copy_global_to_shared(own2, own_k + own * k_token + d + HALF, mask=k_there)
    async_copy.async_copy_global_to_shared(cosines, cosine + own * HALF + d, mask=k_there)
    async_copy.async_copy_global_to_shared(sines, sine + own * HALF + d, mask=k_there)
    async_copy.async_copy_global_to_shared(own3, own_v, mask=v_there)
    async_copy.commit_group()
    x1 = gl.load(place, mask=q_there[:, None, :], other=0.0)
    x2 = gl.load(place + HALF, mask=q_there[:, None, :], other=0.0)
    qc = gl.load(cosine + q_angle, mask=q_there, other=0.0)
    qs = gl.load(sine + q_angle, mask=q_there, other=0.0)
    async_copy.wait_group(0)
    barrier()  # also keeps the compiler from moving loads down to where their values are used
    x1, x2 = _rotated(x1, x2, qc[:, None, :], qs[:, None, :], dtype)
    q1.store(x1.reshape([64, HALF]))
    q2.store(x2.reshape([64, HALF]))
    y1, y2 = _rotated(own1.load(half), own2.load(half), cosines.load(half), sines.load(half), dtype)
    return y1, y2, own3.load(full)


@gluon.jit
def part_kernel(
    q, own_k, own_v, cached_k, cached_v, cosine, sine, mask, partial, stats,
    q_token, k_token, v_token, key_token, value_token, mask_row,
    q_sample, k_sample, v_sample, key_sample, value_sample, mask_sample, angle_sample, SCALE: gl.constexpr,
    M: gl.constexpr, PREFIX: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr,
    PARTS: gl.constexpr, PADDED: gl.constexpr, BATCHED: gl.constexpr, OWN: gl.constexpr, ROTATED: gl.constexpr,
):  # fmt: skip
    """One block: 64 rows and one part of the keys of a sample; ROTATED where queries and own keys are rotated already.

    To partial [b, PARTS, PADDED, D] and f32 stats [b, 2, PARTS, PADDED]. Within 32 columns those of `partial` are in
    the order of a thread's accumulators: 16 bytes at once.
    """
    let_next_start()
    sample = gl.program_id(2).to(gl.int64) if BATCHED else 0
    q += sample * q_sample
    own_k += sample * k_sample
    own_v += sample * v_sample
    cached_k += sample * key_sample
    cached_v += sample * value_sample
    cosine += sample * angle_sample
    sine += sample * angle_sample
    mask += sample * mask_sample
    partial += sample * (PARTS * PADDED * D)
    stats += sample * (2 * PARTS * PADDED)
    HALF: gl.constexpr = D // 2
    EACH: gl.constexpr = (PREFIX + PARTS - 1) // PARTS  # keys of the prefix
    MINE: gl.constexpr = (M + PARTS - 1) // PARTS  # keys of the tokens
    TOKENS: gl.constexpr = 64 // HEADS
    dtype: gl.constexpr = partial.dtype.element_ty
    tile, part = gl.program_id(0), gl.program_id(1)
    inner: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    outer: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    at_rest: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)

    # MINE places for tokens, then the keys of the prefix; what is in the first OWN places is stored after the wait.
    half: gl.constexpr = _lines(HALF)
    full: gl.constexpr = _lines(D)
    k1 = gl.allocate_shared_memory(dtype, [KEYS, HALF], at_rest)
    k2 = gl.allocate_shared_memory(dtype, [KEYS, HALF], at_rest)
    values = gl.allocate_shared_memory(dtype, [KEYS, D], at_rest)
    at = gl.arange(0, KEYS, gl.SliceLayout(1, half)) - MINE
    n = part * EACH + at
    there = ((at >= OWN - MINE) & (at < EACH) & (n < PREFIX))[:, None]
    place = cached_k + n[:, None] * key_token + gl.arange(0, HALF, gl.SliceLayout(0, half))[None, :]
    async_copy.async_copy_global_to_shared(k1, place, mask=there)
    async_copy.async_copy_global_to_shared(k2, place + HALF, mask=there)
    at = gl.arange(0, KEYS, gl.SliceLayout(1, full)) - MINE
    n = part * EACH + at
    there = ((at >= OWN - MINE) & (at < EACH) & (n < PREFIX))[:, None]
    place = cached_v + n[:, None] * value_token + gl.arange(0, D, gl.SliceLayout(0, full))[None, :]
    async_copy.async_copy_global_to_shared(values, place, mask=there)  # zeros where none is
    async_copy.commit_group()
    q1 = gl.allocate_shared_memory(dtype, [64, HALF], at_rest)
    q2 = gl.allocate_shared_memory(dtype, [64, HALF], at_rest)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    marks = gl.allocate_shared_memory(gl.float32, [TOKENS, KEYS], plain)
    i = gl.arange(0, OWN, gl.SliceLayout(1, half))
    k_there = ((i < MINE) & (part * MINE + i < M))[:, None]
    d = gl.arange(0, HALF, gl.SliceLayout(0, half))[None, :]
    own = (part * MINE + i)[:, None]
    n = part * EACH + i - MINE
    there = ((i >= MINE) & (i < EACH + MINE) & (n < PREFIX))[:, None]
    z1 = gl.load(cached_k + n[:, None] * key_token + d, mask=there, other=0.0)
    z2 = gl.load(cached_k + n[:, None] * key_token + d + HALF, mask=there, other=0.0)
    i = gl.arange(0, OWN, gl.SliceLayout(1, full))
    v_there = ((i < MINE) & (part * MINE + i < M))[:, None]
    n = part * EACH + i - MINE
    there = ((i >= MINE) & (i < EACH + MINE) & (n < PREFIX))[:, None]
    e = gl.arange(0, D, gl.SliceLayout(0, full))[None, :]
    z3 = gl.load(cached_v + n[:, None] * value_token + e, mask=there, other=0.0)
    own_v += (part * MINE + i)[:, None] * v_token + e
    marked: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    t = tile * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(1, marked))
    at = gl.arange(0, KEYS, gl.SliceLayout(0, marked))
    mine = part * MINE + at
    n = part * EACH + at - MINE
    there = gl.where(at < MINE, mine < M, (at < EACH + MINE) & (n < PREFIX))[None, :]
    n = gl.where(at < MINE, PREFIX + mine, n)
    mask += t[:, None] * mask_row + n[None, :]
    wait_for_previous()

    seen = gl.load(mask, mask=there & (t < M)[:, None], other=0)
    if ROTATED:
        row = gl.arange(0, 64, gl.SliceLayout(1, half))
        t = tile * TOKENS + row // HEADS
        q += t[:, None] * q_token + (row % HEADS)[:, None] * D + d
        own_k += own * k_token + d
        async_copy.async_copy_global_to_shared(q1, q, mask=(t < M)[:, None])
        async_copy.async_copy_global_to_shared(q2, q + HALF, mask=(t < M)[:, None])
        async_copy.commit_group()
        y1 = gl.load(own_k, mask=k_there, other=0.0)
        y2 = gl.load(own_k + HALF, mask=k_there, other=0.0)
        y3 = gl.load(own_v, mask=v_there, other=0.0)
        async_copy.wait_group(0)
        barrier()
    else:
        y1, y2, y3 = _rotate(
            q, own_k, own_v, cosine, sine, q1, q2, tile, own, d, k_there, v_there, q_token, k_token, M, HEADS, OWN,
            half, full,
        )  # fmt: skip
    k1.slice(0, OWN, 0).store(gl.where(k_there, y1, z1))
    k2.slice(0, OWN, 0).store(gl.where(k_there, y2, z2))
    values.slice(0, OWN, 0).store(gl.where(v_there, y3, z3))
    # added to the logits: nothing where the key is seen, and where it is not so much that it counts for nothing
    marks.store(gl.where(there, gl.where(seen != 0, 0.0, -1.0e30), -3.0e38))
    fence_async_shared()
    barrier()

    logits = warpgroup_mma(q1, k1.permute([1, 0]), gl.zeros([64, KEYS], gl.float32, inner), is_async=True)
    logits = warpgroup_mma(q2, k2.permute([1, 0]), logits, is_async=True)
    logits = warpgroup_mma_wait(0, [logits])
    logits = logits.reshape([TOKENS, HEADS, KEYS])
    note = marks.load(gl.SliceLayout(1, logits.type.layout)).expand_dims(1)
    logits = gl.where(note < 0.0, note, logits * SCALE)
    logits = gl.convert_layout(logits.reshape([64, KEYS]), inner, assert_trivial=True)
    top = gl.max(logits, axis=1)
    p = gl.exp2(logits - top[:, None])
    total = gl.sum(p, axis=1)
    p = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, outer, 2))
    acc = warpgroup_mma(p, values, gl.zeros([64, D], gl.float32, outer), is_async=True)
    row = tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, inner))
    gl.store(stats + part * PADDED + row, top)
    gl.store(stats + (PARTS + part) * PADDED + row, total)
    acc = warpgroup_mma_wait(0, [acc])
    acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, outer))[:, None]
    acc = acc.to(dtype).reshape([64, D // 32, 4, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([64, D])
    layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]][: 6 + (D == 256)],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, D],
    )
    acc = gl.convert_layout(acc, layout)
    row = tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    gl.store(partial + (part * PADDED + row)[:, None] * D + d[None, :], acc)


@gluon.jit
def add_kernel(
    partial, stats, out, out_token, out_sample, M: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr,
    PARTS: gl.constexpr, PADDED: gl.constexpr, BATCHED: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """One block: ROWS rows of a sample, each by a warp."""
    let_next_start()
    sample = gl.program_id(1).to(gl.int64) if BATCHED else 0
    out += sample * out_sample
    partial += sample * (PARTS * PADDED * D)
    stats += sample * (2 * PARTS * PADDED)
    EACH: gl.constexpr = min(D // 32, 8)
    line: gl.constexpr = gl.BlockedLayout([1, EACH], [1, 32], [gl.num_warps(), 1], [1, 0])
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, line))
    d = gl.arange(0, D, gl.SliceLayout(0, line))
    partial += row[:, None] * D + d[None, :]
    stats += row
    wait_for_previous()
    tops, sums, means = (), (), ()
    for part in gl.static_range(PARTS):  # volatile: the compiler keeps their order, before all that uses them
        means += (gl.load(partial + part * PADDED * D, volatile=True),)
    for part in gl.static_range(PARTS):
        tops += (gl.load(stats + part * PADDED, volatile=True),)
        sums += (gl.load(stats + (PARTS + part) * PADDED, volatile=True),)
    best = tops[0]
    for part in gl.static_range(1, PARTS):
        best = gl.maximum(best, tops[part])
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, line))
    acc = gl.zeros([ROWS, D], gl.float32, line)
    for part in gl.static_range(PARTS):
        share = sums[part] * gl.exp2(tops[part] - best)
        total += share
        acc += share[:, None] * means[part].to(gl.float32)
    acc = (acc / total[:, None]).to(out.dtype.element_ty)
    acc = acc.reshape([ROWS, D // 32, 4, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, D])
    layout: gl.constexpr = acc.type.layout
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    target = out + (row // HEADS)[:, None] * out_token + (row % HEADS)[:, None] * D + d[None, :]
    gl.store(target, acc, mask=(row < M * HEADS)[:, None])


def split_attention(
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
    scratch: Tensor,
    config: Split,
    rotated: bool = False,
) -> None:
    """out [b, m, heads, d] = attention of rotated q to the cache and to the tokens' own rotated keys.

    q [b, m, heads, d], own k and v [b, m, 1, d], cache [b, n, 1, d] (rotated), angles f32 [1|b, m, d/2], dense, mask
    bool [1|b, 1|m, n + m]; 16-bit floats of one dtype, where `fits`. Samples and tokens may be strided by a multiple
    of 8, the heads of one are contiguous. `scratch`, float32, has b · `scratch_size` numbers; it needs no initial
    value. `rotated`: q and own k are rotated already.
    """
    b, m, heads, d = q.shape
    n = cached_k.shape[1]
    count, padded = parts(m, n, config), _padded(m, heads)
    flat, size = scratch.view(-1), b * count * padded * d // 2
    partial, stats = flat[:size].view(q.dtype), flat[size:]
    shape = {"M": m, "HEADS": heads, "D": d, "PARTS": count, "PADDED": padded, "BATCHED": b > 1}
    part_kernel[(padded // ROWS, count, b)](
        q, own_k, own_v, cached_k, cached_v, cosine, sine, mask.view(torch.uint8), partial, stats,
        q.stride(1), own_k.stride(1), own_v.stride(1), cached_k.stride(1), cached_v.stride(1),
        mask.stride(1) if mask.shape[1] > 1 else 0,
        *map(per_sample, (q, own_k, own_v, cached_k, cached_v, mask, cosine)),
        SCALE=scale * math.log2(math.e), PREFIX=n, KEYS=config.keys, OWN=OWN, ROTATED=rotated,
        **shape, num_warps=4, launch_pdl=overlaps(),
    )  # fmt: skip
    add_kernel[(triton.cdiv(m * heads, config.rows), b)](
        partial, stats, out, out.stride(1), per_sample(out), ROWS=config.rows, **shape, num_warps=config.rows,
        launch_pdl=overlaps(),
    )  # fmt: skip
