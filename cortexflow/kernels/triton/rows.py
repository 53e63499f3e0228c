"""Row-wise kernels: norms, rotary positions, gated units, and what stands behind a library's product."""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl
from cortexflow.kernels.triton.common import activate, let_next_start, overlaps, per_sample, wait_for_previous


@triton.jit
def norm_kernel(
    x, out, scale, shift, bias, gate, residual, summed, x_row, out_row, residual_row, summed_row, eps, M,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CENTRED: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
    BIAS: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """ROWS rows: (y - mean?) / sqrt(mean square + eps) · scale + shift, in float32, rounded once.

    y is x or, with anything to be added or multiplied before, summed = residual + (x + bias) · gate as it is stored.
    With PARTS > 1 x is the sum of as many parts [PARTS, M, K], in their order.
    """
    let_next_start()
    wait_for_previous()
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = k < K
    there = (row < M)[:, None] & inside[None, :]
    row = row.to(tl.int64)[:, None]
    v = tl.load(x + row * x_row + k[None, :], mask=there, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        v += tl.load(x + (part * M + row) * x_row + k[None, :], mask=there, other=0.0)
    if BIAS:
        v += tl.load(bias + k, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATE:
        v = v * tl.load(gate + k, mask=inside, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        v += tl.load(residual + row * residual_row + k[None, :], mask=there, other=0.0).to(tl.float32)
    if BIAS or GATE or RESIDUAL or PARTS > 1:
        sums = v.to(summed.dtype.element_ty)
        tl.store(summed + row * summed_row + k[None, :], sums, mask=there)
        v = sums.to(tl.float32)
    if SCALED:  # fetched beside the row, not after its sums
        factor = tl.load(scale + k, mask=inside, other=0.0)
    if SHIFTED:
        term = tl.load(shift + k, mask=inside, other=0.0)
    if CENTRED:
        v = tl.where(inside[None, :], v - (tl.sum(v, axis=1) / K)[:, None], 0.0)
    v = v * tl.rsqrt(tl.sum(v * v, axis=1) / K + eps)[:, None]
    if SCALED:
        v = v * factor.to(tl.float32)[None, :]
    if SHIFTED:
        v = v + term.to(tl.float32)[None, :]
    tl.store(out + row * out_row + k[None, :], v.to(out.dtype.element_ty), mask=there)


def norm_config(m: int, k: int) -> tuple[int, int]:
    """Rows and warps of a program that norms m rows of k entries, as measured between products on an H100."""
    return (1, 8) if k > 4096 or m <= 16 else (1, 4)


def _norm(
    x: Tensor, out: Tensor, eps: float, scale: Tensor | None, shift: Tensor | None, centred: bool,
    config: tuple[int, int] | None = None, bias: Tensor | None = None, gate: Tensor | None = None,
    residual: Tensor | None = None, summed: Tensor | None = None, parts: int = 1,
) -> None:  # fmt: skip
    m, k = out.shape
    rows, warps = config or norm_config(m, k)
    vectors = [x if v is None else v for v in (scale, shift, bias, gate)]
    added, sums = x if residual is None else residual, x if summed is None else summed
    norm_kernel[(triton.cdiv(m, rows),)](
        x, out, *vectors, added, sums, x.stride(0), out.stride(0), added.stride(0), sums.stride(0), eps, m,
        K=k, ROWS=rows, BLOCK=triton.next_power_of_2(k), CENTRED=centred, SCALED=scale is not None,
        SHIFTED=shift is not None, BIAS=bias is not None, GATE=gate is not None, RESIDUAL=residual is not None,
        PARTS=parts, num_warps=warps, launch_pdl=overlaps(),
    )  # fmt: skip


def rms_norm(x: Tensor, out: Tensor, eps: float, scale: Tensor | None = None, bias: Tensor | None = None) -> None:
    """out [m, k] = x / sqrt(mean(x²) + eps), times a scale [k] where given; x += bias [k] before, where given."""
    _norm(x, out, eps, scale, None, centred=False, bias=bias)


def layer_norm(
    x: Tensor,
    out: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """out [m, k] = (x - mean) / sqrt(variance + eps), then scale and shift [k]; x += bias [k] before, where given."""
    _norm(x, out, eps, scale, shift, centred=True, bias=bias)


def modulated_norm(x: Tensor, out: Tensor, scale: Tensor, shift: Tensor, eps: float) -> None:
    """out [m, k] = x / sqrt(mean(x²) + eps) · scale + shift."""
    _norm(x, out, eps, scale, shift, centred=False)


def summed_norm(
    x: Tensor,
    summed: Tensor,
    out: Tensor,
    eps: float,
    *,
    residual: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    centred: bool = False,
    parts: int = 1,
) -> None:
    """summed [m, k] = residual + (x + bias) · gate, and out [m, k] its RMS norm, times scale, plus shift; vectors [k].

    `centred`: the layer norm. x [m, k] or, in several parts, float32 [parts · m, k], which are added in their order.
    `summed` may be x or the residual; out is apart from all. Each result has the bits that `epilogue`, or what finishes
    a product in parts, and then the norm alone would give it.
    """
    _norm(x, out, eps, scale, shift, centred, bias=bias, gate=gate, residual=residual, summed=summed, parts=parts)


@triton.jit
def glu_kernel(h, out, h_row, out_row, WIDTH, KIND: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    """A piece of a row: act(first half) · second half, or of each pair."""
    let_next_start()
    wait_for_previous()
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = k < WIDTH
    if PAIRS:
        both = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
        x = tl.load(h + row * h_row + both, mask=both < 2 * WIDTH, other=0.0).to(tl.float32)
        gate, up = tl.split(x.reshape(BLOCK, 2))
    else:
        gate = tl.load(h + row * h_row + k, mask=there, other=0.0).to(tl.float32)
        up = tl.load(h + row * h_row + WIDTH + k, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + k, (activate(gate, KIND) * up).to(out.dtype.element_ty), mask=there)


def glu(h: Tensor, out: Tensor, act: str, config: tuple[int, int] | None = None, pairs: bool = False) -> None:
    """out [m, w] = act(h[:, :w]) · h[:, w:], h [m, 2 w]; with `pairs` act(h[:, ::2]) · h[:, 1::2].

    `config`: (entries of a program, warps).
    """
    m, width = out.shape
    most, warps = config or (2048, 4)
    block = min(most, triton.next_power_of_2(width))
    glu_kernel[(m, triton.cdiv(width, block))](
        h, out, h.stride(0), out.stride(0), width, KIND=act, BLOCK=block, PAIRS=pairs, num_warps=warps,
        launch_pdl=overlaps(),
    )  # fmt: skip


@triton.jit
def _halves(x, x_head, HEADS: tl.constexpr, HALF: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr):
    """Both halves of one token's heads, in float32."""
    head, d = tl.arange(0, MANY), tl.arange(0, BLOCK)
    there = (head < HEADS)[:, None] & (d < HALF)[None, :]
    line = x + head[:, None] * x_head + d[None, :]
    first = tl.load(line, mask=there, other=0.0).to(tl.float32)
    return first, tl.load(line + HALF, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _turn(
    first, second, c, s, out, out_head,
    HEADS: tl.constexpr, HALF: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The halves, rotated by the token's angles, to where the heads go."""
    head, d = tl.arange(0, MANY), tl.arange(0, BLOCK)
    there = (head < HEADS)[:, None] & (d < HALF)[None, :]
    line = out + head[:, None] * out_head + d[None, :]
    tl.store(line, (first * c[None, :] - second * s[None, :]).to(out.dtype.element_ty), mask=there)
    tl.store(line + HALF, (second * c[None, :] + first * s[None, :]).to(out.dtype.element_ty), mask=there)


@triton.jit
def rope_kernel(
    x, cosine, sine, out, x_sample, x_token, x_head, angle_sample, out_sample, out_token, out_head,
    HEADS: tl.constexpr, HALF: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr, BATCHED: tl.constexpr,
):  # fmt: skip
    """One token of one sample: the halves of every head, rotated by the token's angles."""
    let_next_start()
    token, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64) if BATCHED else 0
    x += sample * x_sample + token * x_token
    angles = sample * angle_sample + token * HALF
    out += sample * out_sample + token * out_token
    wait_for_previous()
    first, second = _halves(x, x_head, HEADS, HALF, MANY, BLOCK)
    c = tl.load(cosine + angles + d, mask=d < HALF, other=0.0)
    s = tl.load(sine + angles + d, mask=d < HALF, other=0.0)
    _turn(first, second, c, s, out, out_head, HEADS, HALF, MANY, BLOCK)


def rope(x: Tensor, cosine: Tensor, sine: Tensor, out: Tensor) -> None:
    """out [b, t, heads, d] = x rotated; x may be a slice of a wider buffer; angles f32 [1|b, t, d / 2], dense."""
    samples, tokens, heads, d = x.shape
    rope_kernel[(tokens, samples)](
        x, cosine, sine, out, per_sample(x), x.stride(1), x.stride(2), per_sample(cosine),
        per_sample(out), out.stride(1), out.stride(2), HEADS=heads, HALF=d // 2,
        MANY=triton.next_power_of_2(heads), BLOCK=triton.next_power_of_2(d // 2), BATCHED=samples > 1,
        num_warps=2, launch_pdl=overlaps(),
    )  # fmt: skip


@triton.jit
def rope_and_cache_kernel(
    qkv, cosine, sine, q_out, k_out, v_out, sample_row, row, angle_sample,
    q_sample, q_token, q_head, k_sample, k_token, k_head, v_sample, v_token, v_head,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr,
    MANY: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr, BATCHED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One token of one sample: its keys rotated and its values moved into the cache; ROTATED: its queries as well.

    PARTS: programs that share the heads, each with HEADS query heads and GROUPS key heads.
    """
    let_next_start()
    D: tl.constexpr = 2 * HALF
    token, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64) if BATCHED else 0
    head, full = tl.arange(0, FEW), tl.arange(0, 2 * BLOCK)
    there = (head < GROUPS)[:, None] & (full < D)[None, :]
    qkv += sample * sample_row + token * row
    angles = sample * angle_sample + token * HALF
    q_out += sample * q_sample + token * q_token
    k_out += sample * k_sample + token * k_token
    v_out += sample * v_sample + token * v_token
    k_in, v_in = qkv + PARTS * HEADS * D, qkv + PARTS * (HEADS + GROUPS) * D
    if PARTS > 1:
        part = tl.program_id(2)
        qkv += part * HEADS * D
        k_in += part * GROUPS * D
        v_in += part * GROUPS * D
        q_out += part * HEADS * q_head
        k_out += part * GROUPS * k_head
        v_out += part * GROUPS * v_head
    wait_for_previous()  # everything is fetched before anything is stored: stores may alias, loads would wait for them
    k1, k2 = _halves(k_in, D, GROUPS, HALF, FEW, BLOCK)
    v = tl.load(v_in + head[:, None] * D + full[None, :], mask=there, other=0.0)
    c = tl.load(cosine + angles + d, mask=d < HALF, other=0.0)
    s = tl.load(sine + angles + d, mask=d < HALF, other=0.0)
    if ROTATED:
        q1, q2 = _halves(qkv, D, HEADS, HALF, MANY, BLOCK)
    tl.store(v_out + head[:, None] * v_head + full[None, :], v, mask=there)
    _turn(k1, k2, c, s, k_out, k_head, GROUPS, HALF, FEW, BLOCK)
    if ROTATED:
        _turn(q1, q2, c, s, q_out, q_head, HEADS, HALF, MANY, BLOCK)


def rope_and_cache(
    qkv: Tensor, cosine: Tensor, sine: Tensor, q_out: Tensor | None, k_out: Tensor, v_out: Tensor
) -> None:
    """Rotate the keys of qkv [b, t, (heads + 2 groups) · d] into k_out, copy its values into v_out [b, t, groups, d].

    The queries are rotated into q_out [b, t, heads, d], which may be their place in qkv, or left alone. Rows are
    strided and heads dense in qkv; both are strided in the outputs. Angles f32 [1|b, t, d / 2], dense.
    """
    samples, tokens, groups, d = k_out.shape
    heads = qkv.shape[2] // d - 2 * groups
    q = qkv.unflatten(2, (-1, d)) if q_out is None else q_out
    places = [stride for x in (q, k_out, v_out) for stride in (per_sample(x), x.stride(1), x.stride(2))]
    parts = next(p for p in (8, 4, 2, 1) if groups % p == 0)  # few heads a program, where they can be told apart
    heads, groups = heads // parts, groups // parts
    rope_and_cache_kernel[(tokens, samples, parts)](
        qkv, cosine, sine, q, k_out, v_out, per_sample(qkv), qkv.stride(1), per_sample(cosine), *places,
        HEADS=heads, GROUPS=groups, HALF=d // 2, ROTATED=q_out is not None,
        MANY=triton.next_power_of_2(heads), FEW=triton.next_power_of_2(groups), BLOCK=triton.next_power_of_2(d // 2),
        BATCHED=samples > 1, PARTS=parts, num_warps=4, launch_pdl=overlaps(),
    )  # fmt: skip


@triton.jit
def argmax_kernel(x, out, x_row, N, BLOCK: tl.constexpr):
    """One row, block by block; of equal entries the first counts."""
    let_next_start()
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    best, place = tl.full((), float("-inf"), tl.float32), tl.full((), 0, tl.int32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * x_row + n, mask=n < N, other=float("-inf")).to(tl.float32)
        most, at = tl.max(v, axis=0), tl.argmax(v, axis=0, tie_break_left=True)
        place = tl.where(most > best, start + at, place)
        best = tl.maximum(best, most)
    tl.store(out + row, place)


def argmax(x: Tensor, out: Tensor) -> None:
    """out i32 [m] = where the largest entry of each row of x [m, n] stands, the first of equals; no entry is NaN."""
    m, n = x.shape
    block = min(16384, triton.next_power_of_2(n))
    argmax_kernel[(m,)](x, out, x.stride(0), n, BLOCK=block, num_warps=16 if block > 4096 else 4, launch_pdl=overlaps())


@triton.jit
def epilogue_kernel(
    x, out, bias, residual, gate, x_row, out_row, residual_row, x_sample, out_sample, residual_sample, N,
    KIND: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr,
    BATCHED: tl.constexpr,
):  # fmt: skip
    """A piece of a row: residual + act(x + bias) · gate."""
    let_next_start()
    sample = tl.program_id(2).to(tl.int64) if BATCHED else 0
    x += sample * x_sample
    out += sample * out_sample
    residual += sample * residual_sample
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
    """out [m, n] or [b, m, n] = residual + act(x + bias) · gate; out may be x or the residual itself."""
    added = x if residual is None else residual
    tall = [t if t.dim() == 3 else t.unsqueeze(0) for t in (x, out, added)]
    b, m, n = tall[0].shape
    block = min(2048, triton.next_power_of_2(n))
    epilogue_kernel[(m, triton.cdiv(n, block), b)](
        x, out, x if bias is None else bias, added, x if gate is None else gate,
        *(t.stride(1) for t in tall), *map(per_sample, tall), n,
        KIND=act, BLOCK=block, BIAS=bias is not None, RESIDUAL=residual is not None, GATE=gate is not None,
        BATCHED=b > 1, num_warps=4, launch_pdl=overlaps(),
    )  # fmt: skip
