"""Products of some hundred rows in tiles of any width, so that they fill the card once (`product.cu`).

Triton's tiles are powers of two: 512 rows of 4,304 columns are 136 tiles of 128 x 128, four more than an H100 has
multiprocessors, and the four take as long as the others. Here a tile is 136 columns wide, of which there are 128.
A layer norm between two such products needs no launch: the first writes what each row's mean and variance are
computed from, the second norms its result.
"""

from __future__ import annotations

from itertools import product as pairs_of
from typing import NamedTuple

import torch
from torch import Tensor

from cortexflow.kernels.cuda.launch import SHARED_BYTES, launch, matrix
from cortexflow.kernels.cuda.nvrtc import multiply
from cortexflow.kernels.triton.common import overlaps, processors

BLOCK = 64  # of k
MOST_STATS = 32  # tiles whose sums a row's mean is made of
ACTIVATIONS = ("none", "gelu_tanh")


class Tile(NamedTuple):
    """How a product is cut into tiles, and what a program of it gets."""

    kind: str = "cuda"  # what tells it from other kernels' variants
    rows: int = 128  # 64 for each warpgroup
    columns: int = 128  # a multiple of 8
    cluster: int = 1  # tiles above each other that fetch the weight's rows together
    split: int = 1  # parts of k
    stages: int = 4  # blocks of k in flight
    ahead: int = 2  # of which so many blocks of the weight are fetched before the wait for the kernel ahead


def candidates(m: int, n: int, k: int, added: bool) -> list[Tile]:
    """Tiles that fill Hopper's multiprocessors at most once, for x [m, k] and w [n, k] of 16 bits.

    `added`: the result's parts may be added by a norm behind it.
    """
    if n % 8 or k % 8 or m < BLOCK:
        return []
    found = []
    for rows, split in pairs_of((64, 128, 192), (1, 2, 3, 4) if added and k > 2048 else (1,)):
        down = -(-m // rows)
        across = processors() // (down * split)
        columns = -(-n // max(across, 1) // 8) * 8
        if not 32 <= columns <= (144 if rows == 192 else 208) or (rows == 64 and columns > 128):
            continue
        cluster = 2 if split > 1 and down % 2 == 0 and columns % 16 == 0 else 1
        tile = Tile("cuda", rows, columns, cluster, split, 1, 2 if columns > 96 else 4)
        free = SHARED_BYTES - shared_bytes(tile, added and split == 1)
        stages = min(6 if columns > 96 else 8, free // ((rows + columns) * BLOCK * 2) + 1)
        if stages >= 3:
            found.append(tile._replace(stages=stages))
    return found


def shared_bytes(c: Tile, residual: bool) -> int:
    """Shared memory of a program: the ring, its barriers, what the end needs, and gaps between them."""
    ends = c.columns * 8 + c.rows * 8 + (c.rows * c.columns * 2 if residual else 0)
    return c.stages * (c.rows + c.columns) * BLOCK * 2 + c.stages * 16 + ends + 1024 + 512


def stats_size(m: int, n: int, c: Tile) -> int:
    """Float32 numbers that `new_stats` of [m, n] needs."""
    return 2 * m * -(-n // c.columns)


def product(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    normed: tuple[Tensor, Tensor, float] | None = None,
    new_stats: Tensor | None = None,
    scratch: Tensor | None = None,
    config: Tile,
) -> Tensor:
    """out [m, n] = residual + act(norm(x) [m, k] @ w.T + bias), w [n, k], bias [n]; in bf16 or f16, rounded once.

    `normed`: (stats of x, `sums` f32 [n] of each row of w, eps) asks for x's layer norm, without scale and shift; stats
    are what `new_stats`, float32 with room for `stats_size` numbers, got when x was the `out` of such a product. `out`
    may be the residual. Where `config` splits k, nothing is finished: the parts are returned, float32 [split · m, n] in
    `scratch`, to be added, with bias and residual, by `rows.summed_norm`; otherwise `out` is. Raises ValueError for
    what the kernel cannot do.
    """
    (m, k), n, c = x.shape, w.shape[0], config
    if act not in ACTIVATIONS:
        raise ValueError(f"activation {act!r}: this kernel has {', '.join(ACTIVATIONS)}")
    others = {t.dtype for t in (w, out, bias, residual) if t is not None} - {x.dtype}
    if others:
        raise ValueError(f"expected everything but sums in x's {x.dtype}, found {others}")
    if c.split > 1 and (act != "none" or any(t is not None for t in (bias, residual, normed, new_stats))):
        raise ValueError("parts of k are not finished here: hand bias and residual to what adds them")
    if c.split > 1 and (scratch is None or scratch.numel() < c.split * m * n):
        raise ValueError(f"{c.split} parts of [{m}, {n}] need {c.split * m * n} float32 entries of scratch")
    if new_stats is not None and (new_stats.numel() < stats_size(m, n, c) or n > MOST_STATS * c.columns):
        raise ValueError(f"stats of [{m}, {n}] need {stats_size(m, n, c)} numbers, and at most {MOST_STATS} tiles")
    parts = None if c.split == 1 or scratch is None else scratch[: c.split * m * n].view(-1, n)
    stats, sums, eps = (None, None, 0.0) if normed is None else normed
    tiles = 0 if stats is None else stats.numel() // (2 * m)
    macros = {
        "HALF": x.dtype == torch.float16, "ROWS": c.rows, "COLUMNS": c.columns, "CLUSTER": c.cluster,
        "SPLIT": c.split, "STAGES": c.stages, "AHEAD": min(c.ahead, c.stages), "BIAS": bias is not None,
        "GELU": act == "gelu_tanh", "RESIDUAL": residual is not None, "NORM": tiles, "STATS": new_stats is not None,
        "PARTS": c.split > 1,
    }  # fmt: skip
    whole = out if parts is None else x  # where parts are stored, no map of `out` is read
    maps = [
        matrix(x, c.rows, BLOCK, swizzle=128),
        matrix(w, c.columns // c.cluster, BLOCK, swizzle=128),
        matrix(whole, 64, c.columns if parts is None else BLOCK, swizzle=0),
        matrix(whole if residual is None else residual, c.rows, c.columns if parts is None else BLOCK, swizzle=0),
    ]
    blocks = -(-k // BLOCK)
    launch(
        "product", macros, {"MULTIPLY": multiply(c.columns, x.dtype)},
        grid=-(-m // (c.rows * c.cluster)) * c.cluster * -(-n // c.columns) * c.split, block=c.rows * 2 + 64,
        shared=shared_bytes(c, residual is not None), cluster=c.cluster, early=overlaps(),
        arguments=[*maps, bias, sums, stats, new_stats, parts, m, n, blocks, 1.0 / k, eps],
    )  # fmt: skip
    return out if parts is None else parts
