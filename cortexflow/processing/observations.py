"""Observation dictionaries as openpi's clients and LeRobot's data loaders write them, read as samples.

For a camera `image`, a state part `gripper_position` and the whole state, these keys mean the same:

| | openpi | LeRobot | OpenVLA |
|---|---|---|---|
| camera | `observation/image`, or `image` in a dictionary under `images` | `observation.images.image` | `image` |
| the first of them | | | `full_image` |
| state | `observation/state`, `state`, or parts: `observation/gripper_position` | `observation.state` | `state` |
| instruction | `prompt` | `task` | `instruction` |

Pictures are arrays, tensors or PIL's. A name that already is a key as it stands (`observation/front` in one's own
robot file) is taken too. A key that means nothing is an error: a misspelled camera must not be taken for an absent one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from cortexflow.errors import InputError
from cortexflow.processing.arrays import Floats, as_floats, shape_of
from cortexflow.processing.images import check_picture
from cortexflow.processing.robots import Robot

# What LeRobot's batches hold beside the observation, by key, beginning and end.
IGNORED = ("action", "actions", "timestamp", "frame_index", "episode_index", "index", "task_index", "info", "dataset")
PROMPTS = ("prompt", "task", "instruction")
FIRST_CAMERA = "full_image"  # what openvla's evaluation scripts call the picture
IGNORED_STARTS, IGNORED_ENDS = ("next.",), ("_is_pad",)

Role = tuple[str, str]  # ("camera", its name), ("part", its name), ("state", ""), ("prompt", ""), ("ignored", "")
MOST_SAMPLES = 4096


class Sample(NamedTuple):
    """One observation: a picture [H, W, 3] or None for each view, the state in the robot's units, the instruction."""

    images: list[NDArray[Any] | None]
    state: Floats | None
    prompt: str | None


def read_observation(robot: Robot, observation: Any) -> tuple[list[Sample], bool]:
    """The samples of an observation of `robot`, and whether they came with a leading batch axis.

    Pictures are [H, W, 3] or [3, H, W] (a first axis of 3 is the channels, as openpi decides it), uint8 or floats in
    [0, 1]; with a batch axis before, all of them, the state and the instructions have it (one instruction may
    serve all). None is as good as a key left out. Raises InputError, which names the key.
    """
    found = _by_role(robot, observation)
    pictures = {name: (key, value) for (kind, name), (key, value) in found.items() if kind == "camera"}
    count, batched = _extent(robot, pictures)
    state = _state(robot, found, count, batched)
    prompts = _prompts(found, count, batched)
    samples = []
    for i in range(count):
        images: dict[str | None, Any] = {}
        for camera, (key, value) in pictures.items():
            picture = _channels_last(value[i] if batched else value)
            images[camera] = check_picture(picture, f"{key}[{i}]" if batched else key, low=0.0)
        views = [images.get(camera) for camera in robot.cameras[: robot.views]]
        samples.append(Sample(views, None if state is None else state[i], prompts[i]))
    return samples, batched


def _spellings(name: str) -> tuple[str, ...]:
    return (name, f"observation/{name}", f"observation.{name}")


def _roles(robot: Robot) -> dict[str, Role]:
    roles: dict[str, Role] = dict.fromkeys(PROMPTS, ("prompt", ""))
    if robot.cameras and (first := robot.cameras[0]):
        roles[FIRST_CAMERA] = ("camera", first)
    for name in robot.ignored:
        roles |= dict.fromkeys((*_spellings(name), f"observation.images.{name}"), ("ignored", ""))
    for part, _ in robot.state:
        roles |= dict.fromkeys(_spellings(part), ("part", part))
    roles |= dict.fromkeys(_spellings("state"), ("state", ""))
    for camera in filter(None, robot.cameras):
        roles |= dict.fromkeys((*_spellings(camera), f"observation.images.{camera}"), ("camera", camera))
    return roles


def _by_role(robot: Robot, observation: Any) -> dict[Role, tuple[str, Any]]:
    """What each entry is: role → (its key, its value)."""
    if not isinstance(observation, Mapping):
        raise InputError(f"observation: expected a dictionary ({_expected(robot)}), found {type(observation).__name__}")
    roles = _roles(robot)
    cameras = {name: role for name, role in roles.items() if role[0] in ("camera", "ignored")}
    entries: list[tuple[str, Role | None, Any]] = []
    for key, value in observation.items():
        if key == "images" and isinstance(value, Mapping):
            entries += [(f"images[{name!r}]", _look_up(cameras, name), v) for name, v in value.items()]
        elif key != "images" or value is not None:
            entries.append((key, _look_up(roles, key), value))
    found: dict[Role, tuple[str, Any]] = {}
    unknown = []
    for key, role, value in entries:
        if role is None:
            unknown.append(str(key))
        elif value is not None and role[0] != "ignored":
            value = _from_pil(key, value) if isinstance(value, PIL.Image.Image) else value
            if role in found:
                raise InputError(f"observation: expected one of {found[role][0]} and {key}, found both; leave one out")
            found[role] = (key, value)
    if unknown:
        raise InputError(f"observation: {_expected(robot)}; found the unknown key {', '.join(unknown[:8])[:200]}")
    return found


def _from_pil(key: str, picture: PIL.Image.Image) -> NDArray[Any]:
    if picture.mode[0] in "IF":
        raise InputError(f"{key}: expected 8 bits per channel, found a PIL picture of mode {picture.mode}; convert it")
    try:
        return np.asarray(picture.convert("RGB"))
    except OSError as reason:  # a file opened late
        raise InputError(f"{key}: expected a picture, found one that PIL cannot read ({reason})") from reason


def _look_up(roles: Mapping[str, Role], key: Any) -> Role | None:
    if not isinstance(key, str):
        return None
    if key in roles:
        return roles[key]
    ignored = key in IGNORED or key.startswith(IGNORED_STARTS) or key.endswith(IGNORED_ENDS)
    return ("ignored", "") if ignored else None


def _expected(robot: Robot) -> str:
    cameras = [camera for camera in robot.cameras if camera]
    parts = [f"observation/{part}" for part, _ in robot.state if part != "state"]
    state = f"observation/state or {' and '.join(parts)}" if parts else "observation/state"
    return (
        f"{robot.name} has {', '.join(f'observation/{c}' for c in cameras)}, {state}, prompt (in LeRobot's words "
        f"{', '.join(f'observation.images.{c}' for c in cameras)}, observation.state, task)"
    )


def _extent(robot: Robot, pictures: dict[str, tuple[str, Any]]) -> tuple[int, bool]:
    """How many samples there are, and whether they have an axis of their own."""
    if missing := [camera for camera in robot.required if camera not in pictures]:
        raise InputError(f"observation: {_expected(robot)}; found no picture of {', '.join(missing)}")
    if not pictures:
        raise InputError(f"observation: {_expected(robot)}; found no picture at all, of which it needs one")
    shapes = {}
    for key, image in pictures.values():
        if not isinstance(image, (np.ndarray, torch.Tensor)):
            raise InputError(f"{key}: expected an array or tensor of pixels, found {type(image).__name__}")
        if isinstance(image, torch.Tensor) and image.layout != torch.strided:
            raise InputError(f"{key}: expected a dense tensor of pixels, found {image.layout}")
        if image.ndim not in (3, 4):
            raise InputError(f"{key}: expected a picture (H, W, 3) or (3, H, W), found shape {tuple(image.shape)}")
        shapes[key] = tuple(image.shape)
    counts = {shape[0] if len(shape) == 4 else None for shape in shapes.values()}
    if len(counts) > 1:
        listed = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
        raise InputError(f"observation: expected one batch axis for all pictures, or for none, found {listed}")
    count = counts.pop()
    if count is not None and not 1 <= count <= MOST_SAMPLES:
        raise InputError(f"observation: expected 1 to {MOST_SAMPLES} samples, found {count}")
    return (1, False) if count is None else (count, True)


def _channels_last(image: Any) -> Any:
    """[3, H, W] as [H, W, 3]; anything else as it is."""
    if image.shape[0] != 3:
        return image
    return image.permute(1, 2, 0) if isinstance(image, torch.Tensor) else image.transpose(1, 2, 0)


def _state(robot: Robot, found: Mapping[Role, tuple[str, Any]], count: int, batched: bool) -> Floats | None:
    """float64 [count, values]; None where the observation has none."""
    parts = {name: entry for (kind, name), entry in found.items() if kind == "part"}
    whole = found.get(("state", ""))
    if whole and parts:
        keys = ", ".join(key for key, _ in parts.values())
        raise InputError(f"observation: expected {whole[0]} or its parts, found it and {keys}; leave one out")
    if whole:
        return _vectors(*whole, robot.state_dim, count, batched)
    if not parts:
        return None
    if missing := [name for name, _ in robot.state if name not in parts]:
        raise InputError(f"observation: {_expected(robot)}; found no {', '.join(missing)}")
    return np.concatenate([_vectors(*parts[name], size, count, batched) for name, size in robot.state], axis=-1)


def _vectors(key: str, value: Any, size: int, count: int, batched: bool) -> Floats:
    """float64 [count, size] from [size], or from [count, size] with a batch axis; size 0: any."""
    shape = shape_of(value, key)
    wanted = (count, size) if batched else (size,)
    fits = len(shape) == len(wanted) and all(n in (0, m) for n, m in zip(wanted, shape, strict=True)) and 0 not in shape
    scalar = size == 1 and shape == wanted[:-1]  # openpi takes a gripper as a plain number
    if not fits and not scalar:
        names = f"({count}, {size or 'values'})" if batched else f"({size or 'values'},)"
        raise InputError(f"{key}: expected shape {names}, found {shape}{_why(shape, batched)}")
    if scalar:
        value = (value if isinstance(value, torch.Tensor) else np.asarray(value)).reshape(wanted)
    return as_floats(value, key).reshape(count, -1)


def _why(shape: tuple[int, ...], batched: bool) -> str:
    if batched and len(shape) == 1:
        return "; the pictures have a batch axis and this has none"
    if not batched and len(shape) == 2:
        return "; this has a batch axis and the pictures have none"
    return ""


def _prompts(found: Mapping[Role, tuple[str, Any]], count: int, batched: bool) -> list[str | None]:
    key, value = found.get(("prompt", ""), ("prompt", None))
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "USO":
            raise InputError(f"{key}: expected a text, found an array of {value.dtype}")
        value = value.tolist()
    if value is None or isinstance(value, (str, bytes)):
        return [None if value is None else _text(key, value)] * count
    if not isinstance(value, Sequence):
        raise InputError(f"{key}: expected a text, or a list of one for each sample, found {type(value).__name__}")
    if len(value) != count:
        samples = f"{count} samples" if batched else "one sample without a batch axis"
        raise InputError(f"{key}: expected a text for each of {samples}, found {len(value)}")
    return [_text(f"{key}[{i}]", text) for i, text in enumerate(value)]


def _text(key: str, value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as reason:
            raise InputError(f"{key}: expected a text in UTF-8, found other bytes ({reason})") from None
    if not isinstance(value, str):
        raise InputError(f"{key}: expected a text, found {type(value).__name__}")
    return str(value)
