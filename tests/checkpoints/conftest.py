"""Golden checkpoints, full-size key lists, and the shapes that a graph of a configuration expects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cortexflow.models.config import ModelConfig, VLAModelType

DATA = Path(__file__).parents[1] / "data" / "pi"
PALIGEMMA = "paligemma_with_expert.paligemma.model."


@pytest.fixture
def data() -> Path:
    return DATA


@pytest.fixture
def golden() -> Callable[[str], tuple[dict, dict[str, torch.Tensor]]]:
    """config.json and stored tensors of a golden case."""

    def read(case: str) -> tuple[dict, dict[str, torch.Tensor]]:
        config = json.loads((DATA / case / "config.json").read_text())
        return config, load_file(DATA / case / "model.safetensors")

    return read


@pytest.fixture
def key_list() -> Callable[[str], dict[str, torch.Tensor]]:
    """A full-size checkpoint of meta tensors from its list of names and shapes."""

    def read(name: str) -> dict[str, torch.Tensor]:
        tensors = {}
        for line in (DATA / "keys" / f"{name}.tsv").read_text().splitlines():
            if not line.startswith("#"):
                pattern, shape, dtype, layers = line.split("\t")
                for i in range(int(layers or 1)):
                    tensors[pattern.replace("{}", str(i))] = torch.empty(
                        json.loads(shape), dtype=getattr(torch, dtype), device="meta"
                    )
        return tensors

    return read


@pytest.fixture
def expected_shapes() -> Callable[[ModelConfig], dict[str, tuple[int, ...]]]:
    """Canonical names and shapes of a configuration, written out by hand."""

    def build(c: ModelConfig) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}

        def linear(name: str, out: int, inp: int, bias: bool = True) -> None:
            shapes[name + ".weight"] = (out, inp)
            if bias:
                shapes[name + ".bias"] = (out,)

        vision, w = PALIGEMMA + "vision_tower.vision_model.", c.vision_encoder_dim
        shapes[vision + "embeddings.patch_embedding.weight"] = (w, 3, c.patch_size, c.patch_size)
        shapes[vision + "embeddings.patch_embedding.bias"] = (w,)
        shapes[vision + "embeddings.position_embedding.weight"] = (c.num_patches, w)
        for i in range(c.vision_num_layers):
            layer = f"{vision}encoder.layers.{i}."
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linear(layer + "self_attn." + part, w, w)
            linear(layer + "mlp.fc1", c.vision_mlp_dim, w)
            linear(layer + "mlp.fc2", w, c.vision_mlp_dim)
            for norm in ("layer_norm1", "layer_norm2"):
                shapes[layer + norm + ".weight"] = shapes[layer + norm + ".bias"] = (w,)
        shapes[vision + "post_layernorm.weight"] = shapes[vision + "post_layernorm.bias"] = (w,)
        linear(PALIGEMMA + "multi_modal_projector.linear", c.encoder_dim, w)
        shapes[PALIGEMMA + "language_model.embed_tokens.weight"] = (c.vocab_size, c.encoder_dim)
        pi05 = c.model_type is VLAModelType.PI05
        for prefix, width, mlp, depth, ada in (
            (PALIGEMMA + "language_model.", c.encoder_dim, c.encoder_mlp_dim, c.num_encoder_layers, False),
            ("paligemma_with_expert.gemma_expert.model.", c.decoder_dim, c.decoder_mlp_dim, c.num_decoder_layers, pi05),
        ):
            norms = [f"layers.{i}.{n}" for i in range(depth) for n in ("input_layernorm", "post_attention_layernorm")]
            for norm in [*norms, "norm"]:
                if ada:
                    linear(prefix + norm + ".dense", 3 * width, width)
                else:
                    shapes[prefix + norm + ".weight"] = (width,)
            for i in range(depth):
                layer = f"{prefix}layers.{i}."
                linear(layer + "self_attn.q_proj", c.num_heads * c.head_dim, width, bias=False)
                linear(layer + "self_attn.k_proj", c.num_kv_heads * c.head_dim, width, bias=False)
                linear(layer + "self_attn.v_proj", c.num_kv_heads * c.head_dim, width, bias=False)
                linear(layer + "self_attn.o_proj", width, c.num_heads * c.head_dim, bias=False)
                linear(layer + "mlp.gate_proj", mlp, width, bias=False)
                linear(layer + "mlp.up_proj", mlp, width, bias=False)
                linear(layer + "mlp.down_proj", width, mlp, bias=False)
        d = c.decoder_dim
        linear("action_out_proj", c.action_dim, d)
        if pi05:
            linear("action_in_proj", d, c.action_dim)
            linear("time_mlp_in", d, d)
            linear("time_mlp_out", d, d)
            return shapes
        linear("state_proj", d, c.state_dim)
        linear("action_time_mlp_out", d, d)
        if c.folded_time_steps:
            shapes["folded.action_in.weight"] = (d, c.action_dim)
            shapes["folded.time_bias"] = (c.folded_time_steps, d)
        else:
            linear("action_in_proj", d, c.action_dim)
            linear("action_time_mlp_in", d, 2 * d)
        return shapes

    return build
