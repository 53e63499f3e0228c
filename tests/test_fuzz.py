"""Whatever a user gives, a call ends in a result or in an exception of this package that says what was wrong.

Three doors: observation dictionaries, checkpoint directories with one file damaged, and files that describe a robot.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortexflow.errors import ConfigError, CortexFlowError
from cortexflow.policy import Policy
from cortexflow.processing import load_robot, load_tokenizer, make_robot
from tests.models.openvla_cases import write_checkpoint
from tests.processing.directories import example, random_stats, write_lerobot, write_openpi
from tests.processing.llama import json_text, trained_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

ROBOT = {"cameras": ["front", "wrist"], "state": {"joints": 7, "gripper": 1}, "actions": 7, "optional": ["wrist"]}


def fuzzed(examples: int) -> Callable[[Any], Any]:
    """The same examples in every run, and none kept between runs."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def survives(call: Callable[[], Any], shape: tuple[int, ...] | None = None) -> None:
    """`call` returns finite actions, or raises one of ours with something to read."""
    try:
        found = call()
    except CortexFlowError as error:
        assert len(str(error)) > 20
        return
    actions = found["actions"]
    assert np.isfinite(actions).all()
    assert shape is None or actions.shape[-2:] == shape


# ---- what may stand in an observation --------------------------------------------------------------


class Unwilling:
    """Has a shape, and refuses to be an array."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise ValueError("no array of me")

    @property
    def shape(self) -> tuple[int, ...]:
        return (8,)


def _recursive() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


NUMPY = (
    "bool",
    "int8",
    "uint8",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "object",
    "U3",
    "M8[s]",
)
TORCH = (
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
)
VECTORS = [(), (0,), (1,), (7,), (8,), (14,), (1, 8), (2, 8), (8, 1)]
PICTURES = [
    (28, 28),
    (28, 28, 3),
    (3, 28, 28),
    (28, 28, 4),
    (28, 28, 1),
    (0, 28, 3),
    (3, 3, 3),
    (1, 500, 3),
    (31, 9, 3),
]
BATCHES = [(1, 28, 28, 3), (2, 3, 28, 28), (2, 3, 9, 31), (0, 28, 28, 3), (1, 1, 28, 28, 3)]
SHAPES = st.sampled_from([*VECTORS, *PICTURES, *BATCHES])
FILL = st.sampled_from([0.0, 1.0, 0.5, -1.0, 255.0, math.nan, math.inf, -math.inf, 1e30, 1e300, 1e-300])


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    shape, dtype, fill = draw(SHAPES), draw(st.sampled_from(NUMPY)), draw(FILL)
    with np.errstate(all="ignore"):
        if dtype in ("object", "U3"):
            return np.full(shape, draw(st.sampled_from(["a", "pick"])), dtype)
        return np.full(shape, int(fill) if abs(fill) < 300 else 0 if dtype == "M8[s]" else fill).astype(dtype)


@st.composite
def tensors(draw: st.DrawFn) -> Any:
    shape, dtype, fill = draw(SHAPES), draw(st.sampled_from(TORCH)), draw(FILL)
    value = torch.full(shape, fill, dtype=torch.float64).nan_to_num(0, 0, 0) if not dtype.is_floating_point else None
    tensor = (torch.full(shape, fill, dtype=torch.float64) if value is None else value).to(dtype)
    kind = draw(st.sampled_from(["plain", "plain", "grad", "sparse", "meta"]))
    if kind == "grad" and (dtype.is_floating_point or dtype.is_complex) and dtype.itemsize > 1:
        return tensor.requires_grad_()
    if kind == "sparse" and shape and dtype.itemsize > 1:
        return tensor.to_sparse()
    return tensor.to("meta") if kind == "meta" else tensor


HUGE = (
    lambda: np.broadcast_to(np.uint8(0), (10**5, 10**5, 3)),
    lambda: np.broadcast_to(np.float32(0), (10**6, 10**5)),
    lambda: torch.zeros(1, dtype=torch.uint8).expand(10**6, 10**6, 3),
    lambda: np.broadcast_to(np.uint8(0), (10**6, 28, 28, 3)),
    lambda: [10**400] * 8,
    lambda: 10**5000,
    lambda: "pick up " * 200_000,
    lambda: np.zeros((1, 200_000, 3), np.uint8),
    lambda: np.zeros((200_000, 1, 3), np.float32),
)
JUNK = (
    _recursive,
    object,
    Unwilling,
    set,
    dict,
    lambda: type,
    lambda: range(8),
    lambda: {"front": 1},
    lambda: [[1], [2, 3]],
)
VALUES = st.one_of(
    arrays(),
    tensors(),
    st.sampled_from(HUGE).map(lambda make: make()),
    st.sampled_from(JUNK).map(lambda make: make()),
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=8),
    st.text(max_size=30) | st.just("half \ud800") | st.just("\x00") | st.just(" \n_") | st.just("{text} {state}"),
    st.lists(st.floats() | st.text(max_size=3) | st.none(), max_size=15),
)
CAMERA_KEYS = ["observation/image", "observation.images.image", "images", "wrist", "full_image"]
STATE_KEYS = [
    "state",
    "observation/state",
    "observation.state",
    "observation/gripper_position",
    "observation/joint_position",
]
OTHER_KEYS = ["prompt", "task", "instruction", "", "action"]
KEYS = st.sampled_from([*CAMERA_KEYS, *STATE_KEYS, *OTHER_KEYS]) | st.one_of(
    st.text(max_size=5), st.integers(), st.none()
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("fuzzed")
    return {
        "libero": write_openpi(home / "openpi", "pi05", random_stats(8, 7), "physical-intelligence/libero", 3),
        "droid": write_openpi(home / "droid", "pi0", random_stats(8, 8), "droid", 3),
        "lerobot": write_lerobot(home / "lerobot", "pi05", random_stats(8, 7)),
        "openvla": _write_openvla(home / "openvla"),
    }


def _write_openvla(place: Path) -> Path:
    """A fine-tuned checkpoint with every file that may lie beside the weights."""
    tables = json.loads((write_checkpoint(place) / "config.json").read_text())["norm_stats"]
    (place / "dataset_statistics.json").write_text(json.dumps({"mine": tables["bridge_orig"]}))
    (place / "tokenizer.model").write_bytes(trained_bytes())
    return place


TOLD = {"libero": "libero", "droid": "droid", "lerobot": None, "openvla": None}


@pytest.fixture(scope="module")
def policies(checkpoints: dict[str, Path]) -> dict[str, Policy]:
    return {name: Policy.load(place, TOLD[name], progress=False) for name, place in checkpoints.items()}


LEROBOT_EXAMPLE = {
    "observation.images.image": torch.full((2, 3, 28, 28), 0.5),
    "observation.images.image2": torch.full((2, 3, 28, 28), 0.25),
    "observation.state": torch.zeros(2, 8),
    "task": ["pick", "place"],
}
OPENVLA_EXAMPLE = {"image": np.full((28, 28, 3), 99, np.uint8), "instruction": "pick"}


def observed(name: str) -> dict[Any, Any]:
    given = {"lerobot": LEROBOT_EXAMPLE, "openvla": OPENVLA_EXAMPLE}
    return dict(given[name]) if name in given else example(name, side=28)


@fuzzed(1500)
@given(data=st.data())
def test_observations(policies: dict[str, Policy], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(policies)), "policy")
    policy = policies[name]
    observation = observed(name)
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2]), "changes")):
        kind = data.draw(st.sampled_from(["replace"] * 8 + ["add", "drop", "rename"]), "kind")
        key = data.draw(KEYS if kind == "add" or not observation else st.sampled_from(list(observation)), "key")
        if kind in ("replace", "add"):
            observation[key] = data.draw(VALUES, "value")
        else:
            value = observation.pop(key, None)
            if kind == "rename":
                observation[data.draw(KEYS, "new key")] = value
    survives(lambda: policy.infer(observation), (policy.metadata["action_horizon"], policy.metadata["action_dim"]))


@fuzzed(100)
@given(observation=VALUES, noise=VALUES)
def test_observations_that_are_none(policies: dict[str, Policy], observation: Any, noise: Any) -> None:
    survives(lambda: policies["libero"].infer(observation))
    survives(lambda: policies["libero"].infer(example("libero", side=28), noise=noise))


# ---- damaged directories ---------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.sampled_from([10**9, 10**30, -1, 0, 1e308, 1e-12, math.nan, math.inf])
    | st.text(max_size=6)
    | st.sampled_from(["pi0", "pi05", "VISUAL", "QUANTILES", "openvla", "../../etc", "gemma_2b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def _paths(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside some JSON; of long lists only the first."""
    found = [path] if path else []
    items: list[tuple[Any, Any]] = []
    if isinstance(content, dict):
        items = list(content.items())
    elif isinstance(content, list):
        items = list(enumerate(content))[:1]
    for key, value in items:
        found += _paths(value, (*path, key))
    return found


@st.composite
def changed_json(draw: st.DrawFn, content: Any) -> Any:
    """Some JSON with one value replaced, dropped or moved under another key."""
    made = copy.deepcopy(content)
    *way, last = draw(st.sampled_from(_paths(made)))
    inner = made
    for key in way:
        inner = inner[key]
    kind = draw(st.sampled_from(["replace", "replace", "replace", "drop", "rename"]))
    if kind == "replace":
        inner[last] = draw(JSON)
    else:
        value = inner.pop(last)
        if kind == "rename" and isinstance(inner, dict):
            inner[draw(st.text(max_size=5))] = value
    return made


@st.composite
def damaged(draw: st.DrawFn, name: str, content: bytes) -> bytes | None:
    """What is left of a file; None if it is gone."""
    kinds = ["truncated", "empty", "random", "flipped", "other", "gone", "deep"]
    kind = draw(st.sampled_from(kinds + ["changed"] * 8 if name.endswith(".json") else kinds))
    if kind == "truncated":
        return content[: draw(st.integers(0, len(content) - 1))]
    if kind == "random":
        return draw(st.binary(min_size=1, max_size=200))
    if kind == "flipped":
        damage = bytearray(content)
        for _ in range(draw(st.integers(1, 4))):
            damage[draw(st.integers(0, min(len(damage), 4000) - 1))] = draw(st.integers(0, 255))
        return bytes(damage)
    if kind == "deep":
        return b'{"a":' * 4_000
    if kind == "other":
        return json.dumps(draw(JSON)).encode()
    if kind == "changed":
        return json.dumps(draw(changed_json(json.loads(content)))).encode()
    return b"" if kind == "empty" else None


@pytest.mark.parametrize("name", ["libero", "droid", "lerobot", "openvla"])
def test_damaged_directories(checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    place = Path(shutil.copytree(checkpoints[name], tmp_path / name))
    files = {str(f.relative_to(place)): f.read_bytes() for f in sorted(place.rglob("*")) if f.is_file()}
    observation = observed(name)
    if name == "lerobot":
        observation = {k: v[0] for k, v in observation.items()}

    def load_and_act() -> Any:
        return Policy.load(place, TOLD[name], progress=False).infer(observation)

    survives(load_and_act)

    @fuzzed(120)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        text = [file for file in sorted(files) if file.endswith(".json")]
        file = data.draw(st.sampled_from(sorted(files) + text * 2), "file")
        left = data.draw(damaged(file, files[file]), "left")
        if left is None:
            (place / file).unlink()
        else:
            (place / file).write_bytes(left)
        try:
            survives(load_and_act)
        finally:
            (place / file).write_bytes(files[file])

    run()


@fuzzed(150)
@given(data=st.data())
def test_damaged_tokenizer_json(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    pytest.importorskip("tokenizers")
    file = tmp_path_factory.getbasetemp() / "tokenizer.json"
    left = data.draw(damaged(file.name, json_text(trained_bytes()).encode()), "left")
    file.unlink(missing_ok=True)
    if left is not None:
        file.write_bytes(left)
    try:
        ids = load_tokenizer(file).encode("pick up the cup, Käse 🤖\n")
    except CortexFlowError as error:
        assert len(str(error)) > 20
    else:
        assert all(isinstance(i, int) for i in ids)


# ---- files that describe a robot -------------------------------------------------------------------


@fuzzed(300)
@given(content=JSON | changed_json({**ROBOT, "delta": [True], "norm": "quantile", "asset": "x", "ignored": ["d"]}))
def test_robot_descriptions(content: Any) -> None:
    try:
        robot = make_robot(content)
    except ConfigError as error:
        assert str(error).startswith("robot: ")
    else:
        assert robot.views >= 1
        assert robot.state_dim >= 1


@fuzzed(150)
@given(suffix=st.sampled_from([".toml", ".json"]), data=st.data())
def test_robot_files(tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject) -> None:
    file = tmp_path_factory.getbasetemp() / f"robot{suffix}"
    toml = b'cameras = ["front", "wrist"]\nstate = { joints = 7, gripper = 1 }\nactions = 7\n'
    whole = toml if suffix == ".toml" else json.dumps(ROBOT).encode()
    left = data.draw(damaged(file.name, whole), "left")
    if left is None:
        file.unlink(missing_ok=True)
    else:
        file.write_bytes(left)
    try:
        load_robot(file)
    except ConfigError as error:
        assert str(file) in str(error)


@fuzzed(40)
@given(content=changed_json({**ROBOT, "delta": [True], "norm": "quantile", "eps": "openpi", "state_in_prompt": True}))
def test_robots_of_changed_files_act(checkpoints: dict[str, Path], content: Any) -> None:
    def load_and_act() -> Any:
        policy = Policy.load(checkpoints["libero"], make_robot(content), progress=False)
        picture = np.zeros((28, 28, 3), np.uint8)
        parts = {name: np.zeros(size) for name, size in policy.robot.state}
        return policy.infer({camera: picture for camera in policy.robot.cameras if camera} | parts | {"prompt": "x"})

    survives(load_and_act)
