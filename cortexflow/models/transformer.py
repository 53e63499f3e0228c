"""Decoder layers that language towers share: a norm, grouped heads with rotary positions, a gated unit; no biases.

Gemma and Llama are made of these. What differs is a parameter: the norm (`Norm`), the activation and
the epsilon (`Tower`). What a query may see the caller decides, by giving keys, values and a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cortexflow.ir import Value, scope
from cortexflow.ir.ops import act, add, attention, cos, div, gather, iota, mul, pow_, reshape, rope, scalar, sin
from cortexflow.models.params import Params

Rotation = tuple[Value, Value]  # cosine and sine, f32 [b, s, head_dim / 2]

Norm = Callable[[Value, str], tuple[Value, Value | None]]
"""A layer's norm by name ('input_layernorm', ...): the normalised value, and a gate for the branch or None."""

Attend = Callable[[Value, Value, Value], Value]
"""Attention of a layer: rotated queries and keys, and values, [b, s, heads, head_dim] → [b, s, heads, head_dim]."""


@dataclass(frozen=True)
class Tower:
    """The dimensions of one tower; `act` is the activation of its gated unit, a kind of the op `act`."""

    width: int
    mlp_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    act: str


def rotation(positions: Value, head_dim: int, theta: float, limit: int) -> Rotation:
    """Cosine and sine of the rotary angles at integer positions [b, s], all below `limit`.

    The angles are float32 in every precision: position * theta^(-2j / head_dim), j < head_dim / 2.
    """
    with scope("rope"):
        exponent = div(mul(iota(size=head_dim // 2, dtype="f32"), scalar(2.0, "f32")), scalar(float(head_dim), "f32"))
        frequency = div(scalar(1.0, "f32"), pow_(scalar(theta, "f32"), exponent))
        angles = mul(reshape(iota(size=limit, dtype="f32"), shape=(limit, 1)), frequency)
        return gather(cos(angles), positions), gather(sin(angles), positions)


def layer(x: Value, t: Tower, p: Params, norm: Norm, rotate: Rotation, attend: Attend) -> Value:
    """One layer on x [b, s, width]."""
    with scope("attn"):
        y, gate = norm(x, "input_layernorm")
        q, k, v = heads(y, t, p, rotate)
        y = attend(q, k, v)
        y = p.at("self_attn.o_proj").linear(reshape(y, shape=(*x.type.shape[:2], t.heads * t.head_dim)), t.width)
        x = add(x, y if gate is None else mul(y, gate))
    with scope("mlp"):
        y, gate = norm(x, "post_attention_layernorm")
        y = mul(act(p.at("mlp.gate_proj").linear(y, t.mlp_dim), kind=t.act), p.at("mlp.up_proj").linear(y, t.mlp_dim))
        y = p.at("mlp.down_proj").linear(y, t.width)
        return add(x, y if gate is None else mul(y, gate))


def heads(y: Value, t: Tower, p: Params, rotate: Rotation) -> tuple[Value, Value, Value]:
    """Queries and keys, rotated, and values: [b, s, heads or kv_heads, head_dim]."""
    b, s, _ = y.type.shape
    q, k, v = (
        reshape(p.at(f"self_attn.{n}_proj").linear(y, h * t.head_dim), shape=(b, s, h, t.head_dim))
        for n, h in (("q", t.heads), ("k", t.kv_heads), ("v", t.kv_heads))
    )
    return rope(q, *rotate), rope(k, *rotate), v


def attend_within(mask: Value, t: Tower) -> Attend:
    """Attention of a sequence to itself under a mask bool [b, 1 or s, s]."""
    return lambda q, k, v: attention(q, k, v, mask, scale=t.head_dim**-0.5)


def attend_causally(t: Tower) -> Attend:
    """Attention of each token of a sequence to itself and to those before it."""
    return lambda q, k, v: attention(q, k, v, scale=t.head_dim**-0.5, causal=True)
