"""What π0 and π0.5 share: image tower, prefix tower, and the flow-matching loop over an action expert.

Source: openpi `src/openpi/models/pi0.py` and its PyTorch port, LeRobot `policies/pi05`. The stages
hand on `image_tokens`, then a key and a value cache for each layer and the valid prefix slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from cortexflow.ir import Func, Module, Type, Value, function, named, returns, scope
from cortexflow.ir.ops import (
    add,
    attention,
    broadcast_to,
    cast,
    concat,
    cos,
    cumsum,
    div,
    gather,
    iota,
    loop,
    max_,
    mul,
    pow_,
    reduce_sum,
    reshape,
    scalar,
    sin,
    slice_,
    sub,
)
from cortexflow.models.config import ModelConfig, Signature
from cortexflow.models.gemma import ACT, plain_norm
from cortexflow.models.params import Params
from cortexflow.models.siglip import vision_transformer
from cortexflow.models.transformer import Norm, Tower, attend_within, layer, rotation

VLM = "paligemma_with_expert.paligemma.model"
EXPERT = "paligemma_with_expert.gemma_expert.model"


def encoder_tower(c: ModelConfig) -> Tower:
    """The prefix tower (Gemma 2B in the released models)."""
    return Tower(c.encoder_dim, c.encoder_mlp_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.norm_eps, ACT)


def expert_tower(c: ModelConfig) -> Tower:
    """The action expert (Gemma 300M in the released models); heads as in the prefix tower."""
    return Tower(c.decoder_dim, c.decoder_mlp_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.norm_eps, ACT)


def vision_encoder(c: ModelConfig, s: Signature, dtype: str) -> Func:
    """images f32 [b, views, h, w, 3] in [-1, 1] → image_tokens [b, views * patches, encoder width]."""
    size = c.image_size
    with function("vision_encoder", images=Type("f32", (s.batch, s.views, size, size, 3))) as (f, [images]):
        p = Params(VLM, dtype)
        with scope("vision"):
            flat = reshape(images, shape=(s.batch * s.views, size, size, 3))
            x = vision_transformer(flat, c, p.at("vision_tower.vision_model"))
            with scope("projector"):
                x = p.at("multi_modal_projector.linear").linear(x, c.encoder_dim, bias=True)
            named(x, "image_embed")
        returns(image_tokens=reshape(x, shape=(s.batch, s.views * c.num_patches, c.encoder_dim)))
    return f


def transformer_encoder(c: ModelConfig, s: Signature, dtype: str) -> Func:
    """The prefix: image and prompt tokens → keys and values of every layer, and which slots are valid."""
    images, slots = s.views * c.num_patches, prefix_slots(c, s)
    args = {
        "image_tokens": Type(dtype, (s.batch, images, c.encoder_dim)),
        "image_mask": Type("bool", (s.batch, s.views)),
        "tokens": Type("i32", (s.batch, s.prompt)),
        "token_mask": Type("bool", (s.batch, s.prompt)),
    }
    tower, p = encoder_tower(c), Params(f"{VLM}.language_model", dtype)
    with (
        function("transformer_encoder", **args) as (f, [image_tokens, image_mask, tokens, token_mask]),
        scope("prefix"),
    ):
        x = named(concat(image_tokens, _prompt(tokens, c, p), axis=1), "prefix_embeds")
        cameras = broadcast_to(
            reshape(image_mask, shape=(s.batch, s.views, 1)), shape=(s.batch, s.views, c.num_patches)
        )
        valid = concat(reshape(cameras, shape=(s.batch, images)), token_mask, axis=1)
        positions = sub(cumsum(cast(valid, dtype="i32"), axis=1), scalar(1, "i32"))
        named(positions, "prefix_position_ids")
        # A masked slot before the first valid one would sit at -1: any position does, nobody sees it.
        rotate = rotation(max_(positions, scalar(0, "i32")), c.head_dim, c.rope_theta, position_limit(c, s))
        attend = attend_within(reshape(valid, shape=(s.batch, 1, slots)), tower)
        cache: dict[str, Value] = {}
        for i in range(c.num_encoder_layers):

            def keep(q: Value, k: Value, v: Value, i: int = i) -> Value:
                cache[f"k_{i}"], cache[f"v_{i}"] = k, v
                return attend(q, k, v)

            with scope(f"layers.{i}"):
                q = p.at(f"layers.{i}")
                x = named(layer(x, tower, q, plain_norm(tower, q), rotate, keep), f"prefix_layer_{i}")
        # Nothing reads the last layer beyond its keys and values: `dce` removes it, unless it is exposed.
        named(plain_norm(tower, p)(x, "norm")[0], "prefix_out")
        returns(**cache, prefix_valid=valid)
    return f


def transformer_decoder(
    c: ModelConfig,
    s: Signature,
    dtype: str,
    inputs: dict[str, Type],
    suffix: Callable[
        [list[Value]], tuple[int, Callable[[Value, Value], tuple[Value, Callable[[Params], Norm]]], Value]
    ],
) -> Func:
    """The flow: noise f32 [b, chunk, action] → actions, by Euler steps t = 1, 1 - 1/n, ..., 1/n.

    `suffix(inputs)` gives what the family decides: how many tokens stand before the actions, a function
    (x_t, step) → (suffix tokens, norm of a layer from its parameters), and which suffix tokens see which
    (bool [queries, keys]).
    """
    slots, tower = prefix_slots(c, s), expert_tower(c)
    cache = Type(dtype, (s.batch, slots, c.num_kv_heads, c.head_dim))
    caches = {f"{n}_{i}": cache for i in range(c.num_decoder_layers) for n in "kv"}
    args = {
        **caches,
        "prefix_valid": Type("bool", (s.batch, slots)),
        **inputs,
        "noise": Type("f32", (s.batch, s.chunk, c.action_dim)),
    }
    p = Params(EXPERT, dtype)
    with function("transformer_decoder", **args) as (f, values), scope("expert"):
        given = dict(zip(args, values, strict=True))
        valid = given["prefix_valid"]
        leading, embed, visible = suffix([given[n] for n in inputs])
        m = leading + s.chunk
        rotate = _suffix_rotation(c, s, valid, m)
        mask = _suffix_mask(valid, visible, m)

        def step(i: Value, x: Value) -> list[Value]:
            named(x, "x_t")
            h, norm_of = embed(x, i)
            named(h, "suffix_embeds")
            for j in range(c.num_decoder_layers):
                k, v = given[f"k_{j}"], given[f"v_{j}"]
                with scope(f"layers.{j}"):
                    q = p.at(f"layers.{j}")
                    attend = _attend_behind(k, v, mask, tower)
                    h = named(layer(h, tower, q, norm_of(q), rotate, attend), f"suffix_layer_{j}")
            h = named(norm_of(p)(h, "norm")[0], "suffix_out")
            with scope("head"):
                h = _actions_of(h, leading)
                v_t = Params("action_out_proj", "f32").linear(cast(h, dtype="f32"), c.action_dim, bias=True)
                return [add(x, mul(named(v_t, "v_t"), scalar(-1.0 / s.steps, "f32")))]

        (actions,) = loop([given["noise"]], s.steps, step)
        returns(actions=actions)
    return f


def time_embedding(step: Value, c: ModelConfig, s: Signature) -> Value:
    """Sines then cosines of flow time at geometric periods: f32 [1, decoder width].

    t = 1 - step / steps is rounded to float32, the rest is float64, as in LeRobot
    (`common/vla_utils.py`, `create_sinusoidal_pos_embedding`).
    """
    half = c.decoder_dim // 2
    with scope("time"):
        t = add(mul(cast(step, dtype="f64"), scalar(-1.0 / s.steps, "f64")), scalar(1.0, "f64"))
        t = named(cast(t, dtype="f32"), "time")
        fraction = div(iota(size=half, dtype="f64"), scalar(float(max(half - 1, 1)), "f64"))
        ratio = scalar(c.time_max_period / c.time_min_period, "f64")
        period = mul(pow_(ratio, fraction), scalar(c.time_min_period, "f64"))
        angle = mul(div(scalar(2 * math.pi, "f64"), period), cast(t, dtype="f64"))
        wave = concat(sin(angle), cos(angle), axis=0)
        return reshape(cast(wave, dtype="f32"), shape=(1, c.decoder_dim))


def prefix_slots(c: ModelConfig, s: Signature) -> int:
    """Slots of the prefix: image tokens of every view, then the prompt bucket."""
    return s.views * c.num_patches + s.prompt


def position_limit(c: ModelConfig, s: Signature) -> int:
    """One more than the largest position: both towers share one table of angles."""
    return prefix_slots(c, s) + s.chunk + 1


def assemble(c: ModelConfig, s: Signature, dtype: str, family: str, decoder: Func) -> Module:
    """The three stages as a module."""
    stages = [vision_encoder(c, s, dtype), transformer_encoder(c, s, dtype), decoder]
    meta = {"family": family, "dtype": dtype, "batch": s.batch, "views": s.views}
    meta |= {"prompt": s.prompt, "chunk": s.chunk, "steps": s.steps}
    return Module({f.name: f for f in stages}, {}, meta)


def _prompt(tokens: Value, c: ModelConfig, p: Params) -> Value:
    with scope("embed"):
        rows = gather(p.get("embed_tokens.weight", c.vocab_size, c.encoder_dim), tokens)
        return cast(mul(cast(rows, dtype="f32"), scalar(math.sqrt(c.encoder_dim), "f32")), dtype=p.dtype)


def _suffix_rotation(c: ModelConfig, s: Signature, valid: Value, m: int) -> tuple[Value, Value]:
    """Suffix tokens follow the last valid prefix token of their sample."""
    count = reduce_sum(cast(valid, dtype="i32"), axes=(1,), keepdims=True)
    positions = add(broadcast_to(count, shape=(s.batch, m)), iota(size=m))
    return rotation(positions, c.head_dim, c.rope_theta, position_limit(c, s))


def _suffix_mask(valid: Value, visible: Value, m: int) -> Value:
    """Every suffix token sees the valid prefix, and of the suffix what `visible` [1 or m, m] says."""
    (b, slots), rows = valid.type.shape, visible.type.shape[0]
    prefix = broadcast_to(reshape(valid, shape=(b, 1, slots)), shape=(b, rows, slots))
    suffix = broadcast_to(reshape(visible, shape=(1, rows, m)), shape=(b, rows, m))
    return concat(prefix, suffix, axis=2)


def _attend_behind(k: Value, v: Value, mask: Value, t: Tower) -> Callable[[Value, Value, Value], Value]:
    """Attention to a cached prefix and to the suffix itself."""

    def attend(q: Value, own_k: Value, own_v: Value) -> Value:
        return attention(q, concat(k, own_k, axis=1), concat(v, own_v, axis=1), mask, scale=t.head_dim**-0.5)

    return attend


def _actions_of(h: Value, leading: int) -> Value:
    return slice_(h, axis=1, start=leading) if leading else h
