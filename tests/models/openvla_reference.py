"""OpenVLA in plain torch, written from the published code and apart from the graph: no cache, no padding, batch 1.

Every token is found by running the whole sequence again. `random_tensors` makes checkpoints of any dimensions.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cortexflow.models import ModelConfig
from tests.models.openvla_cases import write_checkpoint

Weights = dict[str, Tensor]


def reference(w: Weights, c: ModelConfig, pixels: Tensor, tokens: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the model makes of pixels [1, 6, h, w] and token ids [1, n]: features, states, logits, ids, actions."""
    w = {k: v.to(dtype) for k, v in w.items()}
    pixels = pixels.to(dtype)
    found: dict[str, Tensor] = {}
    dino, siglip = "vision_backbone.featurizer.", "vision_backbone.fused_featurizer."
    front = torch.cat([w[dino + "cls_token"], w[dino + "reg_token"]], 1)
    found["patches_dino"] = _tower(
        w, dino, pixels[:, :3], front, c.dino_num_layers, c.dino_num_heads, c.patch_size, c.vision_norm_eps
    )
    found["patches_siglip"] = _tower(
        w, siglip, pixels[:, 3:], None, c.vision_num_layers, c.vision_num_heads, c.patch_size, c.vision_norm_eps
    )
    x = found["patch_features"] = torch.cat([found["patches_dino"], found["patches_siglip"]], -1)
    x = F.gelu(_linear(w, "projector.fc1", x))
    x = F.gelu(_linear(w, "projector.fc2", x))
    found["projected"] = _linear(w, "projector.fc3", x)
    ids: list[int] = []
    logits: list[Tensor] = []
    for _ in range(c.chunk_size * c.action_dim):
        given = torch.cat([tokens, torch.tensor([ids], dtype=tokens.dtype)], 1) if ids else tokens
        states, last = _language(w, c, found["projected"], given)
        if not ids:
            found["prefill_hidden"] = states
        logits.append(last)
        ids.append(int(last.argmax()))
        if ids[-1] == c.eos_token_id:
            break
    found["logits"] = torch.stack(logits)
    ids += [c.pad_token_id] * (c.chunk_size * c.action_dim - len(ids))
    found["token_ids"] = torch.tensor([ids])
    edges = torch.from_numpy(np.linspace(-1, 1, c.num_action_bins))
    words = c.vocab_size - c.vocab_padding
    centres = (edges[:-1] + edges[1:]) / 2
    bins = [min(max(words - i - 1, 0), c.num_action_bins - 2) for i in ids]
    found["actions"] = centres[bins].reshape(1, c.chunk_size, c.action_dim)
    return found


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _tower(
    w: Weights, name: str, pixels: Tensor, front: Tensor | None, depth: int, heads: int, patch: int, eps: float
) -> Tensor:
    x = F.conv2d(pixels, w[name + "patch_embed.proj.weight"], w[name + "patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2) + w[name + "pos_embed"]
    first = 0 if front is None else front.shape[1]
    x = x if front is None else torch.cat([front, x], 1)
    width = x.shape[-1]
    for i in range(depth - 1):
        p = f"{name}blocks.{i}."
        y = F.layer_norm(x, (width,), w[p + "norm1.weight"], w[p + "norm1.bias"], eps)
        q, k, v = _linear(w, p + "attn.qkv", y).reshape(1, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        y = torch.softmax(q @ k.mT * (width // heads) ** -0.5, -1) @ v
        y = _linear(w, p + "attn.proj", y.transpose(1, 2).reshape(1, -1, width))
        x = x + y * w.get(p + "ls1.scale_factor", torch.ones(()))
        y = F.layer_norm(x, (width,), w[p + "norm2.weight"], w[p + "norm2.bias"], eps)
        y = _linear(w, p + "mlp.fc2", F.gelu(_linear(w, p + "mlp.fc1", y)))
        x = x + y * w.get(p + "ls2.scale_factor", torch.ones(()))
    return x[:, first:]


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotated(x: Tensor, theta: float) -> Tensor:
    """x [1, heads, s, d] at positions 0, 1, 2, ...; angles in float32."""
    d = x.shape[-1]
    frequency = 1 / theta ** (torch.arange(0, d, 2).float() / d)
    angle = torch.outer(torch.arange(x.shape[2]).float(), frequency).repeat(1, 2)
    turned = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
    return x * angle.cos().to(x.dtype) + turned * angle.sin().to(x.dtype)


def _language(w: Weights, c: ModelConfig, patches: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings and the residual stream behind each layer [layers + 1, s, h], and the last position's logits."""
    m = "language_model.model."
    words = w[m + "embed_tokens.weight"][tokens]
    x = torch.cat([words[:, :1], patches, words[:, 1:]], 1)
    s, states = x.shape[1], [x[0]]
    later = torch.ones(s, s, dtype=torch.bool).triu(1)
    for i in range(c.num_encoder_layers):
        p = f"{m}layers.{i}."
        y = _norm(x, w[p + "input_layernorm.weight"], c.norm_eps)
        q, k, v = (_linear(w, f"{p}self_attn.{n}_proj", y).reshape(1, s, -1, c.head_dim).transpose(1, 2) for n in "qkv")
        k, v = (t.repeat_interleave(c.num_heads // c.num_kv_heads, 1) for t in (k, v))
        scores = _rotated(q, c.rope_theta) @ _rotated(k, c.rope_theta).mT / math.sqrt(c.head_dim)
        y = torch.softmax(scores.masked_fill(later, -torch.inf), -1) @ v
        x = x + _linear(w, p + "self_attn.o_proj", y.transpose(1, 2).reshape(1, s, -1))
        y = _norm(x, w[p + "post_attention_layernorm.weight"], c.norm_eps)
        y = F.silu(_linear(w, p + "mlp.gate_proj", y)) * _linear(w, p + "mlp.up_proj", y)
        x = x + _linear(w, p + "mlp.down_proj", y)
        states.append(x[0])
    states[-1] = _norm(states[-1], w[m + "norm.weight"], c.norm_eps)
    return torch.stack(states), states[-1][-1] @ w["language_model.lm_head.weight"].T


# ---- checkpoints of any dimensions -----------------------------------------------------------------


def random_tensors(c: ModelConfig, seed: int) -> Weights:
    """Weights in bfloat16 for a configuration, those that inference never reads included."""
    random, w = torch.Generator().manual_seed(seed), Weights()

    def draw(name: str, *shape: int, scale: float, around: float = 0.0) -> None:
        w[name] = (around + scale * torch.randn(shape, generator=random)).bfloat16()

    def linear(name: str, out: int, fan: int, bias: bool = True, gain: float = 1.2) -> None:
        draw(f"{name}.weight", out, fan, scale=gain * fan**-0.5)
        if bias:
            draw(f"{name}.bias", out, scale=0.15)

    def norm(name: str, width: int, bias: bool = True) -> None:
        draw(f"{name}.weight", width, scale=0.2, around=1.0)
        if bias:
            draw(f"{name}.bias", width, scale=0.15)

    dino, siglip = "vision_backbone.featurizer.", "vision_backbone.fused_featurizer."
    for tower, width, mlp, depth in (
        (dino, c.dino_dim, c.dino_mlp_dim, c.dino_num_layers),
        (siglip, c.vision_encoder_dim, c.vision_mlp_dim, c.vision_num_layers),
    ):
        pixels = (3, c.patch_size, c.patch_size)
        draw(tower + "patch_embed.proj.weight", width, *pixels, scale=1.2 * math.prod(pixels) ** -0.5)
        draw(tower + "patch_embed.proj.bias", width, scale=0.15)
        draw(tower + "pos_embed", 1, c.num_patches, width, scale=0.7)
        for i in range(depth):
            p = f"{tower}blocks.{i}."
            norm(p + "norm1", width)
            linear(p + "attn.qkv", 3 * width, width, gain=2.0)
            linear(p + "attn.proj", width, width)
            norm(p + "norm2", width)
            linear(p + "mlp.fc1", mlp, width)
            linear(p + "mlp.fc2", width, mlp)
            for scale in ("ls1", "ls2") if tower == dino else ():
                draw(f"{p}{scale}.scale_factor", width, scale=0.25, around=0.6)
        norm(tower + "norm", width)
    draw(dino + "cls_token", 1, 1, c.dino_dim, scale=0.7)
    draw(dino + "reg_token", 1, c.dino_registers, c.dino_dim, scale=0.7)
    draw(siglip + "attn_pool.latent", 1, 1, c.vision_encoder_dim, scale=0.7)
    joined, width = c.dino_dim + c.vision_encoder_dim, c.encoder_dim
    linear("projector.fc1", 4 * joined, joined)
    linear("projector.fc2", width, 4 * joined)
    linear("projector.fc3", width, width)
    m = "language_model.model."
    draw(m + "embed_tokens.weight", c.vocab_size, width, scale=1.0)
    for i in range(c.num_encoder_layers):
        p = f"{m}layers.{i}."
        norm(p + "input_layernorm", width, bias=False)
        linear(p + "self_attn.q_proj", c.num_heads * c.head_dim, width, bias=False, gain=2.0)
        linear(p + "self_attn.k_proj", c.num_kv_heads * c.head_dim, width, bias=False, gain=2.0)
        linear(p + "self_attn.v_proj", c.num_kv_heads * c.head_dim, width, bias=False)
        linear(p + "self_attn.o_proj", width, c.num_heads * c.head_dim, bias=False)
        norm(p + "post_attention_layernorm", width, bias=False)
        linear(p + "mlp.gate_proj", c.encoder_mlp_dim, width, bias=False)
        linear(p + "mlp.up_proj", c.encoder_mlp_dim, width, bias=False)
        linear(p + "mlp.down_proj", width, c.encoder_mlp_dim, bias=False)
    norm(m + "norm", width, bias=False)
    linear("language_model.lm_head", c.vocab_size, width, bias=False, gain=2.5)
    return w


def write_random(folder: Path, c: ModelConfig, seed: int) -> Path:
    """A checkpoint directory of these dimensions, whose config.json says what shapes do not tell."""
    text = {"model_type": "llama", "hidden_size": c.encoder_dim, "intermediate_size": c.encoder_mlp_dim}
    text |= {"num_hidden_layers": c.num_encoder_layers, "num_attention_heads": c.num_heads}
    text |= {"num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim, "vocab_size": c.vocab_size}
    text |= {"rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "eos_token_id": c.eos_token_id}
    towers = [
        {
            "kind": "dinov2_reg4",
            "depth": c.dino_num_layers,
            "num_heads": c.dino_num_heads,
            "norm_eps": c.vision_norm_eps,
        },
        {"kind": "siglip", "depth": c.vision_num_layers, "num_heads": c.vision_num_heads},
    ]
    said = {"text_config": text, "vision_towers": towers, "pad_token_id": c.pad_token_id}
    said |= {
        "image_sizes": [c.image_size] * 2,
        "n_action_bins": c.num_action_bins,
        "pad_to_multiple_of": c.vocab_padding,
    }
    said["norm_stats"] = {"toy": {"action": {"q01": [0.0] * c.action_dim, "q99": [1.0] * c.action_dim}}}
    write_checkpoint(folder, random_tensors(c, seed), **json.loads(json.dumps(said)))
    return folder
