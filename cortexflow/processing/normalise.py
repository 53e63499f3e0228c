"""Numbers of the robot to numbers of the network and back.

Three codes, three sets of small constants (`RULES`); two ways to scale (`MODES`), and none. All in float64. Where
the statistics have a `mask`, values with a 0 in it pass as they are (OpenVLA's gripper).
Sources: openpi src/openpi/transforms.py; lerobot src/lerobot/processor/normalize_processor.py; openvla
prismatic/extern/hf/modeling_prismatic.py (predict_action), prismatic/vla/datasets/rlds/utils/data_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from cortexflow.errors import ConfigError, InputError
from cortexflow.processing.arrays import Floats, as_floats
from cortexflow.processing.stats import Stats, require

__all__ = [
    "MODES",
    "RULES",
    "Rule",
    "absolute_actions",
    "normalise",
    "pad_to",
    "unnormalise",
]


class Rule(NamedTuple):
    """The constants of one code: what is added to std and to q99 - q01 (in, out), what replaces a zero
    q99 - q01, and whether statistics longer than the vector are cut to its length on the way in."""

    std_in: float
    std_out: float
    range_in: float
    range_out: float
    range_if_zero: float
    cuts: bool


RULES: dict[str, Rule] = {
    "openpi": Rule(std_in=1e-6, std_out=1e-6, range_in=1e-6, range_out=1e-6, range_if_zero=0.0, cuts=True),
    "lerobot": Rule(std_in=1e-8, std_out=0.0, range_in=0.0, range_out=0.0, range_if_zero=1e-8, cuts=False),
    "openvla": Rule(std_in=1e-8, std_out=0.0, range_in=1e-8, range_out=0.0, range_if_zero=0.0, cuts=False),
}

MODES: dict[str, tuple[str, ...]] = {  # mode -> the statistics it reads
    "mean_std": ("mean", "std"),
    "quantile": ("q01", "q99"),
    "identity": (),
}


def normalise(values: ArrayLike | torch.Tensor, stats: Stats, group: str, *, mode: str, eps: str) -> Floats:
    """Robot units to network units, along the last axis: float64, the shape of `values` [..., n].

    `mean_std`: `(x - mean) / (std + e)`; `quantile`: `(x - q01) / d * 2 - 1`, d = q99 - q01 after the rule `eps`;
    `identity`: unchanged. Values are not clipped. `group` is `state` or `actions`. openpi's rule cuts statistics
    longer than n; LeRobot's does not.

    Raises InputError if `values` is not finite numbers or its length does not fit the statistics, CheckpointError
    if a statistic is missing, ConfigError for an unknown mode or rule.
    """
    x = as_floats(values, group)
    names, rule = _names(mode), _rule(eps)
    if not names:
        return x
    first, second = require(stats, group, names)
    size, known = x.shape[-1], len(first)
    if size > known or (size < known and not rule.cuts):
        raise InputError(
            f"{group}: expected {known} values (the length of the statistics), found {size}; "
            "give the vector the checkpoint was trained on, or its own statistics"
        )
    first, second = first[:size], second[:size]
    if mode == "mean_std":
        scaled = (x - first) / (second + rule.std_in)
    else:
        scaled = (x - first) / _range(first, second, rule.range_in, rule) * 2.0 - 1.0
    return _masked(scaled, x, stats[group])


def unnormalise(values: ArrayLike | torch.Tensor, stats: Stats, group: str, *, mode: str, eps: str) -> Floats:
    """Network units to robot units, along the last axis: float64, the shape of `values` [..., n].

    The inverse of `normalise`, up to what some rules leave out on the way back (1e-8 of std or of q99 - q01).
    Dimensions beyond the statistics have mean 0 and std 1 (`mean_std`) or pass (`quantile`); they are padding.

    Raises as `normalise` does, InputError also for `values` shorter than the statistics.
    """
    x = as_floats(values, group)
    names, rule = _names(mode), _rule(eps)
    if not names:
        return x
    first, second = require(stats, group, names)
    known = len(first)
    if x.shape[-1] < known:
        raise InputError(
            f"{group}: expected at least {known} values (the length of the statistics), found {x.shape[-1]}; "
            "un-normalise before slicing"
        )
    head, rest = x[..., :known], x[..., known:]
    if mode == "mean_std":
        scaled, rest = head * (second + rule.std_out) + first, rest * (1.0 + rule.std_out)
    else:
        scaled = (head + 1.0) / 2.0 * _range(first, second, rule.range_out, rule) + first
    return np.concatenate([_masked(scaled, head, stats[group]), rest], -1)


def pad_to(values: ArrayLike | torch.Tensor, size: int, name: str = "values") -> Floats:
    """Zeros appended on the last axis up to `size`: float64 [..., size]. Longer input is an InputError.

    Done after normalising. Source: openpi src/openpi/transforms.py (pad_to_dim).
    """
    x = as_floats(values, name)
    if x.shape[-1] > size:
        raise InputError(f"{name}: expected at most {size} values, found {x.shape[-1]}; drop the others")
    return np.concatenate([x, np.zeros((*x.shape[:-1], size - x.shape[-1]))], -1)


def absolute_actions(
    actions: ArrayLike | torch.Tensor, state: ArrayLike | torch.Tensor, mask: Sequence[bool]
) -> Floats:
    """Actions relative to the current state made absolute: `actions[..., i] += state[..., i]` where mask[i].

    `actions` is [..., horizon, n] in robot units, `state` the un-normalised state [m] or [..., m], the same for all
    steps of the horizon; `mask` has at most n and at most m flags, dimensions beyond it stay. Returns float64.
    Raises InputError if the axes do not fit. Source: openpi src/openpi/transforms.py (AbsoluteActions).
    """
    result, origin = as_floats(actions, "actions"), as_floats(state, "state")
    size = len(mask)
    if result.ndim < 2 or result.shape[-1] < size:
        raise InputError(f"actions: expected shape (..., horizon, at least {size}), found {result.shape}")
    if origin.shape[-1] < size or (origin.ndim > 1 and origin.shape[:-1] != result.shape[:-2]):
        raise InputError(
            f"state: expected at least {size} values, as one vector or with leading axes {result.shape[:-2]}, "
            f"found shape {origin.shape}; give the state the actions are relative to"
        )
    result[..., :size] += np.where(np.asarray(mask, bool), origin[..., None, :size], 0.0)
    return result


def _range(low: Floats, high: Floats, added: float, rule: Rule) -> Floats:
    width = high - low + added
    return np.where(width == 0.0, rule.range_if_zero, width) if rule.range_if_zero else width


def _masked(scaled: Floats, values: Floats, vectors: Mapping[str, Floats]) -> Floats:
    """`scaled` where the mask of the statistics, if there is one, is not 0; else `values`."""
    mask = vectors.get("mask")
    return scaled if mask is None else np.where(mask[: scaled.shape[-1]] != 0, scaled, values)


def _names(mode: str) -> tuple[str, ...]:
    if mode not in MODES:
        raise ConfigError(f"normalisation mode: expected one of {', '.join(MODES)}, found {mode!r}")
    return MODES[mode]


def _rule(eps: str) -> Rule:
    if eps not in RULES:
        raise ConfigError(f"eps rule: expected one of {', '.join(RULES)}, found {eps!r}")
    return RULES[eps]
