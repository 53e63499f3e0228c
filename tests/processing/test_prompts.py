"""Prompts: tokenizer files, cleaning, text pieces and state bins against the reference, padding, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from cortexflow.errors import CheckpointError, ConfigError, InputError
from cortexflow.processing.prompts import (
    PROMPT_FORMATS,
    as_bins,
    clean_lerobot,
    clean_openpi,
    clean_realtime,
    encode_prompt,
    pad_tokens,
    prompt_pieces,
    state_bins,
)
from cortexflow.processing.tokenizer import PromptTokenizer, load_tokenizer


class Recorder:
    """One id per character; keeps what it was asked to encode."""

    def __init__(self) -> None:
        self.asked: list[list[Any]] = []

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        self.asked.append([text, bos])
        return [2] * bos + [ord(c) for c in text]


# --- tokenizer files


@pytest.mark.parametrize("name", ["paligemma_tokenizer.model", "tokenizer.model"])
def test_load_from_directory_or_file(tmp_path: Path, model_bytes: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(model_bytes)
    expected = load_tokenizer(tmp_path / name).encode("pick up the red block")
    assert load_tokenizer(tmp_path).encode("pick up the red block") == expected
    assert load_tokenizer(str(tmp_path)).encode("pick up the red block") == expected


def test_encode_starts_with_bos_and_ends_without_eos(tokenizer: PromptTokenizer) -> None:
    ids = tokenizer.encode("open the drawer")
    assert tokenizer.bos_id == ids[0] == 2
    assert 1 not in ids
    assert tokenizer.encode("open the drawer", bos=False) == ids[1:]
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert len(tokenizer.encode("\n", bos=False)) <= 2


def test_tokenizer_errors(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist.*paligemma_tokenizer.model or tokenizer.model"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"looked for paligemma.*found tokenizer_config.json.*sentencepiece"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="expected a sentencepiece model"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="text: expected a string, found list"):
        tokenizer.encode(["a", "b"])  # type: ignore[arg-type]


def test_tokenizer_without_bos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_bytes: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_bytes)
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "bos_id", lambda self: -1)
    with pytest.raises(CheckpointError, match="expected a sentencepiece model with a BOS piece, found none"):
        load_tokenizer(tmp_path)


# --- text


def test_prompts_agree_with_reference(golden: dict[str, Any]) -> None:
    for case in golden["prompts"]:
        bins = None if case["state"] is None else state_bins(case["state"])
        recorder, length = Recorder(), case["max_len"]
        tokens, mask = encode_prompt(recorder, case["text"], format="pi05", length=length, bins=bins, truncate=True)
        assert recorder.asked == case["encoded_pieces [text, add_bos]"]
        assert len(tokens) == case["length"]
        assert int(mask.sum()) == case["valid_with_one_id_per_character"]
        assert tokens.dtype == np.int32
        assert mask.dtype == np.bool_
        if bins is None:
            assert prompt_pieces(case["text"], format="pi0") == prompt_pieces(case["text"], format="pi05")


def test_prompt_texts() -> None:
    text = " put_the cup\non {the} shelf \n"
    assert prompt_pieces(text, format="pi0") == ("put the cup on {the} shelf", "\n")
    assert prompt_pieces(text, format="pi05", bins=[-1, 128]) == (
        "Task: put the cup on {the} shelf, State: -1 128;\nAction: ",
    )
    assert prompt_pieces(text, format="pi0_lerobot") == (text,)
    assert prompt_pieces("a_b", format="pi0_lerobot") == ("a_b\n",)
    assert prompt_pieces(text, format="pi05_realtime", bins=[7]) == (
        "Task: put the cup\non {the} shelf, State: 7;\nAction: ",
    )
    assert prompt_pieces("x", format="pi05", bins=[]) == ("Task: x, State: ;\nAction: ",)


def test_cleaning_rules() -> None:
    assert clean_openpi("\t a_b\nc \n") == "a b c"
    assert clean_realtime("\t a_b\nc \n") == "a b\nc"
    assert clean_lerobot(" a_b ") == " a_b \n"
    assert clean_lerobot("a\n") == "a\n"


def test_prompt_errors() -> None:
    with pytest.raises(ConfigError, match=r"expected one of pi0, pi05, .*found 'pi1'"):
        prompt_pieces("x", format="pi1")
    for name in ("pi0", "pi0_lerobot"):
        with pytest.raises(ConfigError, match="no place for the state"):
            prompt_pieces("x", format=name, bins=[1])
    with pytest.raises(InputError, match="prompt: expected a string, found NoneType"):
        prompt_pieces(None, format="pi05")  # type: ignore[arg-type]


# --- state


def test_bins_agree_with_reference(golden: dict[str, Any]) -> None:
    assert state_bins(golden["bins"]["x"]).tolist() == golden["bins"]["bin"]


@given(st.floats(-1, 1, exclude_max=True), st.integers(0, 255))
def test_bins_are_a_floor(x: float, edge: int) -> None:
    assert abs(int(state_bins([x])[0]) - math.floor((x + 1) * 128)) <= (
        1 if abs(x * 128 - round(x * 128)) < 1e-9 else 0
    )
    exact = edge / 128 - 1
    assert state_bins([exact, np.nextafter(exact, -2)]).tolist() == [edge, edge - 1]


def test_bins_outside() -> None:
    assert state_bins([-1e9, np.nextafter(-1, -2), 1.0, 1e9]).tolist() == [-1, -1, 255, 255]


def test_bins_padded_as_lerobot_04_did() -> None:
    assert state_bins([-1.0, 0.5], pad_to=4).tolist() == [0, 192, 128, 128]
    with pytest.raises(InputError, match="at most 1 values, found 2"):
        state_bins([0.0, 0.0], pad_to=1)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([[0.0]], "1 axis, found shape"),
        ([np.nan], "finite.*nan at index"),
        (["a"], "array of numbers"),
        (0.5, "1 axis"),
    ],
)
def test_bad_state(state: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        state_bins(state)


def test_given_bins_are_checked() -> None:
    assert as_bins(np.array([-1, 0, 255], np.int32)).tolist() == [-1, 0, 255]
    bad: Any
    for bad, message in [([0.5], "expected integers"), ([[1]], "expected integers"), ([256], "-1 to 255, found 256")]:
        with pytest.raises(InputError, match=message):
            as_bins(bad)


# --- bucket


@pytest.mark.parametrize("name", sorted(PROMPT_FORMATS))
def test_padding_with_a_real_tokenizer(tokenizer: PromptTokenizer, name: str) -> None:
    pieces = prompt_pieces("open the_drawer", format=name)
    ids = [tokenizer.bos_id] + [i for piece in pieces for i in tokenizer.encode(piece, bos=False)]
    ids += filter(None, [PROMPT_FORMATS[name].closing])
    tokens, mask = encode_prompt(tokenizer, "open the_drawer", format=name, length=200)
    assert tokens[mask].tolist() == ids
    assert not tokens[len(ids) :].any()
    assert mask.tolist() == [True] * len(ids) + [False] * (200 - len(ids))


def test_bucket_edges() -> None:
    assert pad_tokens([2, 5], 2)[1].tolist() == [True, True]
    with pytest.raises(InputError, match=r"at most 2 tokens.*found 3.*bucket of at least 3.*truncation"):
        pad_tokens([2, 5, 6], 2)
    tokens, mask = pad_tokens([2, 5, 6], 2, truncate=True)
    assert tokens.tolist() == [2, 5]
    assert mask.all()
