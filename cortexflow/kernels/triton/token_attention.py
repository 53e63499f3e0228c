"""Attention of one new token to a cached prefix and to what was generated since, for latency.

A program has one sample and one query head. The prefix was written long ago: its first keys and values are on
their way to registers before the kernel waits for the one ahead, so that what is left after the wait is the query,
and the few tokens generated since, whose keys and values stand in a cache of their own. One row has no use for
matrix instructions: it is multiplied and added where the keys were loaded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import triton
import triton.language as tl
from cortexflow.kernels.triton.common import let_next_start, overlaps, per_sample, wait_for_previous

KEYS = 64  # of a block
EARLY = 640  # blocks fetched ahead, times a head's entries: more would not fit the registers


@triton.jit
def _logits(keys, x, seen, there, SCALE: tl.constexpr):
    """Logits of a block of keys for one query in float32, base 2."""
    found = tl.sum(keys.to(tl.float32) * x[None, :], axis=1) * SCALE
    return tl.where(there, tl.where(seen != 0, found, -1.0e30), float("-inf"))


@triton.jit
def token_attention_kernel(
    q, k0, v0, k1, v1, mask, out, q_sample, k0_sample, k0_token, v0_sample, v0_token, k1_sample, k1_token, v1_sample,
    v1_token, mask_sample, out_sample, SCALE: tl.constexpr, CACHED: tl.constexpr, OWN: tl.constexpr,
    HEADS: tl.constexpr, PER: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, SECOND: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """One query head, PER of which share a key head, over CACHED keys, the first AHEAD blocks fetched early, and OWN.

    There is one maximum and one pass over what was fetched early.
    """
    let_next_start()
    sample, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    group = head // PER
    key, d, own = tl.arange(0, KEYS), tl.arange(0, D), tl.arange(0, SECOND)
    k0 += sample * k0_sample + group * D + d[None, :]
    v0 += sample * v0_sample + group * D + d[None, :]
    keys, values = (), ()
    for i in tl.static_range(AHEAD):
        n = i * KEYS + key
        keys += (tl.load(k0 + n[:, None] * k0_token, mask=(n < CACHED)[:, None], other=0.0),)
        values += (tl.load(v0 + n[:, None] * v0_token, mask=(n < CACHED)[:, None], other=0.0),)
    wait_for_previous()

    x = tl.load(q + sample * q_sample + head * D + d).to(tl.float32)
    mask += sample * mask_sample
    there = own < OWN
    k1 += sample * k1_sample + group * D + own[:, None] * k1_token + d[None, :]
    v1 += sample * v1_sample + group * D + own[:, None] * v1_token + d[None, :]
    last_keys = tl.load(k1, mask=there[:, None], other=0.0)
    last_values = tl.load(v1, mask=there[:, None], other=0.0).to(tl.float32)
    last = _logits(last_keys, x, tl.load(mask + CACHED + own, mask=there, other=0), there, SCALE)
    best = tl.full((KEYS,), -1.0e30, tl.float32)
    logits = ()
    for i in tl.static_range(AHEAD):
        n = i * KEYS + key
        logits += (_logits(keys[i], x, tl.load(mask + n, mask=n < CACHED, other=0), n < CACHED, SCALE),)
        best = tl.maximum(best, logits[i])
    top = tl.maximum(tl.max(best, axis=0), tl.max(last, axis=0))
    p = tl.exp2(last - top)
    weights = tl.zeros((KEYS,), tl.float32)
    sums = tl.zeros((KEYS, D), tl.float32)
    for i in tl.static_range(AHEAD):
        weight = tl.exp2(logits[i] - top)
        weights += weight
        sums += weight[:, None] * values[i].to(tl.float32)
    total = tl.sum(weights, axis=0) + tl.sum(p, axis=0)
    acc = tl.sum(sums, axis=0) + tl.sum(p[:, None] * last_values, axis=0)
    for at in range(AHEAD * KEYS, CACHED, KEYS):
        n = at + key
        k = tl.load(k0 + n[:, None] * k0_token, mask=(n < CACHED)[:, None], other=0.0)
        v = tl.load(v0 + n[:, None] * v0_token, mask=(n < CACHED)[:, None], other=0.0).to(tl.float32)
        more = _logits(k, x, tl.load(mask + n, mask=n < CACHED, other=0), n < CACHED, SCALE)
        new = tl.maximum(top, tl.max(more, axis=0))
        fade, weight = tl.exp2(top - new), tl.exp2(more - new)
        total = total * fade + tl.sum(weight, axis=0)
        acc = acc * fade + tl.sum(weight[:, None] * v, axis=0)
        top = new
    tl.store(out + sample * out_sample + head * D + d, (acc / total).to(out.dtype.element_ty))


def token_attention(
    q: Tensor, k0: Tensor, v0: Tensor, k1: Tensor, v1: Tensor, mask: Tensor, out: Tensor, scale: float
) -> None:
    """out [b, 1, heads, d] = attention of q [b, 1, heads, d] to k0, v0 [b, n, groups, d] and k1, v1 [b, m, groups, d].

    `mask` bool [b|1, 1, n + m]: a key that is not seen weighs nothing, unless none is. d a power of two from 16;
    samples and tokens may be strided, heads are dense. Sums are float32, rounded once.
    """
    b, _, heads, d = q.shape
    (n, groups), m = k0.shape[1:3], k1.shape[1]
    token_attention_kernel[(b * heads,)](
        q, k0, v0, k1, v1, mask.view(torch.uint8), out, q.stride(0), k0.stride(0), k0.stride(1), v0.stride(0),
        v0.stride(1), k1.stride(0), k1.stride(1), v1.stride(0), v1.stride(1), per_sample(mask), out.stride(0),
        SCALE=scale * math.log2(math.e), CACHED=n, OWN=m, HEADS=heads, PER=heads // groups, D=d, KEYS=KEYS,
        SECOND=max(16, triton.next_power_of_2(m)), AHEAD=min(triton.cdiv(n, KEYS), EARLY // d),
        num_warps=8, num_stages=1, launch_pdl=overlaps(),
    )  # fmt: skip
