"""Policy: observations as openpi's clients and LeRobot send them, and what comes back in the robot's units."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cortexflow
from cortexflow.checkpoints import open_checkpoint
from cortexflow.compiler import load_model
from cortexflow.errors import CheckpointError, ConfigError, CortexFlowError, InputError
from cortexflow.observation import Frontend
from cortexflow.policy import Policy
from cortexflow.processing import FAMILIES, ROBOTS, Robot, make_stats, read_observation
from cortexflow.processing.pipeline import HORIZONS
from tests.models.cases import DATA, Batch, batches
from tests.processing.directories import (
    example,
    random_stats,
    small,
    write_lerobot,
    write_norm_stats,
    write_openpi,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"libero": (8, 7), "droid": (8, 8), "aloha": (14, 14)}


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for each family and robot, LeRobot's beside openpi's."""
    place = tmp_path_factory.mktemp("checkpoints")
    for family in ("pi0", "pi05"):
        for robot, sizes in SIZES.items():
            horizon = HORIZONS[f"{family}_{robot}"]
            write_openpi(place / f"{family}_{robot}", family, random_stats(*sizes), ROBOTS[robot].asset or "", horizon)
        write_lerobot(place / f"{family}_lerobot", family, random_stats(8, 7))
    return place


@pytest.fixture(scope="session")
def libero(home: Path) -> Policy:
    return Policy.load(home / "pi05_libero", "libero", progress=False)


@pytest.fixture(scope="session")
def lerobot(home: Path) -> Policy:
    return Policy.load(home / "pi05_lerobot", progress=False)


def noise_of(policy: Policy, samples: int | None = None, seed: int = 0) -> np.ndarray:
    shape = policy.compiled.inputs["noise"].shape[1:]
    return np.random.default_rng(seed).standard_normal(shape if samples is None else (samples, *shape))


# ---- openpi's own examples -------------------------------------------------------------------------


@pytest.mark.parametrize("robot", sorted(SIZES))
@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_openpi_examples(home: Path, family: str, robot: str) -> None:
    policy = Policy.load(home / f"{family}_{robot}", robot, progress=False)
    given = example(robot)
    before = json.dumps(given, default=lambda x: x.tolist())
    found = policy.infer(given)
    assert json.dumps(given, default=lambda x: x.tolist()) == before
    assert found["actions"].shape == (HORIZONS[f"{family}_{robot}"], SIZES[robot][1])
    assert isinstance(found["actions"], np.ndarray)
    assert np.isfinite(found["actions"]).all()
    assert set(found) == {"actions", "policy_timing"}
    assert found["policy_timing"]["infer_ms"] > 0
    assert policy.metadata["action_horizon"] == HORIZONS[f"{family}_{robot}"]


def test_forms_of_the_same_observation(libero: Policy) -> None:
    given = example("libero", side=60)
    noise = noise_of(libero)
    expected = libero.infer(given, noise=noise)["actions"]
    pixels = {camera: given[f"observation/{camera}"] for camera in ("image", "wrist_image")}
    forms: dict[str, dict[str, Any]] = {
        "images": {"images": pixels, "state": given["observation/state"], "prompt": given["prompt"]},
        "prompt as an array": given | {"prompt": np.asarray("do something")},
        "prompt as bytes": given | {"prompt": b"do something"},
        "tensors": {k: v if k == "prompt" else torch.from_numpy(v) for k, v in given.items()},
        "channels first": given | {f"observation/{c}": p.transpose(2, 0, 1) for c, p in pixels.items()},
        "lists and None": given | {"observation/state": list(given["observation/state"]), "images": None},
        "LeRobot's words": {
            "observation.images.image": pixels["image"],
            "observation.images.wrist_image": pixels["wrist_image"],
            "observation.state": given["observation/state"],
            "task": "do something",
            "action": np.zeros(7),
            "next.done": False,
            "action_is_pad": np.zeros(7, bool),
        },
    }
    for name, form in forms.items():
        np.testing.assert_array_equal(libero.infer(form, noise=noise)["actions"], expected, err_msg=name)


def test_float_pictures_become_bytes_as_openpi_makes_them(libero: Policy) -> None:
    given = example("libero", side=40)
    picture = np.random.default_rng(3).random((40, 40, 3))
    floats = libero.infer(given | {"observation/image": picture}, noise=noise_of(libero))
    cut = libero.infer(given | {"observation/image": (255 * picture).astype(np.uint8)}, noise=noise_of(libero))
    np.testing.assert_array_equal(floats["actions"], cut["actions"])


def test_parts_of_the_state(home: Path) -> None:
    policy = Policy.load(home / "pi05_droid", "droid", progress=False)
    given = example("droid", side=28)
    noise = noise_of(policy)
    expected = policy.infer(given, noise=noise)["actions"]
    scalar = given | {"observation/gripper_position": float(given["observation/gripper_position"][0])}
    np.testing.assert_array_equal(policy.infer(scalar, noise=noise)["actions"], expected)
    joints, gripper = given.pop("observation/joint_position"), given.pop("observation/gripper_position")
    whole = policy.infer(given | {"state": np.concatenate([joints, gripper])}, noise=noise)["actions"]
    np.testing.assert_array_equal(whole, expected)
    lacking = given | {"observation/joint_position": joints}
    with pytest.raises(InputError, match="found no gripper_position"):
        policy.infer(lacking)
    with pytest.raises(InputError, match="observation/gripper_position: expected an array of numbers"):
        policy.infer(scalar | {"observation/gripper_position": torch.zeros((), device="meta")})


def test_absent_cameras_are_masked(home: Path) -> None:
    policy = Policy.load(home / "pi0_aloha", "aloha", progress=False)
    given = example("aloha", side=28)
    del given["images"]["cam_right_wrist"]
    samples, batched = read_observation(policy.robot, given)
    assert not batched
    assert [image is not None for image in samples[0].images] == [True, True, False]
    assert policy._prepare(samples[0])["image_mask"].tolist() == [True, True, False]
    noise = noise_of(policy)
    one = policy.infer(given, noise=noise)["actions"]
    given["images"]["cam_right_wrist"] = None
    np.testing.assert_array_equal(policy.infer(given, noise=noise)["actions"], one)
    given["images"]["cam_right_wrist"] = np.zeros((3, 28, 28), np.uint8)
    assert np.abs(policy.infer(given, noise=noise)["actions"] - one).max() > 0


# ---- several samples -------------------------------------------------------------------------------


def batch_of(*given: dict[str, Any]) -> dict[str, Any]:
    """Observations stacked as LeRobot's loader stacks them: tensors, channels first, texts in a list."""
    stacked: dict[str, Any] = {"task": [one["prompt"] for one in given]}
    for key in given[0]:
        if key != "prompt":
            values = torch.stack([torch.as_tensor(one[key]) for one in given])
            stacked[key] = values.movedim(-1, 1) if values.ndim == 4 else values
    return stacked


@pytest.mark.parametrize("batch", [1, 2])
def test_several_samples_equal_one_by_one(home: Path, batch: int) -> None:
    policy = Policy.load(home / "pi05_droid", "droid", batch=batch, progress=False)
    given = [example("droid", seed, side=31) | {"prompt": text} for seed, text in enumerate(["a", "open it", "fold"])]
    noise = noise_of(policy, 3)
    together = policy.infer(batch_of(*given), noise=noise)["actions"]
    assert together.shape == (3, 15, 8)
    alone = [policy.infer(one, noise=noise[i])["actions"] for i, one in enumerate(given)]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    listed = policy.infer_batch(given, noise=noise)
    np.testing.assert_array_equal(listed["actions"], together)
    assert listed["policy_timing"]["batch_size"] == 3
    single = policy.infer(batch_of(given[1]), noise=noise[1:2])["actions"]
    assert single.shape == (1, 15, 8)
    np.testing.assert_allclose(single[0], alone[1], rtol=0, atol=1e-5)


def test_mistaken_lists_of_observations(libero: Policy) -> None:
    given = example("libero", side=28)
    for wrong in ([], given, "ab", 3):
        with pytest.raises(InputError, match="observations: expected a list of at least one observation"):
            libero.infer_batch(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"observations\[1\]: observation/state: expected shape \(8,\), found \(3,\)"):
        libero.infer_batch([given, given | {"observation/state": np.zeros(3)}])
    with pytest.raises(InputError, match=r"observations\[0\]: .* infer takes batches"):
        libero.infer_batch([{k: v[None] if k != "prompt" else v for k, v in given.items()}])


@pytest.mark.parametrize("target", ["onnx"])
def test_targets_agree(home: Path, libero: Policy, target: str) -> None:
    policy = Policy.load(home / "pi05_libero", "libero", target=target, progress=False)
    given, noise = example("libero", side=50), noise_of(libero)
    found, expected = (p.infer(given, noise=noise)["actions"] for p in (policy, libero))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_noise(libero: Policy) -> None:
    given = example("libero", side=28)
    libero.reset()
    first, second = (libero.infer(given)["actions"] for _ in range(2))
    assert np.abs(first - second).max() > 0
    libero.reset()
    np.testing.assert_array_equal(libero.infer(given)["actions"], first)
    with pytest.raises(InputError, match=r"noise: expected shape \(10, 32\), found \(10, 7\)"):
        libero.infer(given, noise=np.zeros((10, 7)))


# ---- LeRobot ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_lerobot_batch(home: Path, family: str) -> None:
    policy = Policy.load(home / f"{family}_lerobot", progress=False)
    generator = torch.Generator().manual_seed(0)
    given = {
        "observation.images.image": torch.rand(2, 3, 48, 36, generator=generator),
        "observation.images.image2": torch.rand(2, 3, 48, 36, generator=generator),
        "observation.state": torch.rand(2, 8, generator=generator),
        "task": ["pick up the cube", "fold"],
        "index": torch.arange(2),
    }
    noise = noise_of(policy, 2)
    found = policy.infer(given, noise=noise)["actions"]
    assert found.shape == (2, 10, 7)
    one = {k: v[1] for k, v in given.items()}
    np.testing.assert_allclose(policy.infer(one, noise=noise[1])["actions"], found[1], rtol=0, atol=1e-5)
    del one["observation.images.image2"]
    assert policy._prepare(read_observation(policy.robot, one)[0][0])["image_mask"].tolist() == [True, False]
    del one["observation.images.image"]
    with pytest.raises(InputError, match="found no picture at all"):
        policy.infer(one)


def test_lerobot_checkpoint_of_a_named_robot(home: Path) -> None:
    """openpi's keys with LeRobot's arithmetic: the views are in the same order."""
    named = Policy.load(home / "pi05_lerobot", "libero", progress=False)
    told = Policy.load(home / "pi05_lerobot", progress=False)
    given, noise = example("libero", side=50), noise_of(told)
    translated = {
        "observation.images.image": given["observation/image"],
        "observation.images.image2": given["observation/wrist_image"],
        "observation.state": given["observation/state"],
        "task": given["prompt"],
    }
    np.testing.assert_array_equal(
        named.infer(given, noise=noise)["actions"], told.infer(translated, noise=noise)["actions"]
    )
    assert named.frontend.processing.eps == "lerobot"


# ---- the golden cases, processing included ---------------------------------------------------------


class Recorded:
    """In a tokenizer's place: the tokens of the reference, whatever the text."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        return self.ids if bos else []


GOLDEN = [b for case in ("pi0_tiny", "pi0_tiny2", "pi05_tiny", "pi05_tiny2") for b in batches(DATA / case)]


@pytest.mark.parametrize("batch", GOLDEN, ids=[f"{b.case.name}-{b.name}" for b in GOLDEN])
def test_golden_cases_with_processing(batch: Batch) -> None:
    """Camera pixels in [0, 1] and a state in robot units in; the reference's actions, in robot units, out."""
    model, _ = load_model(batch.case)
    config = model.config
    family = config.model_type.value  # type: ignore[union-attr]
    stats = random_stats(config.state_dim, config.action_dim, seed=5)
    mode = "mean_std" if family == "pi0" else "quantile"
    cameras = tuple(f"camera_{i}" for i in range(config.num_views))
    robot = Robot(cameras=cameras, state=(), actions=config.action_dim, executed=None, required=())
    rules = replace(
        FAMILIES[family],
        views=config.num_views,
        image_size=config.image_size,
        prompt_length=config.max_token_len,
        state_dim=config.state_dim,
        action_dim=config.action_dim,
        eps="lerobot",
        resize="lerobot",
    )
    compiled = cortexflow.compile(batch.case, progress=False)
    out, state_stats = stats["actions"], stats["state"]
    for i in range(batch.size):
        inputs = {name: value[i] for name, value in batch.inputs.items()}
        tokens = inputs["tokens"][inputs["token_mask"]].tolist()
        assert bool(inputs["token_mask"][: len(tokens)].all())
        pixels = inputs["images"].movedim(-1, 1)  # as a camera gives them: channels first, in [0, 1]
        given: dict[str, Any] = {
            f"observation.images.{c}": (pixels[j] + 1) / 2 for j, c in enumerate(cameras) if inputs["image_mask"][j]
        }
        network = inputs["state"].double().numpy() if family == "pi0" else np.linspace(-0.9, 0.9, config.state_dim)
        if mode == "mean_std":
            given["observation.state"] = network * (state_stats["std"] + 1e-8) + state_stats["mean"]
            expected = batch.outputs["actions"][i].double().numpy() * out["std"] + out["mean"]
            scale = out["std"]
        else:
            given["observation.state"] = (network + 1) / 2 * (state_stats["q99"] - state_stats["q01"])
            given["observation.state"] += state_stats["q01"]
            scale = (out["q99"] - out["q01"]) / 2
            expected = (batch.outputs["actions"][i].double().numpy() + 1) * scale + out["q01"]
        frontend = Frontend(rules, cameras, Recorded(tokens), stats)  # type: ignore[arg-type]
        policy = Policy(compiled, frontend, robot, default_prompt="recorded")
        found = policy.infer(given, noise=inputs["noise"])["actions"]
        assert (np.abs(found - expected) / scale).max() < 1e-4


# ---- statistics ------------------------------------------------------------------------------------


def copy_of(home: Path, name: str, place: Path) -> Path:
    import shutil

    return Path(shutil.copytree(home / name, place / name))


ASSET = "assets/physical-intelligence/libero/norm_stats.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("actions"), "norm_stats.json: expected the keys state and actions, found state"),
        (lambda s: s.update(action=s.pop("actions")), "expected the keys state and actions, found action, state"),
        (
            lambda s: s["state"].pop("q99"),
            r"norm_stats.json: expected the key 'state' to hold q01, q99, found mean, q01",
        ),
        (lambda s: s["actions"].update(mean=[0.0] * 3), "'actions' must hold vectors of one length"),
        (lambda s: s["state"].update(q01=[9.0] * 8), "state.q99: expected at least q01"),
        (lambda s: s["state"].update(std=[-1.0] * 8), "state.std: expected no number below 0"),
        (lambda s: s["state"].update(q01=["a"] * 8), "state.q01: expected a list of numbers"),
        (lambda s: s["state"].update(q99=[1e300] * 8), "state.q99: expected numbers of a robot, found 1e.300"),
        (
            lambda s: [s["actions"].update({k: v[:6]}) for k, v in s["actions"].items()],
            r"actions.q01 of 7 or 32 values",
        ),
        (
            lambda s: s.update(actions=s["state"]),
            r"actions.q01 of 7 or 32 values, found 8; these are the statistics of a",
        ),
    ],
)
def test_mistaken_statistics(home: Path, tmp_path: Path, change: Any, message: str) -> None:
    place = copy_of(home, "pi05_libero", tmp_path)
    content = json.loads((place / ASSET).read_text())
    change(content["norm_stats"])
    (place / ASSET).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message) as caught:
        Policy.load(place, "libero", progress=False)
    assert "norm_stats.json" in str(caught.value)


def test_missing_statistics(home: Path, tmp_path: Path) -> None:
    place = copy_of(home, "pi05_libero", tmp_path)
    (place / ASSET).unlink()
    with pytest.raises(CheckpointError, match=r"expected one asset with norm_stats.json below .*assets, found none"):
        Policy.load(place, "libero", progress=False)


def test_statistics_of_several_robots(home: Path, tmp_path: Path) -> None:
    place = copy_of(home, "pi05_libero", tmp_path)
    write_norm_stats(place / "assets/droid/norm_stats.json", random_stats(8, 8, seed=1))
    found = Policy.load(place, "libero", progress=False)
    np.testing.assert_array_equal(found.frontend.stats["actions"]["q01"], random_stats(8, 7)["actions"]["q01"])  # type: ignore[index]
    with pytest.raises(CheckpointError, match=r"expected asset 'trossen' .* found droid, physical-intelligence/libero"):
        Policy.load(place, "aloha", progress=False)
    with pytest.raises(CheckpointError, match=r"assets/droid/norm_stats.json: expected actions.q01 of 7 or 32 values"):
        Policy.load(place, "libero", asset_id="droid", progress=False)


def test_padded_statistics_are_taken(home: Path, libero: Policy) -> None:
    """openpi's early checkpoints computed them on vectors padded to the network's 32."""
    padded = {g: {k: [*v, *[0.0] * (32 - len(v))] for k, v in s.items()} for g, s in random_stats(8, 7).items()}
    frontend = replace(libero.frontend, stats=make_stats(padded))
    given, noise = example("libero", side=28), noise_of(libero)
    found = Policy(libero.compiled, frontend, libero.robot).infer(given, noise=noise)["actions"]
    np.testing.assert_array_equal(found, libero.infer(given, noise=noise)["actions"])


# ---- one's own robot -------------------------------------------------------------------------------

OWN = """
name = "bench"
cameras = ["observation/front", "gripper"]
optional = ["gripper"]
ignored = ["depth"]
state = { joints = 6, gripper_opening = 1 }
actions = 7
default_prompt = "stack"
"""


def own(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "bench.toml"
    file.write_text(text)
    return file


def test_own_robot(home: Path, tmp_path: Path) -> None:
    place = write_openpi(tmp_path / "own", "pi05", random_stats(7, 7), "my/data")
    policy = Policy.load(place, own(tmp_path, OWN), progress=False)
    given = {
        "observation/front": np.zeros((30, 40, 3), np.uint8),
        "joints": np.zeros(6),
        "gripper_opening": 0.5,
        "depth": np.zeros(3),
    }
    noise = noise_of(policy)
    absolute = policy.infer(given, noise=noise)["actions"]
    assert absolute.shape == (10, 7)
    assert policy.frontend.processing.delta_mask == ()
    np.testing.assert_array_equal(policy.infer(given | {"prompt": "stack"}, noise=noise)["actions"], absolute)

    mask = [True] * 6 + [False]
    relative = Policy.load(place, own(tmp_path, f"{OWN}delta = {json.dumps(mask)}"), progress=False)
    given["joints"] = state = np.arange(6) / 10
    added = relative.infer(given, noise=noise)["actions"] - policy.infer(given, noise=noise)["actions"]
    np.testing.assert_allclose(added, np.broadcast_to([*state, 0.0], added.shape), rtol=0, atol=1e-12)


def test_a_camera_that_is_not_optional_is_needed(home: Path, tmp_path: Path) -> None:
    policy = Policy.load(home / "pi05_libero", own(tmp_path, OWN.replace("joints = 6", "joints = 7")), progress=False)
    given = {"joints": np.zeros(7), "gripper_opening": 0.5, "gripper": np.zeros((9, 9, 3), np.uint8)}
    with pytest.raises(InputError, match="found no picture of observation/front"):
        policy.infer(given)


def test_own_normalisation_over_lerobots_files(home: Path, tmp_path: Path) -> None:
    """The file's norm holds for the actions too, whatever LeRobot's files say of them."""
    text = 'cameras = ["image"]\nstate = 8\nactions = 7\n'
    policies = [
        Policy.load(home / "pi05_lerobot", own(tmp_path, text + more), progress=False)
        for more in ("", 'norm = "mean_std"\n')
    ]
    given = {"image": np.zeros((9, 9, 3), np.uint8), "state": np.zeros(8), "prompt": "x"}
    modes = [(p.frontend.processing.norm, p.frontend.processing.action_norm) for p in policies]
    assert modes == [("quantile", "quantile"), ("mean_std", None)]
    quantile, mean_std = (p.infer(given, noise=noise_of(p))["actions"] for p in policies)
    assert quantile.shape == mean_std.shape == (10, 7)
    assert np.abs(quantile - mean_std).max() > 0.01


def test_own_robot_in_json_with_every_key(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "arm.json"
    content = {
        "cameras": ["front"],
        "state": 8,
        "actions": 7,
        "norm": "mean_std",
        "state_in_prompt": False,
        "resize": "lerobot",
        "eps": "lerobot",
        "adapt": "none",
        "asset": "physical-intelligence/libero",
    }
    file.write_text(json.dumps(content))
    policy = Policy.load(home / "pi05_libero", file, progress=False)
    rules = policy.frontend.processing
    found = (rules.norm, rules.state_in_prompt, rules.resize, rules.eps, rules.views, rules.output_dim)
    assert found == ("mean_std", False, "lerobot", "lerobot", 1, 7)
    assert policy.robot.name == "arm"
    given = {"front": np.zeros((9, 9, 3), np.uint8), "state": np.zeros(8), "prompt": "x"}
    assert policy.infer(given)["actions"].shape == (10, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("actions = 7 = 8", "bench.toml: expected TOML in UTF-8, cannot read it"),
        ("camera = 1", "unknown key 'camera'; the keys are actions, adapt, asset"),
        ("delta = [1, 0]", "delta: expected a list of true and false"),
        ("delta = [true,true,true,true,true,true,true,true]", "delta: expected at most a flag for each of the 7"),
        ('norm = "minmax"', "norm: expected one of mean_std, quantile, identity, found 'minmax'"),
        ("state_in_prompt = 1", "state_in_prompt: expected true or false, found 1"),
        ('asset = ""', "asset: expected a text"),
    ],
)
def test_mistaken_robot_files(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Policy.load("unread", own(tmp_path, f"{OWN}{change}\n"))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("actions = 7", "actions = 0", "actions: expected a whole number from 1 to 1024, found 0"),
        ("actions = 7", "", "expected the keys cameras, state, actions, found no actions"),
        ('["gripper"]', '["wrist"]', "optional: expected some of observation/front, gripper, found wrist"),
        ("gripper_opening", "gripper", "names of cameras, state and ignored that differ.*found gripper; rename"),
        ("joints", "prompt", "none of images, prompt, task, state; found prompt"),
        ("joints = 6", "joints = -6", "state.joints: expected a whole number from 1 to 1024, found -6"),
        ('["observation/front", "gripper"]', "3", "cameras: expected a list of names, found 3"),
    ],
)
def test_contradictory_robot_files(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in OWN
    with pytest.raises(ConfigError, match=message):
        Policy.load("unread", own(tmp_path, OWN.replace(before, after)))


def test_no_robot(home: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"does not say for which robot it was trained; expected robot= one of libero"
    ):
        Policy.load(home / "pi05_libero")
    with pytest.raises(ConfigError, match=r"expected one of libero, droid, aloha, or a .toml or .json file"):
        Policy.load(home / "pi05_libero", "spot")
    with pytest.raises(ConfigError, match="expected a file that describes a robot, found none"):
        Policy.load(home / "pi05_libero", tmp_path / "none.toml")
    robot = own(tmp_path, OWN.replace("actions = 7", "actions = 40"))
    with pytest.raises(ConfigError, match="robot bench: expected at most 32 values of an action"):
        Policy.load(home / "pi05_libero", robot)


def test_a_state_longer_than_the_networks(home: Path, tmp_path: Path) -> None:
    robot = own(tmp_path, OWN.replace("joints = 6", "joints = 40"))
    with pytest.raises(ConfigError, match="32 of a state, which is what this checkpoint has, found 7 and 41"):
        Policy.load(home / "pi0_libero", robot, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": 3}, "tokenizer: expected a path, found 3"),
        ({"stats": []}, "stats: expected a path"),
        ({"seed": "x"}, "seed: expected a whole number, found 'x'"),
        ({"default_prompt": 3}, "default_prompt: expected a text"),
        ({"asset_id": True}, "asset_id: expected a text"),
        ({"processing": 3}, "processing: expected a name or a Processing"),
        ({"processing": "pi0_libero"}, "processing: 'pi0_libero' does not suit a pi05 checkpoint"),
        ({"robot": 3}, "robot: expected a name"),
        ({"robot": Robot((), (), 7, None, ())}, "views: expected a positive integer"),
        ({"prompt": ["a", 1]}, "prompt: expected a positive integer"),
        ({"prompt": 10**9}, "prompt: expected at most 4096, found 1000000000"),
        ({"batch": 10**9}, "batch: expected at most 4096"),
        ({"target": "tpu"}, "tpu"),
        ({"device": "moon"}, "device: expected 'cpu'"),
    ],
)
def test_mistaken_arguments(home: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CortexFlowError, match=message):
        Policy.load(home / "pi05_libero", **({"robot": "libero", "progress": False} | arguments))
    with pytest.raises(InputError, match="checkpoint: expected a directory or a file, found int"):
        Policy.load(3, "libero")  # type: ignore[arg-type]


# ---- options of load -------------------------------------------------------------------------------


def test_horizon_without_config(home: Path, tmp_path: Path) -> None:
    place = copy_of(home, "pi05_libero", tmp_path)
    told = json.loads((place / "config.json").read_text())["cortexflow"]
    (place / "config.json").unlink()
    del told["chunk_size"], told["model_type"]
    for robot, processing, horizon in (
        ("libero", None, 10),
        ("droid", None, 15),
        ("droid", "pi05_full_droid_finetune", 16),
    ):
        opened = open_checkpoint(place, config_overrides=told)
        policy = Policy.load(opened, robot, processing=processing, stats=home / f"pi05_{robot}", progress=False)
        assert policy.metadata["action_horizon"] == horizon
    assert Policy.load(opened, "libero", chunk=3, progress=False).infer(example("libero"))["actions"].shape == (3, 7)


def test_buckets_and_long_prompts(home: Path) -> None:
    given = example("libero", side=28)
    policy = Policy.load(home / "pi05_libero", "libero", prompt=(16, 40), progress=False)
    whole = Policy.load(home / "pi05_libero", "libero", prompt=40, progress=False)
    for text in ("a", "put the red block on the plate and close"):
        noise = noise_of(policy)
        one, other = (p.infer(given | {"prompt": text}, noise=noise)["actions"] for p in (policy, whole))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="prompt: expected at most 40 tokens"):
        policy.infer(given | {"prompt": "put the block " * 20})
    cut = Policy.load(home / "pi05_libero", "libero", prompt=40, truncate_prompt=True, progress=False)
    assert cut.infer(given | {"prompt": "put the block " * 20})["actions"].shape == (10, 7)


def test_prompts(home: Path, libero: Policy) -> None:
    given = example("libero", side=28)
    del given["prompt"]
    with pytest.raises(InputError, match="expected the instruction under prompt"):
        libero.infer(given)
    noise = noise_of(libero)
    named = Policy(libero.compiled, libero.frontend, libero.robot, default_prompt="do something")
    with_prompt = libero.infer(given | {"prompt": "do something"}, noise=noise)["actions"]
    np.testing.assert_array_equal(named.infer(given, noise=noise)["actions"], with_prompt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation/wrist_imgae": 1}, "found the unknown key observation/wrist_imgae"),
        ({"observation/image": None}, "found no picture of image"),
        ({"state": np.zeros(8)}, "expected one of observation/state and state, found both"),
        ({"observation/image": [[1]]}, "observation/image: expected an array or tensor of pixels, found list"),
        ({"observation/image": np.zeros((28, 28, 4), np.uint8)}, "observation/image: expected shape .*four channels"),
        ({"observation/image": np.full((28, 28, 3), 200.0)}, r"observation/image: .*in \[0, 1\], found \[200, 200\]"),
        ({"observation/image": np.zeros((2, 28, 28, 3), np.uint8)}, "expected one batch axis for all pictures"),
        ({"observation/state": np.zeros(7)}, r"observation/state: expected shape \(8,\), found \(7,\)"),
        ({"observation/state": np.zeros((1, 8))}, "this has a batch axis and the pictures have none"),
        ({"observation/state": [np.nan] * 8}, "observation/state: expected finite numbers, found nan"),
        ({"observation/state": "far"}, r"observation/state: expected shape \(8,\), found \(\)"),
        ({"prompt": 3}, "prompt: expected a text, or a list"),
        ({"prompt": ["a", "b"]}, "expected a text for each of one sample without a batch axis, found 2"),
        ({"prompt": b"\xff"}, "prompt: expected a text in UTF-8"),
        ({3: 3}, "found the unknown key 3"),
    ],
)
def test_mistaken_observations(libero: Policy, change: dict[Any, Any], message: str) -> None:
    with pytest.raises(CortexFlowError, match=message):
        libero.infer(example("libero", side=28) | change)


def test_a_huge_state_is_an_error_not_infinity(lerobot: Policy) -> None:
    given = {"observation.images.image": np.zeros((28, 28, 3), np.uint8), "task": "x"}
    with pytest.raises(InputError, match=r"state: expected values near those of the statistics, found 1e\+300"):
        lerobot.infer(given | {"observation.state": [1e300] * 8})


def test_small_configs_are_small() -> None:
    assert small("pi05").num_views == 2
