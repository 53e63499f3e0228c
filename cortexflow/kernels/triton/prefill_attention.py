"""Attention of many queries: blocks of keys under a running softmax in float32.

The query heads of one key head are rows of one matrix (row = token · heads of the group + head), so a
block of keys is read once for all of them. Queries, keys and values may be slices of one wide buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from cortexflow.kernels.triton.common import let_next_start, overlaps, wait_for_previous


@triton.jit
def attention_kernel(
    q, k, v, mask, out, q_batch, q_token, k_batch, k_token, v_batch, v_token, out_batch, out_token,
    mask_batch, mask_row, M, N,
    SCALE: tl.constexpr, GROUPS: tl.constexpr, PER: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one sample and one key head against all keys."""
    let_next_start()
    wait_for_previous()
    batch, group = (tl.program_id(1) // GROUPS).to(tl.int64), tl.program_id(1) % GROUPS
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    token, head = row // PER, group * PER + row % PER
    valid, deep = token < M, d < D
    both = valid[:, None] & deep[None, :]
    a = tl.load(q + batch * q_batch + token[:, None] * q_token + head[:, None] * D + d[None, :], mask=both, other=0.0)
    top = tl.full((ROWS,), -1.0e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDE), tl.float32)
    for at in range(0, N, KEYS):
        n = at + tl.arange(0, KEYS)
        there = n < N
        held = there[:, None] & deep[None, :]
        b = tl.load(k + batch * k_batch + n[:, None] * k_token + group * D + d[None, :], mask=held, other=0.0)
        logits = tl.dot(a, tl.trans(b), input_precision=EXACT) * SCALE
        if MASKED:
            line = mask + batch * mask_batch + token[:, None] * mask_row + n[None, :]
            seen = tl.load(line, mask=valid[:, None] & there[None, :], other=0)
            logits = tl.where(seen != 0, logits, -1.0e30)
        logits = tl.where(there[None, :], logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, axis=1))
        p = tl.exp(logits - new[:, None])
        fade = tl.exp(top - new)
        total = total * fade + tl.sum(p, axis=1)
        c = tl.load(v + batch * v_batch + n[:, None] * v_token + group * D + d[None, :], mask=held, other=0.0)
        acc = acc * fade[:, None] + tl.dot(p.to(c.dtype), c, input_precision=EXACT)
        top = new
    line = out + batch * out_batch + token[:, None] * out_token + head[:, None] * D + d[None, :]
    tl.store(line, (acc / total[:, None]).to(out.dtype.element_ty), mask=both)


def _tile(wide: int, masked: bool, exact: bool) -> tuple[int, int, int, int]:
    """Rows, keys, warps and stages that spill no registers and fit the smallest card's shared memory."""
    if exact:
        return (32, 32, 8, 1) if wide <= 128 else (32, 16, 8, 1)
    return (64, 64, 4, 3) if wide <= 128 and not masked else (64, 32, 8, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    scale: float,
    mask: Tensor | None = None,
    config: tuple[int, int, int, int] | None = None,
) -> None:
    """out [b, m, heads, d] from q [b, m, heads, d], k and v [b, n, groups, d]; heads and d dense, the rest strided.

    `mask` bool [b|1, m|1, n]: a key that is not seen weighs nothing, unless a query sees none. `config`: (rows, keys,
    warps, stages).
    """
    b, m, heads, d = q.shape
    n, groups = k.shape[1:3]
    wide = max(16, triton.next_power_of_2(d))
    rows, keys, warps, stages = config or _tile(wide, mask is not None, q.dtype == torch.float32)
    seen = q if mask is None else mask.view(torch.uint8)
    at = (0, 0) if mask is None else [s * (e > 1) for s, e in zip(mask.stride()[:2], mask.shape[:2], strict=True)]
    attention_kernel[(triton.cdiv(m * heads // groups, rows), b * groups)](
        q, k, v, seen, out, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        out.stride(0), out.stride(1), at[0], at[1], m, n,
        SCALE=scale, GROUPS=groups, PER=heads // groups, D=d, WIDE=wide, ROWS=rows, KEYS=keys, MASKED=mask is not None,
        EXACT="ieee" if q.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages, launch_pdl=overlaps(),
    )  # fmt: skip
