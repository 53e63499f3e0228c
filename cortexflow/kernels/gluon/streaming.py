"""Products of few rows that stream their weights: bound by bytes, and between launches by latency.

A chain of such kernels runs under programmatic dependent launch. Before a kernel waits for the one ahead
of it, its weights are on their way: to registers, in the very fragments that the matrix units take, or to
shared memory where they are many. After the wait there is one round of loads (the rows, again straight
into fragments), the products, and one exchange through shared memory in which the slices of k are added.
The RMS norm costs little on that path: norm(x)·scale + shift, times w, is

    r · ((x·scale) @ w) + shift @ w,    r = rsqrt(mean(x²) + eps),

so r is needed only at the end, the squares are the diagonal of one more product, x @ x.T, and `shift`
rides along as one more row of x.

Weights are [n, k]. k is spread over the warps and no two programs share a column, so nothing is added
across programs: identical runs give identical bits.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from cortexflow.kernels.gluon.common import activate, barrier, let_next_start, wait_for_previous
from cortexflow.kernels.triton.common import overlaps

ROWS = 16  # of one matrix instruction; where the norm is modulated the last one is `shift`


class Config(NamedTuple):
    """How a product is spread over programs and warps.

    Attributes:
        columns: of a program (with a gated unit, as many of gate and of up).
        warps: of a program; each has its own slices of k.
        slices: parts of k with sums of their own: short chains of dependent products.
        chunks: of a slice; one chunk's fragments are loaded while the one before is multiplied.
        shared: whether weights wait in shared memory rather than in registers.
        registers: most of a thread, so that neighbouring kernels fit on one multiprocessor; 0 for no limit.
    """

    columns: int
    warps: int
    slices: int
    chunks: int
    shared: bool
    registers: int


def default(n: int, k: int, glu: bool, norm: bool) -> Config:
    """A config for w [n, k] (gate alone, with a gated unit), as measured on an H100 and an H200 in such chains."""
    if norm:
        return Config(16 if glu else 32, 8, 8, 1, True, 128 if glu and k <= 1024 else 0)
    return Config(16, 8, 8, 1, False, 128) if k <= 2048 else Config(8, 8, 8, k // 2048, True, 0)


@gluon.jit
def _staged(w, buffer, tile, K: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr, SLICES: gl.constexpr,
            CHUNKS: gl.constexpr, FIRST: gl.constexpr):  # fmt: skip
    """Begin to copy COLUMNS rows of w to shared memory, a chunk of every slice after the other."""
    EACH: gl.constexpr = K // SLICES // CHUNKS
    across: gl.constexpr = min(EACH // 8, 32)
    copied: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32 // across, across], [WARPS, 1, 1], [2, 1, 0])
    s = gl.arange(0, SLICES, gl.SliceLayout(1, gl.SliceLayout(2, copied)))
    n = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(2, copied)))
    k = gl.arange(0, EACH, gl.SliceLayout(0, gl.SliceLayout(1, copied)))
    place = w + (tile + n)[None, :, None] * K + s[:, None, None] * (K // SLICES) + k[None, None, :]
    for c in gl.static_range(CHUNKS):
        async_copy.async_copy_global_to_shared(buffer.index(FIRST + c), place + c * EACH)


@gluon.jit
def _fragments(w, tile, K: gl.constexpr, COLUMNS: gl.constexpr, SLICES: gl.constexpr, layout: gl.constexpr):
    """COLUMNS rows of w as operands [slices, k, columns]."""
    s = gl.arange(0, SLICES, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    n = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    k = gl.arange(0, K // SLICES, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    return gl.load(w + (tile + n)[None, None, :] * K + s[:, None, None] * (K // SLICES) + k[None, :, None])


@gluon.jit
def _exchanged(acc, SLICES: gl.constexpr, COLUMNS: gl.constexpr):
    """Sums of every slice in shared memory, [slices, columns / 8, rows, 8]: rows of 32 bytes, no bank conflict."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    eights = acc.reshape([SLICES, 16, COLUMNS // 8, 8]).permute([0, 2, 1, 3])
    return gl.allocate_shared_memory(gl.float32, [SLICES, COLUMNS // 8, 16, 8], plain, eights)


@gluon.jit
def _total(parts, ROW: gl.constexpr, COUNT: gl.constexpr, layout: gl.constexpr):
    """The sum over slices of some rows."""
    return gl.sum(parts.slice(ROW, COUNT, 2).load(layout), axis=0)


@gluon.jit
def streaming_kernel(
    x, w, out, residual, gate, scale, shift, M, x_row, out_row, residual_row, eps,
    N: gl.constexpr, K: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr, SLICES: gl.constexpr,
    CHUNKS: gl.constexpr, SHARED: gl.constexpr, NORM: gl.constexpr, MODULATED: gl.constexpr, GLU: gl.constexpr,
    ACT: gl.constexpr, RESIDUAL: gl.constexpr, GATE: gl.constexpr,
):  # fmt: skip
    """out = residual + gate * act(norm(x) @ w.T): a program for COLUMNS columns (with GLU, of gate and of up)."""
    let_next_start()
    ROWS: gl.constexpr = 16
    EACH: gl.constexpr = K // SLICES // CHUNKS
    dtype: gl.constexpr = w.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    # A thread's fragments are 8 neighbours along k: loads of 16 bytes. Both operands permute k alike.
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 8)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    tile = gl.program_id(0) * COLUMNS

    if SHARED:
        # Every second row swaps its halves of 128 bytes, so that reading fragments meets no bank conflict.
        halves: gl.constexpr = gl.SwizzledSharedLayout(32, 1, 2, [2, 1, 0])
        buffer = gl.allocate_shared_memory(dtype, [CHUNKS * (1 + GLU), SLICES, COLUMNS, EACH], halves)
        _staged(w, buffer, tile, K, COLUMNS, WARPS, SLICES, CHUNKS, 0)
        if GLU:
            _staged(w, buffer, N + tile, K, COLUMNS, WARPS, SLICES, CHUNKS, CHUNKS)
        async_copy.commit_group()
    else:
        gl.static_assert(CHUNKS == 1)
        first = _fragments(w, tile, K, COLUMNS, SLICES, right)
        if GLU:
            second = _fragments(w, N + tile, K, COLUMNS, SLICES, right)

    s = gl.arange(0, SLICES, gl.SliceLayout(1, gl.SliceLayout(2, left)))
    m = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, left)))
    k = gl.arange(0, EACH, gl.SliceLayout(0, gl.SliceLayout(1, left)))
    line = s[:, None, None] * (K // SLICES) + k[None, None, :]
    mine = x + m[None, :, None] * x_row + line
    inside = (m < M)[None, :, None]
    if MODULATED:  # the row that `shift` stands in is not scaled
        gl.static_assert(CHUNKS == 1)
        last = (m == ROWS - 1)[None, :, None]
        factor = gl.where(last, gl.full([], 1.0, dtype), gl.load(scale + line))
        other = gl.where(last, gl.load(shift + line), gl.full([], 0.0, dtype))
    else:
        other = 0.0

    acc = gl.zeros([SLICES, ROWS, COLUMNS], gl.float32, mma)
    up = acc
    squares = gl.zeros([SLICES, ROWS, ROWS], gl.float32, mma)
    added: gl.constexpr = gl.BlockedLayout([SLICES, 1, 1, 1], [1, 1, 4, 8], [1, WARPS // 4, 4, 1], [3, 2, 1, 0])
    flat: gl.constexpr = gl.SliceLayout(0, added)
    g_o = gl.arange(0, COLUMNS // 8, gl.SliceLayout(1, gl.SliceLayout(2, flat)))
    m_o = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, flat)))
    c_o = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, flat)))
    n_o = tile + g_o[:, None, None] * 8 + c_o[None, None, :]  # outputs are [columns / 8, rows, 8]
    stored = (m_o < M)[None, :, None]
    if GATE:
        factor_o = gl.load(gate + n_o).to(gl.float32)

    wait_for_previous()
    a = gl.load(mine, mask=inside, other=other)
    if RESIDUAL:
        before = gl.load(residual + m_o[None, :, None] * residual_row + n_o, mask=stored, other=0.0)
    if SHARED:
        async_copy.wait_group(0)
    barrier()  # also keeps the compiler from moving loads down to where their values are used
    for c in gl.static_range(CHUNKS):
        b = a
        if c + 1 < CHUNKS:
            a = gl.load(mine + (c + 1) * EACH, mask=inside, other=0.0)
        if NORM:
            squares = mma_v2(b, gl.convert_layout(b.permute([0, 2, 1]), right), squares)
            if MODULATED:
                b = b * factor
        if SHARED:
            first = buffer.index(c).permute([0, 2, 1]).load(right)
            if GLU:
                second = buffer.index(CHUNKS + c).permute([0, 2, 1]).load(right)
        acc = mma_v2(b, first, acc)
        if GLU:
            up = mma_v2(b, second, up)

    parts = _exchanged(acc, SLICES, COLUMNS)
    if GLU:
        ups = _exchanged(up, SLICES, COLUMNS)
    if NORM:
        i = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, mma)))
        j = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(1, mma)))
        mean = gl.sum(gl.where(i[None, :, None] == j[None, None, :], squares, 0.0), axis=2) / K
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
        means = gl.allocate_shared_memory(gl.float32, [SLICES, 1, ROWS, 1], plain, mean.reshape([SLICES, 1, ROWS, 1]))
        barrier()
        r = gl.rsqrt(_total(means, 0, ROWS, added) + eps)
    else:
        barrier()
    y = _total(parts, 0, ROWS, added)
    if NORM:
        y = y * r
    if MODULATED:
        y += _total(parts, ROWS - 1, 1, added)
    y = activate(y, ACT)
    if GLU:
        z = _total(ups, 0, ROWS, added)
        if NORM:
            z = z * r
        if MODULATED:
            z += _total(ups, ROWS - 1, 1, added)
        y = y * z
    if GATE:
        y = y * factor_o
    if RESIDUAL:
        y += before.to(gl.float32)
    gl.store(out + m_o[None, :, None] * out_row + n_o, y.to(out.dtype.element_ty), mask=stored)


def streaming(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float | None = None,
    act: str = "none",
    glu: bool = False,
    config: Config,
) -> None:
    """out [m, n] = residual + gate * act(norm(x) [m, k] @ w.T), w [n, k] (with `glu` [2 n, k]: gate, then up rows).

    m up to 16 (15 with `shift`), k a power of two. bf16 or f16, sums in float32, rounded once. Rows may be
    strided; `residual` may be `out`. `eps` asks for the RMS norm, `scale` and `shift` [k] for its modulation;
    `gate` is [n].
    """
    m, k = x.shape
    n = w.shape[0] // (2 if glu else 1)
    streaming_kernel[(n // config.columns,)](
        x, w, out, x if residual is None else residual, x if gate is None else gate,
        x if scale is None else scale, x if shift is None else shift,
        m, x.stride(0), out.stride(0), 0 if residual is None else residual.stride(0), eps or 0.0,
        N=n, K=k, COLUMNS=config.columns, WARPS=config.warps, SLICES=config.slices, CHUNKS=config.chunks,
        SHARED=config.shared, NORM=eps is not None, MODULATED=scale is not None, GLU=glu, ACT=act,
        RESIDUAL=residual is not None, GATE=gate is not None,
        num_warps=config.warps, maxnreg=config.registers or None, launch_pdl=overlaps(),
    )  # fmt: skip
