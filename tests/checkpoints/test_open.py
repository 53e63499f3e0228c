"""Opening checkpoints: golden cases, full-size key lists, what config.json and the caller say."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cortexflow.checkpoints import build_checkpoint, match, open_checkpoint, save_lerobot
from cortexflow.checkpoints.torch_file import from_mapping
from cortexflow.errors import CheckpointError, ConfigError
from cortexflow.models.config import ModelConfig, VLAModelType

CASES = ["pi05_tiny", "pi05_tiny2", "pi0_tiny", "pi0_tiny2"]
EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
FULL = ModelConfig()


def golden_config(c: dict) -> ModelConfig:
    v, e, d = c["vision"], c["vlm"], c["expert"]
    return ModelConfig(
        model_type=VLAModelType(c["model"]),
        vision_encoder_dim=v["width"],
        encoder_dim=e["width"],
        decoder_dim=d["width"],
        num_encoder_layers=e["depth"],
        num_decoder_layers=d["depth"],
        num_heads=e["num_heads"],
        head_dim=e["head_dim"],
        action_dim=c["action_dim"],
        chunk_size=c["action_horizon"],
        num_diffusion_steps=c["num_steps"],
        num_kv_heads=e["num_kv_heads"],
        vision_num_layers=v["depth"],
        vision_num_heads=v["num_heads"],
        vision_mlp_dim=v["mlp_dim"],
        encoder_mlp_dim=e["mlp_dim"],
        decoder_mlp_dim=d["mlp_dim"],
        patch_size=v["patch_size"],
        image_size=v["image_size"],
        vocab_size=c["vocab_size"],
        state_dim=c["state_dim"],
        max_token_len=c["max_token_len"],
        num_views=c["num_views"],
    )


@pytest.mark.parametrize("case", CASES)
def test_golden_cases(case, data, golden, expected_shapes):
    config, stored = golden(case)
    checkpoint = open_checkpoint(data / case)
    assert checkpoint.config == golden_config(config)
    assert checkpoint.family is VLAModelType(config["model"])
    assert checkpoint.format == ("openpi" if config["weight_layout"] == "openpi" else "lerobot")
    tensors = match(checkpoint, expected_shapes(checkpoint.config))
    assert set(tensors) == set(checkpoint.tensors)
    prefix = "" if config["weight_layout"] == "openpi" else "model."
    for name, tensor in tensors.items():
        source = prefix + name if prefix + name in stored else prefix + HEAD
        assert torch.equal(checkpoint.load_checked(name), stored[source])
        assert tensor.dtype == torch.float32
    assert {name.removeprefix("model.") for name in checkpoint.skipped} == {
        HEAD,
        "paligemma_with_expert.gemma_expert.lm_head.weight",
    }


@pytest.mark.parametrize("family", ["pi0", "pi05"])
@pytest.mark.parametrize("name", ["lerobot", "openpi"])
def test_full_size_from_shapes_alone(name, family, key_list, expected_shapes):
    checkpoint = open_checkpoint(key_list(f"{name}_{family}"))
    pi05 = family == "pi05"
    assert checkpoint.config == FULL.with_(model_type=VLAModelType(family), max_token_len=200 if pi05 else 48)
    assert (checkpoint.format, checkpoint.path) == (name, None)
    match(checkpoint, expected_shapes(checkpoint.config))
    sizes = checkpoint.sizes()
    assert sizes["total"].params == (3353433872 if pi05 else 3238048528)
    assert sizes["embedding"].params == 257152 * 2048
    assert sum(size.nbytes for group, size in sizes.items() if group != "total") == sizes["total"].nbytes


def test_lerobot_config(key_list):
    features = {
        "observation.images.base_0_rgb": {"type": "VISUAL", "shape": [3, 224, 224]},
        "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 224, 224]},
        "observation.state": {"type": "STATE", "shape": [8]},
    }
    config = {
        "type": "pi05",
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "chunk_size": 50,
        "n_action_steps": 10,
        "max_action_dim": 32,
        "max_state_dim": 32,
        "num_inference_steps": 5,
        "tokenizer_max_length": 180,
        "image_resolution": [224, 224],
        "min_period": 4e-3,
        "max_period": 4.0,
        "input_features": features,
        "empty_cameras": 2,  # one of them is listed among the features already
    }
    stored = from_mapping(key_list("lerobot_pi05"))
    found = build_checkpoint(stored, config).config
    assert found == FULL.with_(chunk_size=50, num_diffusion_steps=5, max_token_len=180, num_views=3)
    overridden = build_checkpoint(stored, config, config_overrides={"num_views": 2, "chunk_size": 10}).config
    assert (overridden.num_views, overridden.chunk_size) == (2, 10)


def test_openpi_config_with_lora_variant_names(key_list):
    config = {
        "action_dim": 32,
        "action_horizon": 15,
        "paligemma_variant": "gemma_2b_lora",
        "action_expert_variant": "gemma_300m_lora",
        "precision": "bfloat16",
    }
    checkpoint = build_checkpoint(from_mapping(key_list("openpi_pi0")), config)
    assert checkpoint.family is VLAModelType.PI0
    assert checkpoint.config.chunk_size == 15


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"action_dim": 16},
            ["action_dim: config.json 'action_dim' says 16", "action_out_proj.weight [32, 1024] says 32"],
        ),
        ({"paligemma_variant": "gemma_300m"}, ["encoder_dim", "1024", "2048"]),
        ({"action_expert_variant": "gemma_7b"}, ["gemma_7b", "gemma_300m"]),
        ({"action_horizon": "15"}, ["action_horizon", "positive integer", "'15'"]),
        ({"pi05": False}, ["says pi0", "those of pi05"]),
        ({"cortexflow": {"head_dim": 128}}, ["num_heads", "says 8", "gives 16"]),
        ({"cortexflow": {"heads": 8}}, ["no field 'heads'"]),
    ],
)
def test_contradictions_name_both(change, named, key_list):
    config = {"action_dim": 32, "action_horizon": 15, "paligemma_variant": "gemma_2b"} | change
    with pytest.raises(CheckpointError) as error:
        build_checkpoint(from_mapping(key_list("openpi_pi05")), config)
    for text in named:
        assert text in str(error.value)


def test_overrides(data):
    path = data / "pi05_tiny2"
    config = open_checkpoint(path, config_overrides={"chunk_size": 3, "num_views": 1, "rope_theta": 1000.0}).config
    assert (config.chunk_size, config.num_views, config.rope_theta) == (3, 1, 1000.0)
    assert open_checkpoint(path, config_overrides={"model_type": "pi05"}).family is VLAModelType.PI05
    with pytest.raises(ConfigError, match="no field 'horizon'"):
        open_checkpoint(path, config_overrides={"horizon": 3})
    with pytest.raises(CheckpointError, match="config_overrides 'action_dim' says 32, tensor action_out_proj"):
        open_checkpoint(path, config_overrides={"action_dim": 32})
    with pytest.raises(CheckpointError, match="the tensors are those of pi05"):
        open_checkpoint(path, config_overrides={"model_type": "pi0"})


def test_heads(golden):
    _, stored = golden("pi05_tiny2")  # 4 heads of 32, one key-value head; image tower of 72 with 3 heads
    with pytest.raises(CheckpointError, match=r"vision_num_heads: not told .*config_overrides"):
        open_checkpoint(stored)
    checkpoint = open_checkpoint(stored, config_overrides={"vision_num_heads": 3})
    assert (checkpoint.config.num_heads, checkpoint.config.num_kv_heads, checkpoint.config.head_dim) == (4, 1, 32)
    assert any("head_dim 32: inferred" in note for note in checkpoint.notes)
    for said, heads in [
        ({"num_heads": 8}, (8, 2, 16)),
        ({"num_kv_heads": 4}, (16, 4, 8)),
        ({"head_dim": 16}, (8, 2, 16)),
        ({"num_heads": 8, "num_kv_heads": 2, "head_dim": 16}, (8, 2, 16)),
    ]:
        config = open_checkpoint(stored, config_overrides={"vision_num_heads": 3} | said).config
        assert (config.num_heads, config.num_kv_heads, config.head_dim) == heads
    for said in ({"num_heads": 3}, {"num_heads": 8, "num_kv_heads": 1}, {"head_dim": 24}):
        with pytest.raises(CheckpointError, match=r"q_proj|k_proj"):
            open_checkpoint(stored, config_overrides={"vision_num_heads": 3} | said)


def test_embedding_wins_over_head(golden):
    _, stored = golden("pi05_tiny")
    stored["model." + HEAD] = torch.zeros(512, 128)
    checkpoint = open_checkpoint(stored, config_overrides={"vision_num_heads": 4})
    assert checkpoint.load_checked(EMBEDDING).abs().sum() > 0


def test_single_file_reads_the_config_beside_it(data):
    assert open_checkpoint(str(data / "pi0_tiny" / "model.safetensors")).config.num_views == 3


def test_wrapper_prefixes_and_name_clashes(golden):
    _, stored = golden("pi0_tiny")
    wrapped = {"module._orig_mod." + name: tensor for name, tensor in stored.items()}
    assert open_checkpoint(wrapped, config_overrides={"vision_num_heads": 4}).family is VLAModelType.PI0
    stored["model.action_in_proj.bias"] = stored["action_in_proj.bias"]
    with pytest.raises(CheckpointError, match=r"are both action_in_proj\.bias"):
        open_checkpoint(stored)


@pytest.mark.parametrize("case", CASES)
def test_save_lerobot_round_trip(case, data, tmp_path):
    original = open_checkpoint(data / case)
    directory = save_lerobot(tmp_path / "saved", original.tensors, original.config)
    assert all(name.startswith("model.") for name in load_file(directory / "model.safetensors"))
    config = json.loads((directory / "config.json").read_text())
    assert config["type"] == case.split("_")[0]
    assert config["cortexflow"]["head_dim"] == original.config.head_dim
    saved = open_checkpoint(directory)
    assert (saved.config, saved.format) == (original.config, "lerobot")
    assert set(saved.tensors) == set(original.tensors)
    for name in original.tensors:
        assert torch.equal(saved.load_checked(name), original.load_checked(name))


def test_save_lerobot_options(data, tmp_path):
    original = open_checkpoint(data / "pi05_tiny2")
    tensors = {name: tensor.load() for name, tensor in original.tensors.items()}
    tensors["action_in_proj.bias"] = tensors["action_out_proj.weight"][0]  # a view: shared memory is no obstacle
    save_lerobot(tmp_path, tensors, original.config, cameras=["front", "wrist"], extra={"dtype": "float32"})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "float32" and "paligemma_variant" not in config
    assert "observation.images.wrist" in config["input_features"]
    with pytest.raises(CheckpointError, match="expected 2 camera names"):
        save_lerobot(tmp_path, tensors, original.config, cameras=["front"])
    with pytest.raises(CheckpointError, match="expected canonical names"):
        save_lerobot(tmp_path, {"model.x": torch.zeros(1)}, original.config)
    with pytest.raises(CheckpointError, match="folded for 10"):
        save_lerobot(tmp_path, {}, ModelConfig(model_type=VLAModelType.PI0, folded_time_steps=10))


def test_full_size_save_names_the_variants():
    from cortexflow.checkpoints.lerobot import lerobot_config

    config = lerobot_config(FULL)
    assert (config["paligemma_variant"], config["action_expert_variant"]) == ("gemma_2b", "gemma_300m")


def test_nonfinite_weights(data, tmp_path):
    shutil.copytree(data / "pi0_tiny", tmp_path / "bad")
    stored = load_file(tmp_path / "bad" / "model.safetensors")
    stored["state_proj.weight"][3, 4] = float("nan")
    stored["state_proj.weight"][5, :2] = float("-inf")
    stored["action_in_proj.weight"] = stored["action_in_proj.weight"].to(torch.bfloat16)
    stored["action_in_proj.weight"][0, 0] = float("inf")
    save_file(stored, tmp_path / "bad" / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "bad")
    with pytest.raises(CheckpointError, match=r"state_proj.weight: .* 1 NaN and 2 infinite among 2048"):
        checkpoint.load_checked("state_proj.weight")
    with pytest.raises(CheckpointError, match="0 NaN and 1 infinite"):
        checkpoint.load_checked("action_in_proj.weight")
    checkpoint.load_checked("state_proj.bias")
    with pytest.raises(CheckpointError, match="none of this name"):
        checkpoint.load_checked("state_proj.wieght")


def test_file_replaced_after_opening(data, tmp_path):
    shutil.copytree(data / "pi0_tiny", tmp_path / "c")
    checkpoint = open_checkpoint(tmp_path / "c")
    stored = load_file(data / "pi0_tiny" / "model.safetensors")
    stored["state_proj.weight"] = torch.zeros(2, 2)
    (tmp_path / "c" / "model.safetensors").unlink()
    save_file(stored, tmp_path / "c" / "model.safetensors")
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        checkpoint.load_checked("state_proj.weight")
