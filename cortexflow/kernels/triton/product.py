"""Products with many rows: tiles whose height is a sum of two powers of two, so that few rows are padding.

A program holds `rows + more` rows of the result (128 + 64 pads 560 rows to 576, where tiles of 128 pad them to
640); both pieces use the same block of the weight. Blocks arrive through tensor descriptors (TMA on Hopper) where
rows start on multiples of 16 bytes, else through pointers. Where tiles are too few to fill the card, the inner
extent is split: the parts go to float32 scratch, and a second kernel adds them in a fixed order. Bias, activation,
gate and residual are applied before the result is rounded, and so is a gated unit: its weight holds pairs, a gate
column beside its up column, so that one accumulator holds both factors of an entry.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from cortexflow.kernels.triton.common import activate, let_next_start, overlaps, shared_memory, wait_for_previous
from triton.tools.tensor_descriptor import TensorDescriptor

FEW_ROWS = 16  # with at most so many a product is bound by the bytes of its weights


class Config(NamedTuple):
    """How a product is cut into tiles, and what a program of it gets."""

    rows: int = 128
    more: int = 0  # rows of a second, smaller piece of the tile
    columns: int = 128
    depth: int = 64  # of K, in one step
    split: int = 1  # parts of K
    warps: int = 8
    stages: int = 4
    swap: bool = False  # the transposed product: the weight's columns are the instruction's rows


@triton.jit
def _block(
    source, row, column, rows, columns, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A block of a matrix, zero outside of it; of a descriptor, or where rows are multiples of ALIGN entries."""
    if ALIGN == 0:
        return source.load([row, column])
    else:
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        inside = (r < rows)[:, None] & (c < columns // ALIGN * ALIGN)[None, :]
        start = source + r.to(tl.int64)[:, None] * (stride // ALIGN * ALIGN)
        return tl.load(start + c[None, :], mask=inside, other=0.0)


@triton.jit
def prefetch(place):
    """Bring the lines of 128 bytes at some places to the cache that all programs share."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [place], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _add(x, w, acc, SWAP: tl.constexpr, EXACT: tl.constexpr):
    """acc + x @ w, or its transpose."""
    if SWAP:
        return tl.dot(tl.trans(w), tl.trans(x), acc, input_precision=EXACT)
    else:
        return tl.dot(x, w, acc, input_precision=EXACT)


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWAP: tl.constexpr):
    """An accumulator, or its transpose."""
    if SWAP:
        return tl.zeros((COLUMNS, ROWS), tl.float32)
    else:
        return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def _activated(x, KIND: tl.constexpr):
    """`activate`, with 1 / (1 + e) = rsqrt(1 + e)²: the division would be a third of a gated tile's epilogue."""
    if KIND == "gelu_tanh":
        y = x * (-2.302208198 - 0.1029432397 * x * x)  # -2 log2(e) sqrt(2 / pi) (x + 0.044715 x³)
        r = tl.rsqrt(1.0 + tl.exp2(y))
        return x * r * r
    elif KIND == "silu":
        r = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950409))
        return x * r * r
    else:
        return activate(x, KIND)


@triton.jit
def _finish(
    acc, up, row, column, out, bias, residual, gate, M, N, out_row, residual_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACT: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Bias, activation, unit, gate and residual, then the store, rounded once."""
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    there = columns < N
    inside = (rows < M)[:, None] & there[None, :]
    own = columns  # where a column of the result stands in w
    if GLU:
        own = 2 * columns
    if BIAS:
        acc += tl.load(bias + own, mask=there, other=0.0).to(tl.float32)[None, :]
    acc = _activated(acc, ACT)
    if GLU:
        if BIAS:
            up += tl.load(bias + own + 1, mask=there, other=0.0).to(tl.float32)[None, :]
        acc *= up
    if GATE:
        acc *= tl.load(gate + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        place = residual + rows.to(tl.int64)[:, None] * residual_row + columns[None, :]
        acc += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    place = out + rows.to(tl.int64)[:, None] * out_row + columns[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def product_kernel(
    x, x_more, w, w_rows, out, parts, bias, residual, gate, M, N, K, x_row, w_row, out_row, residual_row,
    ROWS: tl.constexpr, MORE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr,
    GROUP: tl.constexpr, SWAP: tl.constexpr, X_ALIGN: tl.constexpr, W_ALIGN: tl.constexpr,
    EXACT: tl.constexpr, ACT: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    GATE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS + MORE rows and COLUMNS columns: whole, or one part of K in float32.

    AHEAD: rows of w that a tile has brought to the cache before it waits for the kernel ahead.
    """
    if AHEAD:
        let_next_start()
    down, across = tl.cdiv(M, ROWS + MORE), tl.cdiv(N, COLUMNS)
    extent = tl.cdiv(tl.cdiv(K, DEPTH), SPLIT) * DEPTH
    WIDE: tl.constexpr = 2 * COLUMNS if GLU else COLUMNS
    width = N
    if GLU:
        width = 2 * N
    part, tile = tl.program_id(0) % SPLIT, tl.program_id(0) // SPLIT
    first = tile // (GROUP * across) * GROUP  # tiles above each other are neighbours in time: they share w
    height = min(down - first, GROUP)
    place = tile % (GROUP * across)
    row, column = (first + place % height) * (ROWS + MORE), place // height * COLUMNS
    if AHEAD:
        k = tl.minimum(part * extent + tl.arange(0, AHEAD), K - 1).to(tl.int64)
        line = tl.minimum(column * (WIDE // COLUMNS) + tl.arange(0, WIDE // 64) * 64, width - 1)
        prefetch(w_rows + k[:, None] * w_row + line[None, :])
    wait_for_previous()

    acc = _zeros(ROWS, WIDE, SWAP)
    if MORE:
        acc_more = _zeros(MORE, WIDE, SWAP)
    for k in tl.range(part * extent, min((part + 1) * extent, K), DEPTH):
        b = _block(w, k, column * (WIDE // COLUMNS), K, width, w_row, DEPTH, WIDE, W_ALIGN)
        a = _block(x, row, k, M, K, x_row, ROWS, DEPTH, X_ALIGN)
        acc = _add(a, b, acc, SWAP, EXACT)
        if MORE:
            a_more = _block(x_more, row + ROWS, k, M, K, x_row, MORE, DEPTH, X_ALIGN)
            acc_more = _add(a_more, b, acc_more, SWAP, EXACT)

    if not AHEAD:  # now, not before: its programs would crowd where this kernel has left processors idle
        let_next_start()
    _store(acc, row, column, part, out, parts, bias, residual, gate, M, N, out_row, residual_row,
           ROWS, COLUMNS, SPLIT, SWAP, ACT, GLU, BIAS, RESIDUAL, GATE)  # fmt: skip
    if MORE:
        _store(acc_more, row + ROWS, column, part, out, parts, bias, residual, gate, M, N, out_row, residual_row,
               MORE, COLUMNS, SPLIT, SWAP, ACT, GLU, BIAS, RESIDUAL, GATE)  # fmt: skip


@triton.jit
def _store(
    acc, row, column, part, out, parts, bias, residual, gate, M, N, out_row, residual_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr, ACT: tl.constexpr,
    GLU: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """One piece of a tile: finished, or as a part."""
    if SWAP:
        acc = tl.trans(acc)
    up = acc
    if GLU:
        acc, up = tl.split(tl.reshape(acc, (ROWS, COLUMNS, 2)))
    if SPLIT == 1 and RESIDUAL and not GLU and ROWS * COLUMNS >= 32768:
        HALF: tl.constexpr = COLUMNS // 2  # the residual of one half at a time: both would not fit the registers
        left, right = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, HALF)), (0, 2, 1)))
        _finish(left, left, row, column, out, bias, residual, gate, M, N, out_row, residual_row,
                ROWS, HALF, ACT, GLU, BIAS, RESIDUAL, GATE)  # fmt: skip
        _finish(right, right, row, column + HALF, out, bias, residual, gate, M, N, out_row, residual_row,
                ROWS, HALF, ACT, GLU, BIAS, RESIDUAL, GATE)  # fmt: skip
    elif SPLIT == 1:
        _finish(acc, up, row, column, out, bias, residual, gate, M, N, out_row, residual_row,
                ROWS, COLUMNS, ACT, GLU, BIAS, RESIDUAL, GATE)  # fmt: skip
    else:
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        place = parts + (rows + part * M).to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(place, acc, mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def finish_kernel(
    out, parts, bias, residual, gate, M, N, out_row, residual_row,
    COLUMNS: tl.constexpr, SPLIT: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
):  # fmt: skip
    """A piece of a row: the sum of the parts in their order, finished."""
    let_next_start()
    wait_for_previous()
    row, column = tl.program_id(0), tl.program_id(1) * COLUMNS
    columns = column + tl.arange(0, COLUMNS)[None, :]
    acc = tl.zeros((1, COLUMNS), tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts + (row + part * M).to(tl.int64) * N + columns, mask=columns < N, other=0.0)
    _finish(acc, acc, row, column, out, bias, residual, gate, M, N, out_row, residual_row,
            1, COLUMNS, ACT, False, BIAS, RESIDUAL, GATE)  # fmt: skip


def _alignment(x: Tensor) -> int:
    """Entries that rows are multiples of; 0 where they start on multiples of 16 bytes and the card has descriptors."""
    size = x.element_size()
    if overlaps() and x.data_ptr() % 16 == 0 and x.stride(0) * size % 16 == 0 and x.stride(0) >= x.shape[1]:
        return 0
    return math.gcd(16 // size, x.stride(0), x.shape[1], x.data_ptr() // size)


def product(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    pairs: bool = False,
    scratch: Tensor | None = None,
    config: Config | None = None,
    finish: bool = True,
) -> Tensor:
    """out [m, n] = residual + gate · act(x [m, k] @ w [k, n] + bias); bias and gate [n]. Returns it.

    With `pairs`, w is [k, 2 n], a gate column beside its up column, bias [2 n] likewise, and the activation becomes
    act(gate) · up. Rows of x, out and residual may be strided; w is row-major. `out` may be the residual itself.
    Factors in float32 are multiplied as three products of parts (TF32), which loses no more than float32's own sums
    do. `scratch`: float32, split · m · n entries, where `config` splits k. Raises ValueError where rows of x or w are
    not dense, where `pairs` are to be split, and where scratch is too small. Without `finish` the parts of k are
    returned, float32 [split · m, n] in the scratch: to be added, with bias and residual, by `rows.summed_norm`; there
    must be some.
    """
    m, k = x.shape
    n = out.shape[1]
    if x.stride(1) != 1 or w.stride(1) != 1:
        raise ValueError("rows of x and w must be dense")
    x_align, w_align = _alignment(x), _alignment(w)
    c = config or default(m, n, k, pairs, shared_memory(), x.element_size(), described=x_align == w_align == 0)
    if pairs and c.split > 1:
        raise ValueError("a product with a gated unit is not split")
    if not finish and c.split == 1:
        raise ValueError("a product that is not split has no parts to hand on: finish it")
    if c.split > 1 and (scratch is None or scratch.numel() < c.split * m * n):
        raise ValueError(f"{c.split} parts of [{m}, {n}] need {c.split * m * n} float32 entries of scratch")
    given: list[Any] = [x, x, w]
    if x_align == 0:
        given[:2] = [TensorDescriptor.from_tensor(x, [rows or c.rows, c.depth]) for rows in (c.rows, c.more)]
    if w_align == 0:
        given[2] = TensorDescriptor.from_tensor(w, [c.depth, c.columns * (2 if pairs else 1)])
    lines = m <= FEW_ROWS and w.element_size() == 2 and c.columns * (1 + pairs) >= 64
    ahead = c.stages * c.depth if lines and overlaps() else 0
    ahead = triton.next_power_of_2(ahead + 1) // 2  # as many as are in flight behind the wait, at most
    some = out  # a pointer that is never read
    ends = [some if t is None else t for t in (bias, residual, gate)]
    strides = out.stride(0), 0 if residual is None else residual.stride(0)
    flags = {"ACT": act, "BIAS": bias is not None, "RESIDUAL": residual is not None, "GATE": gate is not None}
    parts = some if c.split == 1 or scratch is None else scratch
    units = triton.cdiv(m, c.rows + c.more) * triton.cdiv(n, c.columns) * c.split
    product_kernel[(units,)](
        *given, w, out, parts, *ends, m, n, k, x.stride(0), w.stride(0), *strides,
        ROWS=c.rows, MORE=c.more, COLUMNS=c.columns, DEPTH=c.depth, SPLIT=c.split, GROUP=8,
        SWAP=c.swap, X_ALIGN=x_align, W_ALIGN=w_align, EXACT="tf32x3" if x.dtype == torch.float32 else "tf32",
        GLU=pairs, AHEAD=ahead, **flags, num_warps=c.warps, num_stages=c.stages, launch_pdl=overlaps(),
    )  # fmt: skip
    if not finish:
        return parts[: c.split * m * n].view(-1, n)
    if c.split > 1:
        block = min(512, triton.next_power_of_2(n))
        finish_kernel[(m, triton.cdiv(n, block))](
            out, parts, *ends, m, n, *strides, COLUMNS=block, SPLIT=c.split, **flags, launch_pdl=overlaps(),
        )  # fmt: skip
    return out


def parted(x: Tensor, w: Tensor, scratch: Tensor, parts: int) -> Tensor:
    """x [m, k] @ w [k, n], k split: the parts, float32 [parts · m, n] in the scratch, by the library's batched product.

    16-bit operands of one dtype, w dense, k a multiple of `parts`; scratch has parts · m · n numbers.
    `rows.summed_norm` adds them, which saves the launch that adds the library's own. PyTorch raises where shapes do
    not fit.
    """
    (m, k), n = x.shape, w.shape[1]
    out = scratch[: parts * m * n].view(parts, m, n)
    each = x.unflatten(1, (parts, -1)).transpose(0, 1), w.view(parts, k // parts, n)
    torch.bmm(*each, out_dtype=torch.float32, out=out)
    return out.view(-1, n)


def default(
    m: int, n: int, k: int, pairs: bool, shared_bytes: int, itemsize: int = 2, described: bool = True
) -> Config:
    """A configuration that fits a card whose blocks may have so much shared memory.

    `described`: blocks arrive through tensor descriptors; pointers take registers, which large tiles need.
    """
    if m <= FEW_ROWS and itemsize == 2:  # bound by the weights' bytes: many of them in flight
        wide, hopper = 32 if pairs else 64, shared_bytes > 200 * 1024
        return Config(16, 0, wide, 128, warps=4, stages=6, swap=True) if hopper else Config(16, 0, wide, 64, warps=4)
    if pairs and m > 512 and itemsize == 2 and described and shared_bytes > 224 * 1024:
        # 4,480 rows: 0.9 ms against 1.07 (benchmarks/README.md, batches)
        return candidates(m, n, k, pairs, 1)[0]
    columns = 64 if pairs or n <= 64 else 128
    if itemsize > 2:
        return Config(64, 0, 32, 64, warps=4, stages=3)
    rows, warps = (64, 4) if m <= 64 or k < 1024 else (128, 8)
    depth, stages = (64, 4) if shared_bytes > 200 * 1024 else (32, 4)
    return Config(rows, 0, columns, depth, warps=warps, stages=stages)


# Tiles that feed wgmma from shared memory and spill nothing; two programs of four warps share a multiprocessor.
PLAIN = (
    Config(128, 64, 128),
    Config(128, 0, 128),
    Config(128, 0, 128, warps=4, stages=3),
    Config(128, 0, 256),
    Config(256, 0, 128),
    Config(128, 64, 64, warps=4, stages=3, swap=True),
    Config(128, 16, 64, warps=4, swap=True),
    Config(128, 16, 128, swap=True),
    Config(256, 32, 128, swap=True),
    Config(256, 16, 128, swap=True),
    Config(64, 32, 64, warps=4, swap=True),
    Config(128, 0, 64, warps=4, swap=True),
    Config(64, 0, 64, warps=4),
    Config(64, 0, 128, warps=4),
    Config(64, 0, 128, warps=4, stages=5),
)
PAIRS = (
    Config(128, 64, 128),
    Config(128, 64, 64, warps=4, stages=2),
    Config(128, 64, 64, depth=32, warps=4, stages=5),
    Config(128, 0, 128),
    Config(128, 0, 64, warps=4, stages=3),
    Config(64, 0, 128, depth=32, warps=4, stages=5),
)
FEW = (  # for at most FEW_ROWS rows
    Config(16, 0, 64, 128, warps=4, stages=6, swap=True),
    Config(16, 0, 128, 64, warps=4, stages=5, swap=True),
    Config(16, 0, 128, 128, warps=4, stages=3),
    Config(16, 0, 64, 256, warps=4, stages=3),
)
FEW_PAIRS = (
    Config(16, 0, 32, 128, warps=4, stages=6, swap=True),
    Config(16, 0, 64, 128, warps=4, stages=3),
    Config(16, 0, 32, 128, warps=4, stages=4),
)
_SPLITS = (1, 2, 3, 4, 5, 6, 8)


def _cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's own is made for kernels, and slow where it is called a hundred thousand times."""
    return -(-a // b)


def _clocks(c: Config, m: int, n: int, k: int, pairs: bool) -> float:
    """A rough count of clocks on an H100 (132 multiprocessors), to rank configurations before they are measured."""
    tall, wide = c.rows + c.more, c.columns * (2 if pairs else 1)
    units = _cdiv(m, tall) * _cdiv(n, c.columns) * c.split
    depth = _cdiv(_cdiv(k, c.depth), c.split) * c.depth
    products, fetches = tall * wide * depth / 2048 / 0.85, (tall + wide) * depth * 2 / 40
    turns = _cdiv(units, 132)
    overhead = 3500 * (1 if c.warps == 4 else turns)
    parts = 3000 + c.split * m * n * 8 / (132 * 30) if c.split > 1 else 0.0
    return turns * max(products, fetches) + overhead + parts


def candidates(m: int, n: int, k: int, pairs: bool = False, count: int = 8) -> list[Config]:
    """Configurations worth measuring on Hopper, for 16-bit operands; the likeliest first."""
    if m <= FEW_ROWS:
        tiles = FEW_PAIRS if pairs else FEW
        spread = {c: 1 if pairs else min(8, _cdiv(128, _cdiv(n, c.columns))) for c in tiles}
        return list(dict.fromkeys(c._replace(split=s) for c in tiles for s in (1, spread[c])))[:count]
    tiles = PAIRS if pairs else PLAIN
    splits = (1,) if pairs else [s for s in _SPLITS if s == 1 or k >= 256 * s]
    every = [c._replace(split=s) for c in tiles for s in splits]
    return sorted(every, key=lambda c: _clocks(c, m, n, k, pairs))[:count]
