"""Attention of a few queries to a cached prefix and to themselves, rotary positions included.

Query heads of one key head are rows of one matrix. Keys are split over programs; the last program of a
row tile combines the parts in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from cortexflow.kernels.triton.common import let_next_start, overlaps, wait_for_previous


@triton.jit
def _attend(q1, q2, k1, k2, v, seen, there, top, total, acc, SCALE: tl.constexpr):
    """One block of keys in a running softmax; a key that is there but not seen weighs nothing beside one that is."""
    logits = (tl.dot(q1, tl.trans(k1)) + tl.dot(q2, tl.trans(k2))) * SCALE
    logits = tl.where(seen != 0, logits, tl.where(there[None, :], -1.0e30, float("-inf")))
    new = tl.maximum(top, tl.max(logits, axis=1))
    p = tl.exp(logits - new[:, None])
    fade = tl.exp(top - new)
    return new, total * fade + tl.sum(p, axis=1), acc * fade[:, None] + tl.dot(p.to(v.dtype), v)


@triton.jit
def decode_attention_kernel(
    q, own_k, own_v, cached_k, cached_v, cosine, sine, mask, out, parts, counters,
    q_token, k_token, cached_token, out_token, mask_row, SCALE: tl.constexpr,
    M: tl.constexpr, PREFIX: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """One program: TILE rows (token · heads + head) and one part of the prefix; the last part also the suffix."""
    let_next_start()
    tile, part = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = D // 2
    row = tile * TILE + tl.arange(0, TILE)
    token, head = row // HEADS, row % HEADS
    valid = row < M * HEADS
    wait_for_previous()

    d = tl.arange(0, HALF)
    place = q + token[:, None] * q_token + head[:, None] * D + d[None, :]
    first = tl.load(place, mask=valid[:, None], other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=valid[:, None], other=0.0).to(tl.float32)
    c = tl.load(cosine + token[:, None] * HALF + d[None, :], mask=valid[:, None], other=0.0)
    s = tl.load(sine + token[:, None] * HALF + d[None, :], mask=valid[:, None], other=0.0)
    q1 = (first * c - second * s).to(out.dtype.element_ty)
    q2 = (second * c + first * s).to(out.dtype.element_ty)

    top = tl.full((TILE,), -1.0e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, D), tl.float32)
    full = tl.arange(0, D)
    EACH: tl.constexpr = (PREFIX + SPLIT * BLOCK - 1) // (SPLIT * BLOCK) * BLOCK
    for at in range(part * EACH, min((part + 1) * EACH, PREFIX), BLOCK):
        n = at + tl.arange(0, BLOCK)
        there = n < PREFIX
        line = cached_k + n[:, None] * cached_token + d[None, :]
        k1 = tl.load(line, mask=there[:, None], other=0.0)
        k2 = tl.load(line + HALF, mask=there[:, None], other=0.0)
        v = tl.load(cached_v + n[:, None] * cached_token + full[None, :], mask=there[:, None], other=0.0)
        seen = tl.load(mask + token[:, None] * mask_row + n[None, :], mask=valid[:, None] & there[None, :], other=0)
        top, total, acc = _attend(q1, q2, k1, k2, v, seen, there, top, total, acc, SCALE)
    if part == SPLIT - 1:
        m = tl.arange(0, OWN)
        mine = m < M
        lines = own_k + m[:, None] * k_token + d[None, :]
        o1 = tl.load(lines, mask=mine[:, None], other=0.0).to(tl.float32)
        o2 = tl.load(lines + HALF, mask=mine[:, None], other=0.0).to(tl.float32)
        oc = tl.load(cosine + m[:, None] * HALF + d[None, :], mask=mine[:, None], other=0.0)
        os = tl.load(sine + m[:, None] * HALF + d[None, :], mask=mine[:, None], other=0.0)
        ok1 = (o1 * oc - o2 * os).to(out.dtype.element_ty)
        ok2 = (o2 * oc + o1 * os).to(out.dtype.element_ty)
        ov = tl.load(own_v + m[:, None] * k_token + full[None, :], mask=mine[:, None], other=0.0)
        visible = valid[:, None] & mine[None, :]
        look = tl.load(mask + token[:, None] * mask_row + PREFIX + m[None, :], mask=visible, other=0)
        top, total, acc = _attend(q1, q2, ok1, ok2, ov, look, mine, top, total, acc, SCALE)

    ROWS: tl.constexpr = (M * HEADS + TILE - 1) // TILE * TILE
    target = out + token[:, None] * out_token + head[:, None] * D + full[None, :]
    if SPLIT == 1:
        tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=valid[:, None])
    else:
        sums = parts + SPLIT * ROWS * D
        tl.store(parts + (part * ROWS + row[:, None]) * D + full[None, :], acc)
        tl.store(sums + (part * ROWS + row) * 2, top)
        tl.store(sums + (part * ROWS + row) * 2 + 1, total)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            best = tl.full((TILE,), -1.0e30, tl.float32)
            for p in tl.static_range(SPLIT):
                best = tl.maximum(best, tl.load(sums + (p * ROWS + row) * 2, cache_modifier=".cg"))
            acc = tl.zeros((TILE, D), tl.float32)
            total = tl.zeros((TILE,), tl.float32)
            for p in tl.static_range(SPLIT):
                share = tl.exp(tl.load(sums + (p * ROWS + row) * 2, cache_modifier=".cg") - best)
                total += share * tl.load(sums + (p * ROWS + row) * 2 + 1, cache_modifier=".cg")
                acc += share[:, None] * tl.load(
                    parts + (p * ROWS + row[:, None]) * D + full[None, :], cache_modifier=".cg"
                )
            tl.store(counters + tile, 0)
            tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=valid[:, None])


def decode_attention(
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
    config: tuple[int, int, int, int],
) -> None:
    """q [m, heads, d], own k and v [m, 1, d] (strided), cache [n, 1, d], angles f32 [m, d/2], mask [1|m, n + m].

    `config`: (rows of a program, keys of a block, splits, warps).
    """
    m, heads, d = q.shape
    tile, block, split, warps = config
    parts, counters = scratch
    decode_attention_kernel[(triton.cdiv(m * heads, tile), split)](
        q, own_k, own_v, cached_k, cached_v, cosine, sine, mask.view(torch.uint8), out, parts, counters,
        q.stride(0), own_k.stride(0), cached_k.stride(0), out.stride(0), mask.stride(0) if mask.shape[0] > 1 else 0,
        SCALE=scale, M=m, PREFIX=cached_k.shape[0], HEADS=heads, D=d, TILE=tile, BLOCK=block, SPLIT=split,
        OWN=max(16, triton.next_power_of_2(m)), num_warps=warps, num_stages=2, launch_pdl=overlaps(),
    )  # fmt: skip
