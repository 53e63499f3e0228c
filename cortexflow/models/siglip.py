"""The SigLIP vision transformer, by the names of its Hugging Face checkpoints.

Source: big_vision / openpi `src/openpi/models/siglip.py`; transformers `SiglipVisionModel`. Pre-norm
blocks, tanh GELU, LayerNorm, learned positions, no class token, no pooling.
"""

from __future__ import annotations

from cortexflow.ir import Value, named, scope
from cortexflow.ir.ops import act, add, attention, cast, conv2d, layer_norm, reshape, transpose
from cortexflow.models.config import ModelConfig
from cortexflow.models.params import Params


def vision_transformer(images: Value, c: ModelConfig, p: Params) -> Value:
    """Images f32 [n, h, w, 3] in [-1, 1] → features [n, patches, width] in the precision of `p`."""
    x = named(_patches(images, c, p.at("embeddings").to("f32")), "vision_embed")
    x = cast(x, dtype=p.dtype)
    for i in range(c.vision_num_layers):
        with scope(f"layers.{i}"):
            x = named(_layer(x, c, p.at(f"encoder.layers.{i}")), f"vision_layer_{i}")
    with scope("post_layernorm"):
        return named(norm(x, c.vision_norm_eps, p.at("post_layernorm")), "siglip")


def norm(x: Value, eps: float, p: Params) -> Value:
    """LayerNorm with the tensors `weight` and `bias`."""
    width = x.type.shape[-1]
    return layer_norm(x, p.get("weight", width), p.get("bias", width), eps=eps)


def _patches(images: Value, c: ModelConfig, p: Params) -> Value:
    """Non-overlapping patches, row by row, plus their positions; float32, as every reference does."""
    n, size, width = images.type.shape[0], c.patch_size, c.vision_encoder_dim
    with scope("patch_embed"):
        kernel = p.get("patch_embedding.weight", width, 3, size, size)
        bias = p.get("patch_embedding.bias", width)
        grid = conv2d(transpose(images, perm=(0, 3, 1, 2)), kernel, bias, stride=(size, size))
        x = transpose(reshape(grid, shape=(n, width, c.num_patches)), perm=(0, 2, 1))
        return add(x, p.get("position_embedding.weight", c.num_patches, width))


def _layer(x: Value, c: ModelConfig, p: Params) -> Value:
    n, m, width = x.type.shape
    heads = (n, m, c.vision_num_heads, width // c.vision_num_heads)
    with scope("attn"):
        y = norm(x, c.vision_norm_eps, p.at("layer_norm1"))
        q, k, v = (reshape(p.at(f"self_attn.{t}_proj").linear(y, width, bias=True), shape=heads) for t in "qkv")
        y = reshape(attention(q, k, v, scale=heads[3] ** -0.5), shape=(n, m, width))
        x = add(x, p.at("self_attn.out_proj").linear(y, width, bias=True))
    with scope("mlp"):
        y = norm(x, c.vision_norm_eps, p.at("layer_norm2"))
        y = act(p.at("mlp.fc1").linear(y, c.vision_mlp_dim, bias=True), kind="gelu_tanh")
        return add(x, p.at("mlp.fc2").linear(y, width, bias=True))
