"""What each robot sends and expects: camera order, state layout, action length, and Aloha's own units.

Source: openpi src/openpi/policies/{libero,droid,aloha}_policy.py and the clients in examples/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from cortexflow.errors import ConfigError, InputError
from cortexflow.processing.arrays import Floats, as_floats

SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")  # camera slots of π0 and π0.5, in this order


@dataclass(frozen=True)
class Robot:
    """One row of `ROBOTS`, or a user's own (`robot_file.load_robot`)."""

    cameras: tuple[str | None, ...]  # the robot's camera in each of SLOTS; None: never there
    state: tuple[tuple[str, int], ...]  # parts of the state vector in order, with their lengths; none: any vector
    actions: int  # values per action that the robot reads
    executed: int | None  # steps of a chunk the reference client executes before it asks again; None: its own choice
    required: tuple[str, ...]  # cameras without which there is no observation
    ignored: tuple[str, ...] = ()  # cameras that may be given and are not used
    turned: bool = False  # the reference client rotates the simulator's images by 180 degrees before sending them
    clip: float | None = None  # the reference client clips actions to [-clip, clip]
    name: str = "this robot"
    asset: str | None = None  # openpi's id of its statistics, where a checkpoint has those of several robots
    default_prompt: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # fields of Processing that its own file states

    @property
    def state_dim(self) -> int:
        """Length of the state vector; 0 where it is not known."""
        return sum(size for _, size in self.state)

    @property
    def views(self) -> int:
        """Slots up to the last that has a camera: those without one are masked, and leaving them out is the same."""
        return max((i for i, camera in enumerate(self.cameras, 1) if camera is not None), default=0)


ROBOTS: dict[str, Robot] = {
    "libero": Robot(
        cameras=("image", "wrist_image", None),
        state=(("eef_position", 3), ("eef_axis_angle", 3), ("gripper_position", 2)),
        actions=7,
        executed=5,
        required=("image", "wrist_image"),
        turned=True,
        name="libero",
        asset="physical-intelligence/libero",
    ),
    "droid": Robot(
        cameras=("exterior_image_1_left", "wrist_image_left", None),
        state=(("joint_position", 7), ("gripper_position", 1)),
        actions=8,
        executed=8,
        required=("exterior_image_1_left", "wrist_image_left"),
        clip=1.0,
        name="droid",
        asset="droid",
    ),
    "aloha": Robot(
        cameras=("cam_high", "cam_left_wrist", "cam_right_wrist"),
        state=(("left_joints", 6), ("left_gripper", 1), ("right_joints", 6), ("right_gripper", 1)),
        actions=14,
        executed=None,
        required=("cam_high",),
        ignored=("cam_low",),
        name="aloha",
        asset="trossen",
    ),
}


def of_one_view(row: Robot) -> Robot:
    """The robot as a network of one picture sees it: its first camera; the others may be given and are not used."""
    cameras = [camera for camera in row.cameras if camera is not None]
    return replace(row, cameras=tuple(cameras[:1]), required=(), ignored=(*row.ignored, *cameras[1:]))


def robot(name: str) -> Robot:
    """The row of `ROBOTS` called `name`; ConfigError, listing the rows, if there is none."""
    if name not in ROBOTS:
        raise ConfigError(f"robot: expected one of {', '.join(ROBOTS)}, found {name!r}")
    return ROBOTS[name]


def camera_views(name: str, cameras: Mapping[str, Any], *, turn: bool = False) -> list[Any]:
    """The robot's cameras as the list that `as_model_images` takes: one entry per slot, None where absent.

    `turn=True` rotates every picture by 180 degrees: for LIBERO images as the simulator renders them
    (`Robot.turned`). Raises InputError for an unknown camera or a missing required one.
    """
    row = robot(name)
    known = [camera for camera in row.cameras if camera is not None]
    if unknown := sorted(set(cameras) - set(known) - set(row.ignored)):
        raise InputError(f"cameras: {name} has {', '.join(known)}, found {', '.join(unknown)}; rename them")
    if missing := [camera for camera in row.required if cameras.get(camera) is None]:
        raise InputError(f"cameras: {name} needs {', '.join(row.required)}, without {', '.join(missing)} it cannot act")
    views = [None if camera is None else cameras.get(camera) for camera in row.cameras]
    return [view if view is None or not turn else rotate_180(view) for view in views]


def rotate_180(image: Any) -> Any:
    """A picture [H, W, 3] turned by 180 degrees (openpi examples/libero/main.py)."""
    if isinstance(image, torch.Tensor):
        return image.flip(0, 1)
    return np.ascontiguousarray(image[::-1, ::-1])


def join_state(name: str, parts: Mapping[str, Any]) -> Floats:
    """The robot's state vector, float64 [state_dim], from its named parts (a part of length 1 may be a number).

    Raises InputError for missing or unknown parts and for parts of another length.
    """
    row = robot(name)
    sizes = dict(row.state)
    if set(parts) != set(sizes):
        raise InputError(f"state: {name} has the parts {', '.join(sizes)}, found {', '.join(parts) or 'none'}")
    vectors = {part: as_floats(np.atleast_1d(np.asarray(parts[part])), f"state {part}", ndim=1) for part in sizes}
    for part, size in sizes.items():
        if len(vectors[part]) != size:
            raise InputError(f"state: {part} of {name} must have {size} values, found {len(vectors[part])}")
    return np.concatenate(list(vectors.values()))


ALOHA_FLIP = np.array([1, -1, -1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1], np.float64)
ALOHA_GRIPPERS = (6, 13)
ALOHA_OPENING = (0.01844, 0.05800)  # metres: puppet gripper closed, open
ALOHA_ARM, ALOHA_HORN = 0.036, 0.022  # metres: linkage of the gripper
PI_GRIPPER = (0.5476, 1.6296)  # radians: gripper closed, open in the angular space of the base models
ALOHA_JOINT = (-0.6213, 1.4910)  # radians: puppet gripper joint closed, open


def aloha_state(state: ArrayLike | torch.Tensor) -> Floats:
    """Aloha's state in the units of the base models: float64 [..., 14] from [..., 14].

    Joints in radians, three signs turned; a gripper opening in 0..1 becomes an angle, 0 closed and 1 open.
    Raises InputError for another length. Source: openpi src/openpi/policies/aloha_policy.py (adapt_to_pi).
    """
    result = _aloha(state, "state")
    opening = result[..., ALOHA_GRIPPERS] * (ALOHA_OPENING[1] - ALOHA_OPENING[0]) + ALOHA_OPENING[0]
    with np.errstate(divide="ignore"):
        sine = (ALOHA_HORN**2 + opening**2 - ALOHA_ARM**2) / (2 * ALOHA_HORN * opening)
    angle = np.arcsin(np.clip(sine, -1.0, 1.0))
    result[..., ALOHA_GRIPPERS] = (angle - PI_GRIPPER[0]) / (PI_GRIPPER[1] - PI_GRIPPER[0])
    return result


def aloha_actions(actions: ArrayLike | torch.Tensor) -> Floats:
    """Actions of the base models in Aloha's units: float64 [..., 14] from [..., 14]; after un-normalising,
    after making absolute and after slicing.

    Raises InputError for another length. Source: openpi src/openpi/policies/aloha_policy.py (adapt_to_pi).
    """
    result = _aloha(actions, "actions")
    angle = result[..., ALOHA_GRIPPERS] + PI_GRIPPER[0]
    result[..., ALOHA_GRIPPERS] = (angle - ALOHA_JOINT[0]) / (ALOHA_JOINT[1] - ALOHA_JOINT[0])
    return result


def _aloha(values: ArrayLike | torch.Tensor, name: str) -> Floats:
    result = as_floats(values, name)
    if result.shape[-1] != len(ALOHA_FLIP):
        raise InputError(
            f"{name}: Aloha has {len(ALOHA_FLIP)} values, (6 joints, gripper) twice; found {result.shape[-1]}"
        )
    return result * ALOHA_FLIP


def libero_gripper(actions: ArrayLike | torch.Tensor) -> Floats:
    """OpenVLA's last value, 1 open and 0 closed, as LIBERO's gripper takes it: -1 opens, 1 closes. float64 [..., n].

    Source: openvla experiments/robot/robot_utils.py (normalize_gripper_action with binarize, invert_gripper_action).
    """
    result = as_floats(actions, "actions")
    result[..., -1] = -np.sign(2.0 * result[..., -1] - 1.0)
    return result


class Adaptation(NamedTuple):
    """One row of `ADAPTATIONS`: the robot's state on the way in, its actions on the way out."""

    state: Callable[[ArrayLike], Floats]
    actions: Callable[[ArrayLike], Floats]


ADAPTATIONS: dict[str, Adaptation] = {
    "none": Adaptation(lambda state: as_floats(state, "state"), lambda actions: as_floats(actions, "actions")),
    "aloha": Adaptation(aloha_state, aloha_actions),
    "libero_gripper": Adaptation(lambda state: as_floats(state, "state"), libero_gripper),
}
