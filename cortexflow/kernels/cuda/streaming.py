"""Products of few rows that leave room for their neighbours (`streaming.cu`).

A chain of such products is bound by what lies between them: a hand-over, a round of loads, an exchange. Memory is busy
meanwhile only if the next kernels are resident, with their weights on the way. Here weights wait in shared memory,
where the copy engine has put them, and a program takes less than half of a multiprocessor's registers; of every kernel
each multiprocessor has one program, so that no two share one while another has none.

A norm's product is told the sums of its rows' squares by the kernel that makes them: `squares`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cortexflow.kernels.cuda.launch import SHARED_BYTES, launch
from cortexflow.kernels.triton.common import alike, overlaps, processors

ROWS = 16  # of one matrix instruction; where the norm is modulated the last one is `shift`
WARPS = 8
EACH = 128  # numbers of k that a warp has of a chunk
PIECE = 16 << 10  # bytes of the weight that are asked for at a time
ACTIVATIONS = ("none", "gelu_tanh", "silu")


class Stream(NamedTuple):
    """How a product is spread over programs."""

    columns: int  # of a program, or of the cluster that shares them
    cluster: int = 1  # programs that share k
    chunks: int = 1  # of k in a program
    ahead: int = 1  # of which so many of x are loaded at once
    window: int = 1  # pieces of the weight that are in flight
    held: bool = False  # whether weights are in registers before the wait
    registers: int = 255  # most of a thread

    @property
    def mine(self) -> int:
        """Columns that a program finishes: one sum of a row's squares is of so many."""
        return self.columns // self.cluster


def default(n: int, k: int, glu: bool, norm: bool, modulated: bool = False) -> Stream | None:
    """A config for w [n, k] (gate alone, with a gated unit), measured on an H200 in a chain; None where none fits."""
    cluster = 1 if norm else max(1, min(2, k // 1024))
    depth = k // cluster
    if k % cluster or depth % (WARPS * EACH):
        return None
    step = 8 if glu or not norm else 4
    mine = next((c for c in range(step, 65, step) if n % (c * cluster) == 0 and n // c <= processors()), None)
    if mine is None or (not norm and mine & (mine - 1)):
        return None
    chunks = depth // (WARPS * EACH)
    window, held = 3 if glu else chunks, not norm and chunks == 1
    config = Stream(mine * cluster, cluster, chunks, chunks, window, held, registers=112 if glu else 255)
    return config if shared_bytes(config, k, glu, modulated) <= SHARED_BYTES else None


def shared_bytes(c: Stream, k: int, glu: bool, modulated: bool) -> int:
    """Shared memory of a program: weights, the norm's scale and factors, sums of the cluster's others, barriers."""
    depth, wide = k // c.cluster, c.columns * (1 + glu)
    barriers = -(-wide // max(PIECE // (2 * depth), 1)) + 1
    return wide * (2 * depth + 64) + 2 * depth * modulated + 64 + (c.cluster - 1) * 64 * c.mine + 8 * barriers + 128


def row_squares(scratch: tuple[Tensor, Tensor], sums: int) -> Tensor:
    """Where sums of rows' squares are handed on, float32 [ROWS, sums]: at the scratch's end, for the next kernel."""
    return scratch[0][-ROWS * sums :].view(ROWS, sums)


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
    squares: Tensor | None = None,
    new_squares: Tensor | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
    rotated: int = 0,
    act: str = "none",
    glu: bool = False,
    config: Stream,
) -> None:
    """out [m, n] = residual + gate * act(norm(x) [m, k] @ w.T), w [n, k] (with `glu` [2 n, k]: gate, then up rows).

    m up to 16 (15 with `shift`). bf16 or f16, sums in float32, rounded once; rows may be strided by multiples of 16
    bytes; `residual` may be `out`. `eps` asks for the RMS norm, with `squares` float32 [ROWS, s]: s sums of x^2 that
    make up each row; `scale` and `shift` [k] for its modulation. `new_squares`, float32 [ROWS, n / config.mine], gets
    such sums of `out`. `gate` is [n]. `angles`, float32 [1, m, d / 2] each, dense: the first `rotated` columns, heads
    of d numbers, are rotated as rounded. Raises ValueError for what the kernel cannot do.
    """
    (m, k), n, c = x.shape, w.shape[0] // (1 + glu), config
    if act not in ACTIVATIONS:
        raise ValueError(f"activation {act!r}: this kernel has {', '.join(ACTIVATIONS)}")
    if m > ROWS - (shift is not None):
        raise ValueError(f"expected at most {ROWS - (shift is not None)} rows, found {m}")
    others = {t.dtype for t in (w, out, residual, gate, scale, shift) if t is not None} - {x.dtype}
    if others or x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"expected all of one dtype, bfloat16 or float16, found {x.dtype} and {others or 'no other'}")
    if (eps is None) != (squares is None) or (scale is None) != (shift is None):
        raise ValueError("a norm needs `eps` and `squares`; its modulation `scale` and `shift`")
    if any(t.data_ptr() % 16 or t.stride(0) * 2 % 16 or t.stride(1) != 1 for t in (x, w)):
        raise ValueError("expected rows of x and w that are dense and begin at multiples of 16 bytes")
    if new_squares is not None and (residual is None or new_squares.shape != (ROWS, n // c.mine)):
        raise ValueError(f"new_squares: expected a sum, and room [{ROWS}, {n // c.mine}]")
    macros = {
        "HALF": x.dtype == torch.float16, "K": k, "COLUMNS": c.columns, "CLUSTER": c.cluster, "CHUNKS": c.chunks,
        "AHEAD": c.ahead, "WINDOW": c.window, "HELD": c.held, "REGISTERS": c.registers, "WARPS": WARPS,
        "PIECE": PIECE,
        "NORM": eps is not None, "SQUARES": 0 if squares is None else squares.shape[1],
        "MODULATED": scale is not None, "SUMMED": new_squares is not None, "GLU": glu, "ACT": ACTIVATIONS.index(act),
        "ROTATE": rotated, "D": 0 if angles is None else 2 * angles[0].shape[-1], "GATE": gate is not None,
        "RESIDUAL": residual is not None,
    }  # fmt: skip
    cosine, sine = angles or (None, None)
    launch(
        "streaming", macros, {}, grid=alike(n // c.mine, c.cluster), block=WARPS * 32,
        shared=shared_bytes(c, k, glu, scale is not None), cluster=c.cluster, early=overlaps(),
        arguments=[x, w, out, residual, gate, scale, shift, squares, new_squares, cosine, sine, m, n, x.stride(0),
                   out.stride(0), 0 if residual is None else residual.stride(0), eps or 0.0],
    )  # fmt: skip
