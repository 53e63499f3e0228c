"""OpenVLA from a robot's observation to its actions: exactly those of the published `predict_action`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.numpy import load_file

from cortexflow import BackendType, Policy, create_inference, create_openvla_inference
from cortexflow.cli import main
from cortexflow.errors import CheckpointError, ConfigError, InputError
from cortexflow.processing.images import fit_pictures
from cortexflow.processing.robots import libero_gripper
from tests.models.openvla_cases import TINY, write_checkpoint
from tests.processing.llama import json_text, vocabulary_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

CASES: list[dict[str, Any]] = json.loads((TINY / "cases.json").read_text())
PICTURES = load_file(TINY / "inputs.safetensors")
CPU = {"backend": BackendType.PYTORCH, "device": "cpu", "dtype": torch.float32}


def observation(case: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"image": PICTURES[case["image"]], "instruction": case["instruction"]} | more


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_checkpoint(tmp_path_factory.mktemp("openvla"))
    (made / "tokenizer.model").write_bytes(vocabulary_bytes())
    return made


@pytest.fixture(scope="module")
def bridge(place: Path) -> Policy:
    return Policy.load(place, asset_id="bridge_orig", batch=2, progress=False)


@pytest.mark.parametrize("target", ["torch", "onnx", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dataset", ["bridge_orig", "toy_no_mask"])
def test_agrees_exactly(place: Path, target: str, dataset: str) -> None:
    where = {"device": "cuda", "dtype": "bfloat16"} if target == "triton" else {}
    policy = Policy.load(place, asset_id=dataset, target=target, progress=False, **where)
    assert policy.metadata == {"robot": "this checkpoint", "action_horizon": 1, "action_dim": 7}
    for case in CASES:
        if case["unnorm_key"] == dataset:
            result = policy.infer(observation(case))
            assert result["actions"].dtype == np.float64
            assert result["actions"].tolist() == [case["actions"]]
            assert result["policy_timing"]["infer_ms"] > 0


def test_batches(bridge: Policy) -> None:
    """Pictures of several sizes and prompts of several lengths, in portions that do not divide their number."""
    found = bridge.infer_batch([observation(case) for case in CASES])["actions"]
    assert found.shape == (3, 1, 7)
    for i, case in enumerate(CASES):
        if case["unnorm_key"] == "bridge_orig":
            assert found[i].tolist() == [case["actions"]]


def test_the_words_of_each_code(bridge: Policy) -> None:
    case = CASES[0]
    picture, text = PICTURES[case["image"]], case["instruction"]
    channels_first = torch.from_numpy(picture).permute(2, 0, 1)
    for given in (
        {"full_image": picture, "instruction": text, "state": np.zeros(8)},
        {"observation/image": picture, "prompt": text},
        {"images": {"image": picture}, "prompt": text},
        {"observation.images.image": channels_first.float() / 255, "task": text},
        {"image": PIL.Image.fromarray(picture), "instruction": text},
    ):
        assert bridge.infer(given)["actions"].tolist() == [case["actions"]]
    stacked = {"image": np.stack([picture] * 3), "instruction": text}
    assert bridge.infer(stacked)["actions"].tolist() == [[case["actions"]]] * 3


def test_libero_crops_and_closes_the_gripper(place: Path) -> None:
    policy = Policy.load(place, "libero", asset_id="bridge_orig", progress=False)
    assert (policy.frontend.processing.resize, policy.frontend.processing.adapt) == ("openvla_crop", "libero_gripper")
    case = CASES[0]
    wrist = np.zeros((9, 9, 3), np.uint8)  # may be given, and is not looked at
    found = policy.infer(observation(case, wrist_image=wrist))["actions"]
    assert found[0, -1] in (-1.0, 1.0)
    assert found.tolist() == policy.infer(observation(case))["actions"].tolist()
    (cropped,) = fit_pictures([PICTURES[case["image"]]], views=1, size=56, method="openvla_crop")
    plain = Policy.load(place, asset_id="bridge_orig", progress=False)
    expected = plain.infer(observation(case, image=cropped))["actions"]
    assert found.tolist() == libero_gripper(expected).tolist()


def test_gripper_of_libero() -> None:
    actions = [[0.25, 0.0], [0.25, 0.4], [0.25, 0.6], [0.25, 0.996]]
    assert libero_gripper(actions).tolist() == [[0.25, 1.0], [0.25, 1.0], [0.25, -1.0], [0.25, -1.0]]


def test_ones_own_robot_and_the_older_prompt(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "arm.toml"
    file.write_text('cameras = ["front"]\nstate = 4\nactions = 6\nasset = "toy_no_mask"\ndefault_prompt = "Wait"\n')
    policy = Policy.load(place, file, progress=False)
    found = policy.infer({"front": PICTURES["image_0"], "state": np.zeros(4)})["actions"]
    assert found.shape == (1, 6)
    older = Policy.load(place, file, processing="openvla_v01", progress=False)
    assert older.frontend.processing.prompt_format == "openvla_v01"
    with pytest.raises(InputError, match="expected at most 64 tokens"):  # of a tokenizer that knows few words
        older.infer({"front": PICTURES["image_0"]})
    assert older.frontend.processing.towers == policy.frontend.processing.towers


def test_files_beside_the_weights(place: Path, tmp_path: Path) -> None:
    """A fine-tuned checkpoint as newer versions of transformers save it."""
    pytest.importorskip("tokenizers")
    mine = Path(shutil.copytree(place, tmp_path / "mine"))
    (mine / "tokenizer.model").unlink()
    (mine / "tokenizer.json").write_text(json_text(vocabulary_bytes()))
    tables = json.loads((place / "config.json").read_text())["norm_stats"]
    (mine / "dataset_statistics.json").write_text(json.dumps({"mine": tables["toy_no_mask"]}))
    (case,) = (case for case in CASES if case["unnorm_key"] == "toy_no_mask")
    assert Policy.load(mine, progress=False).infer(observation(case))["actions"].tolist() == [case["actions"]]


def test_errors_at_the_door(place: Path, bridge: Policy, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found those of bridge_orig, toy_no_mask; pass asset_id=.*unnorm_key"):
        Policy.load(place, progress=False)
    with pytest.raises(CheckpointError, match="expected the dataset 'viola', found those of bridge_orig, toy_no_mask"):
        Policy.load(place, asset_id="viola", progress=False)
    with pytest.raises(ConfigError, match=r"'pi05_libero' does not suit a openvla checkpoint; choose one of openvla, "):
        Policy.load(place, processing="pi05_libero", asset_id="bridge_orig", progress=False)
    with pytest.raises(InputError, match="no picture at all"):
        bridge.infer({"instruction": "wait"})
    with pytest.raises(InputError, match="expected the instruction"):
        bridge.infer({"image": PICTURES["image_0"]})
    with pytest.raises(InputError, match="found the unknown key wrist"):
        bridge.infer(observation(CASES[0], wrist=PICTURES["image_0"]))
    with pytest.raises(InputError, match="noise: this policy draws none"):
        bridge.infer(observation(CASES[0]), noise=np.zeros((1, 7)))
    with pytest.raises(InputError, match="image: expected 8 bits per channel, found a PIL picture of mode F"):
        bridge.infer(observation(CASES[0], image=PIL.Image.new("F", (8, 8))))
    other = Path(shutil.copytree(place, tmp_path / "other"))
    shutil.copyfile(TINY.parent / "preprocessor_config_224.json", other / "preprocessor_config.json")
    with pytest.raises(CheckpointError, match="expected pictures of 56 pixels, as the weights do, found 224"):
        Policy.load(other, asset_id="bridge_orig", progress=False)
    (other / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="expected the settings of the image processor"):
        Policy.load(other, asset_id="bridge_orig", progress=False)


# ---- the engine ------------------------------------------------------------------------------------


def resized(name: str) -> np.ndarray:
    (picture,) = fit_pictures([PICTURES[name]], views=1, size=56, method="openvla")
    assert picture is not None
    return picture


@pytest.mark.parametrize("where", [CPU, pytest.param({}, marks=pytest.mark.gpu)], ids=["cpu", "gpu"])
def test_engine(place: Path, where: dict[str, Any]) -> None:
    engine = create_openvla_inference(place, **where)
    for case in CASES:
        picture = resized(case["image"])
        floats = picture.astype(np.float32) / 255 * 2 - 1
        for given in (picture[None], [picture], torch.from_numpy(floats)[None]):
            found = engine.predict(given, case["instruction"])
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, np.float32([case["actions_normalised"]]))
    episodes = engine.predict_batch([[resized(c["image"])] for c in CASES], [c["instruction"] for c in CASES])
    np.testing.assert_array_equal(episodes[:, 0], np.float32([case["actions_normalised"] for case in CASES]))


def test_engine_errors(place: Path, tmp_path: Path) -> None:
    engine = create_inference("openvla", place, **CPU)
    picture = resized("image_0")
    bad: list[tuple[Any, dict[str, Any], str]] = [
        (PICTURES["image_0"][None], {}, r"expected 1 views of 56 x 56 RGB pixels"),
        ([None], {}, "all 1 views are None"),
        (np.full((1, 56, 56, 3), 9, np.float32), {}, r"expected RGB in \[-1, 1\], found values from 9 to 9"),
        (np.full((1, 56, 56, 3), np.nan, np.float32), {}, r"expected RGB in \[-1, 1\]"),
        (picture[None], {"noise": np.zeros((1, 7), np.float32)}, "noise: this policy draws none"),
        (picture[None], {"state": [0.0]}, "state: expected None .*'openvla' has no place for it"),
    ]
    for images, more, message in bad:
        with pytest.raises(InputError, match=message):
            engine.predict(images, "wait", **more)
    other = Path(shutil.copytree(place, tmp_path / "other"))
    (other / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="expected the settings of the image processor"):
        create_openvla_inference(other, **CPU)


# ---- from the shell --------------------------------------------------------------------------------


def test_run(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[0]
    PIL.Image.fromarray(PICTURES[case["image"]]).save(tmp_path / "seen.png")
    words = ["run", str(place), "--prompt", case["instruction"], "--image", f"image={tmp_path / 'seen.png'}"]
    words += ["--asset", "bridge_orig", "--save", str(tmp_path / "actions.npz")]
    assert main([*words, "--target", "torch"]) == 0
    saved = np.load(tmp_path / "actions.npz")
    assert saved["actions"].tolist() == [case["actions"]]
    assert saved["network"].tolist() == case["generated_ids"]
    shown = capsys.readouterr().out
    assert "128 x 96 to 56 x 56 stretched" in shown
    assert "19 of 64 tokens" in shown


def test_inspect_and_doctor(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(place)]) == 0
    shown = capsys.readouterr().out
    assert "OpenVLA" in shown
    assert "32,000 pieces" in shown
    assert "those of bridge_orig, toy_no_mask" in shown  # none is chosen
    assert shown.endswith("--prompt 'pick up the red cube and put it on the plate' --asset ID\n")
    assert main(["doctor", str(place), "--json", "--quick"]) in (0, 1)
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == []
