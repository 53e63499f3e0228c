"""What every primitive op means, written again: numpy formulas that share no code with cortexflow.ir."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

Array = np.ndarray
_erf = np.vectorize(math.erf, otypes=[np.float64])


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * sigmoid(x),
    "relu": lambda x: np.where(x > 0, x, 0.0),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
}


def cast(x: Array, dtype: str) -> Array:
    """To float64 for every float: the tests compute in that precision."""
    if dtype == "bool":
        return x != 0
    return np.trunc(x).astype({"i32": np.int32, "i64": np.int64}.get(dtype, np.float64)) if dtype[0] == "i" else x * 1.0


def const(value: Any, dtype: str, shape: tuple[int, ...]) -> Array:
    return np.array(value, {"i32": np.int32, "i64": np.int64, "bool": np.bool_}.get(dtype, np.float64)).reshape(shape)


def slice_(x: Array, axis: int, start: int, stop: int | None, step: int) -> Array:
    return np.take(x, range(start, x.shape[axis] if stop is None else stop, step), axis)


def pad(x: Array, pads: tuple[tuple[int, int], ...], value: float) -> Array:
    out = np.full([d + a + b for d, (a, b) in zip(x.shape, pads, strict=True)], value, x.dtype)
    out[tuple(slice(a, a + d) for d, (a, _) in zip(x.shape, pads, strict=True))] = x
    return out


def cache_update(cache: Array, new: Array, index: Array, axis: int) -> Array:
    out = np.moveaxis(cache.copy(), axis, 0)
    for i, row in enumerate(np.moveaxis(new, axis, 0)):
        out[int(index) + i] = row
    return np.moveaxis(out, 0, axis)


def argmax(x: Array, axis: int, keepdims: bool) -> Array:
    first = np.apply_along_axis(lambda row: list(row).index(max(row)), axis, x)
    return (np.expand_dims(first, axis) if keepdims else first).astype(np.int32)


def cumsum(x: Array, axis: int) -> Array:
    rows = np.moveaxis(x, axis, 0)
    return np.moveaxis(np.stack([rows[: i + 1].sum(0) for i in range(len(rows))]), 0, axis).astype(x.dtype)


def softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def rms_norm(x: Array, g: Array | float = 1.0, *, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * g


def layer_norm(x: Array, g: Array | float = 1.0, b: Array | float = 0.0, *, eps: float) -> Array:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * g + b


def rope(x: Array, cosine: Array, sine: Array) -> Array:
    """A complex rotation: the first half of a head is the real part, the second the imaginary."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (cosine + 1j * sine)[..., None, :]
    return np.concatenate([turned.real, turned.imag], -1)


def attention(q: Array, k: Array, v: Array, *extra: Array, scale: float, causal: bool) -> Array:
    """torch's own, with every KV head repeated; where a query may look nowhere, the mean of the values."""
    q, k, v = (torch.from_numpy(np.ascontiguousarray(t)).transpose(1, 2) for t in (q, k, v))
    times, (m, n) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    visible = torch.ones(q.shape[0], 1, m, n, dtype=torch.bool)
    bias = torch.zeros((), dtype=q.dtype)
    for e in map(torch.from_numpy, map(np.ascontiguousarray, extra)):
        visible, bias = (visible & e[:, None], bias) if e.dtype == torch.bool else (visible, bias + e)
    if causal:
        visible = visible & (torch.arange(n)[None, :] <= torch.arange(m)[:, None] + n - m)
    nowhere = ~visible.any(-1, keepdim=True)
    added = torch.where(visible | nowhere, bias, -math.inf).expand(*q.shape[:3], n)
    out = F.scaled_dot_product_attention(q, k, v, added, scale=scale)
    return torch.where(nowhere, v.mean(2, keepdim=True), out).transpose(1, 2).numpy()


def conv2d(
    x: Array, w: Array, b: Array | None = None, *, stride: Any, padding: Any, dilation: Any, groups: int
) -> Array:
    """One kernel position and one group at a time."""
    x = pad(x, ((0, 0), (0, 0), *padding), 0.0)
    n, (o, fan, kh, kw) = len(x), w.shape
    high, wide = (len(range(0, x.shape[2 + i] - dilation[i] * (w.shape[2 + i] - 1), stride[i])) for i in range(2))
    out = np.zeros((n, o, high, wide), x.dtype)
    for g, i, j in itertools.product(range(groups), range(kh), range(kw)):
        rows, columns = i * dilation[0], j * dilation[1]
        part = x[:, g * fan : (g + 1) * fan, rows :: stride[0], columns :: stride[1]][:, :, :high, :wide]
        to = slice(g * o // groups, (g + 1) * o // groups)
        out[:, to] += np.einsum("nchw,oc->nohw", part, w[to, :, i, j])
    return out if b is None else out + b[:, None, None]


def bucket(relative: int, rows: int, bidirectional: bool, max_distance: int) -> int:
    """T5's bucket of one relative position (key - query), as the mT5 rules put it."""
    first, half = 0, rows
    if bidirectional:
        half = rows // 2
        first = half if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    if distance < half // 2:
        return first + distance
    grown = math.log(distance / (half // 2)) / math.log(max_distance / (half // 2)) * (half // 2)
    return first + min(half // 2 + math.floor(grown), half - 1)


def relative_position_bias(table: Array, queries: Array, keys: Array, bidirectional: bool, max_distance: int) -> Array:
    rows = [[table[bucket(int(k - q), len(table), bidirectional, max_distance)] for k in keys] for q in queries]
    return np.moveaxis(np.array(rows), -1, 0)


REFERENCES: dict[str, Callable[..., Array]] = {
    "neg": lambda x: -x,
    "exp": lambda x: math.e**x,
    "log": np.log,
    "sqrt": lambda x: x**0.5,
    "rsqrt": lambda x: x**-0.5,
    "sin": np.sin,
    "cos": np.cos,
    "abs": np.abs,
    "floor": np.floor,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": lambda a, b: np.where(a > b, a, b),
    "min": lambda a, b: np.where(a < b, a, b),
    "pow": lambda a, b: np.exp(b * np.log(a)),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "not": lambda a: ~a,
    "act": lambda x, kind: ACTIVATIONS[kind](x),
    "cast": cast,
    "where": np.where,
    "const": const,
    "iota": lambda size, dtype: const(list(range(size)), dtype, (size,)),
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": lambda x, perm: np.transpose(x, axes=perm),
    "broadcast_to": np.broadcast_to,
    "concat": lambda *xs, axis: np.concatenate(xs, axis),
    "slice": slice_,
    "pad": pad,
    "gather": np.take,
    "cache_update": cache_update,
    "reduce_sum": lambda x, axes, keepdims: x.sum(axes, keepdims=keepdims).astype(x.dtype),
    "reduce_mean": lambda x, axes, keepdims: np.mean(x, axes, keepdims=keepdims),
    "reduce_max": lambda x, axes, keepdims: np.max(x, axes, keepdims=keepdims),
    "argmax": argmax,
    "cumsum": cumsum,
    "matmul": lambda x, w, dtype: (x[..., :, :, None] * w[..., None, :, :]).sum(-2),
    "softmax": softmax,
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "rope": rope,
    "attention": attention,
    "conv2d": conv2d,
    "relative_position_bias": relative_position_bias,
}
