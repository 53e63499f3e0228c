"""Normalisation statistics on disk: openpi's JSON, LeRobot's processor files, LeRobot's old buffers.

In memory they are always the same plain dictionary, `Stats`: `{"state": {...}, "actions": {...}}`, each holding
float64 vectors `mean`, `std`, `q01`, `q99` as far as the file has them.

| form | files |
|---|---|
| openpi | `norm_stats.json`, or `assets/<asset id>/norm_stats.json` below the checkpoint |
| LeRobot | `policy_preprocessor.json`, `policy_postprocessor.json`, the safetensors file named by a step of each |
| LeRobot, before processors | buffers `normalize_inputs.buffer_observation_state.mean`, ... in `model.safetensors` |

Sources: openpi src/openpi/shared/normalize.py; lerobot src/lerobot/processor/pipeline.py,
normalize_processor.py, relative_action_processor.py and migrate_policy_normalization.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cortexflow.errors import CheckpointError, ConfigError
from cortexflow.processing.arrays import Floats

Stats = dict[str, dict[str, Floats]]

STATISTICS = ("mean", "std", "q01", "q99")
GROUPS = ("state", "actions")

OPENPI_FILE = "norm_stats.json"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
WEIGHTS_FILE = "model.safetensors"

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
LARGEST = 1e30  # of a statistic: float32 holds it with room for the arithmetic
RELATIVE_STEPS = ("relative_actions_processor", "delta_actions_processor")  # the second is the name up to 0.5


def load_stats(path: str | Path, *, asset_id: str | None = None) -> Stats:
    """The statistics at `path`, float64 vectors [n] per group and statistic.

    `path` is a `norm_stats.json` file or a checkpoint directory in one of the three forms (tried in the order of
    the module's table, LeRobot's processors before `assets/`). `asset_id` chooses among several
    `assets/<asset id>/norm_stats.json` (`trossen`, `droid`, `physical-intelligence/libero`) and asks for openpi's.

    Raises CheckpointError if nothing is found, a file cannot be read, a group is missing (the message lists the
    keys that are there), lengths differ within a group, or a number is not finite.
    """
    read, file = _source(Path(path), asset_id)
    return read(file)


def stats_file(path: str | Path, *, asset_id: str | None = None) -> Path:
    """The file or directory that `load_stats` reads, for messages; raises as it does if there is none."""
    return _source(Path(path), asset_id)[1]


def asset_ids(path: str | Path) -> list[str]:
    """The asset ids with statistics below a checkpoint directory, in order; empty for other forms."""
    place = Path(path)
    return list(_assets(place / "assets")) if (place / "assets").is_dir() else []


def check_stats(stats: Stats, where: str | Path, group: str, names: Iterable[str], sizes: Collection[int]) -> None:
    """CheckpointError unless `group` holds the vectors `names`, of one of the lengths `sizes` (none given: any)."""
    _check_groups(stats, str(where))
    found = stats[group]
    if missing := [name for name in names if name not in found]:
        raise CheckpointError(
            f"{where}: expected the key {group!r} to hold {', '.join(names)}, found "
            f"{', '.join(sorted(found)) or 'nothing'} (without {', '.join(missing)}); choose the normalisation the "
            "checkpoint was trained with, or recompute the statistics"
        )
    for name in names:
        if sizes and len(found[name]) not in sizes:
            raise CheckpointError(
                f"{where}: expected {group}.{name} of {' or '.join(map(str, sorted(set(sizes))))} values, found "
                f"{len(found[name])}; these are the statistics of another robot: name the right ones"
            )


def _source(place: Path, asset_id: str | None) -> tuple[Callable[[Path], Stats], Path]:
    """Which reader, and what it reads."""
    if place.is_file():
        return _load_openpi, place
    if not place.is_dir():
        raise CheckpointError(f"statistics: {place} does not exist; give a checkpoint directory or {OPENPI_FILE}")
    if asset_id is not None:
        return _load_openpi, _asset_file(place, asset_id)
    if (place / OPENPI_FILE).is_file():
        return _load_openpi, place / OPENPI_FILE
    if (place / PREPROCESSOR).is_file():
        return _load_lerobot, place
    if (place / "assets").is_dir():
        return _load_openpi, _asset_file(place, None)
    if (place / WEIGHTS_FILE).is_file():
        return _load_buffers, place / WEIGHTS_FILE
    raise CheckpointError(
        f"statistics: looked for {OPENPI_FILE}, {PREPROCESSOR}, assets/ and {WEIGHTS_FILE} in {place}, found none; "
        "copy the statistics of the training run there"
    )


def save_stats(stats: Stats, directory: str | Path, *, norm: str, action_norm: str | None = None) -> list[Path]:
    """Write `stats` in LeRobot's form into `directory` (made if absent); returns the four files written.

    The two pipelines hold the step with the statistics and no other; tensors are float32, as LeRobot keeps them.
    `norm` and `action_norm` (None: the same) are recorded as LeRobot's normalisation modes.
    Raises ConfigError for a mode LeRobot has no name for, CheckpointError for missing groups.
    """
    _check_groups(stats, "stats")
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


def require(stats: Stats, group: str, names: Iterable[str]) -> list[Floats]:
    """The vectors `names` of `group`; CheckpointError, listing the keys found, if one is missing."""
    _check_groups(stats, "statistics")
    missing = [name for name in names if name not in stats[group]]
    if missing:
        raise CheckpointError(
            f"statistics: {group!r} lacks {', '.join(missing)}, found {', '.join(sorted(stats[group])) or 'nothing'}; "
            "choose the normalisation the checkpoint was trained with, or recompute the statistics"
        )
    return [stats[group][name] for name in names]


def make_stats(groups: Mapping[str, Mapping[str, Any]], where: str = "statistics") -> Stats:
    """Checked `Stats` from nested lists or arrays: known statistics only, finite vectors, one length per group.

    Raises CheckpointError, which starts with `where`, if a group is missing or a vector does not fit.
    """
    _check_groups(groups, where)
    stats: Stats = {}
    for group in GROUPS:
        given = {name: groups[group][name] for name in STATISTICS if groups[group].get(name) is not None}
        stats[group] = {name: _vector(value, f"{where}: {group}.{name}") for name, value in given.items()}
        lengths = {name: len(value) for name, value in stats[group].items()}
        _check_order(stats[group], f"{where}: {group}")
        if not lengths or len(set(lengths.values())) > 1:
            raise CheckpointError(
                f"{where}: {group!r} must hold vectors of one length among {', '.join(STATISTICS)}, "
                f"found {lengths or sorted(groups[group])}; recompute the statistics"
            )
    return stats


def _vector(value: Any, name: str) -> Floats:
    try:
        given = np.asarray(value)
        vector = given.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as reason:
        raise CheckpointError(f"{name}: expected a list of numbers ({reason}); recompute the statistics") from reason
    if given.dtype.kind not in "fiu":
        raise CheckpointError(f"{name}: expected a list of numbers, found {given.dtype}; recompute the statistics")
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
        found = f"shape {vector.shape}" if vector.ndim != 1 or not vector.size else "NaN or infinity"
        raise CheckpointError(f"{name}: expected a vector of finite numbers, found {found}; recompute the statistics")
    if np.abs(vector).max() > LARGEST:
        raise CheckpointError(
            f"{name}: expected numbers of a robot, found {vector[np.abs(vector).argmax()]:g}; recompute the statistics"
        )
    return vector


def _check_order(vectors: Mapping[str, Floats], where: str) -> None:
    """No std below 0; no q99 below q01, where they can be compared."""
    if "std" in vectors and (vectors["std"] < 0).any():
        raise CheckpointError(f"{where}.std: expected no number below 0, found {vectors['std'].min():g}")
    low, high = vectors.get("q01"), vectors.get("q99")
    if low is not None and high is not None and low.shape == high.shape and (low > high).any():
        i = int((low > high).argmax())
        raise CheckpointError(f"{where}.q99: expected at least q01, found {high[i]:g} and {low[i]:g} at index {i}")


def _check_groups(groups: Any, where: str) -> None:
    if not isinstance(groups, Mapping) or not all(isinstance(groups.get(group), Mapping) for group in GROUPS):
        found = ", ".join(sorted(map(str, groups))) if isinstance(groups, Mapping) else type(groups).__name__
        raise CheckpointError(f"{where}: expected the keys {' and '.join(GROUPS)}, found {found or 'nothing'}")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as reason:
        raise CheckpointError(f"{file}: expected a JSON file, cannot read it ({reason}); copy it again") from reason


def _read_tensors(file: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Any]:
    try:
        with safe_open(file, "np") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys() if key.startswith(prefixes)}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError) as reason:
        raise CheckpointError(f"{file}: expected safetensors, cannot read it ({reason}); copy it again") from reason


def _load_openpi(file: Path) -> Stats:
    content = _read_json(file)
    if not isinstance(content, Mapping) or "norm_stats" not in content:
        found = ", ".join(sorted(content)[:8]) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{file}: expected the key norm_stats, found {found or 'nothing'}")
    return make_stats(content["norm_stats"], str(file))


def _asset_file(place: Path, asset_id: str | None) -> Path:
    root = place / "assets" if (place / "assets").is_dir() else place
    files = _assets(root)
    if asset_id is None and len(files) == 1:
        return next(iter(files.values()))
    if asset_id not in files:
        wanted = "one asset" if asset_id is None else f"asset {asset_id!r}"
        raise CheckpointError(
            f"statistics: expected {wanted} with {OPENPI_FILE} below {root}, "
            f"found {', '.join(files) or 'none'}; pass asset_id"
        )
    return files[asset_id]


def _assets(root: Path) -> dict[str, Path]:
    return {file.parent.relative_to(root).as_posix(): file for file in sorted(root.rglob(OPENPI_FILE))}


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
    content = _read_json(file)
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


def _load_lerobot(place: Path) -> Stats:
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


def _load_buffers(file: Path) -> Stats:
    tensors = _read_tensors(file, tuple(prefix for prefixes in LEROBOT_BUFFERS.values() for prefix in prefixes))
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for group, prefixes in LEROBOT_BUFFERS.items():
        for prefix in reversed(prefixes):  # the first prefix wins
            groups[group] |= {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
    if not all(groups.values()):
        raise CheckpointError(
            f"statistics: {PREPROCESSOR} (LeRobot) or {OPENPI_FILE} (openpi) is missing in {file.parent}, and "
            f"{file.name} has no buffers {', '.join(p[0] + '*' for p in LEROBOT_BUFFERS.values())} of older LeRobot "
            f"versions (found {', '.join(sorted(tensors)) or 'none'}); copy the statistics of the training run there"
        )
    return make_stats(groups, str(file))
