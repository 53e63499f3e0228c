"""The fused ops. Each is defined by its decomposition and by nothing else.

A body may use other fused ops: `legalize` expands one level at a time, patterns expand to the
ground. Bodies see wildcards when they serve as patterns, so they emit ops and never look at shapes.
Operands of commutative ops stand in the order of `canonicalize`.
"""

from __future__ import annotations

from cortexflow.ir.builder import fused
from cortexflow.ir.core import Value
from cortexflow.ir.ops import act, add, attention, concat, layer_norm, matmul, mul, rms_norm, rope, slice_

# ---- products with an epilogue ---------------------------------------------------------------------


@fused
def linear(x: Value, w: Value, b: Value) -> Value:
    """Project x and add a bias."""
    return add(matmul(x, w), b)


@fused
def linear_act(x: Value, w: Value, b: Value, *, kind: str) -> Value:
    """Project x, add a bias, apply an activation."""
    return act(linear(x, w, b), kind=kind)


@fused
def linear_residual(r: Value, x: Value, w: Value, b: Value) -> Value:
    """Add the projection of x, with bias, to the residual stream r."""
    return add(r, linear(x, w, b))


@fused
def matmul_residual(r: Value, x: Value, w: Value) -> Value:
    """Add the projection of x to the residual stream r."""
    return add(r, matmul(x, w))


@fused
def matmul_gated_residual(r: Value, x: Value, w: Value, gate: Value) -> Value:
    """Add the projection of x, times a gate, to the residual stream r."""
    return add(r, mul(matmul(x, w), gate))


@fused
def glu(h: Value, *, kind: str, width: int) -> Value:
    """The first `width` columns, activated, times the others (a gated linear unit's middle)."""
    return mul(act(slice_(h, axis=-1, stop=width), kind=kind), slice_(h, axis=-1, start=width))


@fused
def matmul_glu(x: Value, w: Value, *, kind: str, width: int) -> Value:
    """Project x to gate and up, combine them."""
    return glu(matmul(x, w), kind=kind, width=width)


# ---- products behind a norm ------------------------------------------------------------------------


@fused
def norm_matmul(x: Value, w: Value, *, eps: float) -> Value:
    """RMS-normalise x, then project it."""
    return matmul(rms_norm(x, eps=eps), w)


@fused
def norm_glu(x: Value, w: Value, *, eps: float, kind: str, width: int) -> Value:
    """RMS-normalise x, project it to gate and up, combine them."""
    return matmul_glu(rms_norm(x, eps=eps), w, kind=kind, width=width)


@fused
def modulated_norm(x: Value, scale: Value, shift: Value, *, eps: float) -> Value:
    """RMS-normalise x, then scale and shift it (adaptive norm; scale is the whole factor)."""
    return add(mul(rms_norm(x, eps=eps), scale), shift)


@fused
def modulated_norm_matmul(x: Value, scale: Value, shift: Value, w: Value, *, eps: float) -> Value:
    """Adaptive norm, then projection."""
    return matmul(modulated_norm(x, scale, shift, eps=eps), w)


@fused
def modulated_norm_glu(x: Value, scale: Value, shift: Value, w: Value, *, eps: float, kind: str, width: int) -> Value:
    """Adaptive norm, projection to gate and up, their combination."""
    return matmul_glu(modulated_norm(x, scale, shift, eps=eps), w, kind=kind, width=width)


@fused
def layer_norm_linear(x: Value, w: Value, b: Value, *, eps: float) -> Value:
    """Layer-normalise x, then project it, with bias."""
    return linear(layer_norm(x, eps=eps), w, b)


@fused
def layer_norm_linear_act(x: Value, w: Value, b: Value, *, eps: float, kind: str) -> Value:
    """Layer-normalise x, project it, with bias, and apply an activation."""
    return linear_act(layer_norm(x, eps=eps), w, b, kind=kind)


# ---- attention -------------------------------------------------------------------------------------


@fused
def attention_segments(
    q: Value, k0: Value, v0: Value, k1: Value, v1: Value, mask: Value, *, scale: float, causal: bool
) -> Value:
    """Attention over keys and values that stand in two places: a cached prefix, then a suffix."""
    keys, values = concat(k0, k1, axis=1), concat(v0, v1, axis=1)
    return attention(q, keys, values, mask, scale=scale, causal=causal)


@fused
def rotated_attention_segments(
    q: Value, k0: Value, v0: Value, k1: Value, v1: Value, cosine: Value, sine: Value, mask: Value,
    *, scale: float, causal: bool,
) -> Value:  # fmt: skip
    """The same where queries and suffix keys are still to be rotated; the cached keys are already."""
    return attention_segments(
        rope(q, cosine, sine), k0, v0, rope(k1, cosine, sine), v1, mask, scale=scale, causal=causal
    )


FUSED = (  # the order in which `fuse` tries them: the largest first
    layer_norm_linear_act,
    layer_norm_linear,
    modulated_norm_glu,
    modulated_norm_matmul,
    modulated_norm,
    norm_glu,
    norm_matmul,
    matmul_gated_residual,
    linear_residual,
    matmul_residual,
    linear_act,
    linear,
    matmul_glu,
    glu,
    rotated_attention_segments,
    attention_segments,
)
