"""Statistics on disk: their forms, what is written is read again, and files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cortexflow.errors import CheckpointError, ConfigError
from cortexflow.processing.stats import Stats, check_stats, make_stats
from cortexflow.processing.stats_files import asset_ids, load_stats, stats_file
from cortexflow.processing.stats_lerobot import POSTPROCESSOR, PREPROCESSOR, lerobot_options, save_stats


def same(found: Stats, expected: Stats, rtol: float = 0.0) -> None:
    assert {g: sorted(v) for g, v in found.items()} == {g: sorted(v) for g, v in expected.items()}
    for group, vectors in expected.items():
        for name, vector in vectors.items():
            assert found[group][name].dtype == np.float64
            np.testing.assert_allclose(found[group][name], vector, rtol=rtol, atol=1e-7 if rtol else 0)


def write_openpi(file: Path, groups: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"norm_stats": groups}))
    return file


# --- openpi


def test_openpi(tmp_path: Path, golden: dict[str, Any], stats: Stats) -> None:
    file = write_openpi(tmp_path / "assets" / "physical-intelligence" / "libero" / "norm_stats.json", golden["stats"])
    for path in (file, file.parent, tmp_path):
        same(load_stats(path), stats)
    same(load_stats(tmp_path, asset_id="physical-intelligence/libero"), stats)


def test_openpi_without_quantiles(tmp_path: Path, golden: dict[str, Any]) -> None:
    groups = {g: {**v, "q01": None, "q99": None} for g, v in golden["stats"].items()}
    assert sorted(load_stats(write_openpi(tmp_path / "norm_stats.json", groups))["state"]) == ["mean", "std"]


def test_several_assets_must_be_chosen(tmp_path: Path, golden: dict[str, Any], stats: Stats) -> None:
    for asset in ("droid", "trossen"):
        write_openpi(tmp_path / "assets" / asset / "norm_stats.json", golden["stats"])
    with pytest.raises(CheckpointError, match=r"expected one asset.*found droid, trossen; pass asset_id"):
        load_stats(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected asset 'libero'.*found droid, trossen"):
        load_stats(tmp_path, asset_id="libero")
    same(load_stats(tmp_path, asset_id="droid"), stats)


VECTOR = {"mean": [0.0], "std": [1.0]}
BAD_OPENPI: dict[str, tuple[Any, str]] = {
    "other key": (
        {"norm_stats": {"state": VECTOR, "action": VECTOR}},
        "expected the keys state and actions, found action",
    ),
    "no norm_stats": ({"stats": {}}, "expected the key norm_stats, found stats"),
    "a list": ([1], "found list"),
    "NaN": ({"norm_stats": {"state": {"mean": [float("nan")]}, "actions": VECTOR}}, "state.mean.*NaN"),
    "lengths": (
        {"norm_stats": {"state": VECTOR, "actions": {"mean": [0.0], "std": [1.0, 1.0]}}},
        "one length.*'std': 2",
    ),
    "misnamed": ({"norm_stats": {"state": VECTOR, "actions": {"avg": [0.0]}}}, r"'actions' must hold.*found \['avg'\]"),
    "text": ({"norm_stats": {"state": VECTOR, "actions": {"mean": ["x"]}}}, "actions.mean: expected a list of numbers"),
    "matrix": ({"norm_stats": {"state": VECTOR, "actions": {"mean": [[0.0]]}}}, r"found shape \(1, 1\)"),
}


@pytest.mark.parametrize("case", BAD_OPENPI)
def test_bad_openpi(tmp_path: Path, case: str) -> None:
    content, message = BAD_OPENPI[case]
    (tmp_path / "norm_stats.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        load_stats(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_stats(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"looked for norm_stats.json, policy_preprocessor.json.*found none"):
        load_stats(tmp_path)
    (tmp_path / "norm_stats.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected a JSON file"):
        load_stats(tmp_path)


# --- LeRobot


def write_lerobot(directory: Path, stats: Stats, **changes: Any) -> None:
    """A checkpoint as LeRobot 0.6 writes it for π0.5, with every step and statistics of other features."""
    norm_map = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"} | changes.get("norm_map", {})
    relative = {"enabled": False, "exclude_joints": ["gripper"], "action_names": None} | changes.get("relative", {})
    features = {
        "observation.images.image": {"type": "VISUAL", "shape": [3, 256, 256]},
        "observation.state": {"type": "STATE", "shape": [8]},
        "action": {"type": "ACTION", "shape": [7]},
    }
    config = {"eps": changes.get("eps", 1e-8), "features": features, "norm_map": norm_map}
    state_file = "policy_preprocessor_step_3_normalizer_processor.safetensors"
    pre = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "relative_actions_processor", "config": relative},
        {"registry_name": "normalizer_processor", "config": config, "state_file": state_file},
        {"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}},
        {"registry_name": "tokenizer_processor", "config": {"max_length": 200, "padding_side": "right"}},
        {"registry_name": "device_processor", "config": {"device": "cuda", "float_dtype": None}},
    ]
    config = config | {"features": {"action": features["action"]}}
    post_file = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    post = [
        {"registry_name": "unnormalizer_processor", "config": config, "state_file": post_file},
        {"registry_name": "absolute_actions_processor", "config": {"enabled": relative["enabled"]}},
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
    ]
    tensors = {f"observation.state.{name}": v.astype(np.float32) for name, v in stats["state"].items()}
    tensors |= {f"action.{name}": v.astype(np.float32) for name, v in stats["actions"].items()}
    tensors |= {"action.count": np.array([9.0], np.float32), "timestamp.mean": np.array([1.0], np.float32)}
    tensors["observation.images.image.mean"] = np.zeros((3, 1, 1), np.float32)
    for name, steps, file in ((PREPROCESSOR, pre, state_file), (POSTPROCESSOR, post, post_file)):
        (directory / name).write_text(json.dumps({"name": name.removesuffix(".json"), "steps": steps}))
        save_file(tensors, directory / file)


def test_lerobot(tmp_path: Path, stats: Stats) -> None:
    write_lerobot(tmp_path, stats)
    same(load_stats(tmp_path), stats, rtol=1e-6)
    assert lerobot_options(tmp_path) == {
        "norm": "quantile",
        "action_norm": "quantile",
        "eps": "lerobot",
        "resize": "lerobot",
        "output_dim": 7,
        "prompt_length": 200,
    }


def test_lerobot_relative_actions(tmp_path: Path, stats: Stats) -> None:
    names = ["x", "y", "z", "left_Gripper.pos", "roll"]
    write_lerobot(tmp_path, stats, relative={"enabled": True, "action_names": names}, norm_map={"ACTION": "MEAN_STD"})
    options = lerobot_options(tmp_path)
    assert options["delta_mask"] == (True, True, True, False, True, True, True)
    assert (options["norm"], options["action_norm"]) == ("quantile", "mean_std")
    write_lerobot(tmp_path, stats, relative={"enabled": True})
    assert lerobot_options(tmp_path)["delta_mask"] == (True,) * 7


def test_lerobot_arithmetic_that_is_not_offered(tmp_path: Path, stats: Stats) -> None:
    write_lerobot(tmp_path, stats, norm_map={"STATE": "MIN_MAX"})
    with pytest.raises(CheckpointError, match="STATE to be one of MEAN_STD, QUANTILES, IDENTITY, found MIN_MAX"):
        lerobot_options(tmp_path)
    write_lerobot(tmp_path, stats, eps=1e-5)
    with pytest.raises(CheckpointError, match="expected eps 1e-08, found 1e-05"):
        lerobot_options(tmp_path)


def edit(file: Path, change: Any) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_lerobot_errors(tmp_path: Path, stats: Stats) -> None:
    post_file = tmp_path / "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    write_lerobot(tmp_path, stats)
    save_file({"act.mean": np.zeros(7, np.float32)}, post_file)
    with pytest.raises(CheckpointError, match=r"expected keys action.mean.*found act.mean"):
        load_stats(tmp_path)
    post_file.write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="expected safetensors, cannot read"):
        load_stats(tmp_path)
    post_file.unlink()
    with pytest.raises(CheckpointError, match="expected safetensors, cannot read"):
        load_stats(tmp_path)
    edit(tmp_path / POSTPROCESSOR, lambda content: content["steps"][0].pop("state_file"))
    with pytest.raises(CheckpointError, match="saved without statistics"):
        load_stats(tmp_path)
    edit(tmp_path / POSTPROCESSOR, lambda content: content["steps"][0].update(state_file="../other.safetensors"))
    with pytest.raises(CheckpointError, match=r"state_file, found '../other.safetensors'"):
        load_stats(tmp_path)
    edit(tmp_path / POSTPROCESSOR, lambda content: content["steps"].pop(0))
    with pytest.raises(CheckpointError, match="expected a step unnormalizer_processor, found absolute_actions"):
        load_stats(tmp_path)
    (tmp_path / POSTPROCESSOR).write_text("[]")
    with pytest.raises(CheckpointError, match="list of steps"):
        load_stats(tmp_path)
    (tmp_path / POSTPROCESSOR).unlink()
    with pytest.raises(CheckpointError, match=r"policy_postprocessor.json is missing"):
        load_stats(tmp_path)


@pytest.mark.parametrize(("norm", "action_norm"), [("quantile", None), ("mean_std", "identity")])
def test_saved_is_read_again(tmp_path: Path, stats: Stats, norm: str, action_norm: str | None) -> None:
    files = save_stats(stats, tmp_path / "new", norm=norm, action_norm=action_norm)
    assert sorted(files) == sorted((tmp_path / "new").iterdir())
    same(load_stats(tmp_path / "new"), stats, rtol=1e-6)
    options = lerobot_options(tmp_path / "new")
    assert (options["norm"], options["action_norm"], options["output_dim"]) == (norm, action_norm or norm, 7)


def test_saved_form(tmp_path: Path, stats: Stats) -> None:
    save_stats(stats, tmp_path, norm="quantile")
    (step,) = json.loads((tmp_path / PREPROCESSOR).read_text())["steps"]
    assert step["registry_name"] == "normalizer_processor"
    assert step["config"]["features"]["observation.state"] == {"type": "STATE", "shape": [8]}
    assert step["config"]["norm_map"] == {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}
    tensors = load_file(tmp_path / step["state_file"])
    assert tensors["action.q99"].dtype == np.float32
    assert tensors["observation.state.mean"].shape == (8,)


def test_save_errors(tmp_path: Path, stats: Stats) -> None:
    with pytest.raises(ConfigError, match="mean_std, quantile, identity, found minmax"):
        save_stats(stats, tmp_path, norm="minmax")
    with pytest.raises(CheckpointError, match="expected the keys state and actions, found state"):
        save_stats({"state": stats["state"]}, tmp_path, norm="quantile")


def test_old_buffers(tmp_path: Path, stats: Stats) -> None:
    prefixes = {"state": "normalize_inputs.buffer_observation_state.", "actions": "unnormalize_outputs.buffer_action."}
    tensors = {prefixes[g] + n: v for g, vectors in stats.items() for n, v in vectors.items() if n in ("mean", "std")}
    tensors["normalize_targets.buffer_action.mean"] = np.zeros(7)
    tensors["model.weight"] = np.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    same(load_stats(tmp_path), make_stats({g: {n: v[n] for n in ("mean", "std")} for g, v in stats.items()}))
    save_file({"model.weight": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"policy_preprocessor.* missing .*no buffers normalize_inputs.*found none"
    ):
        load_stats(tmp_path)
    tensors[prefixes["state"] + "mean"] = np.full(8, np.inf)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"state.mean.*NaN or infinity"):
        load_stats(tmp_path)


# ---- checks before anything is scaled --------------------------------------------------------------


def test_a_norm_map_that_is_silent_is_an_error(stats: Stats, tmp_path: Path) -> None:
    """LeRobot would leave the values as they are."""
    save_stats(stats, tmp_path, norm="quantile")
    file = tmp_path / "policy_postprocessor.json"
    content = json.loads(file.read_text())
    norm_map = content["steps"][0]["config"]["norm_map"]
    norm_map["ACTIONS"] = norm_map.pop("ACTION")
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"policy_postprocessor.json: expected norm_map to say how ACTION is sca"):
        lerobot_options(tmp_path)


def test_stats_file_and_assets(stats: Stats, tmp_path: Path) -> None:
    assert asset_ids(tmp_path) == []
    for asset in ("trossen", "my/data"):
        file = tmp_path / "assets" / asset / "norm_stats.json"
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    assert asset_ids(tmp_path) == ["my/data", "trossen"]
    assert stats_file(tmp_path, asset_id="my/data") == tmp_path / "assets/my/data/norm_stats.json"
    save_stats(stats, tmp_path / "lerobot", norm="quantile")
    assert stats_file(tmp_path / "lerobot") == tmp_path / "lerobot"


def test_check_stats(stats: Stats) -> None:
    check_stats(stats, "file", "state", ("q01", "q99"), (8, 32))
    check_stats(stats, "file", "state", (), (3,))
    with pytest.raises(CheckpointError, match=r"file: expected state.q01 of 7 or 32 values, found 8"):
        check_stats(stats, "file", "state", ("q01",), (7, 32))
    with pytest.raises(CheckpointError, match="file: expected the key 'state' to hold q50, found mean, q01, q99, std"):
        check_stats(stats, "file", "state", ("q50",), ())


# --- OpenVLA

ACTION = {"q01": [-1.0, 0.0], "q99": [1.0, 2.0], "mean": [0.0, 0.5], "std": [1.0, 1.0], "mask": [True, False]}


def write_datasets(file: Path, tables: Any) -> Path:
    file.write_text(json.dumps({"model_type": "openvla", "norm_stats": tables} if "config" in file.name else tables))
    return file


def test_datasets_of_config_json(tmp_path: Path) -> None:
    other = {"action": {"q01": [0.0], "q99": [0.5]}, "num_trajectories": 3}
    file = write_datasets(tmp_path / "config.json", {"bridge_orig": {"action": ACTION}, "kuka": other})
    for path in (tmp_path, file):
        assert asset_ids(path) == ["bridge_orig", "kuka"]
        found = load_stats(path, asset_id="bridge_orig")
        assert found["state"] == {}
        assert found["actions"]["mask"].tolist() == [1.0, 0.0]
        assert found["actions"]["q99"].tolist() == [1.0, 2.0]
        assert "mask" not in load_stats(path, asset_id="kuka")["actions"]
        assert stats_file(path, asset_id="kuka") == file
    for wanted, words in ((None, "the statistics of one dataset"), ("viola", "the dataset 'viola'")):
        with pytest.raises(CheckpointError, match=f"expected {words}, found those of bridge_orig, kuka; pass asset_id"):
            load_stats(tmp_path, asset_id=wanted)


def test_dataset_statistics_replace_those_of_config_json(tmp_path: Path) -> None:
    write_datasets(tmp_path / "config.json", {"bridge_orig": {"action": ACTION}})
    write_datasets(tmp_path / "dataset_statistics.json", {"mine": {"action": ACTION | {"q99": [5.0, 5.0]}}})
    assert load_stats(tmp_path)["actions"]["q99"].tolist() == [5.0, 5.0]
    with pytest.raises(CheckpointError, match="expected the dataset 'bridge_orig', found those of mine"):
        load_stats(tmp_path, asset_id="bridge_orig")


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({}, "expected a table of statistics for each dataset, found {}"),
        ([1], r"expected a table of statistics for each dataset, found \[1\]"),
        ({"a": {"state": {}}}, "a: expected the key action with q01 and q99, found {'state': {}}"),
        ({"a": {"action": {}}}, "'action' must hold vectors of one length"),
        ({"a": {"action": ACTION | {"q01": [0.0]}}}, "one length.*'q01': 1"),
        ({"a": {"action": ACTION | {"q01": [9.0, 9.0]}}}, "action.q99: expected at least q01, found 1 and 9"),
        ({"a": {"action": ACTION | {"q99": [1.0, float("nan")]}}}, "action.q99.*NaN"),
        ({"a": {"action": ACTION | {"mask": [True]}}}, r"action.mask: expected 2 of true and false, found \[True\]"),
        ({"a": {"action": ACTION | {"mask": [1, 0]}}}, "action.mask: expected 2 of true and false"),
    ],
)
def test_bad_datasets(tmp_path: Path, tables: Any, message: str) -> None:
    write_datasets(tmp_path / "dataset_statistics.json", tables)
    with pytest.raises(CheckpointError, match=f"dataset_statistics.json: .*{message}"):
        load_stats(tmp_path)
