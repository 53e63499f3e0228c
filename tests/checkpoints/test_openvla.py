"""OpenVLA's checkpoint directories: configuration, names, what is skipped, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cortexflow.checkpoints import build_checkpoint, match, open_checkpoint
from cortexflow.checkpoints.openvla import LAST_BLOCK, LAST_NORM, POOLING
from cortexflow.checkpoints.torch_file import from_mapping
from cortexflow.cli import main
from cortexflow.errors import CheckpointError, CortexFlowError
from cortexflow.models import ModelConfig, VLAModelType, create_model
from tests.models.openvla_cases import DATA, EMBEDDING, INDEX, TINY, weights, write_checkpoint
from tests.models.test_openvla import TINY_CONFIG, stored_keys
from tests.test_fuzz import changed_json, fuzzed

TEXT = json.loads((TINY / "config.json").read_text())["text_config"]
TOWERS = json.loads((TINY / "config.json").read_text())["vision_towers"]
RELEASED = ModelConfig.released(VLAModelType.OPENVLA)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def full_size() -> dict[str, torch.Tensor]:
    """The released checkpoint's tensors without values."""
    keys = stored_keys("yes") | stored_keys("no")
    return {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in keys.items()}


def test_a_directory(tiny: Path) -> None:
    opened = open_checkpoint(tiny)
    assert (opened.format, opened.family, opened.config) == ("openvla", VLAModelType.OPENVLA, TINY_CONFIG)
    assert not opened.notes
    assert len(opened.tensors) == 134 and len(opened.skipped) == 43
    reasons = sorted(opened.skipped.values())
    assert [reasons.count(r) for r in (LAST_BLOCK, LAST_NORM, POOLING)] == [26, 4, 13]
    matched = match(opened, create_model(opened.config).get_weight_shapes())
    assert all(torch.equal(t.load(), weights()[name]) for name, t in matched.items())


def test_the_released_checkpoint_needs_no_dimensions_said() -> None:
    """Heads and depths follow from the widths that everybody uses."""
    opened = open_checkpoint(full_size())
    assert opened.config == RELEASED
    assert set(opened.tensors) == set(stored_keys("yes")) and set(opened.skipped) == set(stored_keys("no"))
    assert opened.notes == ["action_dim: no statistics tell it; 7 is assumed"]
    sizes = {name: size.params for name, size in opened.sizes().items()}
    assert sizes["total"] == 7_541_237_184 - 43_080_480 and sizes["projector"] == 71_385_600
    assert sizes["embedding"] == sizes["action"] == 32064 * 4096


def test_the_released_config_says_the_same(tmp_path: Path) -> None:
    """As the conversion writes it: `text_config` holds four keys, LlamaConfig's defaults the rest."""
    config = json.loads((DATA / "config.full.json").read_text())
    opened = build_checkpoint(from_mapping(full_size()), config)
    assert opened.config == RELEASED and not opened.notes


def with_text(**changes: Any) -> dict[str, Any]:
    return {"text_config": TEXT | changes}


def with_tower(which: int, **changes: Any) -> dict[str, Any]:
    return {"vision_towers": [t | changes if i == which else t for i, t in enumerate(TOWERS)]}


STATS = {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}
# keys of config.json, the fields that differ then
SAID: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "norm and angles": (with_text(rms_norm_eps=1e-5, rope_theta=5e5), {"norm_eps": 1e-5, "rope_theta": 5e5}),
    "angles in a section": (
        with_text(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 2e4}),
        {"rope_theta": 2e4},
    ),
    "another end": (with_text(eos_token_id=5), {"eos_token_id": 5}),
    "heads of another width": (with_text(num_attention_heads=8, num_key_value_heads=8, head_dim=5), {
        "num_heads": 8, "num_kv_heads": 8, "head_dim": 5,
    }),
    "defaults of LlamaConfig": (
        {"text_config": {k: v for k, v in TEXT.items() if k not in ("rms_norm_eps", "rope_theta", "hidden_act")}}, {}
    ),
    "bins": ({"n_action_bins": 128}, {"num_action_bins": 128}),
    "longer actions": (
        {"norm_stats": {"a": {"action": {"q01": [0.0] * 14}}, "b": {"action": {"q01": [0.0] * 14}}}},
        {"action_dim": 14},
    ),
    "in our own words": (
        {"vision_towers": None, "cortexflow": {"dino_num_heads": 6, "vision_num_heads": 8, "action_dim": 3}},
        {"dino_num_heads": 6, "vision_num_heads": 8, "action_dim": 3},
    ),
    "lengths that differ, but it is said": (
        {"norm_stats": {"a": STATS, "b": {"action": {"q01": [0.0]}}}, "cortexflow": {"action_dim": 5}},
        {"action_dim": 5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_what_config_json_says_is_obeyed(tmp_path: Path, case: str) -> None:
    said, fields = SAID[case]
    assert open_checkpoint(write_checkpoint(tmp_path, **said)).config == TINY_CONFIG.with_(**fields)


def test_statistics_of_a_fine_tuned_model_tell_the_length_of_its_actions(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "dataset_statistics.json").write_text(json.dumps({"mine": {"action": {"q01": [0.0] * 14}}}))
    assert open_checkpoint(folder).config.action_dim == 14
    assert open_checkpoint(folder, config_overrides={"action_dim": 9}).config.action_dim == 9


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another projector": ({"arch_specifier": "no-align+gelu-mlp"}, r"'arch_specifier': expected 'no-align\+fused"),
    "one tower": ({"use_fused_vision_backbone": False}, "'use_fused_vision_backbone': expected True, found False"),
    "another activation": ({"timm_override_act_layers": [None, "quick_gelu"]}, "'timm_override_act_layers': expected"),
    "another unit": (with_text(hidden_act="gelu"), "'text_config' 'hidden_act': expected 'silu', found 'gelu'"),
    "biases": (with_text(attention_bias=True), "'attention_bias': expected False, found True; this variant is not"),
    "a tied head": (with_text(tie_word_embeddings=True), "'tie_word_embeddings': expected False"),
    "stretched angles": (with_text(rope_scaling={"type": "linear"}), "'rope_scaling': expected None"),
    "stretched angles, newer": (with_text(rope_parameters={"rope_type": "yarn"}), "'rope_type': expected 'default'"),
    "another language model": (with_text(model_type="mistral"), "'text_config' 'model_type': expected 'llama'"),
    "no section": ({"text_config": 3}, "'text_config': expected an object, found 3"),
    "another kind": ({"model_type": "prismatic"}, "'model_type': expected 'pi0', 'pi05', 'openvla', found 'prismatic'"),
    "π0's name": ({"model_type": "pi0"}, "says pi0, the tensors are those of openvla"),
    "towers in another order": ({"vision_towers": TOWERS[::-1]}, "expected dinov2 with 'act' gelu_erf"),
    "a tower with tanh GELU": (with_tower(1, act="gelu_tanh"), "expected siglip with 'act' gelu_erf"),
    "one tower described": ({"vision_towers": TOWERS[:1]}, "expected two objects, DINOv2's and SigLIP's"),
    "towers with two eps": (with_tower(1, norm_eps=1e-5), r"vision_norm_eps: .* says 1e-06, .* says 1e-05"),
    "no heads": ({"vision_towers": None}, "dino_num_heads: heads are in no tensor's shape"),
    "heads that do not divide": (with_tower(0, num_heads=5), "dino_dim=48 must be a multiple of dino_num_heads=5"),
    "another width": (with_text(hidden_size=48), r"encoder_dim: .*'hidden_size' says 48, tensor .* says 40"),
    "another depth": (with_tower(0, depth=24), r"dino_num_layers: .* says 24, .* says 4 \(layers are missing"),
    "pictures of two sizes": ({"image_sizes": [56, 224]}, "'image_sizes': expected one size for both towers"),
    "another size": ({"image_sizes": [224, 224]}, r"image_size: .* says 224, tensor .* says 56"),
    "statistics of two lengths": (
        {"norm_stats": {"a": STATS, "b": {"action": {"q01": [0.0]}}}},
        r"expected actions of one length, found \{'a': 7, 'b': 1\}; say which",
    ),
    "statistics of no length": ({"norm_stats": {"a": {"action": {"q01": 3}}}}, "'norm_stats' 'a': expected an object"),
    "a negative number": ({"n_action_bins": -1}, "'n_action_bins': expected a positive integer, found -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_graph_does_not_compute_is_refused(tmp_path: Path, case: str) -> None:
    said, message = REFUSED[case]
    with pytest.raises(CortexFlowError, match=message):
        open_checkpoint(write_checkpoint(tmp_path, **said))


LAYER = "language_model.model.layers"
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"vision_backbone.featurizer.blocks.3.extra": torch.ones(2)}, r"unknown \(1\):\n  vision_backbone.fea"),
    "an unknown norm": ({"vision_backbone.featurizer.norm_pre.weight": torch.ones(2)}, "norm_pre"),
    "missing": ({f"{LAYER}.1.mlp.up_proj.weight": None}, r"missing \(1\):\n  language_model.model.layers.\{1\}.mlp.up"),
    "missing in a tower": (
        {f"vision_backbone.fused_featurizer.blocks.{i}.attn.qkv.bias": None for i in (1, 2)},
        r"missing \(2\):\n  vision_backbone.fused_featurizer.blocks.\{1-2\}.attn.qkv.bias \(2\)",
    ),
    "misshapen": ({"projector.fc2.bias": torch.ones(3)}, r"projector.fc2.bias: expected \[40\], found \[3\]"),
    "LoRA": ({f"{LAYER}.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 40)}, "LoRA deltas are not merged"),
    "quantised": ({"projector.fc2.weight": torch.ones(40, 480, dtype=torch.int8)}, "the weights are quantised"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit_are_explained(tiny: Path, case: str) -> None:
    changes, message = MISFITS[case]
    tensors = {k: v for k, v in {**weights(), **changes}.items() if v is not None}
    opened = open_checkpoint(tensors, config_overrides={"dino_num_heads": 3, "vision_num_heads": 4, "num_heads": 4})
    with pytest.raises(CheckpointError, match=message):
        match(opened, create_model(opened.config).get_weight_shapes())


def test_a_directory_without_its_first_tensors_says_which() -> None:
    tensors = {k: v for k, v in weights().items() if k != EMBEDDING}
    with pytest.raises(CheckpointError, match=f"complete openvla checkpoint; .* missing: {EMBEDDING}"):
        open_checkpoint(tensors)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    shard = json.loads((folder / INDEX).read_text())["weight_map"][EMBEDDING]
    (folder / shard).unlink()
    with pytest.raises(CheckpointError, match=shard):
        open_checkpoint(folder)


def test_older_files_store_the_angles(tmp_path: Path) -> None:
    extra = {f"{LAYER}.{i}.self_attn.rotary_emb.inv_freq": torch.ones(5) for i in range(3)}
    opened = open_checkpoint(write_checkpoint(tmp_path, {**weights(), **extra}))
    assert set(extra) <= set(opened.skipped)


@fuzzed(150)
@given(content=changed_json(json.loads((TINY / "config.json").read_text()) | {"cortexflow": {"action_dim": 3}}))
def test_any_config_json_ends_in_a_graph_or_a_clear_error(content: Any) -> None:
    try:
        opened = build_checkpoint(from_mapping(weights()), content)
        match(opened, create_model(opened.config).get_weight_shapes())
    except CortexFlowError as error:
        assert len(str(error)) > 20


SHAPES = st.lists(st.integers(0, 60), max_size=5).map(tuple)


@fuzzed(100)
@given(shapes=st.dictionaries(st.sampled_from(sorted(weights())), SHAPES, max_size=4), gone=st.booleans())
def test_tensors_of_any_shape_end_in_a_clear_error(shapes: dict[str, tuple[int, ...]], gone: bool) -> None:
    tensors = {n: torch.empty(s, dtype=torch.bfloat16, device="meta") for n, s in shapes.items()}
    tensors = {k: v for k, v in {**weights(), **tensors}.items() if not (gone and k in shapes)}
    try:
        opened = build_checkpoint(from_mapping(tensors), json.loads((TINY / "config.json").read_text()))
        match(opened, create_model(opened.config).get_weight_shapes())
    except CortexFlowError as error:
        assert len(str(error)) > 20
    else:
        changed = [n for n in shapes if gone or tensors[n].shape != weights()[n].shape]
        assert all(n in opened.skipped or n not in opened.tensors for n in changed)


def test_the_doctor_explains_a_directory(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tiny), "--quiet"]) == 0
    said = capsys.readouterr().out
    for words in (
        "OpenVLA (Hugging Face)",
        "every tensor that the model needs is there",
        POOLING,
        "every value finite",
    ):
        assert words in said
    assert "DINOv2 tower" in said and "4 registers" in said
    broken = {**weights(), "projector.fc1.bias": torch.full_like(weights()["projector.fc1.bias"], torch.nan)}
    assert main(["doctor", str(write_checkpoint(tmp_path, broken)), "--quiet"]) == 2
    assert "1 tensors hold NaN or infinity: projector.fc1.bias" in capsys.readouterr().out
