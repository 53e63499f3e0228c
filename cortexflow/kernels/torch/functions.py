"""Functions that generated PyTorch source calls for ops that are more than an expression.

`codegen/torch` copies the text of those that a module needs into its source, so each stands alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """The operand in the precision in which statistics are taken: float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """Grouped attention on [batch, tokens, heads, dim]; the query heads of a key head become its rows."""
    b, m, heads, d = q.shape
    n, groups = k.shape[1], k.shape[2]
    per = heads // groups
    if causal:
        earlier = torch.ones(1, m, n, dtype=torch.bool, device=q.device).tril(n - m)
        mask = earlier if mask is None else mask & earlier
    add = None if bias is None else bias.to(q.dtype)
    if mask is not None:  # a finite fill: a query that may look nowhere attends uniformly
        add = torch.zeros(1, 1, 1, 1, dtype=q.dtype, device=q.device) if add is None else add
        add = add.masked_fill(~mask.unsqueeze(1), torch.finfo(q.dtype).min)
        if q.dtype == torch.float16:  # its lowest number leaves differences between logits
            q = q * mask.any(-1)[..., None, None]
    rows = q.reshape(b, m, groups, per, d).permute(0, 2, 3, 1, 4).reshape(b, groups, per * m, d)
    if add is not None and per > 1 and (add.shape[1] > 1 or add.shape[2] > 1):
        add = add.expand(add.shape[0], heads, m, n).reshape(add.shape[0], groups, per * m, n)
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=add, scale=scale)
    return out.reshape(b, groups, per, m, v.shape[-1]).permute(0, 3, 1, 2, 4).reshape(b, m, heads, v.shape[-1])


def attention_segments(
    q: Tensor, k0: Tensor, v0: Tensor, k1: Tensor, v1: Tensor, mask: Tensor, scale: float, causal: bool
) -> Tensor:
    """Attention over a cached prefix and a suffix, whose keys and values are never copied together."""
    b, m, heads, d = q.shape
    n, groups = k0.shape[1] + k1.shape[1], k0.shape[2]
    per = heads // groups
    if causal:
        earlier = torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m)
        mask = mask & earlier
    rows = q.reshape(b, m, groups, per, d).permute(0, 2, 3, 1, 4).reshape(b, groups, per * m, d)
    logits = torch.cat([rows @ k0.permute(0, 2, 3, 1), rows @ k1.permute(0, 2, 3, 1)], dim=-1)
    logits = wide(logits) * scale
    logits = logits.reshape(b, groups, per, m, n)
    logits = logits.masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    p = torch.softmax(logits, -1).to(q.dtype).reshape(b, groups, per * m, n)
    s = k0.shape[1]
    out = p[..., :s] @ v0.transpose(1, 2) + p[..., s:] @ v1.transpose(1, 2)
    return out.reshape(b, groups, per, m, v0.shape[-1]).permute(0, 3, 1, 2, 4).reshape(b, m, heads, v0.shape[-1])


def rope(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the halves of each head of [..., tokens, heads, dim]; angles in float32."""
    first, second = wide(x).chunk(2, dim=-1)
    c, s = cosine.unsqueeze(-2), sine.unsqueeze(-2)
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x.dtype)


def rms_norm(x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps), in float32, times a scale where there is one."""
    y = wide(x)
    y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + eps)
    return (y if scale is None else y * wide(scale)).to(x.dtype)


def layer_norm(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps), in float32, times a scale and plus a shift where there are any."""
    y = wide(x)
    scale, shift = (None if p is None else p.to(y.dtype) for p in (scale, shift))
    return F.layer_norm(y, x.shape[-1:], scale, shift, eps).to(x.dtype)


def cache_update(cache: Tensor, new: Tensor, index: int | Tensor, axis: int) -> Tensor:
    """A copy of the cache with `new` written at the index along an axis."""
    out = cache.clone()
    out.narrow(axis, int(index), new.shape[axis]).copy_(new)
    return out


def relative_position_bias(
    table: Tensor, queries: Tensor, keys: Tensor, bidirectional: bool, max_distance: int
) -> Tensor:
    """T5's bias [heads, queries, keys] from a table [buckets, heads]."""
    buckets = table.shape[0]
    distance = keys[None, :].long() - queries[:, None].long()
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
    return table[base + torch.where(distance < exact, distance, far)].permute(2, 0, 1)
