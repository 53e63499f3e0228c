"""Reference data, and a small sentencepiece model trained on the spot."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file

from cortexflow.processing.stats import Stats, make_stats
from cortexflow.processing.tokenizer import PromptTokenizer, load_tokenizer

DATA = Path(__file__).parents[1] / "data" / "processing"

CORPUS = [
    "pick up the red block and put it on the plate",
    "open the drawer of the kitchen cabinet",
    "Task: close the microwave, State: 0 1 2 3 4 5 6 7 8 9 -1 128 255;",
    "Action: fold the towel with both arms",
    "XYZ ABCDEFGHIJKLMNOPQRSTUVW _ - , ; :",
]


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DATA / "processing.json").read_text())
    return content


@pytest.fixture(scope="session")
def golden_images() -> dict[str, np.ndarray]:
    return load_file(DATA / "resize.safetensors")


@pytest.fixture(scope="session")
def stats(golden: dict[str, Any]) -> Stats:
    return make_stats(golden["stats"])


@pytest.fixture(scope="session")
def model_bytes() -> bytes:
    """A sentencepiece model with PaliGemma's special ids: pad 0, EOS 1, BOS 2, and "\\n" as one piece."""
    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=target,
        model_type="bpe",
        vocab_size=120,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["\n"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return target.getvalue()


@pytest.fixture(scope="session")
def tokenizer(model_bytes: bytes, tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(model_bytes)
    return load_tokenizer(file)
