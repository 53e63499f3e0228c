"""Products of up to 128 rows that stream their weights, by warpgroup instructions.

Like `streaming`, a kernel fetches its weights before it waits for the one ahead of it, here to shared
memory, where the matrix units read them in place. The rows go from global memory straight into the
fragments of the other operand: a thread loads 8 neighbours along k, where the instruction wants pairs 8
apart. The order of k within a product is free as long as both operands agree, so the weights are stored
in the order in which such loads arrive, once, when they are prepared: within a block of 32, number
16 i + 8 h + 2 t + e of a row is its entry 8 t + 4 i + 2 h + e (i, h, e < 2, t < 4).

Where columns are few, k is split over programs: each writes its sums to a scratch, and `combine`, one
program a row, adds them in their order, with gate, residual, and the norm that follows.

Programs of several kernels share a multiprocessor, each waiting for the kernel ahead. One that had room for
two programs of a kernel, while others wait with one, would hold up all that follow; so a launch has as many
programs as fill every multiprocessor alike, and those without columns wait and end.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cortexflow.kernels.gluon.common import activate, barrier, let_next_start, wait_for_previous
from cortexflow.kernels.triton.common import alike, overlaps

ROWS = 64  # of one warpgroup; more rows take two side by side, which share the weights
MOST = 160 << 10  # bytes of shared memory for a program's weights


class Config(NamedTuple):
    """How a product is spread over programs.

    Attributes:
        columns: of a program (with a gated unit, as many of gate and of up).
        split: parts of k in programs of their own.
        chunk: of k, whose fragments are loaded and multiplied at once.
        ahead: chunks whose loads begin before the first is multiplied; with 1, the next one's while one is.
    """

    columns: int
    split: int
    chunk: int
    ahead: int = 1


def default(n: int, k: int, glu: bool) -> Config | None:
    """A config for w [n, k] (gate alone, with a gated unit), as measured on an H200 in a chain of such kernels.

    None where a program's weights would not fit beside its neighbours'.
    """
    split, columns, chunk, ahead = (1, 32, 128, 2) if glu else (1, 16, 256, 1)
    if not glu and n < 2048:  # too few columns to occupy the card
        columns, most = (32, 4) if k <= 2048 else (64, 8)
        split, chunk, ahead = max(s for s in (1, 2, 4, 8) if s <= most and k % (256 * s) == 0), 256, 2
    while columns > 8 and columns * (1 + glu) * k // split * 2 > MOST:
        columns //= 2
    fits = columns * (1 + glu) * k // split * 2 <= MOST and k % (split * chunk) == 0 and n % columns == 0
    return Config(columns, split, chunk, ahead) if fits else None


@gluon.jit
def warpgroup_kernel(
    x, w, out, cosine, sine, M, x_row, out_row, ANGLES,
    N: gl.constexpr, K: gl.constexpr, COLUMNS: gl.constexpr, SPLIT: gl.constexpr, CHUNK: gl.constexpr,
    AHEAD: gl.constexpr, ROWS: gl.constexpr, GLU: gl.constexpr, ACT: gl.constexpr, HALF: gl.constexpr,
    ROTATED: gl.constexpr,
):  # fmt: skip
    """out = act(x @ w.T), or with SPLIT > 1 the sums of one part of k, float32, to out [SPLIT, ROWS, N].

    Two sets of columns, halves of a tile, meet where they are stored: gate and up of a unit, or with HALF, half a head,
    those that are rotated together. The first ROTATED columns are, by row m % ANGLES of the angles.
    """
    let_next_start()
    if gl.program_id(0) >= N // COLUMNS * SPLIT:
        wait_for_previous()  # meanwhile its memory is taken
        return
    PART: gl.constexpr = K // SPLIT
    CHUNKS: gl.constexpr = PART // CHUNK
    dtype: gl.constexpr = w.dtype.element_ty
    WARPS: gl.constexpr = ROWS // 16
    WIDE: gl.constexpr = COLUMNS * (1 + GLU)
    SET: gl.constexpr = WIDE // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDE, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    nth, slice_of_k = gl.program_id(0) % (N // COLUMNS), gl.program_id(0) // (N // COLUMNS)
    tile, part = nth * COLUMNS, slice_of_k * PART

    at_rest: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    buffer = gl.allocate_shared_memory(dtype, [CHUNKS, WIDE, CHUNK], at_rest)
    across: gl.constexpr = min(CHUNK // 8, 32)
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [WARPS, 1], [1, 0])
    n = gl.arange(0, WIDE, gl.SliceLayout(1, copied))
    if GLU:
        n = gl.where(n < SET, n, n - SET + N)
    elif HALF:
        tile = nth // (HALF // SET) * (2 * HALF) + nth % (HALF // SET) * SET  # as the compiler sees that it is aligned
        n = gl.where(n < SET, n, n - SET + HALF)
    k = gl.arange(0, CHUNK, gl.SliceLayout(0, copied))
    place = w + (tile + n)[:, None] * K + part + k[None, :]
    for i in gl.static_range(CHUNKS):
        async_copy.async_copy_global_to_shared(buffer.index(i), place + i * CHUNK)
    async_copy.commit_group()

    # A thread: 8 neighbours along k, of every block of 32, in rows 8 apart.
    registers: gl.constexpr = [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]]
    loaded: gl.constexpr = gl.DistributedLinearLayout(
        registers[: 4 + (CHUNK >= 64) + (CHUNK >= 128) + (CHUNK >= 256)],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [64, 0]][: 2 + (ROWS > 64)],
        [],
        [ROWS, CHUNK],
    )
    m = gl.minimum(gl.arange(0, ROWS, gl.SliceLayout(1, loaded)), M - 1)  # what is not there is not stored
    k = gl.arange(0, CHUNK, gl.SliceLayout(0, loaded))
    mine = x + m[:, None] * x_row + part + k[None, :]
    acc = gl.zeros([ROWS, WIDE], gl.float32, mma)
    sets: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, SET, 16])
    stored: gl.constexpr = sets if GLU or HALF else mma
    m_o = gl.arange(0, ROWS, gl.SliceLayout(1, stored))
    n_o = tile + gl.arange(0, SET if GLU or HALF else COLUMNS, gl.SliceLayout(0, stored))
    there = (m_o < M)[:, None]

    wait_for_previous()
    if HALF:
        angle = (m_o % ANGLES)[:, None] * HALF + (n_o % (2 * HALF))[None, :]
        c = gl.load(cosine + angle, mask=there & (tile < ROTATED), other=1.0)
        s = gl.load(sine + angle, mask=there & (tile < ROTATED), other=0.0)
    a = ()
    for i in gl.static_range(min(AHEAD, CHUNKS)):
        a += (gl.load(mine + i * CHUNK),)
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    for i in gl.static_range(CHUNKS):
        b = a[i].reshape([ROWS, CHUNK // 32, 4, 2, 2, 2]).permute([0, 1, 3, 4, 2, 5]).reshape([ROWS, CHUNK])
        b = gl.convert_layout(b, left)
        if AHEAD == 1 and i + 1 < CHUNKS:
            a += (gl.load(mine + (i + 1) * CHUNK),)
            barrier()  # keeps the compiler from moving these loads behind the products
        acc = warpgroup_mma(b, buffer.index(i).permute([1, 0]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        if AHEAD > 1 and i + AHEAD < CHUNKS:
            a += (gl.load(mine + (i + AHEAD) * CHUNK),)
            barrier()

    if SPLIT > 1:
        gl.store(out + (slice_of_k * ROWS + m_o[:, None]) * N + n_o[None, :], acc, mask=there)
    elif GLU:
        y, up = _sets(acc, ROWS, SET, sets)
        gl.store(out + m_o[:, None] * out_row + n_o[None, :], (activate(y, ACT) * up).to(dtype), mask=there)
    elif HALF:  # rounded first, as where the rotation is a launch of its own
        x1, x2 = _sets(acc.to(dtype).to(gl.float32), ROWS, SET, sets)
        line = out + m_o[:, None] * out_row + n_o[None, :]
        gl.store(line, (x1 * c - x2 * s).to(dtype), mask=there)
        gl.store(line + HALF, (x2 * c + x1 * s).to(dtype), mask=there)
    else:
        gl.store(out + m_o[:, None] * out_row + n_o[None, :], activate(acc, ACT).to(dtype), mask=there)


@gluon.jit
def _sets(acc, ROWS: gl.constexpr, SET: gl.constexpr, layout: gl.constexpr):
    """The left and the right half of a tile: both halves of a row are in one thread."""
    one, two = acc.reshape([ROWS, 2, SET]).permute([0, 2, 1]).split()
    return gl.convert_layout(one, layout), gl.convert_layout(two, layout)


@gluon.jit
def combine_kernel(
    parts, out, residual, gate, normed, scale, shift, out_row, residual_row, normed_row, eps,
    N: gl.constexpr, SPLIT: gl.constexpr, ROWS: gl.constexpr, RESIDUAL: gl.constexpr, GATE: gl.constexpr,
    NORM: gl.constexpr, SCALED: gl.constexpr, SHIFTED: gl.constexpr,
):  # fmt: skip
    """One row: out = residual + gate * the sum of the parts, in their order; normed = norm(out) * scale + shift."""
    let_next_start()
    WIDE: gl.constexpr = max(N // (32 * gl.num_warps()), 1)
    line: gl.constexpr = gl.BlockedLayout([min(WIDE, 4)], [32], [gl.num_warps()], [0])
    row, n = gl.program_id(0), gl.arange(0, N, line)
    if GATE:
        factor = gl.load(gate + n).to(gl.float32)
    if SCALED:
        after = gl.load(scale + n).to(gl.float32)
    if SHIFTED:
        offset = gl.load(shift + n).to(gl.float32)
    wait_for_previous()
    if RESIDUAL:
        before = gl.load(residual + row * residual_row + n).to(gl.float32)
    y = gl.load(parts + row * N + n)
    for p in gl.static_range(1, SPLIT):
        y += gl.load(parts + (p * ROWS + row) * N + n)
    if GATE:
        y = y * factor
    if RESIDUAL:
        y += before
    rounded = y.to(out.dtype.element_ty)
    gl.store(out + row * out_row + n, rounded)
    if NORM:
        y = rounded.to(gl.float32)
        y = y * gl.rsqrt(gl.sum(y * y, axis=0) / N + eps)
        if SCALED:
            y = y * after
        if SHIFTED:
            y += offset
        gl.store(normed + row * normed_row + n, y.to(normed.dtype.element_ty))


def padded(m: int) -> int:
    """Rows of a kernel's tile for m rows."""
    return ROWS if m <= ROWS else 2 * ROWS


def warpgroup(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    *,
    act: str = "none",
    glu: bool = False,
    angles: tuple[Tensor, Tensor] | None = None,
    rotated: int = 0,
    config: Config,
) -> None:
    """out [m, n] = act(x [m, k] @ w.T), w [n, k] in that order of k (with `glu` [2 n, k]: gate, then up rows).

    m up to 128; bf16 or f16, sums in float32. Rows of x and out may be strided. With a split, out is the
    scratch for `combine`: float32, at least split * n times m as a multiple of 64. `angles`, cosines and sines
    f32 [1|b, t, d/2], dense, m = b t: the first `rotated` columns are heads of d entries, whose halves are rotated once
    they are rounded; for a product that is not split, 16 columns a program, n a multiple of d.
    """
    m, k = x.shape
    n = w.shape[0] // (2 if glu else 1)
    half = angles[0].shape[-1] if angles else 0
    if angles and not rotates(n, half, config):
        raise ValueError(f"heads of {2 * half} entries are not rotated in a product of {n} columns by {config}")
    cosine, sine = angles or (x, x)
    warpgroup_kernel[(alike(n // config.columns * config.split),)](
        x, w, out, cosine, sine, m, x.stride(0), out.stride(0), cosine.numel() // half if half else 1,
        N=n, K=k, COLUMNS=config.columns, SPLIT=config.split, CHUNK=config.chunk, AHEAD=config.ahead, ROWS=padded(m),
        GLU=glu, ACT=act, HALF=half, ROTATED=rotated, num_warps=padded(m) // 16, launch_pdl=overlaps(),
    )  # fmt: skip


def rotates(n: int, half: int, config: Config | None) -> bool:
    """Whether a product of n columns can rotate heads of 2 · half entries: programs have columns of one head each."""
    if config is None or config.split > 1 or config.columns < 16:
        return False
    return half % (config.columns // 2) == 0 and n % (2 * half) == 0


def combine(
    parts: Tensor,
    out: Tensor,
    split: int,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    normed: Tensor | None = None,
    eps: float = 0.0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> None:
    """out [m, n] = residual + gate * the sum of the parts; normed [m, n] = rms_norm(out) * scale + shift.

    n a power of two. `residual` may be `out`; gate, scale and shift are [n]; without `normed` no norm.
    """
    m, n = out.shape
    some, more = out if residual is None else residual, out if normed is None else normed
    combine_kernel[(m,)](
        parts, out, some, out if gate is None else gate, more, out if scale is None else scale,
        out if shift is None else shift, out.stride(0), some.stride(0), more.stride(0), eps,
        N=n, SPLIT=split, ROWS=padded(m), RESIDUAL=residual is not None, GATE=gate is not None, NORM=normed is not None,
        SCALED=scale is not None, SHIFTED=shift is not None, num_warps=8 if n >= 1024 else 4, launch_pdl=overlaps(),
    )  # fmt: skip
