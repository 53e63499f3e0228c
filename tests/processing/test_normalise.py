"""Normalisation against the reference, its inverse, lengths, absolute actions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexflow.errors import CheckpointError, ConfigError, InputError
from cortexflow.processing.normalise import MODES, RULES, absolute_actions, normalise, pad_to, unnormalise
from cortexflow.processing.stats import Stats, make_stats

MASKS = {
    "absolute_libero_delta": (True,) * 6 + (False,),
    "absolute_aloha_delta": ((True,) * 6 + (False,)) * 2,
    "absolute_droid_joint_position": (True,) * 7 + (False,),
}


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, np.asarray(expected), rtol=1e-12, atol=1e-6)
    assert found.dtype == np.float64


@pytest.mark.parametrize("mode", ["mean_std", "quantile"])
def test_agrees_with_reference(golden: dict[str, Any], stats: Stats, mode: str) -> None:
    expected = golden[mode]
    state = normalise(golden["state_raw"], stats, "state", mode=mode, eps="openpi")
    close(state, expected["state_normalised"])
    padded = pad_to(state, 32)
    close(padded, expected["state_padded_32"])
    raw = unnormalise(padded, stats, "state", mode=mode, eps="openpi")
    close(raw, expected["state_unnormalised"])
    actions = unnormalise(golden["model_actions"], stats, "actions", mode=mode, eps="openpi")
    close(actions, expected["actions_unnormalised"])
    for name, mask in MASKS.items():
        close(absolute_actions(actions, raw, mask), expected[name])
        close(absolute_actions(actions, pad_to(golden["state_raw"], 32), mask), expected[name])


def test_lerobot_rule_by_hand() -> None:
    stats = make_stats(
        {
            "state": {"mean": [1.0, 2.0], "std": [0.5, 0.0], "q01": [-1.0, 3.0], "q99": [3.0, 3.0]},
            "actions": {"mean": [1.0, 2.0], "std": [0.5, 0.0], "q01": [-1.0, 3.0], "q99": [3.0, 3.0]},
        }
    )
    close(normalise([2.0, 2.0], stats, "state", mode="mean_std", eps="lerobot"), [1 / (0.5 + 1e-8), 0.0])
    close(unnormalise([2.0, 5.0], stats, "actions", mode="mean_std", eps="lerobot"), [2.0, 2.0])
    close(normalise([0.0, 3.0], stats, "state", mode="quantile", eps="lerobot"), [-0.5, -1.0])
    close(normalise([0.0, 4.0], stats, "state", mode="quantile", eps="lerobot")[1:], [2e8 - 1])
    close(unnormalise([-0.5, 9.0, 7.0], stats, "actions", mode="quantile", eps="lerobot"), [0.0, 3 + 5e-8, 7.0])


def test_padding_dimensions_beyond_the_statistics() -> None:
    stats = make_stats({"state": {"mean": [0.0], "std": [1.0]}, "actions": {"mean": [5.0], "std": [2.0]}})
    close(unnormalise([[1.0, 1.0]], stats, "actions", mode="mean_std", eps="openpi"), [[7 + 1e-6, 1 + 1e-6]])
    assert unnormalise([1.0, 1.0], stats, "actions", mode="mean_std", eps="lerobot").tolist() == [7.0, 1.0]


# Their inverses leave out 1e-8 of what was divided by.
INEXACT = {("mean_std", "lerobot"), ("mean_std", "openvla"), ("quantile", "openvla")}

numbers = st.floats(-1e3, 1e3, allow_nan=False)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Stats, np.ndarray, str, str]:
    size = draw(st.integers(1, 6))
    eps = draw(st.sampled_from(sorted(RULES)))
    mode = draw(st.sampled_from(sorted(MODES)))
    vector = st.lists(numbers, min_size=size, max_size=size)
    inexact = (mode, eps) in INEXACT
    std = draw(st.lists(st.floats(0.1 if inexact else 0.0, 1e2), min_size=size, max_size=size))
    low = np.array(draw(vector))
    widths = st.floats(0.1, 1e2) if inexact else st.one_of(st.just(0.0), st.floats(1e-3, 1e2))
    width = draw(st.lists(widths, min_size=size, max_size=size))
    group = {"mean": draw(vector), "std": std, "q01": low, "q99": low + width}
    x = draw(st.lists(vector, min_size=1, max_size=3))
    return make_stats({"state": group, "actions": group}), np.array(x), mode, eps


@settings(max_examples=200, deadline=None)
@given(cases())
def test_unnormalise_inverts_normalise(case: tuple[Stats, np.ndarray, str, str]) -> None:
    stats, x, mode, eps = case
    there = normalise(x, stats, "actions", mode=mode, eps=eps)
    back = unnormalise(there, stats, "actions", mode=mode, eps=eps)
    np.testing.assert_allclose(back, x, rtol=1e-6, atol=1e-3 if (mode, eps) in INEXACT else 1e-6)


def test_lengths(stats: Stats) -> None:
    short = normalise([0.5] * 5, stats, "state", mode="mean_std", eps="openpi")  # openpi cuts the statistics
    close(short, normalise([0.5] * 8, stats, "state", mode="mean_std", eps="openpi")[:5])
    with pytest.raises(InputError, match=r"state: expected 8 values.*found 5"):
        normalise([0.5] * 5, stats, "state", mode="mean_std", eps="lerobot")
    for eps in RULES:
        with pytest.raises(InputError, match=r"state: expected 8 values.*found 9"):
            normalise([0.5] * 9, stats, "state", mode="quantile", eps=eps)
        with pytest.raises(InputError, match=r"actions: expected at least 7 values.*found 6"):
            unnormalise([[0.5] * 6], stats, "actions", mode="quantile", eps=eps)


def test_identity_and_torch(stats: Stats) -> None:
    x = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16, requires_grad=True)
    close(normalise(x, {}, "state", mode="identity", eps="openpi"), [[1.0, 2.0]])
    close(unnormalise(x, {}, "actions", mode="identity", eps="lerobot"), [[1.0, 2.0]])


def test_names_and_missing_statistics(stats: Stats) -> None:
    with pytest.raises(ConfigError, match="mean_std, quantile, identity, found 'minmax'"):
        normalise([0.0], stats, "state", mode="minmax", eps="openpi")
    with pytest.raises(ConfigError, match="openpi, lerobot, openvla, found 'none'"):
        normalise([0.0], stats, "state", mode="mean_std", eps="none")
    only_mean = make_stats({g: {"mean": [0.0], "std": [1.0]} for g in ("state", "actions")})
    with pytest.raises(CheckpointError, match="'state' lacks q01, q99, found mean, std"):
        normalise([0.0], only_mean, "state", mode="quantile", eps="openpi")
    with pytest.raises(CheckpointError, match="expected the keys state and actions, found action"):
        normalise([0.0], {"action": {}}, "state", mode="quantile", eps="openpi")
    for bad in ([np.inf], ["a"], [1j], 3.0, [[1.0], [1.0, 2.0]]):
        with pytest.raises(InputError, match="state: expected"):
            normalise(bad, stats, "state", mode="mean_std", eps="openpi")


def test_pad_to() -> None:
    assert pad_to([[1.0], [2.0]], 3).tolist() == [[1, 0, 0], [2, 0, 0]]
    with pytest.raises(InputError, match="state: expected at most 1 values, found 2"):
        pad_to([1.0, 2.0], 1, "state")


def test_absolute_actions_in_batches() -> None:
    actions = np.arange(12.0).reshape(2, 2, 3)
    state = np.array([[10.0, 20.0], [30.0, 40.0]])
    found = absolute_actions(actions, state, (True, False))
    np.testing.assert_array_equal(found - actions, [[[10, 0, 0]] * 2, [[30, 0, 0]] * 2])
    np.testing.assert_array_equal(actions, np.arange(12.0).reshape(2, 2, 3))
    np.testing.assert_array_equal(absolute_actions(actions, state[0], (False, True))[1] - actions[1], [[0, 20, 0]] * 2)


def test_absolute_actions_errors() -> None:
    with pytest.raises(InputError, match="state: expected at least 3 values"):
        absolute_actions(np.zeros((5, 4)), np.zeros(2), (True,) * 3)
    with pytest.raises(InputError, match=r"actions: expected shape .*at least 3"):
        absolute_actions(np.zeros((5, 2)), np.zeros(4), (True,) * 3)
    with pytest.raises(InputError, match="leading axes"):
        absolute_actions(np.zeros((2, 5, 4)), np.zeros((3, 4)), (True,) * 3)


def test_masked_values_pass_as_they_are() -> None:
    group = {"q01": np.array([0.0, 5.0]), "q99": np.array([4.0, 9.0]), "mask": np.array([1.0, 0.0])}
    stats = {"state": {}, "actions": group}
    assert unnormalise([[0.5, 0.3]], stats, "actions", mode="quantile", eps="openvla").tolist() == [[3.0, 0.3]]
    close(normalise([[3.0, 0.3]], stats, "actions", mode="quantile", eps="openvla"), [[0.5, 0.3]])
