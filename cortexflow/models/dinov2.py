"""The DINOv2 image tower with registers, by timm's names: `vit_large_patch14_reg4_dinov2`.

Source: timm `vision_transformer.py`. Positions are added to the patches alone; a class token and the
registers stand before them. LayerScale on both branches, erf GELU. OpenVLA takes the residual stream
before the last block, without a final norm and without the tokens in front.
"""

from __future__ import annotations

from cortexflow.ir import Value, scope
from cortexflow.ir.ops import add, broadcast_to, cast, concat, slice_
from cortexflow.models.config import ModelConfig
from cortexflow.models.params import Params
from cortexflow.models.vit import TIMM_LAYER_SCALE, ImageTower, blocks, patches


def features(pixels: Value, c: ModelConfig, p: Params) -> Value:
    """Pixels f32 [n, 3, h, w], normalised → features of the patches [n, patches, width]."""
    sizes = (c.dino_dim, c.dino_num_heads, c.dino_mlp_dim, c.patch_size, c.num_patches)
    t, f32, front = ImageTower(*sizes, c.vision_norm_eps, "gelu", TIMM_LAYER_SCALE), p.to("f32"), 1 + c.dino_registers
    with scope("patch_embed"):
        x = add(patches(pixels, t, f32.at("patch_embed.proj")), f32.get("pos_embed", 1, t.num_patches, t.width))
        tokens = [f32.get("cls_token", 1, 1, t.width), f32.get("reg_token", 1, c.dino_registers, t.width)]
        first = broadcast_to(concat(*tokens, axis=1), shape=(pixels.type.shape[0], front, t.width))
        x = cast(concat(first, x, axis=1), dtype=p.dtype)
    x = blocks(x, t, p.at("blocks"), c.dino_num_layers - 1, "dino_layer")
    return slice_(x, axis=1, start=front)
