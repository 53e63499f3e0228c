"""OpenVLA's prompts and Llama's tokenizers, from a tokenizer.model and from a tokenizer.json alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cortexflow.errors import CheckpointError, ConfigError
from cortexflow.processing.prompts import encode_prompt, prompt_ids, prompt_pieces
from cortexflow.processing.tokenizer import PromptTokenizer, load_tokenizer
from tests.processing.llama import json_text, trained_bytes, vocabulary_bytes

DATA = Path(__file__).parents[1] / "data" / "openvla" / "openvla_tiny"
SPACE = 29871


def write(place: Path, form: str, model: bytes) -> PromptTokenizer:
    if form == "json":
        pytest.importorskip("tokenizers")
        (place / "tokenizer.json").write_text(json_text(model))
    else:
        (place / "tokenizer.model").write_bytes(model)
    return load_tokenizer(place)


@pytest.mark.parametrize("form", ["sentencepiece", "json"])
def test_the_reference_requests(tmp_path: Path, form: str) -> None:
    """The ids as given to the published `predict_action`, and the one that it appends."""
    tokenizer, given = write(tmp_path, form, vocabulary_bytes()), load_file(DATA / "inputs.safetensors")
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (1, 32000)
    for case in json.loads((DATA / "cases.json").read_text()):
        assert prompt_pieces(case["instruction"], format="openvla") == (case["prompt"],)
        passed = given[f"{case['case']}.input_ids"][0].tolist()
        expected = passed if passed[-1] == SPACE else [*passed, SPACE]
        assert prompt_ids(tokenizer, case["instruction"], format="openvla") == expected
        tokens, mask = encode_prompt(tokenizer, case["instruction"], format="openvla", length=64)
        assert tokens.dtype == np.int32
        assert tokens[mask].tolist() == expected


TEXTS = ["pick up the cup", "  two  spaces ", "Käse, 日本 🤖\n", "", "x" * 300]


def test_both_forms_agree(tmp_path: Path) -> None:
    model, text = (write(tmp_path, form, trained_bytes()) for form in ("json", "sentencepiece"))
    for words in TEXTS:
        assert model.encode(words) == text.encode(words)
        assert model.encode(words, bos=False) == text.encode(words)[1:]
    assert len(text.encode("🤖", bos=False)) == 5  # the leading space and four bytes
    assert len(load_tokenizer(tmp_path / "tokenizer.json").encode(TEXTS[-1])) > 100  # not cut to the file's max_length


def test_sentencepiece_comes_first(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("damaged")
    assert write(tmp_path, "sentencepiece", trained_bytes()).bos_id == 1


def test_templates() -> None:
    assert prompt_pieces("Open The {Top} Drawer ", format="openvla") == (
        "In: What action should the robot take to open the {top} drawer ?\nOut:",
    )
    (text,) = prompt_pieces("Wait", format="openvla_v01")
    assert text.startswith(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    )
    assert text.endswith("questions. USER: What action should the robot take to wait? ASSISTANT:")


class Fixed:
    def __init__(self, *ids: int) -> None:
        self.ids = list(ids)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        return self.ids


def test_the_closing_space_is_there_once() -> None:
    assert prompt_ids(Fixed(1, 5), "x", format="openvla") == [1, 5, SPACE]
    assert prompt_ids(Fixed(1, 5, SPACE), "x", format="openvla") == [1, 5, SPACE]
    assert prompt_ids(Fixed(1, SPACE, 5), "x", format="openvla_v01") == [1, SPACE, 5, SPACE]
    assert prompt_ids(Fixed(2, 5), "x", format="pi0_lerobot") == [2, 5]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', '{"a":' * 4000])
def test_damaged_json(tmp_path: Path, text: str) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: expected a tokenizer of Hugging Face's, cannot read"):
        load_tokenizer(tmp_path)


def test_a_piece_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained_bytes().replace(b"<0x00>", b"\x800x00>"))
    with pytest.raises(CheckpointError, match=r"tokenizer.model: expected a sentencepiece model, found something else"):
        load_tokenizer(tmp_path)


def test_json_without_bos(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text('{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[]}}')
    with pytest.raises(CheckpointError, match="expected a piece <s> or <bos>, which begins a prompt, found none"):
        load_tokenizer(tmp_path)


def test_json_without_the_package_that_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"the package tokenizers, .*pip install 'cortexflow-vla\[tokenizers\]'"):
        load_tokenizer(tmp_path)
