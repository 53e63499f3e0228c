"""Robots: camera slots, state layout, Aloha's units against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cortexflow.errors import ConfigError, InputError
from cortexflow.processing.images import as_model_images
from cortexflow.processing.robots import (
    ADAPTATIONS,
    ROBOTS,
    SLOTS,
    aloha_actions,
    aloha_state,
    camera_views,
    join_state,
    robot,
    rotate_180,
)


def test_aloha_agrees_with_reference(golden: dict[str, Any]) -> None:
    case = golden["aloha"]
    np.testing.assert_allclose(aloha_state(case["state"]), case["state_adapted"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(aloha_actions(case["model_actions"]), case["actions_adapted"], rtol=0, atol=1e-6)
    stacked = aloha_state(np.stack([case["state"]] * 2))
    np.testing.assert_array_equal(stacked[1], aloha_state(case["state"]))


def test_adaptations_leave_their_argument_alone(golden: dict[str, Any]) -> None:
    for row in ADAPTATIONS.values():
        state = np.array(golden["aloha"]["state"])
        row.state(state)[:] = 0
        row.actions(state)[:] = 0
        np.testing.assert_array_equal(state, golden["aloha"]["state"])


@pytest.mark.parametrize("function", [aloha_state, aloha_actions])
def test_aloha_length(function: Any) -> None:
    with pytest.raises(InputError, match=r"Aloha has 14 values.*found 7"):
        function(np.zeros(7))


@pytest.mark.parametrize("name", sorted(ROBOTS))
def test_rows_are_consistent(name: str) -> None:
    row = robot(name)
    assert len(row.cameras) == len(SLOTS)
    assert set(row.required) <= {camera for camera in row.cameras if camera}
    assert row.state_dim == {"libero": 8, "droid": 8, "aloha": 14}[name]
    assert row.actions == {"libero": 7, "droid": 8, "aloha": 14}[name]


def test_camera_views_fill_slots() -> None:
    front, wrist = np.zeros((4, 4, 3), np.uint8), np.ones((4, 4, 3), np.uint8)
    views = camera_views("libero", {"wrist_image": wrist, "image": front})
    assert views[0] is front
    assert views[1] is wrist
    assert views[2] is None
    assert as_model_images(views, views=3, size=4, method="pil")[1].tolist() == [True, True, False]
    aloha = camera_views("aloha", {"cam_high": front, "cam_low": wrist, "cam_right_wrist": wrist})
    assert [view is None for view in aloha] == [False, True, False]


def test_turning() -> None:
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    turned = camera_views("libero", {"image": image, "wrist_image": torch.from_numpy(image)}, turn=True)
    np.testing.assert_array_equal(turned[0][0, 0], image[1, 2])
    np.testing.assert_array_equal(turned[1].numpy(), turned[0])
    np.testing.assert_array_equal(rotate_180(turned[0]), image)


def test_camera_errors() -> None:
    with pytest.raises(InputError, match="droid has exterior_image_1_left, wrist_image_left, found front"):
        camera_views("droid", {"front": 0, "wrist_image_left": 0})
    with pytest.raises(InputError, match="without wrist_image_left it cannot act"):
        camera_views("droid", {"exterior_image_1_left": 0})
    with pytest.raises(ConfigError, match="libero, droid, aloha, found 'spot'"):
        camera_views("spot", {})


def test_join_state() -> None:
    parts = {"gripper_position": 0.5, "joint_position": np.arange(7.0)}
    assert join_state("droid", parts).tolist() == [0, 1, 2, 3, 4, 5, 6, 0.5]
    with pytest.raises(InputError, match="parts joint_position, gripper_position, found joint_position"):
        join_state("droid", {"joint_position": np.zeros(7)})
    with pytest.raises(InputError, match="joint_position of droid must have 7 values, found 6"):
        join_state("droid", {"joint_position": np.zeros(6), "gripper_position": 0.0})
