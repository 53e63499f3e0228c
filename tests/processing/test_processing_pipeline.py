"""The whole way in and out: order of the steps, options, presets, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cortexflow.errors import CheckpointError, ConfigError, InputError
from cortexflow.processing.normalise import normalise
from cortexflow.processing.pipeline import FAMILIES, PROCESSINGS, Processing, finish_actions, prepare_observation, suits
from cortexflow.processing.prompts import encode_prompt, state_bins
from cortexflow.processing.robots import aloha_actions, aloha_state
from cortexflow.processing.stats import Stats, make_stats
from cortexflow.processing.tokenizer import PromptTokenizer

SMALL = Processing(views=2, image_size=8, output_dim=7)
IMAGES = np.random.default_rng(1).integers(0, 256, (2, 10, 12, 3), np.uint8)


def test_observation(golden: dict[str, Any], stats: Stats, tokenizer: PromptTokenizer) -> None:
    found = prepare_observation(
        SMALL,
        images=[IMAGES[0], None],
        prompt="open the drawer",
        tokenizer=tokenizer,
        state=golden["state_raw"],
        stats=stats,
    )
    assert {name: (str(value.dtype), value.shape) for name, value in found.items()} == {  # type: ignore[attr-defined]
        "images": ("float32", (2, 8, 8, 3)),
        "image_mask": ("bool", (2,)),
        "tokens": ("int32", (200,)),
        "token_mask": ("bool", (200,)),
        "state": ("float32", (32,)),
    }
    assert found["image_mask"].tolist() == [True, False]
    np.testing.assert_allclose(found["state"], golden["quantile"]["state_padded_32"], rtol=1e-6, atol=1e-6)
    bins = state_bins(golden["quantile"]["state_normalised"])  # of the normalised state at its true length
    tokens, mask = encode_prompt(tokenizer, "open the drawer", format="pi05", length=200, bins=bins)
    np.testing.assert_array_equal(found["tokens"], tokens)
    np.testing.assert_array_equal(found["token_mask"], mask)


def test_state_padded_before_binning(golden: dict[str, Any], stats: Stats, tokenizer: PromptTokenizer) -> None:
    options = replace(SMALL, pad_state_before_binning=True)
    given: dict[str, Any] = {"images": IMAGES, "prompt": "fold", "tokenizer": tokenizer, "stats": stats}
    found = prepare_observation(options, state=golden["state_raw"], **given)
    bins = state_bins(golden["quantile"]["state_normalised"], pad_to=32)
    assert bins[8:].tolist() == [128] * 24
    np.testing.assert_array_equal(
        found["tokens"], encode_prompt(tokenizer, "fold", format="pi05", length=200, bins=bins)[0]
    )


def test_state_tokens_replace_the_state(tokenizer: PromptTokenizer) -> None:
    found = prepare_observation(
        SMALL, images=torch.from_numpy(IMAGES), prompt="fold", tokenizer=tokenizer, state_tokens=np.array([10, 20, 30])
    )
    expected = encode_prompt(tokenizer, "fold", format="pi05", length=200, bins=[10, 20, 30])[0]
    np.testing.assert_array_equal(found["tokens"], expected)
    assert not found["state"].any()


def test_prompt_without_state(tokenizer: PromptTokenizer) -> None:
    options = replace(PROCESSINGS["pi05_libero"], views=2, image_size=8)
    found = prepare_observation(options, images=IMAGES, prompt="fold_it", tokenizer=tokenizer)
    expected = [2, *tokenizer.encode("fold it", bos=False), *tokenizer.encode("\n", bos=False)]
    assert found["tokens"][found["token_mask"]].tolist() == expected


def test_mean_std_and_continuous_state(golden: dict[str, Any], stats: Stats, tokenizer: PromptTokenizer) -> None:
    options = replace(PROCESSINGS["pi0_libero"], views=2, image_size=8)
    given: dict[str, Any] = {"images": IMAGES, "prompt": "x", "tokenizer": tokenizer}
    found = prepare_observation(options, state=golden["state_raw"], stats=stats, **given)
    np.testing.assert_allclose(found["state"], golden["mean_std"]["state_padded_32"], rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match="state: expected up to 32 values, found None; this network reads it"):
        prepare_observation(options, **given)


@pytest.mark.parametrize(
    ("name", "key"),
    [("pi0_libero", "absolute_libero_delta"), ("pi05_full_droid_finetune", "absolute_droid_joint_position")],
)
def test_actions_agree_with_reference(golden: dict[str, Any], stats: Stats, name: str, key: str) -> None:
    options = PROCESSINGS[name]
    found = finish_actions(options, golden["model_actions"], state=golden["state_raw"], stats=stats)
    expected = np.array(golden[options.norm][key])[:, : options.output_dim]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-6)


def test_actions_without_delta(golden: dict[str, Any], stats: Stats) -> None:
    actions = torch.tensor(golden["model_actions"], dtype=torch.float64)
    expected = np.array(golden["quantile"]["actions_unnormalised"])
    np.testing.assert_allclose(finish_actions(SMALL, actions, stats=stats), expected[:, :7], rtol=1e-12, atol=1e-6)
    batch = finish_actions(replace(SMALL, output_dim=None), torch.stack([actions] * 2), stats=stats)
    np.testing.assert_allclose(batch[1], expected, rtol=1e-12, atol=1e-6)


def test_aloha_adapts_before_and_after(golden: dict[str, Any], tokenizer: PromptTokenizer) -> None:
    rng = np.random.default_rng(0)
    stats = make_stats({g: {"q01": -1 - rng.random(14), "q99": 1 + rng.random(14)} for g in ("state", "actions")})
    options = replace(PROCESSINGS["pi05_aloha"], image_size=8)
    raw, chunk = np.array(golden["aloha"]["state"]), rng.standard_normal((5, 32))
    found = prepare_observation(
        options, images=[IMAGES[0], None, None], prompt="x", tokenizer=tokenizer, state=raw, stats=stats
    )
    adapted = aloha_state(raw)
    np.testing.assert_allclose(
        found["state"][:14], normalise(adapted, stats, "state", mode="quantile", eps="openpi"), rtol=0, atol=1e-6
    )
    width = stats["actions"]["q99"] - stats["actions"]["q01"] + 1e-6
    absolute = (chunk[:, :14] + 1) / 2 * width + stats["actions"]["q01"] + np.where(options.delta_mask, adapted, 0)
    np.testing.assert_allclose(finish_actions(options, chunk, state=raw, stats=stats), aloha_actions(absolute))


def test_action_mode_may_differ(stats: Stats) -> None:
    options = replace(SMALL, action_norm="identity")
    chunk = np.ones((3, 32))
    np.testing.assert_array_equal(finish_actions(options, chunk), chunk[:, :7])


BAD_OBSERVATIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "images": ({"images": IMAGES[:1]}, InputError, "images: expected 2 views, found 1"),
    "prompt": ({"prompt": 3}, InputError, "prompt: expected a string, found int"),
    "long prompt": ({"prompt": "red block " * 100}, InputError, "at most 200 tokens"),
    "no state": ({"state": None}, InputError, "found neither; the prompt contains the state"),
    "no statistics": ({"stats": None}, InputError, "stats: expected statistics to scale the state by quantile"),
    "empty statistics": ({"stats": {}}, CheckpointError, "found nothing"),
    "long state": ({"state": np.zeros(33)}, InputError, "state: expected at most 32 values, found 33"),
    "other state": ({"state": np.zeros(9)}, InputError, "state: expected 8 values"),
    "matrix": ({"state": np.zeros((1, 8))}, InputError, "state: expected an array with 1 axis"),
    "NaN": ({"state": np.full(8, np.nan)}, InputError, "state: expected finite numbers"),
    "bins": ({"state_tokens": [300]}, InputError, "state_tokens: expected bins"),
}


@pytest.mark.parametrize("case", BAD_OBSERVATIONS)
def test_bad_observations(case: str, stats: Stats, tokenizer: PromptTokenizer) -> None:
    change, error, message = BAD_OBSERVATIONS[case]
    given: dict[str, Any] = {
        "images": IMAGES,
        "prompt": "x",
        "tokenizer": tokenizer,
        "state": np.zeros(8),
        "stats": stats,
    }
    with pytest.raises(error, match=message):
        prepare_observation(SMALL, **(given | change))


def test_state_tokens_that_no_prompt_takes(tokenizer: PromptTokenizer) -> None:
    options = replace(SMALL, state_in_prompt=False)
    with pytest.raises(InputError, match="state_tokens: expected None"):
        prepare_observation(options, images=IMAGES, prompt="x", tokenizer=tokenizer, state_tokens=[1])


def test_bad_actions(stats: Stats) -> None:
    chunk = np.zeros((5, 32))
    with pytest.raises(InputError, match=r"actions: expected shape \(\.\.\., horizon, 32\), found \(5, 7\)"):
        finish_actions(SMALL, chunk[:, :7], stats=stats)
    with pytest.raises(InputError, match="actions: expected finite numbers"):
        finish_actions(SMALL, np.full((5, 32), np.nan), stats=stats)
    with pytest.raises(InputError, match="stats: expected statistics to scale the actions"):
        finish_actions(SMALL, chunk)
    with pytest.raises(InputError, match="state: expected the robot's state, found None"):
        finish_actions(PROCESSINGS["pi0_libero"], chunk, stats=stats)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize": "area"}, "resize: expected one of pil, lerobot"),
        ({"norm": "minmax"}, "norm: expected one of mean_std"),
        ({"action_norm": "minmax"}, "action_norm: expected one of None, mean_std"),
        ({"eps": "jax"}, "eps: expected one of openpi"),
        ({"prompt_format": "rt2"}, "prompt_format: expected one of pi0"),
        ({"adapt": "spot"}, "adapt: expected one of none, aloha"),
        ({"views": 0}, "views: expected a positive"),
        ({"prompt_format": "pi0"}, "no place for the state; set state_in_prompt=False"),
        ({"output_dim": 33}, "action_dim=32 must not be less than output_dim=33"),
        ({"delta_mask": (True,) * 40}, "40 flags"),
    ],
)
def test_contradictory_processing(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Processing(**change)


@pytest.mark.parametrize("name", sorted(PROCESSINGS))
def test_presets(name: str) -> None:
    row = PROCESSINGS[name]
    pi0 = "pi0" in name.split("_")
    assert row.norm == ("mean_std" if pi0 else "quantile")
    tokens = name.startswith("openvla")
    assert (row.action_bins is not None) == bool(row.towers) == (row.eps == "openvla") == tokens
    assert row.prompt_length == (48 if pi0 else 64 if tokens else 200)
    assert row.continuous_state == pi0
    assert [family for family in FAMILIES if suits(row, family)] == ["pi0" if pi0 else "openvla" if tokens else "pi05"]
    assert (row.eps == row.resize == "lerobot") == name.startswith("lerobot")
    assert len(row.delta_mask) in (0, row.output_dim)
