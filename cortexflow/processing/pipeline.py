"""One observation in, model inputs out; the model's chunk in, robot actions out. The order is openpi's:

    in:  robot units -> normalise -> images to size -> prompt -> pad the state
    out: tokens to values -> un-normalise -> absolute -> slice -> robot units

Source: openpi src/openpi/policies/policy_config.py and src/openpi/training/config.py; openvla
prismatic/extern/hf/modeling_prismatic.py and experiments/robot.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from cortexflow.errors import ConfigError, InputError
from cortexflow.processing.action_tokens import LLAMA_BINS, Bins, check_ended, decode_actions
from cortexflow.processing.arrays import Floats, as_floats
from cortexflow.processing.images import RESIZES, Pixels, fit_pictures, unit_pictures
from cortexflow.processing.normalise import MODES, RULES, absolute_actions, normalise, pad_to, unnormalise
from cortexflow.processing.prompts import PROMPT_FORMATS, Encoder, as_bins, encode_prompt, prompt_format, state_bins
from cortexflow.processing.robots import ADAPTATIONS
from cortexflow.processing.stats import Stats
from cortexflow.processing.towers import DINO_SIGLIP, Tower, pixel_values

FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Processing:
    """Every choice in which checkpoints differ outside the network. Defaults: openpi's π0.5, every action returned.

    Raises ConfigError for values that no table has or that contradict each other.
    """

    views: int = 3  # camera slots
    image_size: int = 224  # pixels, square
    resize: str = "pil"  # one of images.RESIZES
    towers: tuple[Tower, ...] = ()  # how each image tower scales pixels; none: the network reads RGB in [-1, 1]
    norm: str = "quantile"  # a key of normalise.MODES, for the state and, unless action_norm says otherwise, actions
    action_norm: str | None = None
    eps: str = "openpi"  # a key of normalise.RULES
    prompt_format: str = "pi05"  # a key of prompts.PROMPT_FORMATS
    prompt_length: int = 200  # slots of the prompt bucket
    truncate_prompt: bool = False  # cut the end of a long prompt off instead of raising
    state_in_prompt: bool = True  # openpi's discrete_state_input
    pad_state_before_binning: bool = False  # LeRobot 0.4.0 to 0.4.4
    continuous_state: bool = False  # the network itself reads the state (π0)
    state_dim: int = 32  # of the network; shorter vectors are padded
    action_dim: int = 32  # of the network
    action_bins: Bins | None = None  # actions come as token ids; None: as values
    output_dim: int | None = None  # values per action the robot reads; None: all
    delta_mask: tuple[bool, ...] = ()  # True where an action is relative to the state; absolute beyond its end
    adapt: str = "none"  # a key of robots.ADAPTATIONS

    def __post_init__(self) -> None:
        tables: dict[str, Collection[Any]] = {
            "resize": RESIZES,
            "norm": MODES,
            "action_norm": (None, *MODES),
            "eps": RULES,
            "prompt_format": PROMPT_FORMATS,
            "adapt": ADAPTATIONS,
        }
        for name, table in tables.items():
            if (value := getattr(self, name)) not in table:
                known = ", ".join(str(key) for key in table)
                raise ConfigError(f"Processing.{name}: expected one of {known}, found {value!r}")
        for name in ("views", "image_size", "prompt_length", "state_dim", "action_dim"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"Processing.{name}: expected a positive integer, found {value!r}")
        if self.state_in_prompt and prompt_format(self.prompt_format).with_state is None:
            raise ConfigError(
                f"Processing: prompt_format {self.prompt_format!r} has no place for the state; "
                "set state_in_prompt=False"
            )
        size = self.action_dim if self.output_dim is None else self.output_dim
        if not 1 <= size <= self.action_dim or len(self.delta_mask) > self.action_dim:
            raise ConfigError(
                f"Processing: action_dim={self.action_dim} must not be less than output_dim={self.output_dim} "
                f"and the {len(self.delta_mask)} flags of delta_mask"
            )


class ModelInputs(TypedDict):
    """What `prepare_observation` returns: V views of S pixels, L prompt slots; pixels in one of two forms."""

    images: NotRequired[Pixels]  # float32 [V, S, S, 3] in [-1, 1]
    pixel_values: NotRequired[Pixels]  # float32 [V * 3 * towers, S, S], where each tower scales them by itself
    image_mask: NDArray[np.bool_]  # [V]
    tokens: NDArray[np.int32]  # [L]
    token_mask: NDArray[np.bool_]  # [L]
    state: NDArray[np.float32]  # [state_dim], normalised, padded with zeros


def suits(processing: Processing, family: str) -> bool:
    """Whether a network of the family reads and answers what the processing gives and takes."""

    def kind(rules: Processing) -> tuple[bool, bool, bool]:
        return rules.continuous_state, bool(rules.towers), rules.action_bins is not None

    return family in FAMILIES and kind(processing) == kind(FAMILIES[family])


def prepare_observation(
    processing: Processing,
    *,
    images: Any,
    prompt: str,
    tokenizer: Encoder,
    state: ArrayLike | torch.Tensor | None = None,
    stats: Stats | None = None,
    state_tokens: ArrayLike | torch.Tensor | None = None,
    pixel_low: float = -1.0,
) -> ModelInputs:
    """The model inputs of one observation.

    `images`: as for `as_model_images`, float pixels in [pixel_low, 1]. `prompt`: the instruction. `state`: the robot's
    own state [n], in its units, n <= state_dim; needed if the network reads it (`continuous_state`) or the prompt
    contains it. `stats`: from `load_stats`, needed with a state unless `norm` is `identity`. `state_tokens`: bins from
    -1 to 255 [m] that go into the prompt instead of those of `state`.

    Without a state, or where nothing reads it, the `state` entry is zeros.
    Raises InputError naming the argument that does not fit, CheckpointError for statistics that are not there.
    """
    size = processing.image_size
    pictures = fit_pictures(images, views=processing.views, size=size, method=processing.resize, low=pixel_low)
    vector = _network_state(processing, state, stats)
    tokens, token_mask = encode_prompt(
        tokenizer,
        prompt,
        format=processing.prompt_format,
        length=processing.prompt_length,
        bins=_prompt_bins(processing, vector, state_tokens),
        truncate=processing.truncate_prompt,
    )
    padded = np.zeros(processing.state_dim) if vector is None else pad_to(vector, processing.state_dim, "state")
    made: ModelInputs = {
        "image_mask": np.array([picture is not None for picture in pictures]),
        "tokens": tokens,
        "token_mask": token_mask,
        "state": padded.astype(np.float32),
    }
    if processing.towers:
        made["pixel_values"] = pixel_values(pictures, processing.towers)
    else:
        made["images"] = unit_pictures(pictures, size)
    return made


def finish_actions(
    processing: Processing,
    actions: ArrayLike | torch.Tensor,
    *,
    state: ArrayLike | torch.Tensor | None = None,
    stats: Stats | None = None,
) -> Floats:
    """The network's chunk as robot actions: float64 [..., horizon, output_dim] from [..., horizon, action_dim].

    Where actions are tokens (`action_bins`), `actions` is their ids, [..., horizon * action_dim] integers.
    `state` is the robot's own state of the same observation, in its units, [n] or [..., n]; needed if `delta_mask`
    has a True. `stats`: from `load_stats`, needed unless the mode of the actions is `identity`.

    Raises InputError if an argument does not fit or the actions are not finite, CheckpointError for statistics
    that are not there.
    """
    if processing.action_bins:
        check_ended(actions, processing.action_bins)
        values = decode_actions(actions, processing.action_bins)
        if not values.shape or values.shape[-1] % processing.action_dim or not values.size:
            raise InputError(
                f"actions: expected a token id for each of the {processing.action_dim} values of an action, found "
                f"shape {values.shape}; give the network's tokens as they are"
            )
        actions = values.reshape(*values.shape[:-1], -1, processing.action_dim)
    chunk = as_floats(actions, "actions")
    if chunk.ndim < 2 or chunk.shape[-1] != processing.action_dim:
        raise InputError(
            f"actions: expected shape (..., horizon, {processing.action_dim}), found {chunk.shape}; "
            "give the network's output as it is"
        )
    mode = processing.action_norm or processing.norm
    chunk = unnormalise(chunk, _needed(stats, mode, "actions"), "actions", mode=mode, eps=processing.eps)
    adaptation = ADAPTATIONS[processing.adapt]
    if any(processing.delta_mask):
        if state is None:
            raise InputError("state: expected the robot's state, found None; these actions are relative to it")
        chunk = absolute_actions(chunk, adaptation.state(as_floats(state, "state")), processing.delta_mask)
    return adaptation.actions(chunk[..., : processing.output_dim])


def _network_state(processing: Processing, state: Any, stats: Stats | None) -> Floats | None:
    """The robot's state normalised, at its true length; None if there is none and none is needed, or read."""
    if processing.action_bins:  # a network that emits tokens reads no state
        return None
    if state is None:
        if processing.continuous_state:
            raise InputError(f"state: expected up to {processing.state_dim} values, found None; this network reads it")
        return None
    vector = ADAPTATIONS[processing.adapt].state(as_floats(state, "state", ndim=1))
    if len(vector) > processing.state_dim:
        raise InputError(f"state: expected at most {processing.state_dim} values, found {len(vector)}")
    stats = _needed(stats, processing.norm, "state")
    scaled = normalise(vector, stats, "state", mode=processing.norm, eps=processing.eps)
    if np.abs(scaled).max(initial=0.0) > FLOAT32_MAX:
        worst = int(np.abs(scaled).argmax())
        raise InputError(
            f"state: expected values near those of the statistics, found {vector[worst]:g} at index {worst}, which "
            "no float32 holds once it is scaled; check the sensor and the units"
        )
    return scaled


def _prompt_bins(processing: Processing, vector: Floats | None, state_tokens: Any) -> NDArray[np.int64] | None:
    if not processing.state_in_prompt:
        if state_tokens is not None:
            raise InputError(
                f"state_tokens: expected None, since the prompt of {processing.prompt_format!r} is without state here; "
                "leave them out or set state_in_prompt=True"
            )
        return None
    if state_tokens is not None:
        return as_bins(state_tokens)
    if vector is None:
        raise InputError("state: expected a state or state_tokens, found neither; the prompt contains the state")
    return state_bins(vector, pad_to=processing.state_dim if processing.pad_state_before_binning else None)


def _needed(stats: Stats | None, mode: str, group: str) -> Stats:
    if stats is None and MODES[mode]:
        raise InputError(
            f"stats: expected statistics to scale the {group} by {mode}, found None; pass load_stats(checkpoint), "
            "or choose 'identity' for values that are scaled already"
        )
    return stats or {}


_ALOHA_DELTA = ((True,) * 6 + (False,)) * 2
_PI0 = Processing(norm="mean_std", prompt_format="pi0", prompt_length=48, state_in_prompt=False, continuous_state=True)
_PI05 = Processing()
_OPENVLA = Processing(
    views=1,
    resize="openvla",
    towers=DINO_SIGLIP,
    eps="openvla",
    prompt_format="openvla",
    prompt_length=64,
    state_in_prompt=False,
    action_dim=7,
    action_bins=LLAMA_BINS,
)

FAMILIES = {"pi0": _PI0, "pi05": _PI05, "openvla": _OPENVLA}  # settings by model family, of no robot in particular
ONE_CAMERA = {"openvla": "image"}  # families that see one picture, and its name where no robot has another

# openpi's configurations (src/openpi/training/config.py), OpenVLA's evaluations and LeRobot's defaults.
PROCESSINGS: dict[str, Processing] = {
    "pi0_aloha": replace(_PI0, output_dim=14, delta_mask=_ALOHA_DELTA, adapt="aloha"),
    "pi0_aloha_sim": replace(_PI0, output_dim=14, adapt="aloha"),
    "pi0_droid": replace(_PI0, output_dim=8),
    "pi0_libero": replace(_PI0, output_dim=7, delta_mask=(True,) * 6 + (False,)),
    "pi05_aloha": replace(_PI05, output_dim=14, delta_mask=_ALOHA_DELTA, adapt="aloha"),
    "pi05_droid": replace(_PI05, output_dim=8),
    "pi05_libero": replace(_PI05, output_dim=7, state_in_prompt=False),
    "pi05_full_droid_finetune": replace(_PI05, output_dim=8, delta_mask=(True,) * 7 + (False,)),
    "pi05_droid_finetune": replace(_PI05, output_dim=8),
    "openvla": _OPENVLA,
    "openvla_v01": replace(_OPENVLA, prompt_format="openvla_v01"),
    "openvla_libero": replace(_OPENVLA, resize="openvla_crop", output_dim=7, adapt="libero_gripper"),
    "lerobot_pi0": replace(_PI0, eps="lerobot", resize="lerobot", prompt_format="pi0_lerobot"),
    "lerobot_pi05": replace(_PI05, eps="lerobot", resize="lerobot"),
}

HORIZONS = {  # actions per prediction of openpi's configurations, for checkpoints without a config.json
    "pi0_aloha": 50,
    "pi0_aloha_sim": 50,
    "pi0_droid": 10,
    "pi0_libero": 50,
    "pi05_aloha": 50,
    "pi05_droid": 15,
    "pi05_libero": 10,
    "pi05_full_droid_finetune": 16,
    "pi05_droid_finetune": 16,
}
