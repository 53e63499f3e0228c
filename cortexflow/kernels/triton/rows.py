"""Row-wise kernels: norms, rotary positions, gated units, and what stands behind a library's product."""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl
from cortexflow.kernels.triton.common import activate, let_next_start, overlaps, wait_for_previous


@triton.jit
def norm_kernel(
    x, out, scale, shift, x_row, out_row, eps,
    K: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """One row: (x - mean?) / sqrt(mean square + eps) · scale + shift, in float32, rounded once."""
    let_next_start()
    wait_for_previous()
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = k < K
    v = tl.load(x + row * x_row + k, mask=there, other=0.0).to(tl.float32)
    if CENTRED:
        v = tl.where(there, v - tl.sum(v) / K, 0.0)
    v = v * tl.rsqrt(tl.sum(v * v) / K + eps)
    if SCALED:
        v = v * tl.load(scale + k, mask=there, other=0.0).to(tl.float32)
    if SHIFTED:
        v = v + tl.load(shift + k, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + k, v.to(out.dtype.element_ty), mask=there)


def _norm(x: Tensor, out: Tensor, eps: float, scale: Tensor | None, shift: Tensor | None, centred: bool) -> None:
    m, k = x.shape
    block = triton.next_power_of_2(k)
    norm_kernel[(m,)](
        x, out, x if scale is None else scale, x if shift is None else shift, x.stride(0), out.stride(0), eps,
        K=k, BLOCK=block, CENTRED=centred, SCALED=scale is not None, SHIFTED=shift is not None,
        num_warps=4 if block <= 2048 else 8, launch_pdl=overlaps(),
    )  # fmt: skip


def rms_norm(x: Tensor, out: Tensor, eps: float, scale: Tensor | None = None) -> None:
    """out [m, k] = x / sqrt(mean(x²) + eps), times a scale [k] where given."""
    _norm(x, out, eps, scale, None, centred=False)


def layer_norm(x: Tensor, out: Tensor, eps: float, scale: Tensor | None = None, shift: Tensor | None = None) -> None:
    """out [m, k] = (x - mean) / sqrt(variance + eps), then scale and shift [k] where given."""
    _norm(x, out, eps, scale, shift, centred=True)


def modulated_norm(x: Tensor, out: Tensor, scale: Tensor, shift: Tensor, eps: float) -> None:
    """out [m, k] = x / sqrt(mean(x²) + eps) · scale + shift."""
    _norm(x, out, eps, scale, shift, centred=False)


@triton.jit
def glu_kernel(h, out, h_row, out_row, WIDTH, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """A piece of a row: act(first half) · second half."""
    let_next_start()
    wait_for_previous()
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = k < WIDTH
    gate = tl.load(h + row * h_row + k, mask=there, other=0.0).to(tl.float32)
    up = tl.load(h + row * h_row + WIDTH + k, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + k, (activate(gate, KIND) * up).to(out.dtype.element_ty), mask=there)


def glu(h: Tensor, out: Tensor, act: str) -> None:
    """out [m, w] = act(h[:, :w]) · h[:, w:], h [m, 2 w]."""
    m, width = out.shape
    block = min(2048, triton.next_power_of_2(width))
    glu_kernel[(m, triton.cdiv(width, block))](
        h, out, h.stride(0), out.stride(0), width, KIND=act, BLOCK=block, num_warps=4, launch_pdl=overlaps()
    )


@triton.jit
def rope_kernel(
    x, cosine, sine, out, x_token, x_head, out_token,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: the halves of every head, rotated by the token's angles."""
    let_next_start()
    wait_for_previous()
    token, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = d < HALF
    c = tl.load(cosine + token * HALF + d, mask=there, other=0.0)
    s = tl.load(sine + token * HALF + d, mask=there, other=0.0)
    for head in tl.static_range(HEADS):
        line = x + token * x_token + head * x_head + d
        first = tl.load(line, mask=there, other=0.0).to(tl.float32)
        second = tl.load(line + HALF, mask=there, other=0.0).to(tl.float32)
        target = out + token * out_token + head * 2 * HALF + d
        tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=there)
        tl.store(target + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=there)


def rope(x: Tensor, cosine: Tensor, sine: Tensor, out: Tensor) -> None:
    """out [t, heads, d] = x rotated; x may be a slice of a wider buffer; angles f32 [t, d / 2], dense."""
    tokens, heads, d = x.shape
    rope_kernel[(tokens,)](
        x, cosine, sine, out, x.stride(0), x.stride(1), out.stride(0),
        HEADS=heads, HALF=d // 2, BLOCK=triton.next_power_of_2(d // 2), num_warps=2, launch_pdl=overlaps(),
    )  # fmt: skip


@triton.jit
def epilogue_kernel(
    x, out, bias, residual, gate, x_row, out_row, residual_row, N,
    KIND: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """A piece of a row: residual + act(x + bias) · gate."""
    let_next_start()
    wait_for_previous()
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = n < N
    v = tl.load(x + row * x_row + n, mask=there, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    v = activate(v, KIND)
    if GATE:
        v = v * tl.load(gate + n, mask=there, other=0.0).to(tl.float32)
    if RESIDUAL:
        v += tl.load(residual + row * residual_row + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + n, v.to(out.dtype.element_ty), mask=there)


def epilogue(
    x: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """out [m, n] = residual + act(x + bias) · gate; out may be x or the residual itself."""
    m, n = x.shape
    block = min(2048, triton.next_power_of_2(n))
    epilogue_kernel[(m, triton.cdiv(n, block))](
        x, out, x if bias is None else bias, x if residual is None else residual, x if gate is None else gate,
        x.stride(0), out.stride(0), 0 if residual is None else residual.stride(0), n,
        KIND=act, BLOCK=block, BIAS=bias is not None, RESIDUAL=residual is not None, GATE=gate is not None,
        num_warps=4, launch_pdl=overlaps(),
    )  # fmt: skip
