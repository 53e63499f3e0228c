"""The sentencepiece tokenizer of a checkpoint: text in, ids out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cortexflow.errors import CheckpointError, InputError

FILE_NAMES = ("paligemma_tokenizer.model", "tokenizer.model")  # looked for in a directory, in this order
PAD_ID = 0


class PromptTokenizer:
    """Encodes text with a loaded sentencepiece model; ids start with BOS unless asked otherwise, no EOS is added.

    `bos_id` (2 in PaliGemma's) and `vocab_size` (in pieces) are read from the model; CheckpointError without a BOS.
    Source: openpi src/openpi/models/tokenizer.py (PaligemmaTokenizer).
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.bos_id: int = processor.bos_id()
        self.vocab_size: int = processor.vocab_size()
        if self.bos_id < 0:
            raise CheckpointError("tokenizer: the sentencepiece model has no BOS piece; give the PaliGemma tokenizer")

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of `text`, BOS first (`bos=False`: without). Raises InputError if `text` is not a string."""
        if not isinstance(text, str):
            raise InputError(f"text: expected a string, found {type(text).__name__}")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise InputError(
                f"text: expected Unicode, found half of a surrogate pair in {text[:80]!r}; decode it again"
            )
        ids = [int(i) for i in self._processor.encode(text)]
        return [self.bos_id, *ids] if bos else ids


def load_tokenizer(path: str | Path) -> PromptTokenizer:
    """The tokenizer in a sentencepiece `.model` file, or in a directory that holds one (`FILE_NAMES`).

    Raises CheckpointError if there is none, saying what was looked for, or if the file cannot be read.
    """
    import sentencepiece

    file = _model_file(Path(path))
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(file.read_bytes())
    except (RuntimeError, OSError) as reason:
        raise CheckpointError(
            f"{file}: expected a sentencepiece model, found something else ({reason}); download the tokenizer again"
        ) from reason
    return PromptTokenizer(processor)


def _model_file(path: Path) -> Path:
    if path.is_file():
        return path
    wanted = " or ".join(FILE_NAMES)
    if not path.is_dir():
        raise CheckpointError(
            f"tokenizer: {path} does not exist; expected a sentencepiece .model file or a directory with {wanted}"
        )
    for name in FILE_NAMES:
        if (path / name).is_file():
            return path / name
    found = sorted(entry.name for entry in path.iterdir() if "token" in entry.name or entry.suffix == ".model")
    raise CheckpointError(
        f"tokenizer: looked for {wanted} in {path}, found {', '.join(found) or 'no tokenizer file'}; "
        "copy the sentencepiece model of google/paligemma-3b-pt-224 there, or give the path of the .model file"
    )
