"""From a checkpoint's directory to what stands around the network: cameras, normalisation, tokenizer.

`load_frontend` reads it, `model_inputs` turns an observation of the robot into inputs of a compiled
policy, `robot_actions` turns the policy's chunk into actions of the robot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cortexflow.checkpoints import Checkpoint
from cortexflow.checkpoints.tensors import read_json
from cortexflow.errors import CheckpointError, ConfigError, InputError
from cortexflow.ir import Type
from cortexflow.models import Signature, VLAModelType
from cortexflow.processing import (
    FAMILIES,
    ONE_CAMERA,
    PROCESSINGS,
    Processing,
    PromptTokenizer,
    Stats,
    asset_ids,
    check_stats,
    finish_actions,
    lerobot_options,
    load_stats,
    load_tokenizer,
    prepare_observation,
    read_image,
    stats_file,
    suits,
)
from cortexflow.processing.action_tokens import Bins
from cortexflow.processing.arrays import Floats
from cortexflow.processing.normalise import MODES
from cortexflow.processing.robots import SLOTS
from cortexflow.processing.stats_lerobot import LEROBOT_STEPS
from cortexflow.processing.towers import PREPROCESSOR_CONFIG, Tower, load_towers

CAMERA = "observation.images."  # LeRobot's prefix of a camera's name


@dataclass(frozen=True)
class FixedPrompt:
    """In a tokenizer's place where a file holds the embeddings of one prompt: its tokens are 0, 1, 2, ..."""

    length: int

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """All tokens for the piece that begins the prompt, none for the others."""
        return list(range(self.length)) if bos else []


@dataclass(frozen=True)
class Frontend:
    """Everything between a robot and a compiled policy. `cameras` names the views in the policy's order."""

    processing: Processing
    cameras: tuple[str, ...]
    tokenizer: PromptTokenizer | FixedPrompt
    stats: Stats | None  # None where the values are scaled already


def load_frontend(
    checkpoint: Checkpoint,
    signature: Signature,
    *,
    processing: str | Processing | None = None,
    tokenizer: str | Path | None = None,
    stats: str | Path | None = None,
    asset_id: str | None = None,
) -> Frontend:
    """Read what belongs to a checkpoint from its directory; what is given here is taken instead.

    `processing` is a `Processing` or a key of `PROCESSINGS`; LeRobot's directories tell it, others must be told.
    `tokenizer` and `stats` are files or directories; `asset_id` chooses among the statistics of several robots.
    Statistics are checked for what the processing reads. Raises ConfigError, CheckpointError.
    """
    rules = find_processing(checkpoint, signature, processing)
    fixed = checkpoint.fixed_prompt
    return Frontend(
        rules,
        camera_names(checkpoint, signature.views),
        FixedPrompt(fixed) if fixed else load_tokenizer(tokenizer or directory(checkpoint)),
        find_stats(rules, stats or directory(checkpoint), asset_id) if any(statistics_read(rules).values()) else None,
    )


def statistics_read(rules: Processing) -> dict[str, tuple[str, ...]]:
    """Which statistics of the state and of the actions a processing reads."""
    state = () if rules.action_bins else MODES[rules.norm]  # a network that emits tokens reads no state
    return {"state": state, "actions": MODES[rules.action_norm or rules.norm]}


def find_stats(
    rules: Processing,
    place: str | Path,
    asset_id: str | None = None,
    sizes: Mapping[str, tuple[int, ...]] | None = None,
) -> Stats:
    """The statistics at `place`, checked for all that `rules` read, in one of the lengths `sizes` of each group.

    Raises CheckpointError, which names the file, the key and what was found.
    """
    found, file = load_stats(place, asset_id=asset_id), stats_file(place, asset_id=asset_id)
    for group, names in statistics_read(rules).items():
        where = file / LEROBOT_STEPS[group][0] if file.is_dir() else file
        check_stats(found, where, group, names, (sizes or {}).get(group, ()))
    return found


def directory(checkpoint: Checkpoint) -> Path:
    """Where a checkpoint's statistics and tokenizer are looked for."""
    if checkpoint.path is None:
        raise ConfigError("this checkpoint is a dictionary without a directory: give processing, tokenizer and stats")
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def find_processing(checkpoint: Checkpoint, signature: Signature, chosen: str | Processing | None = None) -> Processing:
    """The arithmetic around the network, in the dimensions of the checkpoint and the signature."""
    config = checkpoint.config
    family = VLAModelType(config.model_type).value
    if chosen is not None:
        rules = _preset(chosen) if isinstance(chosen, str) else chosen
        if not suits(rules, family):
            raise ConfigError(f"processing: {chosen!r} does not suit a {family} checkpoint; {_presets(family)}")
    elif checkpoint.format == "lerobot":
        rules = replace(PROCESSINGS[f"lerobot_{family}"], **lerobot_options(directory(checkpoint)))
    elif needs_no_robot(checkpoint):
        rules = FAMILIES[family]
    else:
        raise ConfigError(
            f"processing: {checkpoint.path or 'the dictionary'} ({checkpoint.format}) does not say for which robot it "
            f"was trained; {_presets(family)} (on the command line: --processing NAME)"
        )
    if rules.towers and not isinstance(chosen, Processing):
        rules = replace(rules, towers=checkpoint_towers(checkpoint))
    if rules.action_bins:
        rules = replace(rules, action_bins=Bins(config.num_action_bins, config.vocab_size - config.vocab_padding))
    return replace(
        rules,
        views=signature.views,
        image_size=config.image_size,
        prompt_length=signature.prompt,
        state_dim=config.state_dim,
        action_dim=config.action_dim,
    )


def needs_no_robot(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint acts without being told for which robot.

    LeRobot's say it themselves; a family that sees one picture needs no more than the statistics of a data set.
    """
    return checkpoint.format == "lerobot" or family_of(checkpoint) in ONE_CAMERA


def reads_state(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's family reads the robot's state; one that emits tokens does not."""
    return FAMILIES[family_of(checkpoint)].action_bins is None


def several_statistics(checkpoint: Checkpoint) -> bool:
    """Whether there are statistics of several robots or data sets in a checkpoint's directory."""
    return checkpoint.path is not None and len(asset_ids(directory(checkpoint))) > 1


def family_of(checkpoint: Checkpoint) -> str:
    """The name of a checkpoint's family."""
    return VLAModelType(checkpoint.config.model_type).value


def checkpoint_towers(checkpoint: Checkpoint) -> tuple[Tower, ...]:
    """How the image towers of a checkpoint scale pixels, as the file beside it says; of a dictionary as released."""
    if checkpoint.path is None:
        return FAMILIES[family_of(checkpoint)].towers
    place, config = directory(checkpoint), checkpoint.config
    size, towers = load_towers(place)
    if size != config.image_size:
        raise CheckpointError(
            f"{place / PREPROCESSOR_CONFIG}: expected pictures of {config.image_size} pixels, as the weights do, found "
            f"{size}; copy the file that belongs to this checkpoint"
        )
    return towers


def camera_names(checkpoint: Checkpoint, views: int) -> tuple[str, ...]:
    """Names of the views in order: LeRobot's config.json has them, other formats have openpi's slots, or one name."""
    if (family := family_of(checkpoint)) in ONE_CAMERA:
        return (ONE_CAMERA[family],)
    names: list[str] = []
    if checkpoint.format == "lerobot" and checkpoint.path is not None:
        file = directory(checkpoint) / "config.json"
        features = read_json(file).get("input_features") if file.is_file() else None
        if isinstance(features, Mapping):
            visual = [n for n, f in features.items() if isinstance(f, Mapping) and f.get("type") == "VISUAL"]
            names = [name.removeprefix(CAMERA) for name in visual]
    known = names or list(SLOTS)
    return tuple(known[i] if i < len(known) else f"camera_{i}" for i in range(views))


def find_camera(name: str, cameras: tuple[str, ...]) -> str:
    """The camera that a name means: itself, its number, or the only one that contains it.

    `wrist` means the left one where there are two: one-armed robots use that slot. Raises InputError.
    """
    if name in cameras:
        return name
    if name.isdecimal() and int(name) < len(cameras):
        return cameras[int(name)]
    fitting = [camera for camera in cameras if name and name in camera]
    if name == "wrist" and len(fitting) > 1:
        fitting = [camera for camera in fitting if "left" in camera] or fitting
    if len(fitting) == 1:
        return fitting[0]
    found = f"a name that fits {' and '.join(fitting)}" if fitting else "none of them"
    raise InputError(f"camera {name!r}: expected one of {', '.join(cameras)}, or a part of one name, found {found}")


def model_inputs(
    frontend: Frontend,
    inputs: Mapping[str, Type],
    *,
    images: Mapping[str, Any],
    prompt: str | None = None,
    state: Any = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """What a compiled policy of these `inputs` takes, for one observation; noise, if any, is drawn from `seed`.

    `images` are files or arrays by camera (see `find_camera`); a camera left out is absent. `state` is the
    robot's own, in its units. `prompt` is the instruction; a file that holds a fixed one takes none.
    Raises InputError.
    """
    _check_prompt(frontend, prompt)
    pictures: dict[str, Any] = {}
    for name, image in images.items():
        camera = find_camera(name, frontend.cameras)
        if camera in pictures:
            raise InputError(f"camera {camera}: expected one image, found two ({', '.join(images)})")
        pictures[camera] = read_image(image) if isinstance(image, (str, Path)) else image
    views = [pictures.get(camera) for camera in frontend.cameras]
    prepared = network_inputs(frontend, views, prompt, state)
    made = {name: torch.from_numpy(value)[None] for name, value in prepared.items() if name in inputs}
    if "noise" in inputs:
        made["noise"] = torch.randn(inputs["noise"].shape, generator=torch.Generator().manual_seed(seed))
    return made


def network_inputs(
    frontend: Frontend, views: Sequence[Any], prompt: str | None, state: Any, pixel_low: float = -1.0
) -> Mapping[str, Any]:
    """`prepare_observation` for pictures in the views' order, None where absent; float pixels in [pixel_low, 1]."""
    _check_prompt(frontend, prompt)
    return prepare_observation(
        frontend.processing,
        images=list(views),
        prompt=prompt or "",
        tokenizer=frontend.tokenizer,
        state=state,
        stats=frontend.stats,
        pixel_low=pixel_low,
    )


def _check_prompt(frontend: Frontend, prompt: str | None) -> None:
    if isinstance(frontend.tokenizer, FixedPrompt):
        if prompt is not None:
            raise InputError(
                f"prompt: this file holds the embeddings of one prompt, of {frontend.tokenizer.length} tokens, and "
                f"knows no other; found {prompt!r}. Leave it out, or convert the original again for this prompt"
            )
    elif prompt is None:
        raise InputError("prompt: expected the instruction, found None (on the command line: --prompt TEXT)")


def network_actions(results: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Of what a compiled policy returns the normalised actions [batch, chunk, action]."""
    return results if isinstance(results, Tensor) else results["actions"]


def network_answer(frontend: Frontend, results: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Of what a compiled policy returns what `robot_actions` takes: `token_ids` [batch, chunk * action] of a network
    that emits tokens, else the `actions` [batch, chunk, action]."""
    if frontend.processing.action_bins and not isinstance(results, Tensor):
        return results["token_ids"]
    return network_actions(results)


def robot_actions(frontend: Frontend, answer: Tensor, state: Any = None) -> Floats:
    """The policy's answer for one observation [1, ...] as the robot's actions [chunk, values], in its units."""
    return finish_actions(frontend.processing, answer[0], state=state, stats=frontend.stats)


def typical_state(frontend: Frontend) -> Floats:
    """A state the robot could be in: the mean of its statistics, or the middle of their range."""
    known = frontend.stats["state"] if frontend.stats else {}
    if not known:
        return np.zeros(frontend.processing.state_dim)
    return known["mean"] if "mean" in known else (known["q01"] + known["q99"]) / 2


def _preset(name: str) -> Processing:
    if name not in PROCESSINGS:
        raise ConfigError(f"processing: expected one of {', '.join(PROCESSINGS)}, found {name!r}")
    return PROCESSINGS[name]


def _presets(family: str) -> str:
    return f"choose one of {', '.join(name for name, rules in PROCESSINGS.items() if suits(rules, family))}"
