"""OpenVLA: two image towers, a projector and Llama-2, which emits one token for each number of an action.

Source: openvla `prismatic/extern/hf/modeling_prismatic.py`. Tensors have the names of its Hugging Face
checkpoints. The sequence is BOS, the patches, the rest of the prompt; a prompt that is shorter than its
bucket leaves its gap at the end. Generated tokens continue at the true length and have a cache of
their own, so that episodes of one batch may differ in length and the prefix' cache is only read.
"""

from __future__ import annotations

from collections.abc import Sequence

from cortexflow.errors import ConfigError
from cortexflow.ir import Func, Module, Type, Value, function, named, returns, scope
from cortexflow.ir.ops import (
    act,
    add,
    broadcast_to,
    cache_update,
    cast,
    concat,
    div,
    eq,
    gather,
    iota,
    le,
    loop,
    lt,
    max_,
    min_,
    mul,
    not_,
    or_,
    reduce_max,
    reduce_sum,
    reshape,
    scalar,
    slice_,
    sub,
    where,
)
from cortexflow.models import dinov2, llama, siglip
from cortexflow.models.base import VLAModel, register_model
from cortexflow.models.config import ModelConfig, Signature, VLAModelType
from cortexflow.models.llama import Cache
from cortexflow.models.params import Params
from cortexflow.models.transformer import Rotation, rotation


@register_model
class OpenVLA(VLAModel):
    """OpenVLA with fused DINOv2 and SigLIP towers (`dinosiglip-vit-so-224px`) and Llama-2."""

    family = VLAModelType.OPENVLA

    def build(self, signature: Signature, dtype: str = "f32") -> Module:
        """The three stages; see `VLAModel.build`.

        Inputs: `pixel_values` f32 [batch, 6, size, size], RGB normalised for DINOv2, then for SigLIP;
        `tokens` i32 [batch, prompt], BOS first, and `token_mask`, true for the tokens before the padding.
        Results: `actions` f64 [batch, chunk, action_dim], the centres of the bins, in (-1, 1); `token_ids`
        i32 [batch, chunk * action_dim], `pad_token_id` behind an EOS.
        """
        c, s = self.config, signature
        _check(c, s)
        stages = [_vision_encoder(c, s, dtype), _transformer_encoder(c, s, dtype), _transformer_decoder(c, s, dtype)]
        meta = {"family": "openvla", "dtype": dtype, "batch": s.batch, "prompt": s.prompt, "chunk": s.chunk}
        return Module({f.name: f for f in stages}, {}, meta | {"padding": "end"})


def _check(c: ModelConfig, s: Signature) -> None:
    """Refuse what the family does not have."""
    for field in ("dim", "mlp_dim"):
        encoder, decoder = getattr(c, f"encoder_{field}"), getattr(c, f"decoder_{field}")
        if encoder != decoder:
            raise ConfigError(
                f"OpenVLA's encoder and decoder are one transformer: expected decoder_{field}={encoder}, as "
                f"encoder_{field}, found {decoder}; begin with ModelConfig.released(VLAModelType.OPENVLA)"
            )
    if c.num_encoder_layers != c.num_decoder_layers:
        raise ConfigError(
            "OpenVLA's encoder and decoder are one transformer: expected equal num_encoder_layers and "
            f"num_decoder_layers, found {c.num_encoder_layers} and {c.num_decoder_layers}"
        )
    if min(c.vision_num_layers, c.dino_num_layers) < 2:
        raise ConfigError("OpenVLA reads its image towers before their last block: each needs two layers at least")
    if c.pad_token_id >= c.vocab_size or c.num_action_bins < 2 or _words(c) < c.num_action_bins:
        raise ConfigError(
            f"expected a vocabulary that holds pad_token_id={c.pad_token_id} and, before its last "
            f"vocab_padding={c.vocab_padding} rows, num_action_bins={c.num_action_bins} action tokens (two at least); "
            f"found vocab_size={c.vocab_size}"
        )
    if s.views != 1:
        raise ConfigError(f"OpenVLA sees one picture: expected views=1, found {s.views}")
    if s.chunk != c.chunk_size:
        raise ConfigError(
            f"OpenVLA emits as many actions at once as it was trained on: expected chunk={c.chunk_size}, found "
            f"{s.chunk}; for a model that was fine-tuned on more, say so in its configuration (chunk_size)"
        )
    if s.steps != c.num_diffusion_steps:
        raise ConfigError(f"OpenVLA has no flow: steps={s.steps} does not apply; leave it out")
    if s.prompt < 2:
        raise ConfigError(f"OpenVLA's prompts have BOS and more: expected prompt=2 at least, found {s.prompt}")


def _words(c: ModelConfig) -> int:
    """Entries of the tokenizer's own vocabulary; the ids of actions are its last ones."""
    return c.vocab_size - c.vocab_padding


def _generated(c: ModelConfig, s: Signature) -> int:
    """Tokens of a prediction: one for each number of the chunk."""
    return s.chunk * c.action_dim


def _slots(c: ModelConfig, s: Signature) -> int:
    """Slots of the sequence that the prefill reads."""
    return c.num_patches + s.prompt


def _vision_encoder(c: ModelConfig, s: Signature, dtype: str) -> Func:
    """pixel_values → image_tokens [b, patches, encoder width]."""
    size = c.image_size
    with function("vision_encoder", pixel_values=Type("f32", (s.batch, 6, size, size))) as (f, [pixels]):
        p = Params("vision_backbone", dtype)
        with scope("dino"):
            first = dinov2.features(slice_(pixels, axis=1, stop=3), c, p.at("featurizer"))
            named(first, "patches_dino")
        with scope("siglip"):
            second = siglip.features(slice_(pixels, axis=1, start=3), c, p.at("fused_featurizer"))
            named(second, "patches_siglip")
        x = named(concat(first, second, axis=2), "patch_features")
        with scope("projector"):
            p = Params("projector", dtype)
            x = act(p.at("fc1").linear(x, 4 * x.type.shape[-1], bias=True), kind="gelu")
            x = act(p.at("fc2").linear(x, c.encoder_dim, bias=True), kind="gelu")
            x = named(p.at("fc3").linear(x, c.encoder_dim, bias=True), "projected")
        returns(image_tokens=x)
    return f


def _transformer_encoder(c: ModelConfig, s: Signature, dtype: str) -> Func:
    """image_tokens, tokens, token_mask → keys and values of every layer, what stands at the prompt's end, its length.

    `prompt_end` [b, width] is the residual stream of the last token; `length` i32 [b] counts patches too.
    """
    b, slots, tower, p = s.batch, _slots(c, s), llama.tower(c), Params("language_model", dtype)
    args = {
        "image_tokens": Type(dtype, (b, c.num_patches, c.encoder_dim)),
        "tokens": Type("i32", (b, s.prompt)),
        "token_mask": Type("bool", (b, s.prompt)),
    }
    with function("transformer_encoder", **args) as (f, [image_tokens, tokens, token_mask]), scope("prefill"):
        words = llama.embed(tokens, c, p)
        x = concat(slice_(words, axis=1, stop=1), image_tokens, slice_(words, axis=1, start=1), axis=1)
        rotate = _rotation(reshape(iota(size=slots), shape=(1, slots)), c, s)
        x, cache = llama.prefill(named(x, "prefill_embeds"), tower, p, rotate, c.num_encoder_layers)
        named(llama.final_norm(x, tower, p), "prefill_out")  # of every token: dead, unless it is exposed
        length = add(reduce_sum(cast(token_mask, dtype="i32"), axes=(1,)), scalar(c.num_patches, "i32"))
        with scope("end"):
            last = add(sub(length, scalar(1, "i32")), mul(iota(size=b), scalar(slots, "i32")))
            end = gather(reshape(x, shape=(b * slots, c.encoder_dim)), last)
        keys = {f"{n}_{i}": v for i, pair in enumerate(cache) for n, v in zip("kv", pair, strict=True)}
        returns(**keys, prompt_end=end, length=length)
    return f


def _transformer_decoder(c: ModelConfig, s: Signature, dtype: str) -> Func:
    """Greedy decoding behind the cache → actions and token_ids.

    The first token follows from the prompt's end; every further one takes a pass through the layers, in a loop
    that ends early once every episode has emitted EOS. An episode that has gets `pad_token_id` from there on, so
    that its results do not depend on whether the others, or the loop, go on.
    """
    b, slots, more = s.batch, _slots(c, s), _generated(c, s) - 1
    cached = Type(dtype, (b, slots, c.num_kv_heads, c.head_dim))
    args = {f"{n}_{i}": cached for i in range(c.num_decoder_layers) for n in "kv"}
    args |= {"prompt_end": Type(dtype, (b, c.encoder_dim)), "length": Type("i32", (b,))}
    p = Params("language_model", dtype)
    with function("transformer_decoder", **args) as (f, values), scope("decode"):
        *flat, end, length = values
        ids = llama.choose(end, c, p, "first_logits")
        if more:
            rest = _further_tokens(c, s, p, ids, length, _pairs(flat))
            ids = concat(reshape(ids, shape=(b, 1)), rest, axis=1)
        with scope("actions"):
            actions = reshape(_centres(ids, c), shape=(b, s.chunk, c.action_dim))
        returns(actions=actions, token_ids=reshape(ids, shape=(b, 1 + more)))
    return f


def _further_tokens(c: ModelConfig, s: Signature, p: Params, first: Value, length: Value, prefix: Cache) -> Value:
    """The tokens behind the first: ids i32 [b, count], from a loop that carries their cache."""
    b, slots, count = s.batch, _slots(c, s), _generated(c, s) - 1
    tower, pad = llama.tower(c), scalar(c.pad_token_id, "i32")
    carried = ["token", "ended", "ids", "position", *(f"own_{n}_{i}" for i in range(len(prefix)) for n in "kv")]
    valid = reshape(lt(iota(size=slots), reshape(length, shape=(b, 1))), shape=(b, 1, slots))

    def step(i: Value, token: Value, ended: Value, ids: Value, position: Value, *flat: Value) -> list[Value]:
        for v, name in zip((token, ended, ids, position, *flat), carried, strict=True):
            named(v, name)
        x = llama.embed(reshape(token, shape=(b, 1)), c, p)
        written = broadcast_to(reshape(le(iota(size=count), i), shape=(1, 1, count)), shape=(b, 1, count))
        mask, rotate = concat(valid, written, axis=2), _rotation(reshape(position, shape=(b, 1)), c, s)
        x, own = llama.append(x, tower, p, rotate, prefix, _pairs(flat), i, mask)
        found = llama.choose(reshape(x, shape=(b, c.encoder_dim)), c, p, "step_logits")
        token = where(ended, pad, found)
        ids = cache_update(ids, reshape(token, shape=(b, 1)), i, axis=1)
        ended = or_(ended, eq(found, scalar(c.eos_token_id, "i32")))
        stop = not_(reduce_max(not_(ended), axes=(0,)))
        return [stop, token, ended, ids, add(position, scalar(1, "i32")), *(v for pair in own for v in pair)]

    empty = broadcast_to(scalar(0.0, p.dtype), shape=(b, count, c.num_kv_heads, c.head_dim))
    start = [first, eq(first, scalar(c.eos_token_id, "i32")), broadcast_to(pad, shape=(b, count)), length]
    return loop([*start, *[empty] * (2 * len(prefix))], count, step, early_stop=True)[2]


def _pairs(flat: Sequence[Value]) -> Cache:
    """Keys and values in turn, as pairs."""
    return list(zip(flat[::2], flat[1::2], strict=True))


def _rotation(positions: Value, c: ModelConfig, s: Signature) -> Rotation:
    return rotation(positions, c.head_dim, c.rope_theta, _slots(c, s) + _generated(c, s))


def _centres(ids: Value, c: ModelConfig) -> Value:
    """The number that a token stands for, f64: the centre of its bin; the last id of the vocabulary is the lowest bin.

    Source: `modeling_prismatic.py`, `predict_action`: linspace(-1, 1, bins) has one bin less than it has edges, and
    whatever is no action token goes to the nearest end.
    """
    bins = c.num_action_bins - 1
    edges = add(mul(iota(size=bins + 1, dtype="f64"), scalar(2.0 / bins, "f64")), scalar(-1.0, "f64"))
    centres = div(add(slice_(edges, axis=0, stop=bins), slice_(edges, axis=0, start=1)), scalar(2.0, "f64"))
    index = max_(sub(scalar(_words(c) - 1, "i32"), ids), scalar(0, "i32"))
    return gather(centres, min_(index, scalar(bins - 1, "i32")))
