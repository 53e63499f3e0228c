"""OpenVLA's statistics: a table of the actions for each dataset that the checkpoint was trained on.

    {"bridge_orig": {"action": {"q01": [...], "q99": [...], "mask": [...]}}, ...}

It is `norm_stats` in config.json, and in a fine-tuned checkpoint `dataset_statistics.json`, which replaces that.
Source: openvla experiments/robot/openvla_utils.py (get_vla), prismatic/extern/hf/modeling_prismatic.py
(predict_action).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cortexflow.errors import CheckpointError
from cortexflow.processing.stats import Stats, make_group, read_json

DATASETS_FILE = "dataset_statistics.json"
CONFIG_FILE = "config.json"
KEY = "norm_stats"  # of the tables in config.json


def holds_datasets(file: Path) -> bool:
    """Whether a file is of this form; one that is named so is, however damaged."""
    if file.name == DATASETS_FILE:
        return True
    content = read_json(file) if file.suffix == ".json" else None
    tables = content.get(KEY, content) if isinstance(content, Mapping) else None
    return isinstance(tables, Mapping) and any(isinstance(t, Mapping) and "action" in t for t in tables.values())


def read_datasets(file: Path) -> Mapping[str, Any]:
    """The tables of a file by dataset; CheckpointError if there is none."""
    content = read_json(file)
    tables = content.get(KEY, content) if isinstance(content, Mapping) else content
    if not isinstance(tables, Mapping) or not tables:
        raise CheckpointError(
            f"{file}: expected a table of statistics for each dataset, found {tables!r:.80}; copy the file again"
        )
    return tables


def load_dataset(file: Path, dataset: str | None = None) -> Stats:
    """The statistics of one dataset: `q01`, `q99`, and `mask` where there is one, of the actions; none of the state.

    `dataset` may be left out where there is one only. Raises CheckpointError, which lists the datasets, if it is not
    among them, and if its table is damaged.
    """
    tables = read_datasets(file)
    if dataset is None and len(tables) == 1:
        dataset = next(iter(tables))
    if dataset is None or dataset not in tables:
        wanted = "the statistics of one dataset" if dataset is None else f"the dataset {dataset!r}"
        raise CheckpointError(
            f"{file}: expected {wanted}, found those of {', '.join(tables)}; pass asset_id= one of them "
            "(what OpenVLA calls unnorm_key)"
        )
    table, where = tables[dataset], f"{file}: {dataset}"
    action = table.get("action") if isinstance(table, Mapping) else None
    if not isinstance(action, Mapping):
        raise CheckpointError(f"{where}: expected the key action with q01 and q99, found {table!r:.80}")
    vectors = make_group(action, where, "action")
    if (mask := action.get("mask")) is not None:
        size = len(next(iter(vectors.values())))
        if not isinstance(mask, list) or len(mask) != size or not all(isinstance(flag, bool) for flag in mask):
            raise CheckpointError(f"{where}: action.mask: expected {size} of true and false, found {mask!r:.80}")
        vectors["mask"] = np.array(mask, np.float64)
    return {"state": {}, "actions": vectors}
