"""Gemma decoder layers: RMSNorm (plain or adaptive), rotary positions, grouped heads, gated GELU.

Source: openpi `src/openpi/models/gemma.py`; transformers `GemmaModel`. Both towers of a π model are
made of these layers; a caller decides what a query may see by giving keys, values and a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cortexflow.ir import Value, named, scope
from cortexflow.ir.ops import (
    act,
    add,
    attention,
    cast,
    cos,
    div,
    gather,
    iota,
    mul,
    pow_,
    reshape,
    rms_norm,
    rope,
    scalar,
    sin,
    slice_,
)
from cortexflow.models.params import Params

Rotation = tuple[Value, Value]  # cosine and sine, f32 [b, s, head_dim / 2]


@dataclass(frozen=True)
class Tower:
    """The dimensions of one tower."""

    width: int
    mlp_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float


def rotation(positions: Value, head_dim: int, theta: float, limit: int) -> Rotation:
    """Cosine and sine of the rotary angles at integer positions [b, s], all below `limit`.

    The angles are float32 in every precision: position * theta^(-2j / head_dim), j < head_dim / 2.
    """
    with scope("rope"):
        exponent = div(mul(iota(size=head_dim // 2, dtype="f32"), scalar(2.0, "f32")), scalar(float(head_dim), "f32"))
        frequency = div(scalar(1.0, "f32"), pow_(scalar(theta, "f32"), exponent))
        angles = mul(reshape(iota(size=limit, dtype="f32"), shape=(limit, 1)), frequency)
        return gather(cos(angles), positions), gather(sin(angles), positions)


Norm = Callable[[Value, str], tuple[Value, Value | None]]
"""A layer's norm by name ('input_layernorm', ...): the normalised value, and a gate for the branch or None."""


def plain_norm(t: Tower, p: Params) -> Norm:
    """RMSNorm whose factor is 1 + weight, as Gemma stores it."""

    def apply(x: Value, name: str) -> tuple[Value, Value | None]:
        factor = add(p.to("f32").get(f"{name}.weight", t.width), scalar(1.0, "f32"))
        return rms_norm(x, cast(factor, dtype=p.dtype), eps=t.eps), None

    return apply


def adaptive_norm(t: Tower, p: Params, condition: Value) -> Norm:
    """RMSNorm whose factor, shift and gate are a linear function of a condition f32 [1, width]."""

    def apply(x: Value, name: str) -> tuple[Value, Value | None]:
        modulation = p.to("f32").at(f"{name}.dense").linear(condition, 3 * t.width, bias=True)
        scale, shift, gate = (slice_(modulation, axis=-1, start=i * t.width, stop=(i + 1) * t.width) for i in range(3))
        scale = add(scale, scalar(1.0, "f32"))
        parts = {"scale": scale, "shift": shift, "gate": gate}
        scale, shift, gate = (named(cast(v, dtype=p.dtype), n) for n, v in parts.items())
        return add(mul(rms_norm(x, eps=t.eps), scale), shift), gate

    return apply


def layer(
    x: Value, t: Tower, p: Params, norm: Norm, rotate: Rotation, attend: Callable[[Value, Value, Value], Value]
) -> Value:
    """One layer on x [b, s, width]; `attend(q, k, v)` gets rotated queries and keys, [b, s, heads, head_dim]."""
    with scope("attn"):
        y, gate = norm(x, "input_layernorm")
        q, k, v = heads(y, t, p, rotate)
        y = attend(q, k, v)
        y = p.at("self_attn.o_proj").linear(reshape(y, shape=(*x.type.shape[:2], t.heads * t.head_dim)), t.width)
        x = add(x, y if gate is None else mul(y, gate))
    with scope("mlp"):
        y, gate = norm(x, "post_attention_layernorm")
        y = mul(
            act(p.at("mlp.gate_proj").linear(y, t.mlp_dim), kind="gelu_tanh"), p.at("mlp.up_proj").linear(y, t.mlp_dim)
        )
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


def attend_within(mask: Value, t: Tower) -> Callable[[Value, Value, Value], Value]:
    """Attention of a sequence to itself under a mask bool [b, 1 or s, s]."""
    return lambda q, k, v: attention(q, k, v, mask, scale=t.head_dim**-0.5)
