"""Normalisation statistics in memory: always the same plain dictionary, `Stats`, and what is checked of it.

`{"state": {...}, "actions": {...}}`, each holding float64 vectors `mean`, `std`, `q01`, `q99` as far as the file has
them, and `mask` (1 where a value is scaled, 0 where it passes as it is; without it all are scaled).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cortexflow.errors import CheckpointError
from cortexflow.processing.arrays import Floats

Stats = dict[str, dict[str, Floats]]

STATISTICS = ("mean", "std", "q01", "q99")
GROUPS = ("state", "actions")
LARGEST = 1e30  # of a statistic: float32 holds it with room for the arithmetic


def check_stats(stats: Stats, where: str | Path, group: str, names: Iterable[str], sizes: Collection[int]) -> None:
    """CheckpointError unless `group` holds the vectors `names`, of one of the lengths `sizes` (none given: any)."""
    check_groups(stats, str(where))
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


def require(stats: Stats, group: str, names: Iterable[str]) -> list[Floats]:
    """The vectors `names` of `group`; CheckpointError, listing the keys found, if one is missing."""
    check_groups(stats, "statistics")
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
    check_groups(groups, where)
    return {group: make_group(groups[group], where, group) for group in GROUPS}


def make_group(values: Mapping[str, Any], where: str, group: str) -> dict[str, Floats]:
    """One checked group of `make_stats`, called `group` in errors."""
    given = {name: values[name] for name in STATISTICS if values.get(name) is not None}
    vectors = {name: _vector(value, f"{where}: {group}.{name}") for name, value in given.items()}
    lengths = {name: len(value) for name, value in vectors.items()}
    _check_order(vectors, f"{where}: {group}")
    if not lengths or len(set(lengths.values())) > 1:
        raise CheckpointError(
            f"{where}: {group!r} must hold vectors of one length among {', '.join(STATISTICS)}, "
            f"found {lengths or sorted(map(str, values))}; recompute the statistics"
        )
    return vectors


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


def check_groups(groups: Any, where: str) -> None:
    if not isinstance(groups, Mapping) or not all(isinstance(groups.get(group), Mapping) for group in GROUPS):
        found = ", ".join(sorted(map(str, groups))) if isinstance(groups, Mapping) else type(groups).__name__
        raise CheckpointError(f"{where}: expected the keys {' and '.join(GROUPS)}, found {found or 'nothing'}")


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as reason:
        raise CheckpointError(f"{file}: expected a JSON file, cannot read it ({reason}); copy it again") from reason
