"""realtime-vla's converted dictionaries: a forward conversion written here, and back by the package."""

import json
import math
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexflow.checkpoints import match, open_checkpoint
from cortexflow.checkpoints.realtime_vla import uninterleave
from cortexflow.errors import CheckpointError
from cortexflow.models.config import ModelConfig, VLAModelType

PALIGEMMA = "paligemma_with_expert.paligemma.model."
VISION = PALIGEMMA + "vision_tower.vision_model."
ENCODER = PALIGEMMA + "language_model."
DECODER = "paligemma_with_expert.gemma_expert.model."
EMBEDDING = ENCODER + "embed_tokens.weight"
CASES = ["pi05_tiny", "pi05_tiny2", "pi0_tiny", "pi0_tiny2"]
PROMPT = [2, 17, 300, 17, 108]
STEPS = 10


def interleave_columns(matrix: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[in, heads * head_dim]: new[2j] = old[j], new[2j+1] = old[j + head_dim/2] in every head."""
    result = torch.empty_like(matrix)
    half = head_dim // 2
    for head in range(matrix.shape[1] // head_dim):
        for j in range(half):
            result[:, head * head_dim + 2 * j] = matrix[:, head * head_dim + j]
            result[:, head * head_dim + 2 * j + 1] = matrix[:, head * head_dim + half + j]
    return result


def time_embedding(t: float, width: int) -> torch.Tensor:
    i = torch.arange(width // 2, dtype=torch.float64) / (width // 2 - 1)
    angle = t * 2 * math.pi / (4e-3 * 1000**i)
    return torch.cat([angle.sin(), angle.cos()]).float()


def to_realtime_vla(w: dict[str, torch.Tensor], c: dict) -> dict[str, torch.Tensor]:
    """The dictionary that realtime-vla's converter makes of a model, in float32."""
    out: dict[str, torch.Tensor] = {}
    pi05 = c["model"] == "pi05"

    def stack(key, depth, make):
        out[key] = torch.stack([make(i) for i in range(depth)])

    v, depth = VISION + "encoder.layers.", c["vision"]["depth"]
    out["vision_patch_embedding_w"] = w[VISION + "embeddings.patch_embedding.weight"].permute(2, 3, 1, 0)
    out["vision_patch_embedding_b"] = w[VISION + "embeddings.patch_embedding.bias"]
    out["vision_position_embedding"] = w[VISION + "embeddings.position_embedding.weight"]
    qkv = ("q_proj", "k_proj", "v_proj")
    stack("vision_attn_qkv_w", depth, lambda i: torch.cat([w[f"{v}{i}.self_attn.{p}.weight"].t() for p in qkv], dim=1))
    stack("vision_attn_qkv_b", depth, lambda i: torch.cat([w[f"{v}{i}.self_attn.{p}.bias"] for p in qkv]))
    for key, name in (("attn_o", "self_attn.out_proj"), ("ffn_up", "mlp.fc1"), ("ffn_down", "mlp.fc2")):
        stack(f"vision_{key}_w", depth, lambda i, name=name: w[f"{v}{i}.{name}.weight"].t())
        stack(f"vision_{key}_b", depth, lambda i, name=name: w[f"{v}{i}.{name}.bias"])
    for key, name in (("attn", "layer_norm1"), ("ffn", "layer_norm2")):
        stack(f"vision_pre_{key}_norm_w", depth, lambda i, name=name: w[f"{v}{i}.{name}.weight"])
        stack(f"vision_pre_{key}_norm_b", depth, lambda i, name=name: w[f"{v}{i}.{name}.bias"])
    out["vision_final_norm_w"] = w[VISION + "post_layernorm.weight"]
    out["vision_final_norm_b"] = w[VISION + "post_layernorm.bias"]
    out["encoder_multi_modal_projector_w"] = w[PALIGEMMA + "multi_modal_projector.linear.weight"].t()
    out["encoder_multi_modal_projector_b"] = w[PALIGEMMA + "multi_modal_projector.linear.bias"]

    for tower, prefix, section in (("encoder", ENCODER, "vlm"), ("decoder", DECODER, "expert")):
        depth, head_dim = c[section]["depth"], c[section]["head_dim"]
        folds = tower == "encoder" or not pi05

        def scale(i, norm, prefix=prefix, folds=folds):
            return (1 + w[f"{prefix}layers.{i}.{norm}.weight"])[:, None] if folds else 1.0

        def attention(i, prefix=prefix, head_dim=head_dim, scale=scale):
            q, k, value = (w[f"{prefix}layers.{i}.self_attn.{p}.weight"].t() * scale(i, "input_layernorm") for p in qkv)
            return torch.cat([interleave_columns(q, head_dim), interleave_columns(k, head_dim), value], dim=1)

        def mlp(i, part, prefix=prefix, scale=scale):
            return w[f"{prefix}layers.{i}.mlp.{part}_proj.weight"].t() * scale(i, "post_attention_layernorm")

        stack(f"{tower}_attn_qkv_w", depth, attention)
        stack(f"{tower}_attn_o_w", depth, lambda i, p=prefix: w[f"{p}layers.{i}.self_attn.o_proj.weight"].t())
        stack(f"{tower}_ffn_gate_w", depth, lambda i, mlp=mlp: mlp(i, "gate"))
        stack(f"{tower}_ffn_up_w", depth, lambda i, mlp=mlp: mlp(i, "up"))
        stack(f"{tower}_ffn_down_w", depth, lambda i, p=prefix: w[f"{p}layers.{i}.mlp.down_proj.weight"].t())

    width = c["expert"]["width"]
    times = torch.stack([time_embedding(1 - k / STEPS, width) for k in range(STEPS)])
    out["language_embeds"] = w[EMBEDDING][PROMPT] * math.sqrt(c["vlm"]["width"])
    if pi05:
        out["embedding_weight"] = w[EMBEDDING]
        out["decoder_time_embeds"] = times
        for name in ("time_mlp_in", "time_mlp_out", "action_in_proj", "action_out_proj"):
            out[f"decoder_{name}_w"] = w[name + ".weight"].t()
            out[f"decoder_{name}_b"] = w[name + ".bias"]
        for key, norm in (("attn", "input_layernorm"), ("ffn", "post_attention_layernorm")):
            dense = DECODER + "layers.{}." + norm + ".dense."
            stack(f"decoder_pre_{key}_norm_mod_w", depth, lambda i, dense=dense: w[dense.format(i) + "weight"].t())
            stack(f"decoder_pre_{key}_norm_mod_b", depth, lambda i, dense=dense: w[dense.format(i) + "bias"])
        out["decoder_final_norm_mod_w"] = w[DECODER + "norm.dense.weight"].t()
        out["decoder_final_norm_mod_b"] = w[DECODER + "norm.dense.bias"]
        return {name: tensor.contiguous() for name, tensor in out.items()}
    first = w["action_time_mlp_in.weight"].t()
    action_part, time_part = first[:width], first[width:]
    out["decoder_state_in_proj_w"], out["decoder_state_in_proj_b"] = w["state_proj.weight"].t(), w["state_proj.bias"]
    out["decoder_action_fused_in_proj_w"] = w["action_in_proj.weight"].t() @ action_part
    out["decoder_action_fused_time_biases"] = (
        w["action_in_proj.bias"] @ action_part + times @ time_part + w["action_time_mlp_in.bias"]
    )
    out["decoder_action_mlp_w"] = w["action_time_mlp_out.weight"].t()
    out["decoder_action_mlp_b"] = w["action_time_mlp_out.bias"]
    final = (1 + w[DECODER + "norm.weight"])[:, None]
    out["decoder_action_fused_out_proj_w"] = w["action_out_proj.weight"].t() * final * (-1 / STEPS)
    out["decoder_action_fused_out_proj_b"] = w["action_out_proj.bias"] * (-1 / STEPS)
    return {name: tensor.contiguous() for name, tensor in out.items()}


@pytest.fixture
def converted(data):
    def make(case):
        original = open_checkpoint(data / case)
        config = json.loads((data / case / "config.json").read_text())
        weights = {name: original.load_checked(name) for name in original.tensors}
        overrides = {"vision_num_heads": config["vision"]["num_heads"]}
        return original, weights, to_realtime_vla(weights, config), overrides

    return make


def norm_of(name: str) -> str | None:
    """The RMSNorm whose weight a converter folds into this matrix."""
    layer = re.split("self_attn|mlp", name, maxsplit=1)[0]
    if any(part in name for part in ("q_proj", "k_proj", "v_proj")) and VISION not in name:
        return layer + "input_layernorm.weight"
    if any(part in name for part in ("gate_proj", "up_proj")):
        return layer + "post_attention_layernorm.weight"
    if name == "action_out_proj.weight":
        return DECODER + "norm.weight"
    return None


@pytest.mark.parametrize("case", CASES)
def test_back_to_canonical(case, converted, expected_shapes):
    original, weights, stored, overrides = converted(case)
    checkpoint = open_checkpoint(stored, config_overrides=overrides)
    assert (checkpoint.format, checkpoint.family) == ("realtime-vla", original.family)
    tensors = match(checkpoint, expected_shapes(checkpoint.config))
    assert set(tensors) == set(checkpoint.tensors)
    for name in tensors:
        value = checkpoint.load_checked(name)
        assert tuple(value.shape) == checkpoint.tensors[name].shape and value.is_contiguous()
        if name.startswith("folded."):
            continue
        if name == EMBEDDING and original.family is VLAModelType.PI0:
            torch.testing.assert_close(value, weights[EMBEDDING][PROMPT])
        elif name.endswith("norm.weight") and not name.startswith(VISION):
            assert not value.any()  # folded: 1 + 0
        elif (norm := norm_of(name)) in weights:
            # The product with a normed row is what folding keeps: (x * (1 + w)) @ W.T
            x = torch.randn(5, value.shape[1], generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(x @ value.t(), (x * (1 + weights[norm])) @ weights[name].t())
        elif name == "action_out_proj.bias":
            torch.testing.assert_close(value, weights[name])  # times -1/steps and back
        else:
            assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("case", ["pi0_tiny", "pi0_tiny2"])
def test_folded_action_input(case, converted):
    """folded.action_in and folded.time_bias give the same hidden row as the two projections."""
    original, weights, stored, overrides = converted(case)
    checkpoint = open_checkpoint(stored, config_overrides=overrides)
    config = checkpoint.config
    assert (config.folded_time_steps, config.num_diffusion_steps) == (STEPS, STEPS)
    assert (config.vocab_size, config.max_token_len) == (len(PROMPT), len(PROMPT))
    assert any("fixed prompt" in note for note in checkpoint.notes)
    x = torch.randn(3, original.config.action_dim, generator=torch.Generator().manual_seed(1))
    for step in range(STEPS):
        action = x @ weights["action_in_proj.weight"].t() + weights["action_in_proj.bias"]
        time = time_embedding(1 - step / STEPS, config.decoder_dim).expand(3, -1)
        hidden = torch.cat([action, time], dim=1) @ weights["action_time_mlp_in.weight"].t()
        hidden += weights["action_time_mlp_in.bias"]
        w, b = checkpoint.load_checked("folded.action_in.weight"), checkpoint.load_checked("folded.time_bias")
        torch.testing.assert_close(x @ w.t() + b[step], hidden, rtol=1e-4, atol=1e-5)


def test_pi05_embedding_steps_and_bfloat16(converted):
    _, weights, stored, overrides = converted("pi05_tiny")
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in stored.items()}
    checkpoint = open_checkpoint(stored, config_overrides=overrides)
    assert checkpoint.config.num_diffusion_steps == STEPS
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.bfloat16}
    assert torch.equal(checkpoint.load_checked(EMBEDDING), weights[EMBEDDING].to(torch.bfloat16))
    five = open_checkpoint(stored, config_overrides=overrides | {"num_diffusion_steps": 5})
    assert five.config.num_diffusion_steps == 5


def test_pi0_factors_are_undone_in_float32(converted):
    _, _, stored, overrides = converted("pi0_tiny")
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in stored.items()}
    checkpoint = open_checkpoint(stored, config_overrides=overrides)
    head = checkpoint.load_checked("action_out_proj.weight")
    assert head.dtype == torch.float32
    assert torch.equal((head * (-1 / STEPS)).to(torch.bfloat16).t(), stored["decoder_action_fused_out_proj_w"])


def test_fixed_prompt_and_steps_cannot_be_overridden(converted):
    _, _, stored, overrides = converted("pi0_tiny")
    with pytest.raises(CheckpointError, match="folded in for 10 steps"):
        open_checkpoint(stored, config_overrides=overrides | {"num_diffusion_steps": 5})
    with pytest.raises(CheckpointError, match="max_token_len: config_overrides 'max_token_len' says 48"):
        open_checkpoint(stored, config_overrides=overrides | {"max_token_len": 48})


def test_several_key_value_heads(converted):
    _, _, stored, overrides = converted("pi05_tiny")
    config = open_checkpoint(stored, config_overrides=overrides | {"num_kv_heads": 2}).config
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (16, 2, 8)


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_full_size_from_shapes_alone(family, key_list, expected_shapes):
    checkpoint = open_checkpoint(key_list(f"realtime_vla_{family}"))
    changes = {} if family == "pi05" else {"vocab_size": 7, "max_token_len": 7, "folded_time_steps": 10}
    assert checkpoint.config == ModelConfig(model_type=VLAModelType(family)).with_(**changes)
    match(checkpoint, expected_shapes(checkpoint.config))
    loaded = checkpoint.tensors[DECODER + "layers.17.self_attn.q_proj.weight"].load()
    assert tuple(loaded.shape) == (2048, 1024)


@given(heads=st.integers(1, 4), half=st.integers(1, 6), width=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_uninterleave_inverts_the_interleave(heads, half, width):
    weight = torch.arange(heads * 2 * half * width, dtype=torch.float32).reshape(-1, width)
    stored = interleave_columns(weight.t().contiguous(), 2 * half)
    assert torch.equal(uninterleave(stored.t(), 2 * half), weight)


def test_files(converted, tmp_path):
    """A .pt file, and a pickle with and without consent, are the dictionary."""
    _, _, stored, overrides = converted("pi0_tiny2")
    torch.save(stored, tmp_path / "weights.pt")
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(stored))
    torch.save(stored, tmp_path / "zip.pkl")  # what the bytes are decides, not the suffix
    torch.save(stored, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    memory = open_checkpoint(stored, config_overrides=overrides)
    for name, consent in (("weights.pt", False), ("zip.pkl", False), ("legacy.pt", False), ("weights.pkl", True)):
        checkpoint = open_checkpoint(tmp_path / name, config_overrides=overrides, allow_pickle=consent)
        assert checkpoint.config == memory.config
        for tensor in checkpoint.tensors:
            assert torch.equal(checkpoint.load_checked(tensor), memory.load_checked(tensor))
    with pytest.raises(CheckpointError, match=r"unpickling runs whatever code.*allow_pickle=True.*weights\.pt"):
        open_checkpoint(tmp_path / "weights.pkl", config_overrides=overrides)


def test_bad_dictionaries(converted):
    _, _, stored, overrides = converted("pi0_tiny")
    without = {name: tensor for name, tensor in stored.items() if name != "decoder_attn_o_w"}
    with pytest.raises(CheckpointError, match=r"realtime-vla checkpoint of pi0, 1 of .*decoder_attn_o_w"):
        open_checkpoint(without, config_overrides=overrides)
    with pytest.raises(CheckpointError, match="stacks of one number of layers"):
        open_checkpoint(stored | {"vision_ffn_up_b": stored["vision_ffn_up_b"][:1]}, config_overrides=overrides)
    with pytest.raises(CheckpointError, match="expected 3 dimensions"):
        open_checkpoint(stored | {"encoder_attn_o_w": torch.zeros(4, 4)}, config_overrides=overrides)
    with pytest.raises(CheckpointError, match=r"q \| k \| v with q as wide"):
        open_checkpoint(stored | {"encoder_attn_qkv_w": torch.zeros(2, 128, 100)}, config_overrides=overrides)
    with pytest.raises(CheckpointError, match="do not divide into heads"):
        open_checkpoint(stored, config_overrides=overrides | {"head_dim": 24})
    with pytest.raises(CheckpointError, match="found str under 'note'"):
        open_checkpoint(stored | {"note": "made today"}, config_overrides=overrides)
    with pytest.raises(CheckpointError, match="found none"):
        open_checkpoint({})


def test_unknown_names_are_reported_by_match(converted, expected_shapes):
    _, _, stored, overrides = converted("pi05_tiny")
    checkpoint = open_checkpoint(stored | {"decoder_extra_w": torch.zeros(2, 2)}, config_overrides=overrides)
    with pytest.raises(CheckpointError, match=r"unknown \(1\):\n  decoder_extra_w"):
        match(checkpoint, expected_shapes(checkpoint.config))
