"""Small products in float32: few rows, a weight of a few thousand entries, each sum by one program."""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl
from cortexflow.kernels.triton.common import activate, let_next_start, overlaps, wait_for_previous


@triton.jit
def thin_kernel(
    x, w, out, bias, residual, squares, x_row, w_row, out_row, residual_row, N,
    K: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    SQUARES: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """WIDE columns of one row."""
    let_next_start()
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = n < N
    k = tl.arange(0, DEEP)
    first = tl.load(w + k[:, None] * w_row + n[None, :], mask=(k < K)[:, None] & inside[None, :], other=0.0)
    if BIAS:
        shift = tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous()
    v = tl.load(x + row * x_row + k, mask=k < K, other=0.0).to(tl.float32)
    acc = tl.sum(v[:, None] * first.to(tl.float32), axis=0)
    for at in tl.range(DEEP, K, DEEP):
        j = at + k
        v = tl.load(x + row * x_row + j, mask=j < K, other=0.0).to(tl.float32)
        u = tl.load(w + j[:, None] * w_row + n[None, :], mask=(j < K)[:, None] & inside[None, :], other=0.0)
        acc += tl.sum(v[:, None] * u.to(tl.float32), axis=0)
    if BIAS:
        acc += shift
    acc = activate(acc, ACT)
    if RESIDUAL:
        acc += tl.load(residual + row * residual_row + n, mask=inside, other=0.0).to(tl.float32)
    made = acc.to(out.dtype.element_ty)
    tl.store(out + row * out_row + n, made, mask=inside)
    if SQUARES:
        made = tl.where(inside, made.to(tl.float32), 0.0)
        tl.store(squares + row * tl.num_programs(1) + tl.program_id(1), tl.sum(made * made, axis=0))


def _width(n: int) -> int:
    """Columns of a program."""
    return 8 if n <= 64 else 128


def square_sums(n: int) -> int:
    """Sums of squares that make up a row of n."""
    return triton.cdiv(n, _width(n))


def thin(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    squares: Tensor | None = None,
) -> None:
    """out [m, n] = residual + act(x [m, k] @ w [k, n] + bias [n]), summed in float32, rounded once.

    Any float dtypes, rows strided; `residual` may be `out`. `squares`, float32 [m or more, `square_sums(n)`], gets sums
    of out^2 that make up each row.
    """
    (m, k), n = x.shape, w.shape[1]
    wide = _width(n)
    deep = min(4096 // wide, triton.next_power_of_2(k))
    thin_kernel[(m, triton.cdiv(n, wide))](
        x, w, out, *(out if t is None else t for t in (bias, residual, squares)), x.stride(0), w.stride(0),
        out.stride(0), 0 if residual is None else residual.stride(0), n,
        K=k, DEEP=deep, WIDE=wide, BIAS=bias is not None, RESIDUAL=residual is not None, SQUARES=squares is not None,
        ACT=act, num_warps=4, launch_pdl=overlaps(),
    )  # fmt: skip
