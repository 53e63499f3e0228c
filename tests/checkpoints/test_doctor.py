"""Strict matching, and the reasons the doctor gives."""

import pytest
import torch

from cortexflow.checkpoints import build_checkpoint, match, open_checkpoint
from cortexflow.checkpoints.doctor import group_names, ranges
from cortexflow.checkpoints.names import NEVER_READ, never_read
from cortexflow.checkpoints.torch_file import from_mapping
from cortexflow.errors import CheckpointError
from cortexflow.models.config import ModelConfig, VLAModelType

ENCODER = "paligemma_with_expert.paligemma.model.language_model."
DECODER = "paligemma_with_expert.gemma_expert.model."
FULL = ModelConfig()


def complaint(checkpoint, expected, **options) -> str:
    with pytest.raises(CheckpointError) as error:
        match(checkpoint, expected, **options)
    return str(error.value)


def test_ranges_and_groups():
    assert ranges([3, 0, 1, 2, 7, 9, 8, 20]) == "0-3,7-9,20"
    names = [f"a.layers.{i}.w" for i in range(3)] + ["b", "a.layers.5.v"]
    assert group_names(names) == ["a.layers.{0-2}.w (3)", "b", "a.layers.{5}.v"]


def test_everything_in_one_error(golden, data, expected_shapes):
    config = open_checkpoint(data / "pi05_tiny").config
    _, stored = golden("pi05_tiny")
    del stored["model.action_in_proj.bias"]
    stored["model.surprise"] = torch.zeros(3)
    stored["model.time_mlp_out.bias"] = torch.zeros(5)
    stored["model.action_out_proj.bias"] = torch.zeros(32, dtype=torch.int8)
    checkpoint = build_checkpoint(from_mapping(stored), config_overrides={"vision_num_heads": 4})
    text = complaint(checkpoint, expected_shapes(config))
    assert "4 do not fit this lerobot checkpoint of pi05" in text
    assert "missing (1):\n  action_in_proj.bias" in text
    assert "unknown (1):\n  surprise" in text
    assert "misshapen (1):\n  time_mlp_out.bias: expected [64], found [5]" in text
    assert "action_out_proj.bias: int8" in text and "quantised" in text


def test_optional_names(golden, data, expected_shapes):
    _, stored = golden("pi0_tiny")
    expected = expected_shapes(open_checkpoint(data / "pi0_tiny").config)
    norm = ENCODER + "norm.weight"
    del stored[norm], expected["state_proj.bias"]
    checkpoint = open_checkpoint(stored, config_overrides={"vision_num_heads": 4})
    text = complaint(checkpoint, expected)
    assert norm in text and "state_proj.bias" in text and "another model or version" in text
    tensors = match(checkpoint, expected, optional={norm, "state_proj.bias"})
    assert list(tensors) == [name for name in expected if name != norm]


def test_unmerged_lora(golden, data, expected_shapes):
    _, stored = golden("pi0_tiny")
    expected = expected_shapes(open_checkpoint(data / "pi0_tiny").config)
    for side, shape in (("A", (4, 128)), ("B", (16, 4))):
        for i in range(2):
            stored[f"{ENCODER}layers.{i}.self_attn.k_proj.lora_{side}.default.weight"] = torch.zeros(shape)
    checkpoint = open_checkpoint(stored, config_overrides={"vision_num_heads": 4})
    text = complaint(checkpoint, expected)
    assert "LoRA deltas are not merged (4 tensors" in text
    assert f"{ENCODER}layers.{{0-1}}.self_attn.k_proj.lora_A.default.weight (2)" in text


def test_peft_names_at_the_door(golden):
    _, stored = golden("pi0_tiny")
    peft = {"base_model.model." + n.replace("q_proj.", "q_proj.base_layer."): t for n, t in stored.items()}
    with pytest.raises(CheckpointError, match="LoRA deltas are not merged"):
        open_checkpoint(peft)
    base = {n.replace("k_proj.", "k_proj.base_layer."): t for n, t in stored.items()}
    with pytest.raises(CheckpointError, match=r"(?s)these tensors are missing: .*LoRA deltas are not merged"):
        open_checkpoint(base)


@pytest.mark.parametrize(("here", "there"), [("pi0", "pi05"), ("pi05", "pi0")])
def test_the_other_family(here, there, key_list, expected_shapes):
    checkpoint = open_checkpoint(key_list(f"lerobot_{here}"))
    text = complaint(checkpoint, expected_shapes(FULL.with_(model_type=VLAModelType(there))))
    assert f"another family: the checkpoint is {here}, the graph is {there}" in text
    assert f"{DECODER}layers.{{0-17}}.input_layernorm" in text
    assert len(text.splitlines()) < 40


def test_pi0_renamed_to_pi05_as_lerobot_does(key_list, expected_shapes):
    stored = key_list("lerobot_pi0")
    del stored["model.state_proj.weight"], stored["model.state_proj.bias"]
    renamed = {name.replace("action_time_mlp", "time_mlp"): tensor for name, tensor in stored.items()}
    with pytest.raises(CheckpointError, match=r"projections of pi05 and the action expert's norms of pi0.*LeRobot"):
        open_checkpoint(renamed)
    pi05 = key_list("lerobot_pi05")
    pi05["model.time_mlp_in.weight"] = torch.empty(1024, 2048, device="meta")
    text = complaint(open_checkpoint(pi05), expected_shapes(FULL))
    assert "it is π0's action_time_mlp_in" in text


def test_another_configuration(key_list, expected_shapes):
    checkpoint = open_checkpoint(key_list("openpi_pi05"))
    text = complaint(checkpoint, expected_shapes(FULL.with_(action_dim=14, vision_mlp_dim=4096)))
    assert "action_dim is 32 in the checkpoint and 14 in the graph" in text
    assert "vision_mlp_dim is 4304 in the checkpoint and 4096 in the graph" in text


def test_whole_layers_missing(golden, data, expected_shapes):
    """A checkpoint cut after some layers, with a configuration that knows better and with none."""
    expected = expected_shapes(open_checkpoint(data / "pi05_tiny2").config)
    config, stored = golden("pi05_tiny2")
    cut = {n: t for n, t in stored.items() if ".layers.2." not in n or "vision" in n}
    with pytest.raises(CheckpointError, match=r"num_encoder_layers: .* says 3, .* says 2 \(layers are missing"):
        build_checkpoint(from_mapping(cut), config)
    checkpoint = open_checkpoint(cut, config_overrides={"vision_num_heads": 3})
    text = complaint(checkpoint, expected)
    assert f"whole layers are absent ({ENCODER}layers 2; {DECODER}layers 2)" in text
    assert "truncated or a shard is missing" in text
    uneven = {n: t for n, t in stored.items() if not n.startswith(DECODER + "layers.2.")}
    with pytest.raises(CheckpointError, match="num_encoder_layers: 3, num_decoder_layers: 2"):
        open_checkpoint(uneven, config_overrides={"vision_num_heads": 3})


def test_full_size_depth_is_known(key_list):
    """Widths of a model everybody uses tell its depth: fewer layers are a loss, not a smaller model."""
    stored = {n: t for n, t in key_list("openpi_pi05").items() if ".layers.26." not in n}
    with pytest.raises(CheckpointError, match=r"vision_num_layers: SigLIP So400m.* says 27, .* says 26"):
        open_checkpoint(stored)
    assert open_checkpoint(stored, config_overrides={"vision_num_layers": 26}).config.vision_num_layers == 26


def test_missing_ends_name_the_tensors(key_list):
    stored = {n: t for n, t in key_list("openpi_pi05").items() if "multi_modal" not in n and "position_emb" not in n}
    with pytest.raises(CheckpointError, match=r"these tensors are missing: .*position_embedding\.weight"):
        open_checkpoint(stored)


def test_quantised(key_list, expected_shapes):
    stored = key_list("openpi_pi05")
    for name, tensor in stored.items():
        if "mlp.up_proj" in name:
            stored[name] = tensor.to(torch.float8_e4m3fn)
    text = complaint(open_checkpoint(stored), expected_shapes(FULL))
    assert "the weights are quantised" in text and "mlp.up_proj.weight (18): float8_e4m3fn" in text


def test_folded_against_unfolded(key_list, expected_shapes):
    checkpoint = open_checkpoint(key_list("realtime_vla_pi0"))
    text = complaint(checkpoint, expected_shapes(checkpoint.config.with_(folded_time_steps=None)))
    assert "flow times folded in" in text and "folded_time_steps" in text


def test_long_lists_are_cut(data):
    text = complaint(open_checkpoint(data / "pi05_tiny"), {f"thing_{i}": (1,) for i in range(40)})
    assert "missing (40)" in text and "... and 28 more such lines" in text


def test_not_a_policy():
    with pytest.raises(CheckpointError, match=r"expected a checkpoint of π0 or π0\.5 .* found 1 tensors such as a\.b"):
        open_checkpoint({"a.b": torch.zeros(1)})


def test_never_read_names(data, golden):
    assert all(reason for _, reason in NEVER_READ)
    assert never_read("paligemma_with_expert.paligemma.lm_head.weight")
    assert never_read("normalize_inputs.buffer_observation_state.mean")
    assert never_read("action_in_proj.weight") is None
    _, stored = golden("pi0_tiny")
    stored["normalize_inputs.buffer_observation_state.mean"] = torch.zeros(3)
    checkpoint = open_checkpoint(stored, config_overrides={"vision_num_heads": 4})
    assert "statistics" in checkpoint.skipped["normalize_inputs.buffer_observation_state.mean"]
