"""The semantic ops of transformers and convolutional towers, declared as in `ops`, which offers them too.

They stay whole, so that no pass has to rediscover them: products, norms, attention, convolution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cortexflow.ir.builder import Cost, op, per_element, traffic
from cortexflow.ir.core import FLOATS, Op, Type
from cortexflow.ir.dtypes import TORCH_DTYPES, wide
from cortexflow.ir.shapes import axis_of, broadcast, floating, integer, require, same_dtype, window


def _matmul(x: Tensor, w: Tensor, dtype: str | None) -> Tensor:
    if dtype is None or TORCH_DTYPES[dtype] == x.dtype:
        return x @ w
    return (wide(x) @ wide(w)).to(TORCH_DTYPES[dtype])  # rounded once, from the sums


def _matmul_cost(o: Op) -> Cost:
    return traffic(o, 2 * o.outputs[0].type.size * o.inputs[0].type.shape[-1])


@op(evaluate=_matmul, cost=_matmul_cost)
def matmul(x: Type, w: Type, *, dtype: str | None = None) -> Type:
    """x @ w over the last two axes, leading axes broadcast, sums in float32.

    x [..., m, k], w [..., k, n] → [..., m, n]; `dtype` is the result's, by default the operands'.
    """
    floating(x, w)
    require(len(x.shape) >= 2 and len(w.shape) >= 2, f"operands need two axes, found {x} @ {w}")
    require(x.shape[-1] == w.shape[-2], f"inner extents differ: {x} @ {w}")
    common = same_dtype(x, w)
    require(dtype is None or dtype in FLOATS, f"the result's dtype must be a float, found {dtype!r}")
    batch = broadcast(x.shape[:-2], w.shape[:-2])
    return Type(dtype or common, (*batch, x.shape[-2], w.shape[-1]))


@op(evaluate=lambda x, axis: torch.softmax(wide(x), axis).to(x.dtype), cost=per_element(6))
def softmax(x: Type, *, axis: int = -1) -> Type:
    """exp(x) / sum(exp(x)) along an axis, in float32."""
    floating(x)
    axis_of(x, axis)
    return x


def _rms_norm(x: Tensor, g: Tensor | None = None, *, eps: float) -> Tensor:
    y = wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if g is None else y * wide(g)).to(x.dtype)


@op(evaluate=_rms_norm, cost=per_element(5))
def rms_norm(x: Type, *scale: Type, eps: float) -> Type:
    """x * rsqrt(mean(x²) + eps) over the last axis, in float32, times a scale [n] where given."""
    floating(x, *scale)
    axis_of(x, -1)
    require(len(scale) <= 1, "takes x and at most a scale")
    require(all(s.shape == x.shape[-1:] for s in scale), f"the scale must be {x.shape[-1:]}")
    return x


def _layer_norm(x: Tensor, g: Tensor | None = None, b: Tensor | None = None, *, eps: float) -> Tensor:
    y = wide(x)
    scale, shift = (None if p is None else p.to(y.dtype) for p in (g, b))
    return F.layer_norm(y, y.shape[-1:], scale, shift, eps).to(x.dtype)


@op(evaluate=_layer_norm, cost=per_element(8))
def layer_norm(x: Type, *affine: Type, eps: float) -> Type:
    """(x - mean) * rsqrt(var + eps) over the last axis, in float32; then scale [n] and shift [n] where given."""
    floating(x, *affine)
    axis_of(x, -1)
    require(len(affine) in (0, 2), "takes x alone, or x, scale and shift")
    require(all(p.shape == x.shape[-1:] for p in affine), f"scale and shift must be {x.shape[-1:]}")
    return x


def _rope(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    first, second = wide(x).chunk(2, dim=-1)
    c, s = wide(c).unsqueeze(-2), wide(s).unsqueeze(-2)
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x.dtype)


@op(evaluate=_rope, cost=per_element(3))
def rope(x: Type, cosine: Type, sine: Type) -> Type:
    """Rotate the two halves of each head: x [..., s, heads, d]; cosine and sine [..., s, d/2], in float32."""
    floating(x, cosine, sine)
    axis_of(cosine, -1)
    require(len(x.shape) >= 3 and x.shape[-1] % 2 == 0, f"expected [..., s, heads, even d], found {x}")
    require(cosine == sine, f"cosine and sine must agree, found {cosine} and {sine}")
    table = (*cosine.shape[:-1], 1, cosine.shape[-1])
    half = (*x.shape[:-1], x.shape[-1] // 2)
    require(broadcast(table, half) == half, f"the table {cosine} does not fit {x}")
    return x


def _attention(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor, scale: float, causal: bool) -> Tensor:
    b, m, heads, d = q.shape
    n, groups = k.shape[1], k.shape[2]
    rows = wide(q).reshape(b, m, groups, heads // groups, d)
    logits = torch.einsum("bmghd,bngd->bghmn", rows, wide(k)).reshape(b, heads, m, n) * scale
    for e in extra:
        if e.dtype != torch.bool:
            logits = logits + e.to(logits.dtype)
    for e in extra:
        if e.dtype == torch.bool:
            logits = logits.masked_fill(~e.unsqueeze(1), torch.finfo(torch.float32).min)
    if causal:
        later = torch.ones(m, n, dtype=torch.bool, device=q.device).triu(n - m + 1)
        logits = logits.masked_fill(later, torch.finfo(torch.float32).min)
    weights = torch.softmax(logits, -1).reshape(b, groups, heads // groups, m, n)
    return torch.einsum("bghmn,bngd->bmghd", weights, wide(v)).reshape(b, m, heads, v.shape[-1]).to(q.dtype)


def _attention_cost(o: Op) -> Cost:
    (b, m, heads, d), (_, n, _, dv) = o.inputs[0].type.shape, o.inputs[2].type.shape
    return traffic(o, 2 * b * heads * m * n * (d + dv) + 6 * b * heads * m * n)


@op(evaluate=_attention, cost=_attention_cost)
def attention(q: Type, k: Type, v: Type, *extra: Type, scale: float, causal: bool = False) -> Type:
    """softmax(q·k * scale + bias) v, logits and softmax in float32; grouped heads.

    q [b, m, heads, d], k [b, n, groups, d], v [b, n, groups, dv] → [b, m, heads, dv]; heads is a
    multiple of groups. Further operands: a bool mask [b|1, m|1, n] (true: may look) and a float bias
    [b|1, heads|1, m|1, n]. A query that may look nowhere attends uniformly. `causal` lets query i
    see the keys up to n - m + i.
    """
    floating(q, k, v)
    same_dtype(q, k, v)
    require(len(q.shape) == len(k.shape) == len(v.shape) == 4, f"expected four axes each, found {q}, {k}, {v}")
    b, m, heads, d = q.shape
    n, groups = k.shape[1:3]
    require(k.shape[0] == v.shape[0] == b and v.shape[1:3] == (n, groups), f"k {k} and v {v} do not pair with q {q}")
    require(k.shape[3] == d and groups >= 1 and heads % groups == 0, f"heads of q {q} and k {k} do not group")
    require(len({e.dtype == "bool" for e in extra}) == len(extra), "at most one bool mask and one float bias")
    for e in extra:
        full = (b, m, n) if e.dtype == "bool" else (b, heads, m, n)
        fits = len(e.shape) == len(full) and broadcast(e.shape, full) == full and e.shape[-1] == n
        require(fits, f"{'mask' if e.dtype == 'bool' else 'bias'} {e} does not broadcast to {full}")
    return Type(q.dtype, (b, m, heads, v.shape[3]))


def _conv2d(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    padded = F.pad(x, (*padding[1], *padding[0]))
    return F.conv2d(padded, w, b, stride=stride, dilation=dilation, groups=groups)


def _conv2d_cost(o: Op) -> Cost:
    return traffic(o, 2 * o.outputs[0].type.size * math.prod(o.inputs[1].type.shape[1:]))


@op(evaluate=_conv2d, cost=_conv2d_cost)
def conv2d(
    x: Type,
    w: Type,
    *bias: Type,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Type:
    """A 2-D convolution: x [n, c, h, w], w [o, c/groups, kh, kw], bias [o] where given.

    `padding` is ((top, bottom), (left, right)), in zeros, so that every framework's rule can be written.
    """
    floating(x, w, *bias)
    same_dtype(x, w, *bias)
    require(len(x.shape) == len(w.shape) == 4, f"expected [n,c,h,w] and [o,c/g,kh,kw], found {x}, {w}")
    out, fan = w.shape[:2]
    require(groups >= 1 and fan * groups == x.shape[1] and out % groups == 0, f"{groups} groups do not fit {x} and {w}")
    require(len(bias) <= 1 and all(t.shape == (out,) for t in bias), f"the bias must be {(out,)}")
    spatial = [window(x.shape[2 + i], w.shape[2 + i], stride[i], padding[i], dilation[i]) for i in range(2)]
    return Type(x.dtype, (x.shape[0], out, *spatial))


def _relative_bias(table: Tensor, q: Tensor, k: Tensor, bidirectional: bool, max_distance: int) -> Tensor:
    buckets = table.shape[0]
    distance = k[None, :].long() - q[:, None].long()
    base = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        base = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return table[base + torch.where(distance < exact, distance, far)].permute(2, 0, 1).contiguous()


@op(evaluate=_relative_bias)
def relative_position_bias(
    table: Type, queries: Type, keys: Type, *, bidirectional: bool, max_distance: int = 128
) -> Type:
    """T5's bias: table [buckets, heads], positions [m] and [n] → [heads, m, n].

    Source: transformers `mt5/modeling_mt5.py`, `_relative_position_bucket`. The relative position is
    key - query; half of the buckets are exact distances, the others grow with the logarithm up to
    `max_distance`; `bidirectional` gives each sign its own half.
    """
    floating(table)
    integer(queries, keys)
    rows = table.shape[0] if len(table.shape) == 2 else 0
    require(rows >= 4 and rows % 4 == 0, f"the table must be [4·n, heads], found {table}")
    exact = rows // (4 if bidirectional else 2)
    require(max_distance > exact, f"max_distance must exceed the {exact} exact distances, found {max_distance}")
    require(len(queries.shape) == len(keys.shape) == 1, f"positions must be vectors, found {queries}, {keys}")
    return Type(table.dtype, (table.shape[1], *queries.shape, *keys.shape))
