"""LeRobot's statistics: processor files, buffers of older versions, and what the files say about the arithmetic.

Sources: lerobot src/lerobot/processor/pipeline.py, normalize_processor.py, relative_action_processor.py and
migrate_policy_normalization.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cortexflow.errors import CheckpointError, ConfigError
from cortexflow.processing.stats import GROUPS, Stats, check_groups, make_stats, read_json

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"

# group -> (pipeline file, registry name of the step, feature key, feature type in norm_map)
LEROBOT_STEPS: dict[str, tuple[str, str, str, str]] = {
    "state": (PREPROCESSOR, "normalizer_processor", "observation.state", "STATE"),
    "actions": (POSTPROCESSOR, "unnormalizer_processor", "action", "ACTION"),
}
LEROBOT_BUFFERS = {  # group -> prefixes of the old buffers
    "state": ("normalize_inputs.buffer_observation_state.",),
    "actions": ("unnormalize_outputs.buffer_action.", "normalize_targets.buffer_action."),
}
LEROBOT_MODES = {"MEAN_STD": "mean_std", "QUANTILES": "quantile", "IDENTITY": "identity"}
LEROBOT_EPS = 1e-8
RELATIVE_STEPS = ("relative_actions_processor", "delta_actions_processor")  # the second is the name up to 0.5


def save_stats(stats: Stats, directory: str | Path, *, norm: str, action_norm: str | None = None) -> list[Path]:
    """Write `stats` in LeRobot's form into `directory` (made if absent); returns the four files written.

    The two pipelines hold the step with the statistics and no other; tensors are float32, as LeRobot keeps them.
    `norm` and `action_norm` (None: the same) are recorded as LeRobot's normalisation modes.
    Raises ConfigError for a mode LeRobot has no name for, CheckpointError for missing groups.
    """
    check_groups(stats, "stats")
    modes = {"state": norm, "actions": action_norm or norm}
    names = {mode: name for name, mode in LEROBOT_MODES.items()}
    if unknown := sorted(set(modes.values()) - set(names)):
        raise ConfigError(f"norm: expected one of {', '.join(names)}, found {', '.join(unknown)}")
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{LEROBOT_STEPS[group][2]}.{name}": value.astype(np.float32)
        for group in GROUPS
        for name, value in stats[group].items()
    }
    norm_map = {"VISUAL": "IDENTITY"} | {LEROBOT_STEPS[group][3]: names[modes[group]] for group in GROUPS}
    written = []
    for group, (file, step, _, _) in LEROBOT_STEPS.items():
        shown = GROUPS if group == "state" else ("actions",)
        features = {
            LEROBOT_STEPS[g][2]: {"type": LEROBOT_STEPS[g][3], "shape": [len(next(iter(stats[g].values())))]}
            for g in shown
        }
        stem = file.removesuffix(".json")
        state_file = f"{stem}_step_0_{step}.safetensors"
        config = {"eps": LEROBOT_EPS, "features": features, "norm_map": norm_map}
        steps = [{"registry_name": step, "config": config, "state_file": state_file}]
        (place / file).write_text(json.dumps({"name": stem, "steps": steps}, indent=2) + "\n")
        save_file(tensors, place / state_file)
        written += [place / file, place / state_file]
    return written


def lerobot_options(directory: str | Path) -> dict[str, Any]:
    """What LeRobot's processor files say about the arithmetic, under the names that `Processing` uses.

    Always `norm`, `action_norm`, `eps="lerobot"`, `resize="lerobot"`; `output_dim` if the action's shape is given;
    `prompt_length` if the tokenizer step has one; `delta_mask` if relative actions are switched on. The files do
    not tell the model family, nor whether the state was padded before it was discretised (LeRobot 0.4.x did).
    Raises CheckpointError for a file that cannot be read, an unknown normalisation or another eps.
    """
    place = Path(directory)
    steps = {group: _step(place, group) for group in GROUPS}
    modes = {group: _mode(step, group, place) for group, step in steps.items()}
    options: dict[str, Any] = {"norm": modes["state"], "action_norm": modes["actions"]}
    options |= {"eps": "lerobot", "resize": "lerobot"}
    features = _object(_config(steps["actions"]), "features", place / POSTPROCESSOR)
    feature = _object(features, "action", place / POSTPROCESSOR)
    if shape := _list(feature, "shape", place / POSTPROCESSOR):
        options["output_dim"] = _positive(shape[0], "the action's shape", place / POSTPROCESSOR)
    for step in _steps(place / PREPROCESSOR):
        config = _config(step)
        if step.get("registry_name") == "tokenizer_processor" and config.get("max_length"):
            options["prompt_length"] = _positive(config["max_length"], "max_length", place / PREPROCESSOR)
        if step.get("registry_name") in RELATIVE_STEPS and config.get("enabled"):
            options["delta_mask"] = _relative_mask(config, options.get("output_dim"), place / PREPROCESSOR)
    return options


def _read_tensors(file: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Any]:
    try:
        with safe_open(file, "np") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys() if key.startswith(prefixes)}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError) as reason:
        raise CheckpointError(f"{file}: expected safetensors, cannot read it ({reason}); copy it again") from reason


def _object(content: Mapping[str, Any], key: str, file: Path) -> Mapping[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{file}: expected {key} to be an object, found {value!r}; copy it again")
    return value


def _list(content: Mapping[str, Any], key: str, file: Path) -> list[Any]:
    value = content.get(key) or []
    if not isinstance(value, list):
        raise CheckpointError(f"{file}: expected {key} to be a list, found {value!r}; copy it again")
    return value


def _positive(value: Any, name: str, file: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{file}: expected {name} to be a positive integer, found {value!r}; copy it again")
    return value


def _steps(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise CheckpointError(f"statistics: {file} is missing; copy both {PREPROCESSOR} and {POSTPROCESSOR}")
    content = read_json(file)
    steps = content.get("steps") if isinstance(content, Mapping) else None
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise CheckpointError(f"{file}: expected an object with a list of steps, found something else; copy it again")
    return steps


def _step(place: Path, group: str) -> dict[str, Any]:
    file, name, _, _ = LEROBOT_STEPS[group]
    steps = _steps(place / file)
    for step in steps:
        if step.get("registry_name") == name:
            return step
    found = ", ".join(str(step.get("registry_name")) for step in steps)
    raise CheckpointError(f"{place / file}: expected a step {name}, found {found or 'no step'}")


def _config(step: Mapping[str, Any]) -> dict[str, Any]:
    config = step.get("config")
    return config if isinstance(config, dict) else {}


def _mode(step: Mapping[str, Any], group: str, place: Path) -> str:
    file, _, _, kind = LEROBOT_STEPS[group]
    config = _config(step)
    eps = config.get("eps", LEROBOT_EPS)
    if eps != LEROBOT_EPS:
        raise CheckpointError(
            f"{place / file}: expected eps {LEROBOT_EPS}, found {eps}; this arithmetic is not offered"
        )
    norm_map = _object(config, "norm_map", place / file)
    if kind not in norm_map:  # LeRobot would go on without scaling
        raise CheckpointError(
            f"{place / file}: expected norm_map to say how {kind} is scaled ({', '.join(LEROBOT_MODES)}), found "
            f"{', '.join(norm_map) or 'nothing'}; copy the file of the training run again"
        )
    mode = norm_map[kind]
    if not isinstance(mode, str) or mode not in LEROBOT_MODES:
        raise CheckpointError(f"{place / file}: expected {kind} to be one of {', '.join(LEROBOT_MODES)}, found {mode}")
    return LEROBOT_MODES[mode]


def _relative_mask(config: Mapping[str, Any], size: int | None, file: Path) -> tuple[bool, ...]:
    """One flag per action: True where the action is relative to the state. Excluded names match by substring."""
    excluded = [str(name).lower() for name in _list(config, "exclude_joints", file) if name]
    names = [str(name).lower() for name in _list(config, "action_names", file)]
    if size is None:
        raise CheckpointError(
            f"{file}: relative actions need the shape of the action feature; pass delta_mask yourself"
        )
    if not excluded or not names:
        return (True,) * size
    flags = [not any(token in name for token in excluded) for name in names[:size]]
    return tuple(flags + [True] * (size - len(flags)))


def load_lerobot(place: Path) -> Stats:
    groups: dict[str, dict[str, Any]] = {}
    for group, (file, name, feature, _) in LEROBOT_STEPS.items():
        state_file = _step(place, group).get("state_file")
        if not isinstance(state_file, str) or Path(state_file).name != state_file:
            raise CheckpointError(
                f"{place / file}: step {name} must name its statistics in state_file, found {state_file!r}; "
                "the checkpoint was saved without statistics (a base model?): pass those of your data set"
            )
        tensors = _read_tensors(place / state_file)
        prefix = feature + "."
        groups[group] = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if not groups[group]:
            found = ", ".join(sorted(tensors)) or "nothing"
            raise CheckpointError(f"{place / state_file}: expected keys {prefix}mean, ..., found {found}")
    return make_stats(groups, str(place))


def load_buffers(file: Path) -> Stats:
    tensors = _read_tensors(file, tuple(prefix for prefixes in LEROBOT_BUFFERS.values() for prefix in prefixes))
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for group, prefixes in LEROBOT_BUFFERS.items():
        for prefix in reversed(prefixes):  # the first prefix wins
            groups[group] |= {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
    if not all(groups.values()):
        raise CheckpointError(
            f"statistics: {PREPROCESSOR} (LeRobot) or norm_stats.json (openpi) is missing in {file.parent}, and "
            f"{file.name} has no buffers {', '.join(p[0] + '*' for p in LEROBOT_BUFFERS.values())} of older LeRobot "
            f"versions (found {', '.join(sorted(tensors)) or 'none'}); copy the statistics of the training run there"
        )
    return make_stats(groups, str(file))
