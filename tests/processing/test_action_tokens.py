"""Token ids to actions and back, against the published implementation's own results, which must be met exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cortexflow.errors import InputError
from cortexflow.processing import PROCESSINGS, finish_actions, load_stats
from cortexflow.processing.action_tokens import Bins, bin_centres, decode_actions, encode_actions
from cortexflow.processing.normalise import unnormalise

DATA = Path(__file__).parents[1] / "data" / "openvla"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DATA / "action_decode.json").read_text())
    return content


def test_bin_centres(golden: dict[str, Any]) -> None:
    assert bin_centres().tolist() == golden["bin_centers"]


@pytest.mark.parametrize("dataset", ["bridge_orig", "toy_no_mask"])
def test_ids_to_actions(golden: dict[str, Any], dataset: str) -> None:
    stats = load_stats(DATA / "action_decode.json", asset_id=dataset)
    ids = np.array([[row["id"]] * 7 for row in golden["decode"]])
    values = decode_actions(ids)
    assert values[:, 0].tolist() == [row["bin_center"] for row in golden["decode"]]
    actions = unnormalise(values, stats, "actions", mode="quantile", eps="openvla")
    assert actions.dtype == np.float64
    assert actions.tolist() == [row["actions"][dataset] for row in golden["decode"]]


def test_actions_to_ids(golden: dict[str, Any]) -> None:
    ids = encode_actions([row["action"] for row in golden["encode"]])
    assert ids.tolist() == [row["id"] for row in golden["encode"]]


def test_generated_ids() -> None:
    for case in json.loads((DATA / "openvla_tiny" / "cases.json").read_text()):
        stats = load_stats(DATA / "openvla_tiny", asset_id=case["unnorm_key"])
        values = decode_actions(torch.tensor([case["generated_ids"]], dtype=torch.int32))
        assert values[0].tolist() == case["actions_normalised"]
        assert unnormalise(values, stats, "actions", mode="quantile", eps="openvla")[0].tolist() == case["actions"]


def test_every_bin_comes_back() -> None:
    """A bin's middle encodes as the bin's id, in vocabularies of any size."""
    for bins in (Bins(), Bins(edges=17, vocabulary=100)):
        ids = np.arange(bins.vocabulary - bins.edges + 1, bins.vocabulary)
        back = encode_actions(decode_actions(ids, bins), bins)
        assert back.tolist() == ids.tolist()


@pytest.mark.parametrize("bad", [[0.5], ["a"], [True], torch.ones(3), [[1], [2, 3]]])
def test_other_than_ids(bad: Any) -> None:
    with pytest.raises(InputError, match="action tokens: expected"):
        decode_actions(bad)


def test_an_answer_that_ended_early_moves_no_robot() -> None:
    """Id 2 ends it and padding follows: as values they would be the ends of the range."""
    rules, ids = PROCESSINGS["openvla"], np.full(7, 31872)
    stats = {"state": {}, "actions": {"q01": np.full(7, -1.0), "q99": np.full(7, 1.0)}}
    assert finish_actions(rules, ids, stats=stats).shape == (1, 7)
    ids[4], ids[5:] = 2, 32000
    with pytest.raises(InputError, match=r"ended its answer at token 5 of 7 \(id 2\); expected a token for each value"):
        finish_actions(rules, ids, stats=stats)
