"""The tokenizer of a checkpoint: text in, ids out.

| file | read by |
|---|---|
| `paligemma_tokenizer.model`, `tokenizer.model` | sentencepiece |
| `tokenizer.json`, where that is all there is | Hugging Face's `tokenizers` (the extra `tokenizers`) |
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cortexflow.errors import CheckpointError, ConfigError, InputError

# Looked for in a directory, in this order.
FILE_NAMES = ("paligemma_tokenizer.model", "tokenizer.model", "tokenizer.json")
BOS_PIECES = ("<s>", "<bos>")  # Llama's, Gemma's; a tokenizer.json does not say which of its pieces is BOS
PAD_ID = 0


class PromptTokenizer:
    """Encodes text; ids start with BOS unless asked otherwise, no EOS is added.

    `bos_id` (2 in PaliGemma's, 1 in Llama's) and `vocab_size` (in pieces) are the file's.
    Source: openpi src/openpi/models/tokenizer.py (PaligemmaTokenizer).
    """

    def __init__(self, encode: Callable[[str], list[int]], bos_id: int, vocab_size: int) -> None:
        self._encode = encode
        self.bos_id = bos_id
        self.vocab_size = vocab_size

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of `text`, BOS first (`bos=False`: without). Raises InputError if `text` is not a string."""
        if not isinstance(text, str):
            raise InputError(f"text: expected a string, found {type(text).__name__}")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise InputError(
                f"text: expected Unicode, found half of a surrogate pair in {text[:80]!r}; decode it again"
            )
        ids = self._encode(text)
        return [self.bos_id, *ids] if bos else ids


def load_tokenizer(path: str | Path) -> PromptTokenizer:
    """The tokenizer in a sentencepiece `.model` file, in a `.json` file, or in a directory that holds one.

    Raises CheckpointError if there is none, saying what was looked for, or if the file cannot be read; ConfigError
    where a tokenizer.json is all there is and the package that reads it is not installed.
    """
    file = _model_file(Path(path))
    return _from_json(file) if file.suffix == ".json" else _from_sentencepiece(file)


def _from_sentencepiece(file: Path) -> PromptTokenizer:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(file.read_bytes())
    except (RuntimeError, OSError, ValueError) as reason:  # ValueError: pieces that are not UTF-8
        raise CheckpointError(
            f"{file}: expected a sentencepiece model, found something else ({reason}); download the tokenizer again"
        ) from reason
    if processor.bos_id() < 0:
        raise CheckpointError(
            f"{file}: expected a sentencepiece model with a BOS piece, found none; give the tokenizer of the checkpoint"
        )
    return PromptTokenizer(
        lambda text: [int(i) for i in processor.encode(text)], processor.bos_id(), processor.vocab_size()
    )


def _from_json(file: Path) -> PromptTokenizer:
    try:
        import tokenizers
    except ImportError as reason:
        raise ConfigError(
            f"{file}: expected the package tokenizers, which reads this file, found it not installed; "
            "pip install 'cortexflow-vla[tokenizers]', or put the tokenizer.model of the same repository beside it"
        ) from reason
    try:
        model: Any = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as reason:  # the package raises no class of its own
        raise CheckpointError(
            f"{file}: expected a tokenizer of Hugging Face's, cannot read it ({reason}); download the tokenizer again"
        ) from reason
    model.no_padding()
    model.no_truncation()
    bos = next((i for i in map(model.token_to_id, BOS_PIECES) if i is not None), None)
    if bos is None:
        raise CheckpointError(
            f"{file}: expected a piece {' or '.join(BOS_PIECES)}, which begins a prompt, found none; give the "
            "tokenizer of the checkpoint"
        )

    def encode(text: str) -> list[int]:
        try:
            return [int(i) for i in model.encode(text, add_special_tokens=False).ids]
        except Exception as reason:
            raise CheckpointError(
                f"{file}: expected to encode any text, failed at {text[:80]!r} ({reason}); download the tokenizer again"
            ) from reason

    return PromptTokenizer(encode, bos, model.get_vocab_size(with_added_tokens=False))


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
        f"tokenizer: looked for {wanted} in {path}, found {', '.join(found) or 'no tokenizer file'}; copy the "
        "sentencepiece model of the checkpoint's language model there (π0, π0.5: google/paligemma-3b-pt-224), or give "
        "the path of the .model file"
    )
