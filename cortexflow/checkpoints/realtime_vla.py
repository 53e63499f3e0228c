"""realtime-vla's converted checkpoints, presented under canonical names.

A dictionary of stacked [layer, in, out] matrices with q | k | v side by side, the columns of q and k
interleaved for a RoPE that pairs neighbours, and RMSNorm weights multiplied into the matrices that follow.
Undone lazily, one tensor at a time. Norms that were multiplied in become zeros: Gemma's norm
multiplies by 1 + w. What the π0 file folded for good (the time MLP's first layer, the flow's step) keeps
its folded form under `folded.*`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from cortexflow.checkpoints.dialects import Fact, Facts
from cortexflow.checkpoints.names import DECODER, EMBEDDING, ENCODER, PROJECTOR, VISION
from cortexflow.checkpoints.tensors import LazyTensor
from cortexflow.errors import CheckpointError
from cortexflow.models.config import VLAModelType

MARK = "vision_patch_embedding_w"  # in every realtime-vla file, in no other format

# Stored name: rank. What a file must hold, by family.
COMMON = {
    MARK: 4,
    "vision_patch_embedding_b": 1,
    "vision_position_embedding": 2,
    "vision_attn_qkv_w": 3,
    "vision_attn_qkv_b": 2,
    "vision_attn_o_w": 3,
    "vision_attn_o_b": 2,
    "vision_ffn_up_w": 3,
    "vision_ffn_up_b": 2,
    "vision_ffn_down_w": 3,
    "vision_ffn_down_b": 2,
    "vision_pre_attn_norm_w": 2,
    "vision_pre_attn_norm_b": 2,
    "vision_pre_ffn_norm_w": 2,
    "vision_pre_ffn_norm_b": 2,
    "vision_final_norm_w": 1,
    "vision_final_norm_b": 1,
    "encoder_multi_modal_projector_w": 2,
    "encoder_multi_modal_projector_b": 1,
    "encoder_attn_qkv_w": 3,
    "encoder_attn_o_w": 3,
    "encoder_ffn_gate_w": 3,
    "encoder_ffn_up_w": 3,
    "encoder_ffn_down_w": 3,
    "decoder_attn_qkv_w": 3,
    "decoder_attn_o_w": 3,
    "decoder_ffn_gate_w": 3,
    "decoder_ffn_up_w": 3,
    "decoder_ffn_down_w": 3,
}
PI0_KEYS = {
    "decoder_state_in_proj_w": 2,
    "decoder_state_in_proj_b": 1,
    "decoder_action_fused_in_proj_w": 2,
    "decoder_action_fused_time_biases": 2,
    "decoder_action_mlp_w": 2,
    "decoder_action_mlp_b": 1,
    "decoder_action_fused_out_proj_w": 2,
    "decoder_action_fused_out_proj_b": 1,
    "language_embeds": 2,
}
PI05_KEYS = {
    "embedding_weight": 2,
    "decoder_time_embeds": 2,
    "decoder_time_mlp_in_w": 2,
    "decoder_time_mlp_in_b": 1,
    "decoder_time_mlp_out_w": 2,
    "decoder_time_mlp_out_b": 1,
    "decoder_pre_attn_norm_mod_w": 3,
    "decoder_pre_attn_norm_mod_b": 2,
    "decoder_pre_ffn_norm_mod_w": 3,
    "decoder_pre_ffn_norm_mod_b": 2,
    "decoder_final_norm_mod_w": 2,
    "decoder_final_norm_mod_b": 1,
    "decoder_action_in_proj_w": 2,
    "decoder_action_in_proj_b": 1,
    "decoder_action_out_proj_w": 2,
    "decoder_action_out_proj_b": 1,
}
NOT_NEEDED = {
    "decoder_time_embeds": 2,  # recomputed from the flow time, for any number of steps
    "language_embeds": 2,  # a prompt's embeddings; where embedding_weight is stored, prompts are embedded anew
}


@dataclass
class Converted:
    """Canonical tensors of one file, with what the format says about the configuration."""

    family: VLAModelType
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)  # an override or another source may say otherwise
    fixed: Facts = field(default_factory=dict)  # none may
    notes: list[str] = field(default_factory=list)
    fixed_prompt: int | None = None  # tokens of the only prompt that the file knows


def uninterleave(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k from (head_dim / 2, 2) per head back to (2, head_dim / 2): halves paired, as in Gemma."""
    rows, width = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, width)
    return pairs.transpose(1, 2).reshape(rows, width)


def _check(stored: Mapping[str, LazyTensor], family: VLAModelType) -> None:
    wanted = COMMON | (PI05_KEYS if family is VLAModelType.PI05 else PI0_KEYS)
    if absent := [name for name in wanted if name not in stored]:
        raise CheckpointError(
            f"expected a realtime-vla checkpoint of {family.value}, {len(absent)} of its tensors are missing: "
            f"{', '.join(absent)}. Convert the original again with realtime-vla's converter for {family.value}"
        )
    for name, rank in (wanted | NOT_NEEDED).items():
        if name in stored and len(stored[name].shape) != rank:
            raise CheckpointError(f"{name}: expected {rank} dimensions, found the shape {list(stored[name].shape)}")
    for tower in ("vision_", "encoder_", "decoder_"):
        # Stacked per layer: three-dimensional matrices, and the vectors that go with them.
        stacks = {n: stored[n].shape[0] for n, rank in wanted.items() if n.startswith(tower) and _stacked(n, rank)}
        if len(set(stacks.values())) > 1:
            text = ", ".join(f"{n} {list(stored[n].shape)}" for n in stacks)
            raise CheckpointError(f"expected stacks of one number of layers, found {text}")


def _stacked(name: str, rank: int) -> bool:
    return rank == 3 or (rank == 2 and name.endswith("_b")) or (rank == 2 and "vision_pre_" in name)


def _attention_split(stored: Mapping[str, LazyTensor], tower: str) -> tuple[int, int]:
    """Columns of q and of k (v is as wide as k) in a stack of q | k | v."""
    columns, q = stored[f"{tower}_attn_qkv_w"].shape[2], stored[f"{tower}_attn_o_w"].shape[1]
    if columns <= q or (columns - q) % 2:
        raise CheckpointError(
            f"{tower}_attn_qkv_w {list(stored[f'{tower}_attn_qkv_w'].shape)}: expected q | k | v with q as wide as the "
            f"input of {tower}_attn_o_w {list(stored[f'{tower}_attn_o_w'].shape)}"
        )
    return q, (columns - q) // 2


def convert(stored: Mapping[str, LazyTensor], *, num_kv_heads: int = 1, head_dim: int | None = None) -> Converted:
    """Canonical tensors of a realtime-vla dictionary. Values are read and rearranged when they are loaded.

    The format knows one key-value head; the caller may say otherwise.
    """
    family = VLAModelType.PI05 if "decoder_time_mlp_in_w" in stored else VLAModelType.PI0
    _check(stored, family)
    result = Converted(family)
    used: set[str] = set()

    def put(
        name: str,
        key: str,
        layer: int | None = None,
        columns: tuple[int, int] | None = None,
        then: Callable[[torch.Tensor], torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """One canonical tensor: a layer of a stack, a range of its columns, transposed to [out, in]."""
        source = stored[key]
        used.add(key)
        shape = source.shape if layer is None else source.shape[1:]
        if columns is not None:
            shape = (*shape[:-1], columns[1] - columns[0])
        transpose = len(shape) == 2 and name.endswith(".weight") and key.endswith("_w")

        def load() -> torch.Tensor:
            value = source.load()
            if layer is not None:
                value = value[layer]
            if columns is not None:
                value = value[..., columns[0] : columns[1]]
            if dtype is not None:
                value = value.to(dtype)
            if transpose:
                value = value.t()
            if then is not None:
                value = then(value)
            return value.contiguous()

        shape = (shape[1], shape[0]) if transpose else shape
        result.tensors[name] = LazyTensor(name, shape, dtype or source.dtype, load)

    def zeros(name: str, width: int, dtype: torch.dtype) -> None:
        result.tensors[name] = LazyTensor(name, (width,), dtype, lambda: torch.zeros(width, dtype=dtype))

    def pair(name: str, key: str, layer: int | None = None) -> None:
        put(name + ".weight", key + "_w", layer)
        put(name + ".bias", key + "_b", layer)

    result.facts["num_kv_heads"] = Fact(num_kv_heads, "realtime-vla's format")
    _vision(stored, result, put, pair)
    used.add(MARK)
    pair(PROJECTOR.removesuffix("."), "encoder_multi_modal_projector")
    for tower, prefix in (("encoder", ENCODER), ("decoder", DECODER)):
        q, k = _attention_split(stored, tower)
        dim = head_dim or k // num_kv_heads
        if dim % 2 or q % dim or k % dim:
            raise CheckpointError(
                f"{tower}_attn_qkv_w: {q} columns of q and {k} of k do not divide into heads of head_dim {dim} (an "
                "even number); pass config_overrides={'head_dim': ..., 'num_kv_heads': ...}"
            )

        def rope(weight: torch.Tensor, dim: int = dim) -> torch.Tensor:
            return uninterleave(weight, dim)

        qkv = stored[f"{tower}_attn_qkv_w"]
        for i in range(qkv.shape[0]):
            layer = f"{prefix}layers.{i}."
            put(layer + "self_attn.q_proj.weight", f"{tower}_attn_qkv_w", i, (0, q), rope)
            put(layer + "self_attn.k_proj.weight", f"{tower}_attn_qkv_w", i, (q, q + k), rope)
            put(layer + "self_attn.v_proj.weight", f"{tower}_attn_qkv_w", i, (q + k, q + 2 * k))
            put(layer + "self_attn.o_proj.weight", f"{tower}_attn_o_w", i)
            for part in ("gate", "up", "down"):
                put(layer + f"mlp.{part}_proj.weight", f"{tower}_ffn_{part}_w", i)
            for norm, key in (("input_layernorm", "attn"), ("post_attention_layernorm", "ffn")):
                if tower == "decoder" and family is VLAModelType.PI05:
                    pair(layer + norm + ".dense", f"decoder_pre_{key}_norm_mod", i)
                else:
                    zeros(layer + norm + ".weight", qkv.shape[1], qkv.dtype)
        if tower == "decoder" and family is VLAModelType.PI05:
            pair(DECODER + "norm.dense", "decoder_final_norm_mod")
        else:
            zeros(prefix + "norm.weight", qkv.shape[1], qkv.dtype)
    if family is VLAModelType.PI05:
        _pi05(stored, result, put, pair)
    else:
        _pi0(stored, result, put, pair)
    # Names that are none of this format's stay as they are: strict matching reports them.
    result.tensors |= {n: t for n, t in stored.items() if n not in used and n not in NOT_NEEDED}
    return result


def _vision(stored: Mapping[str, LazyTensor], result: Converted, put: Callable, pair: Callable) -> None:
    patch = stored[MARK]
    name = VISION + "embeddings.patch_embedding.weight"
    kh, kw, channels, width = patch.shape
    result.tensors[name] = LazyTensor(
        name, (width, channels, kh, kw), patch.dtype, lambda: patch.load().permute(3, 2, 0, 1).contiguous()
    )
    put(VISION + "embeddings.patch_embedding.bias", "vision_patch_embedding_b")
    put(VISION + "embeddings.position_embedding.weight", "vision_position_embedding")
    q, k = _attention_split(stored, "vision")
    parts = {"q": (0, q), "k": (q, q + k), "v": (q + k, q + 2 * k)}
    for i in range(stored["vision_attn_qkv_w"].shape[0]):
        layer = f"{VISION}encoder.layers.{i}."
        for part, columns in parts.items():
            put(layer + f"self_attn.{part}_proj.weight", "vision_attn_qkv_w", i, columns)
            put(layer + f"self_attn.{part}_proj.bias", "vision_attn_qkv_b", i, columns)
        pair(layer + "self_attn.out_proj", "vision_attn_o", i)
        pair(layer + "mlp.fc1", "vision_ffn_up", i)
        pair(layer + "mlp.fc2", "vision_ffn_down", i)
        pair(layer + "layer_norm1", "vision_pre_attn_norm", i)
        pair(layer + "layer_norm2", "vision_pre_ffn_norm", i)
    pair(VISION + "post_layernorm", "vision_final_norm")


def _pi05(stored: Mapping[str, LazyTensor], result: Converted, put: Callable, pair: Callable) -> None:
    put(EMBEDDING, "embedding_weight")
    pair("time_mlp_in", "decoder_time_mlp_in")
    pair("time_mlp_out", "decoder_time_mlp_out")
    pair("action_in_proj", "decoder_action_in_proj")
    pair("action_out_proj", "decoder_action_out_proj")
    times = stored["decoder_time_embeds"].shape
    inputs = stored["decoder_time_mlp_in_w"].shape[0]
    if times[1] != inputs:
        raise CheckpointError(f"decoder_time_embeds: expected [steps, {inputs}], found {list(times)}")
    result.facts["num_diffusion_steps"] = Fact(times[0], f"tensor decoder_time_embeds {list(times)}")


def _pi0(stored: Mapping[str, LazyTensor], result: Converted, put: Callable, pair: Callable) -> None:
    steps = stored["decoder_action_fused_time_biases"].shape[0]

    def unscale(value: torch.Tensor) -> torch.Tensor:
        return value * -float(steps)  # the file holds the head times -1/steps

    pair("state_proj", "decoder_state_in_proj")
    put("folded.action_in.weight", "decoder_action_fused_in_proj_w")
    put("folded.time_bias", "decoder_action_fused_time_biases")
    pair("action_time_mlp_out", "decoder_action_mlp")
    # float32, so that undoing a factor rounds no value a second time
    put("action_out_proj.weight", "decoder_action_fused_out_proj_w", None, None, unscale, torch.float32)
    put("action_out_proj.bias", "decoder_action_fused_out_proj_b", None, None, unscale, torch.float32)
    if "embedding_weight" in stored:
        put(EMBEDDING, "embedding_weight")
        return
    length, width = stored["language_embeds"].shape

    def unembed(value: torch.Tensor) -> torch.Tensor:
        return value / math.sqrt(width)  # stored as the model sees it: embedding times sqrt(width)

    put(EMBEDDING, "language_embeds", None, None, unembed, torch.float32)
    result.fixed_prompt = length
    result.fixed["max_token_len"] = Fact(length, f"tensor language_embeds {[length, width]}")
    result.notes.append(
        f"fixed prompt: the file holds the embeddings of one prompt of {length} tokens and no token embedding; "
        f"tokens are 0 .. {length - 1} in order, another prompt needs a file converted for it"
    )
