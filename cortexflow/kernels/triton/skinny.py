"""Products with few rows: each weight is read once, before the kernel waits for the one ahead of it.

A program holds its columns' weights in registers by the time its input is ready (programmatic dependent
launch), so a chain of such kernels streams weights without a pause. Weights are [n, k]: the rows of a
program are one contiguous range. The inner extent is spread over the warps; where there are too few
columns to fill the card it is also split over programs, and the last program of a tile adds the parts
in a fixed order, so that identical runs give identical bits.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl
from cortexflow.kernels.triton.common import activate, let_next_start, overlaps, wait_for_previous


@triton.jit
def skinny_kernel(
    x, w, out, bias, residual, gate, scale, shift, parts, counters, M, x_row, out_row, residual_row, eps,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, SLICES: tl.constexpr,
    NORM: tl.constexpr, MODULATED: tl.constexpr, GLU: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """out = epilogue(norm(x) @ w.T): one program for BN columns and one part of K."""
    let_next_start()
    tile, part = tl.program_id(0), tl.program_id(1)
    KS: tl.constexpr = K // SPLIT // SLICES
    rows, columns = tl.arange(0, ROWS), tile * BN + tl.arange(0, BN)
    k = part * (K // SPLIT) + tl.arange(0, SLICES)[:, None, None] * KS + tl.arange(0, KS)[None, :, None]  # [s, k, 1]
    a = tl.load(w + columns[None, None, :].to(tl.int64) * K + k)  # [s, k, n]
    if GLU:
        b = tl.load(w + (N + columns[None, None, :].to(tl.int64)) * K + k)
    ks = part * (K // SPLIT) + tl.arange(0, SLICES)[:, None, None] * KS + tl.arange(0, KS)[None, None, :]  # [s, 1, k]
    if MODULATED:
        factor = tl.load(scale + ks)
        offset = tl.load(shift + ks)
    wait_for_previous()

    inside = rows < M
    v = tl.load(x + rows[None, :, None] * x_row + ks, mask=inside[None, :, None], other=0.0)  # [s, m, k]
    if NORM:
        f = v.to(tl.float32)
        mean = tl.sum(tl.sum(f * f, axis=2), axis=0) / K
        n = (f * tl.rsqrt(mean + eps)[None, :, None]).to(v.dtype)
        if MODULATED:
            n = (n.to(tl.float32) * factor + offset).to(v.dtype)
        v = n
    acc = tl.sum(tl.dot(v, a), axis=0)
    up = acc
    if GLU:
        up = tl.sum(tl.dot(v, b), axis=0)

    if SPLIT > 1:
        tl.store(parts + (part * ROWS + rows[:, None]) * N + columns[None, :], acc)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            acc = tl.zeros((ROWS, BN), tl.float32)
            for p in tl.static_range(SPLIT):
                acc += tl.load(parts + (p * ROWS + rows[:, None]) * N + columns[None, :], cache_modifier=".cg")
            tl.store(counters + tile, 0)
            _finish(acc, up, out, bias, residual, gate, rows, columns, inside, out_row, residual_row,
                    GLU, ACT, BIAS, RESIDUAL, GATE)  # fmt: skip
    else:
        _finish(acc, up, out, bias, residual, gate, rows, columns, inside, out_row, residual_row,
                GLU, ACT, BIAS, RESIDUAL, GATE)  # fmt: skip


@triton.jit
def _finish(
    acc, up, out, bias, residual, gate, rows, columns, inside, out_row, residual_row,
    GLU: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Bias, activation, gate and residual, then the store; rounded once."""
    if BIAS:
        acc += tl.load(bias + columns)[None, :].to(tl.float32)
    acc = activate(acc, ACT)
    if GLU:
        acc = acc * up
    if GATE:
        acc = acc * tl.load(gate + columns)[None, :].to(tl.float32)
    if RESIDUAL:
        place = residual + rows[:, None] * residual_row + columns[None, :]
        acc += tl.load(place, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(out + rows[:, None] * out_row + columns[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None])


def skinny(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float | None = None,
    act: str = "none",
    glu: bool = False,
    scratch: tuple[Tensor, Tensor] | None = None,
    config: tuple[int, int, int, int] | None = None,
) -> None:
    """out [m, n] = epilogue(norm(x) [m, k] @ w.T), w [n, k] (with `glu` [2 n, k]: gate rows, then up rows).

    `eps` asks for the RMS norm, `scale` and `shift` for its modulation. `scratch`: float32 parts and zeroed
    counters, for splits of k. `config`: (columns of a program, splits of k, slices of k, warps).
    """
    m, k = x.shape
    n = w.shape[0] // (2 if glu else 1)
    bn, split, slices, warps = config or (16, 1, 4, 4)
    rows = max(16, triton.next_power_of_2(m))
    parts, counters = scratch if scratch is not None else (out, out)
    some = x  # a pointer that is never read
    skinny_kernel[(n // bn, split)](
        x, w, out,
        some if bias is None else bias, some if residual is None else residual, some if gate is None else gate,
        some if scale is None else scale, some if shift is None else shift, parts, counters,
        m, x.stride(0), out.stride(0), 0 if residual is None else residual.stride(0), eps or 0.0,
        N=n, K=k, ROWS=rows, BN=bn, SPLIT=split, SLICES=slices,
        NORM=eps is not None, MODULATED=scale is not None, GLU=glu, ACT=act, BIAS=bias is not None,
        RESIDUAL=residual is not None, GATE=gate is not None,
        num_warps=warps, num_stages=1, launch_pdl=overlaps(),
    )  # fmt: skip
