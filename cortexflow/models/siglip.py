"""The SigLIP image towers, by the names of their checkpoints: Hugging Face's (π) and timm's (OpenVLA).

Source: big_vision / openpi `src/openpi/models/siglip.py`; transformers `SiglipVisionModel`; timm
`vit_so400m_patch14_siglip_224`. Learned positions, no class token, no pooling here. timm's runs with
the erf GELU, and OpenVLA takes its features before the last block, without a final norm.
"""

from __future__ import annotations

from cortexflow.ir import Value, named, scope
from cortexflow.ir.ops import add, cast, transpose
from cortexflow.models.config import ModelConfig
from cortexflow.models.params import Params
from cortexflow.models.vit import HUGGING_FACE, TIMM, BlockNames, ImageTower, blocks, norm, patches


def vision_transformer(images: Value, c: ModelConfig, p: Params) -> Value:
    """Images f32 [n, h, w, 3] in [-1, 1] → features [n, patches, width] in the precision of `p`."""
    t = _tower(c, "gelu_tanh", HUGGING_FACE)
    x = transpose(images, perm=(0, 3, 1, 2))
    x = _embedded(x, t, p.to("f32"), "embeddings.patch_embedding", "embeddings.position_embedding.weight")
    x = cast(named(x, "vision_embed"), dtype=p.dtype)
    x = blocks(x, t, p.at("encoder.layers"), c.vision_num_layers, "vision_layer")
    with scope("post_layernorm"):
        return named(norm(x, t.eps, p.at("post_layernorm")), "siglip")


def features(pixels: Value, c: ModelConfig, p: Params) -> Value:
    """Pixels f32 [n, 3, h, w], normalised → the residual stream before the last block [n, patches, width]."""
    t = _tower(c, "gelu", TIMM)
    x = cast(_embedded(pixels, t, p.to("f32"), "patch_embed.proj", "pos_embed", 1), dtype=p.dtype)
    return blocks(x, t, p.at("blocks"), c.vision_num_layers - 1, "siglip_layer")


def _tower(c: ModelConfig, act: str, names: BlockNames) -> ImageTower:
    sizes = (c.vision_encoder_dim, c.vision_num_heads, c.vision_mlp_dim, c.patch_size, c.num_patches)
    return ImageTower(*sizes, c.vision_norm_eps, act, names)


def _embedded(images: Value, t: ImageTower, p: Params, kernel: str, positions: str, *lead: int) -> Value:
    """Patches plus their learned positions [*lead, patches, width]; float32, as every reference does."""
    with scope("patch_embed"):
        return add(patches(images, t, p.at(kernel)), p.get(positions, *lead, t.num_patches, t.width))
