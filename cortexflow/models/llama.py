"""Llama-2 as a token decoder: embedding, prefill over a sequence, one token behind a cache, the head.

Source: transformers `models/llama/modeling_llama.py`. The layers are `transformer`'s, with RMSNorms
whose factor is the weight itself and SiLU units; the head is not tied to the embedding.
"""

from __future__ import annotations

from cortexflow.ir import Value, named, scope
from cortexflow.ir.ops import argmax, attention, cache_update, concat, gather, rms_norm
from cortexflow.models.config import ModelConfig
from cortexflow.models.params import Params
from cortexflow.models.transformer import Attend, Norm, Rotation, Tower, attend_causally, layer

Cache = list[tuple[Value, Value]]  # keys, rotated, and values of each layer: [b, slots, kv_heads, head_dim]


def tower(c: ModelConfig) -> Tower:
    """The dimensions, from the fields of the encoder: one transformer reads the prompt and emits tokens."""
    return Tower(c.encoder_dim, c.encoder_mlp_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.norm_eps, "silu")


def scaled_norm(t: Tower, p: Params) -> Norm:
    """RMSNorm whose factor is the weight."""
    return lambda x, name: (rms_norm(x, p.get(f"{name}.weight", t.width), eps=t.eps), None)


def embed(tokens: Value, c: ModelConfig, p: Params) -> Value:
    """Token ids [...] → rows of the embedding [..., width]."""
    with scope("embed"):
        return gather(p.get("model.embed_tokens.weight", c.vocab_size, c.encoder_dim), tokens)


def prefill(x: Value, t: Tower, p: Params, rotate: Rotation, layers: int) -> tuple[Value, Cache]:
    """All layers over a sequence [b, s, width], causally: the residual stream before the final norm, and the cache.

    What stands behind a sequence's end changes nothing before it: padding there needs no mask.
    """
    within, cache = attend_causally(t), Cache()

    def keep(q: Value, k: Value, v: Value) -> Value:
        cache.append((k, v))
        return within(q, k, v)

    for i in range(layers):
        with scope(f"layers.{i}"):
            q = p.at(f"model.layers.{i}")
            x = named(layer(x, t, q, scaled_norm(t, q), rotate, keep), f"prefill_layer_{i}")
    return x, cache


def append(
    x: Value, t: Tower, p: Params, rotate: Rotation, prefix: Cache, own: Cache, step: Value, mask: Value
) -> tuple[Value, Cache]:
    """All layers over one more token [b, 1, width], which goes into slot `step` of the cache `own`.

    It sees what `mask` bool [b, 1, prefix slots + own slots] says. Returns the residual stream and the new `own`.
    """
    new = Cache()

    def behind(k0: Value, v0: Value, k1: Value, v1: Value) -> Attend:
        def attend(q: Value, k: Value, v: Value) -> Value:
            new.append((cache_update(k1, k, step, axis=1), cache_update(v1, v, step, axis=1)))
            keys, values = concat(k0, new[-1][0], axis=1), concat(v0, new[-1][1], axis=1)
            return attention(q, keys, values, mask, scale=t.head_dim**-0.5)

        return attend

    for i, (before, after) in enumerate(zip(prefix, own, strict=True)):
        with scope(f"layers.{i}"):
            q = p.at(f"model.layers.{i}")
            x = named(layer(x, t, q, scaled_norm(t, q), rotate, behind(*before, *after)), f"step_layer_{i}")
    return x, new


def final_norm(x: Value, t: Tower, p: Params) -> Value:
    """The norm behind the last layer."""
    with scope("norm"):
        return scaled_norm(t, p.at("model"))(x, "norm")[0]


def choose(x: Value, c: ModelConfig, p: Params, label: str) -> Value:
    """The likeliest next token behind residual streams [b, width]: ids i32 [b]. Logits, named `label`, are float32."""
    h = final_norm(x, tower(c), p)
    with scope("head"):
        logits = named(p.at("lm_head").linear(h, c.vocab_size, result="f32"), label)
        return argmax(logits, axis=-1)
