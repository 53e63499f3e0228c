"""Attention of a few tokens to a cached prefix and to themselves in one kernel: clusters of eight blocks.

For Hopper and Blackwell's data-centre cards. A cluster has sixteen rows (token, head) and some of the values'
columns; its blocks share the keys, every one its part of the prefix's and of the tokens' own. The prefix's keys
and values are on their way to shared memory before a block waits for the kernel ahead; after the wait there is
one round of loads. A block writes every other block's columns of its product, with its largest logits and
sums, straight into that block's shared memory, where a barrier counts the bytes; each then adds its columns
in the order of the blocks, so that identical runs give identical bits.

Registers and shared memory are kept low on purpose: the kernels before and after this one are on the same
multiprocessors, and fetch their weights meanwhile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from cortexflow.kernels.gluon.common import let_next_start, wait_for_previous
from cortexflow.kernels.triton.common import overlaps

BLOCKS = 8  # of a cluster: no card must allow more
OWN = 8  # places among a block's keys for the tokens' own


class Cluster(NamedTuple):
    """How clusters share the work."""

    keys: int = 80
    """Keys that a block has room for, with `OWN` places for the tokens' own; a multiple of 16."""
    parts: int = 2
    """Clusters that share the values' columns of sixteen rows; each multiplies by all keys."""
    warps: int = 4
    """Warps of a block."""
    registers: int = 96
    """Most of a thread."""


def fits(m: int, heads: int, d: int, n: int, config: Cluster) -> bool:
    """Whether every block has room for its part of `n` cached keys and of `m` tokens, and layouts for the rest."""
    each, own = triton.cdiv(n, BLOCKS), triton.cdiv(m, BLOCKS)
    columns = d // config.parts
    rows = triton.cdiv(config.keys, 32) * 32
    # a launch that asks for no more than 48 KB of dynamic shared memory gets 48 KB with the static box
    dynamic, box = rows * (d + columns) * 2, 16 * (columns + 2 * BLOCKS) * 4
    return (
        own <= OWN
        and each + OWN <= config.keys
        and 16 % heads == 0
        and (d & (d - 1)) == 0
        and 64 <= d <= 256
        and columns >= 8 * max(config.warps, BLOCKS)
        and (dynamic > 48 << 10 or dynamic + 24576 + box <= 48 << 10)
    )


@gluon.constexpr_function
def _products(blocks, warps):
    """Accumulators of 16 rows, columns over the warps; every block of the cluster has the whole matrix."""
    return gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8], [[0, 0]] * (blocks.bit_length() - 1))


@gluon.constexpr_function
def _lines(width, blocks, warps):
    """Rows loaded in vectors of eight; every block of the cluster has the whole matrix."""
    lanes = min(width // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0], [[0, 0]] * (blocks.bit_length() - 1))


@gluon.constexpr_function
def _heads(tokens, half, blocks, warps):
    """[tokens, heads, half] in vectors of eight; heads of a token in one thread share its angles."""
    lanes = min(half // 8, 32)
    few = min(tokens, 32 // lanes)
    over = min(tokens // few, warps)
    cluster = [[0, 0, 0]] * (blocks.bit_length() - 1)
    return gl.BlockedLayout([1, 1, 8], [few, 32 // lanes // few, lanes], [over, warps // over, 1], [2, 1, 0], cluster)


@gluon.constexpr_function
def _shared(blocks):
    """Rows in shared memory, free of bank conflicts for a product; a copy in every block of the cluster."""
    return gl.SwizzledSharedLayout(8, 1, 8, [1, 0], cga_layout=[[0, 0]] * (blocks.bit_length() - 1))


@gluon.constexpr_function
def _narrow(blocks):
    """The same for rows of 64 bytes."""
    return gl.SwizzledSharedLayout(8, 2, 4, [1, 0], cga_layout=[[0, 0]] * (blocks.bit_length() - 1))


@gluon.constexpr_function
def _plain(blocks):
    """The same as it comes."""
    return gl.SwizzledSharedLayout(1, 1, 1, [1, 0], cga_layout=[[0, 0]] * (blocks.bit_length() - 1))


@gluon.constexpr_function
def _across(blocks, warps):
    """[16, warps]: what each warp found for the rows of its accumulators, in every warp."""
    bits, rows = warps.bit_length() - 1, [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    registers = [[0, 1 << i] for i in range(bits)] + [[8, 0]]
    cluster = [[0, 0]] * (blocks.bit_length() - 1)
    return gl.DistributedLinearLayout(registers, rows, [[0, 0]] * bits, cluster, [16, warps])


@gluon.constexpr_function
def _finished(part, each, blocks, warps):
    """The output's 16 rows; each block of the cluster has its `part` of the columns, a thread `each` neighbours."""
    lanes = min(part // each, 32)
    cluster = [[0, 1 << i] for i in range(blocks.bit_length() - 1)]
    return gl.BlockedLayout([1, each], [32 // lanes, lanes], [warps, 1], [1, 0], cluster)


@gluon.constexpr_function
def _box(size):
    """The address of `size` bytes of the block's own shared memory and of a barrier behind them."""
    return f"{{ .shared .align 16 .b8 box[{size + 8}]; mov.u32 $0, box; }}"


@gluon.constexpr_function
def _expect(size):
    """The barrier at the end of the box will open when `size` bytes have come from the cluster."""
    return (
        f"{{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
        f" @p mbarrier.init.shared::cta.b64 [$1+{size}], 1; @p fence.mbarrier_init.release.cluster;"
        f" @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1+{size}], {size};"
        f" barrier.cluster.arrive.relaxed.aligned; mov.u32 $0, 0; }}"
    )


@gluon.constexpr_function
def _received(size):
    """Wait for those bytes."""
    return (
        f"{{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [$1+{size}], 0; @p bra done;"
        f" bra again; done: mov.u32 $0, 0; }}"
    )


@gluon.constexpr_function
def _read(count):
    """Neighbouring float32 numbers of the block's own shared memory."""
    found = ", ".join(f"${i}" for i in range(count))
    return f"ld.shared{f'.v{count}' if count > 1 else ''}.f32 {f'{{{found}}}' if count > 1 else found}, [${count}];"


@gluon.constexpr_function
def _operands(count):
    """Constraints of a read: its results, and an address for each."""
    return ",".join(["=r"] * count + ["r"] * count)


@gluon.constexpr_function
def _send_pair(size):
    """Two neighbouring numbers to another block's box, counted by its barrier."""
    return (
        f"{{ .reg .u32 a, b; mapa.shared::cluster.u32 a, $2, $4; mapa.shared::cluster.u32 b, $8, $4;"
        f" st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [a], {{$6, $7}}, [b+{size}];"
        f" mov.u32 $0, 0; mov.u32 $1, 0; }}"
    )


@gluon.constexpr_function
def _send_row(size, blocks):
    """A row's two numbers to a block, where that block is one of the cluster."""
    return (
        f"{{ .reg .u32 a, b; .reg .pred p; setp.lt.u32 p, $2, {blocks};"
        f" @p mapa.shared::cluster.u32 a, $1, $2; @p mapa.shared::cluster.u32 b, $5, $2;"
        f" @p st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [a], {{$3, $4}}, [b+{size}];"
        f" mov.u32 $0, 0; }}"
    )


@gluon.constexpr_function
def _each(part, warps):
    """Neighbouring columns of a thread in the finished output."""
    return max(part // (2 * warps), 1)


@gluon.jit
def _rotated(x1, x2, c, s, dtype: gl.constexpr):
    """Both halves of rotated rows."""
    f1, f2 = x1.to(gl.float32), x2.to(gl.float32)
    return (f1 * c - f2 * s).to(dtype), (f2 * c + f1 * s).to(dtype)


@gluon.jit
def _place(box, part, r, d, PART: gl.constexpr):
    """Where a part's product of row r and column d is: rows of 32 bytes, no bank conflict when fragments are written."""
    return box + ((part * (PART // 8) + d // 8) * 16 + r) * 32 + (d % 8) * 4


@gluon.jit
def cluster_kernel(
    q, own_k, own_v, cached_k, cached_v, cosine, sine, mask, out,
    q_token, k_token, v_token, key_token, value_token, out_token, mask_row, SCALE: gl.constexpr,
    M: gl.constexpr, PREFIX: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr,
    PARTS: gl.constexpr, BLOCKS: gl.constexpr, OWN: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """One cluster: sixteen rows and D / PARTS columns; a block has a share of the prefix's keys and of the tokens'."""
    let_next_start()
    HALF: gl.constexpr = D // 2
    COLUMNS: gl.constexpr = D // PARTS  # of the values
    PART: gl.constexpr = COLUMNS // BLOCKS  # of those that this block finishes
    EACH: gl.constexpr = (PREFIX + BLOCKS - 1) // BLOCKS  # keys of the prefix
    MINE: gl.constexpr = (M + BLOCKS - 1) // BLOCKS  # keys of the tokens
    CHUNKS: gl.constexpr = (KEYS + 31) // 32
    TOKENS: gl.constexpr = 16 // HEADS
    mma: gl.constexpr = _products(BLOCKS, WARPS)
    shared: gl.constexpr = _shared(BLOCKS)
    dtype: gl.constexpr = out.dtype.element_ty
    rank = gl.inline_asm_elementwise("mov.u32 $0, %cluster_ctarank;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    SIZE: gl.constexpr = 16 * (COLUMNS + 2 * BLOCKS) * 4
    box = gl.inline_asm_elementwise(_box(SIZE), "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    gl.inline_asm_elementwise(_expect(SIZE), "=r,r", [box], dtype=gl.int32, is_pure=False, pack=1)
    first_token = gl.program_id(0) // PARTS * TOKENS
    first_column = gl.program_id(0) % PARTS * COLUMNS

    # In every block's memory: OWN places for tokens, then its keys of the prefix.
    half: gl.constexpr = _lines(HALF, BLOCKS, WARPS)
    short: gl.constexpr = _lines(COLUMNS, BLOCKS, WARPS)
    d = gl.arange(0, HALF, gl.SliceLayout(0, half))
    column = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, short))
    firsts, seconds, values = (), (), ()  # halves of keys, values
    for c in gl.static_range(CHUNKS):
        at = c * 32 - OWN + gl.arange(0, 32, gl.SliceLayout(1, half))
        n = rank * EACH + at
        there = (at >= 0) & (at < EACH) & (n < PREFIX)
        firsts += (gl.allocate_shared_memory(dtype, [32, HALF], shared),)
        seconds += (gl.allocate_shared_memory(dtype, [32, HALF], shared),)
        place = cached_k + n[:, None] * key_token + d[None, :]
        async_copy.async_copy_global_to_shared(firsts[c], place, mask=there[:, None])
        async_copy.async_copy_global_to_shared(seconds[c], place + HALF, mask=there[:, None])
    for c in gl.static_range(CHUNKS):
        at = c * 32 - OWN + gl.arange(0, 32, gl.SliceLayout(1, short))
        n = rank * EACH + at
        there = (at >= 0) & (at < EACH) & (n < PREFIX)
        values += (gl.allocate_shared_memory(dtype, [32, COLUMNS], shared),)
        place = cached_v + n[:, None] * value_token + column[None, :]
        async_copy.async_copy_global_to_shared(values[c], place, mask=there[:, None])  # zeros where none is
    async_copy.commit_group()
    if KEYS % 32 == 16:  # the last half of the last chunk is free
        q1 = firsts[CHUNKS - 1]._reinterpret(dtype, [2, 16, HALF], shared).index(1)
        q2 = seconds[CHUNKS - 1]._reinterpret(dtype, [2, 16, HALF], shared).index(1)
    else:
        q1 = gl.allocate_shared_memory(dtype, [16, HALF], shared)
        q2 = gl.allocate_shared_memory(dtype, [16, HALF], shared)
    weights = ()
    for c in gl.static_range(CHUNKS):
        weights += (gl.allocate_shared_memory(dtype, [16, 32], _narrow(BLOCKS)),)

    triple: gl.constexpr = _heads(TOKENS, HALF, BLOCKS, WARPS)
    pair: gl.constexpr = gl.SliceLayout(1, triple)
    t = first_token + gl.arange(0, TOKENS, gl.SliceLayout(1, gl.SliceLayout(2, triple)))
    h = gl.arange(0, HEADS, gl.SliceLayout(0, gl.SliceLayout(2, triple)))
    dq = gl.arange(0, HALF, gl.SliceLayout(0, pair))
    q += t[:, None, None] * q_token + h[None, :, None] * D + dq[None, None, :]
    t = first_token + gl.arange(0, TOKENS, gl.SliceLayout(1, pair))
    q_angle = t[:, None] * HALF + dq[None, :]
    q_there = (t < M)[:, None]
    i = gl.arange(0, OWN, gl.SliceLayout(1, half))
    dk = gl.arange(0, HALF, gl.SliceLayout(0, half))
    k_there = ((i < MINE) & (rank * MINE + i < M))[:, None]
    own_k += (rank * MINE + i)[:, None] * k_token + dk[None, :]
    k_angle = (rank * MINE + i)[:, None] * HALF + dk[None, :]
    i = gl.arange(0, OWN, gl.SliceLayout(1, short))
    v_there = ((i < MINE) & (rank * MINE + i < M))[:, None]
    own_v += (rank * MINE + i)[:, None] * v_token + column[None, :]
    r = gl.arange(0, 16, gl.SliceLayout(1, mma))
    token = first_token + r // HEADS
    mask += token[:, None] * mask_row
    column = gl.arange(0, 32, gl.SliceLayout(0, mma))
    gl.inline_asm_elementwise(
        "barrier.cluster.wait.aligned; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # the others have their barriers
    wait_for_previous()

    x1 = gl.load(q, mask=q_there[:, None, :], other=0.0)
    x2 = gl.load(q + HALF, mask=q_there[:, None, :], other=0.0)
    k1 = gl.load(own_k, mask=k_there, other=0.0)
    k2 = gl.load(own_k + HALF, mask=k_there, other=0.0)
    qc = gl.load(cosine + q_angle, mask=q_there, other=0.0)
    qs = gl.load(sine + q_angle, mask=q_there, other=0.0)
    kc = gl.load(cosine + k_angle, mask=k_there, other=0.0)
    ks = gl.load(sine + k_angle, mask=k_there, other=0.0)
    v = gl.load(own_v, mask=v_there, other=0.0)
    seen, inside = (), ()
    for c in gl.static_range(CHUNKS):
        at = c * 32 - OWN + column
        n = rank * EACH + at
        there = (at < EACH) & (n < PREFIX)
        if c == 0:
            mine = rank * MINE + column
            there = gl.where(column < OWN, (column < MINE) & (mine < M), there)
            n = gl.where(column < OWN, PREFIX + mine, n)
        inside += (there[None, :],)
        seen += (gl.load(mask + n[None, :], mask=there[None, :] & (token < M)[:, None], other=0),)
    async_copy.wait_group(0)
    gl.thread_barrier()  # also keeps the compiler from moving loads down to where their values are used
    x1, x2 = _rotated(x1, x2, qc[:, None, :], qs[:, None, :], dtype)
    q1.store(x1.reshape([16, HALF]))
    q2.store(x2.reshape([16, HALF]))
    k1, k2 = _rotated(k1, k2, kc, ks, dtype)
    firsts[0]._reinterpret(dtype, [32 // OWN, OWN, HALF], shared).index(0).store(k1)
    seconds[0]._reinterpret(dtype, [32 // OWN, OWN, HALF], shared).index(0).store(k2)
    values[0]._reinterpret(dtype, [32 // OWN, OWN, COLUMNS], shared).index(0).store(v)

    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    nothing = gl.zeros([16, 32], gl.float32, mma)
    a1 = q1.load(left)
    logits = ()
    for c in gl.static_range(CHUNKS):  # two sums, so that neither waits for the other
        logits += (mma_v2(a1, firsts[c].permute([1, 0]).load(right), nothing),)
    a2 = q2.load(left)
    masked = ()
    for c in gl.static_range(CHUNKS):
        second = mma_v2(a2, seconds[c].permute([1, 0]).load(right), nothing)
        x = gl.where(seen[c] != 0, (logits[c] + second) * SCALE, -1.0e30)  # unseen: nothing beside one that is seen
        masked += (gl.where(inside[c], x, -3.0e38),)
    top = masked[0]
    for c in gl.static_range(1, CHUNKS):
        top = gl.maximum(top, masked[c])
    top = gl.max(top.reshape([16, WARPS, 32 // WARPS]), axis=2)  # of a warp's keys
    tops = gl.allocate_shared_memory(gl.float32, [16, WARPS], _plain(BLOCKS), top).load(_across(BLOCKS, WARPS))
    top = gl.convert_layout(gl.max(tops, axis=1), gl.SliceLayout(1, mma), assert_trivial=True)
    for c in gl.static_range(CHUNKS):
        weights[c].store(gl.exp2(masked[c] - top[:, None]).to(dtype))
    acc = gl.zeros([16, COLUMNS], gl.float32, mma)
    total = nothing  # the sum in every column: a product with ones, as a sum over the warps would cost two more barriers
    ones = gl.full([32, 32], 1.0, dtype, right)
    for c in gl.static_range(CHUNKS):
        p = weights[c].load(left)
        acc = mma_v2(p, values[c].load(right), acc)
        total = mma_v2(p, ones, total)

    # to block `d // PART` its columns; to every block largest logit and sum [BLOCKS, 16, 2]
    d = gl.arange(0, COLUMNS, gl.SliceLayout(0, mma))
    local = _place(box, rank, r[:, None], (d % PART)[None, :], PART)
    local, block = gl.broadcast(local, (d // PART)[None, :])
    gl.inline_asm_elementwise(
        _send_pair(SIZE), "=r,=r,r,r,r,r,r,r,r,r", [local, block, acc, box + block * 0],
        dtype=gl.int32, is_pure=False, pack=2,
    )  # fmt: skip
    local = box + (16 * COLUMNS + (rank * 16 + r[:, None]) * 2) * 4
    local, block = gl.broadcast(local, column[None, :])
    top, _ = gl.broadcast(top[:, None], block)
    gl.inline_asm_elementwise(
        _send_row(SIZE, BLOCKS), "=r,r,r,r,r,r", [local, block, top, total, box + block * 0],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    gl.inline_asm_elementwise(_received(SIZE), "=r,r", [box], dtype=gl.int32, is_pure=False, pack=1)

    EACH_THREAD: gl.constexpr = _each(PART, WARPS)
    done: gl.constexpr = _finished(PART, EACH_THREAD, BLOCKS, WARPS)
    r = gl.arange(0, 16, gl.SliceLayout(1, done))
    d = gl.arange(0, COLUMNS, gl.SliceLayout(0, done))
    tops, sums, parts = (), (), ()
    for b in gl.static_range(BLOCKS):
        place = box + (16 * COLUMNS + (b * 16 + r) * 2) * 4
        tops += (gl.inline_asm_elementwise(_read(1), "=r,r", [place], dtype=gl.float32, is_pure=False, pack=1),)
        sums += (gl.inline_asm_elementwise(_read(1), "=r,r", [place + 4], dtype=gl.float32, is_pure=False, pack=1),)
        place = _place(box, b, r[:, None], (d % PART)[None, :], PART)
        parts += (
            gl.inline_asm_elementwise(
                _read(EACH_THREAD), _operands(EACH_THREAD), [place], dtype=gl.float32, is_pure=False, pack=EACH_THREAD
            ),
        )
    best = gl.full([16], -3.0e38, gl.float32, gl.SliceLayout(1, done))
    total = gl.zeros([16], gl.float32, gl.SliceLayout(1, done))
    acc = gl.zeros([16, COLUMNS], gl.float32, done)
    for b in gl.static_range(BLOCKS):
        best = gl.maximum(best, tops[b])
    for b in gl.static_range(BLOCKS):
        share = gl.exp2(tops[b] - best)
        total += share * sums[b]
        acc += share[:, None] * parts[b]
    token = first_token + r // HEADS
    target = out + token[:, None] * out_token + (r % HEADS)[:, None] * D + first_column + d[None, :]
    gl.store(target, (acc / total[:, None]).to(dtype), mask=(token < M)[:, None])


def cluster_attention(
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
    config: Cluster,
) -> None:
    """out [m, heads, d] = attention of rotated q to the cache and to the tokens' own rotated keys.

    q [m, heads, d], own k and v [m, 1, d], cache [n, 1, d] (rotated), angles f32 [m, d/2], mask bool
    [1|m, n + m]; 16-bit floats of one dtype, where `fits`. Tokens may be strided by a multiple of 8, the heads
    of one are contiguous.
    """
    m, heads, d = q.shape
    n = cached_k.shape[0]
    cluster_kernel[(triton.cdiv(m * heads, 16) * config.parts,)](
        q, own_k, own_v, cached_k, cached_v, cosine, sine, mask.view(torch.uint8), out,
        q.stride(0), own_k.stride(0), own_v.stride(0), cached_k.stride(0), cached_v.stride(0), out.stride(0),
        mask.stride(0) if mask.shape[0] > 1 else 0, SCALE=scale * math.log2(math.e), M=m, PREFIX=n, HEADS=heads, D=d,
        KEYS=config.keys, PARTS=config.parts, BLOCKS=BLOCKS, OWN=OWN, WARPS=config.warps,
        num_warps=config.warps, num_ctas=BLOCKS, maxnreg=config.registers, launch_pdl=overlaps(),
    )  # fmt: skip
