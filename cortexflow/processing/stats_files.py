"""Normalisation statistics on disk, found and read.

| form | files |
|---|---|
| openpi | `norm_stats.json`, or `assets/<asset id>/norm_stats.json` below the checkpoint |
| LeRobot | `policy_preprocessor.json`, `policy_postprocessor.json`, the safetensors file named by a step of each |
| OpenVLA | `dataset_statistics.json`, else `norm_stats` in `config.json`: a table for each dataset |
| LeRobot, before processors | buffers `normalize_inputs.buffer_observation_state.mean`, ... in `model.safetensors` |

Source: openpi src/openpi/shared/normalize.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from cortexflow.errors import CheckpointError
from cortexflow.processing.stats import Stats, make_stats, read_json
from cortexflow.processing.stats_datasets import CONFIG_FILE, DATASETS_FILE, holds_datasets, load_dataset, read_datasets
from cortexflow.processing.stats_lerobot import PREPROCESSOR, load_buffers, load_lerobot

OPENPI_FILE = "norm_stats.json"
WEIGHTS_FILE = "model.safetensors"


def load_stats(path: str | Path, *, asset_id: str | None = None) -> Stats:
    """The statistics at `path`, float64 vectors [n] per group and statistic.

    `path` is a file of openpi's or OpenVLA's form, or a checkpoint directory in one of the four forms (tried in the
    order of the module's table, LeRobot's processors before `assets/`). `asset_id` chooses among several
    `assets/<asset id>/norm_stats.json` (`trossen`, `droid`, `physical-intelligence/libero`) or among the datasets of
    OpenVLA's (`bridge_orig`; its `unnorm_key`).

    Raises CheckpointError if nothing is found, a file cannot be read, a group is missing (the message lists the
    keys that are there), lengths differ within a group, or a number is not finite.
    """
    read, file = _source(Path(path), asset_id)
    return read(file)


def stats_file(path: str | Path, *, asset_id: str | None = None) -> Path:
    """The file or directory that `load_stats` reads, for messages; raises as it does if there is none."""
    return _source(Path(path), asset_id)[1]


def asset_ids(path: str | Path) -> list[str]:
    """The asset ids, or datasets, with statistics at a file or below a directory, in order; empty for other forms."""
    place = Path(path)
    if file := _datasets_file(place):
        return list(read_datasets(file))
    return list(_assets(place / "assets")) if (place / "assets").is_dir() else []


def _source(place: Path, asset_id: str | None) -> tuple[Callable[[Path], Stats], Path]:
    """Which reader, and what it reads."""
    if file := _datasets_file(place):
        return partial(load_dataset, dataset=asset_id), file
    if place.is_file():
        return _load_openpi, place
    if not place.is_dir():
        raise CheckpointError(f"statistics: {place} does not exist; give a checkpoint directory or {OPENPI_FILE}")
    if asset_id is not None:
        return _load_openpi, _asset_file(place, asset_id)
    if (place / OPENPI_FILE).is_file():
        return _load_openpi, place / OPENPI_FILE
    if (place / PREPROCESSOR).is_file():
        return load_lerobot, place
    if (place / "assets").is_dir():
        return _load_openpi, _asset_file(place, None)
    if (place / WEIGHTS_FILE).is_file():
        return load_buffers, place / WEIGHTS_FILE
    raise CheckpointError(
        f"statistics: looked for {OPENPI_FILE}, {PREPROCESSOR}, assets/, {DATASETS_FILE}, norm_stats in {CONFIG_FILE} "
        f"and {WEIGHTS_FILE} in {place}, found none; copy the statistics of the training run there"
    )


def _datasets_file(place: Path) -> Path | None:
    """The file of OpenVLA's form at a path, if that is the form of what is there."""
    if place.is_file():
        return place if holds_datasets(place) else None
    if (place / DATASETS_FILE).is_file():
        return place / DATASETS_FILE
    other = (place / OPENPI_FILE).is_file() or (place / PREPROCESSOR).is_file() or (place / "assets").is_dir()
    config = place / CONFIG_FILE
    return config if not other and config.is_file() and holds_datasets(config) else None


def _load_openpi(file: Path) -> Stats:
    content = read_json(file)
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
