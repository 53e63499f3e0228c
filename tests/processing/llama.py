"""Tokenizers in the manner of Llama-2's: byte fallback, a leading space, BOS 1; none of its real ones is here.

`vocabulary_bytes` is one of 32000 pieces in which the words of three reference requests have their true ids, so that
these requests must come out as the published implementation was given them.
"""

from __future__ import annotations

import io
import json
from functools import cache
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

SPACE = "▁"
CORPUS = ["in: what action should the robot take to pick up the cup?", "out: put the eggplant in the basket, then stop"]

# The pieces of the reference requests by id, as their order in the requests tells.
PIECES = {
    278: "▁the",
    297: "▁in",
    304: "▁to",
    322: "▁and",
    372: "▁it",
    512: "▁In",
    556: "wer",
    701: "▁up",
    769: "▁then",
    881: "▁should",
    1722: "▁open",
    1724: "▁What",
    1925: "▁put",
    2058: "▁place",
    2125: "▁take",
    2246: "▁top",
    2768: "▁inside",
    3158: "▁action",
    3744: "Out",
    3802: "▁close",
    5839: "▁pick",
    7482: "▁dra",
    13328: "▁yellow",
    18002: "▁cup",
    19710: "▁egg",
    19964: "▁robot",
    24389: "plant",
    25972: "▁basket",
    26163: "▁apple",
    29871: SPACE,
    29892: ",",
    29901: ":",
    29973: "?",
}


def _model() -> Any:
    """Llama-2's settings, its first three pieces and the 256 bytes."""
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    for piece, type_ in (("<unk>", kind.UNKNOWN), ("<s>", kind.CONTROL), ("</s>", kind.CONTROL)):
        model.pieces.add(piece=piece, score=0.0, type=type_)
    for value in range(256):
        model.pieces.add(piece=f"<0x{value:02X}>", score=0.0, type=kind.BYTE)
    return model


@cache
def vocabulary_bytes() -> bytes:
    """A sentencepiece model of 32000 pieces: `PIECES`, the letters and beginnings that merge into them, and fillers."""
    words = set(PIECES.values())
    parts = {word[:n] for word in words for n in range(1, len(word))} | {letter for word in words for letter in word}
    ids = dict(PIECES)
    free = (i for i in range(31999, 0, -1) if i not in PIECES)
    ids |= {next(free): part for part in sorted(parts - words)}
    model = _model()
    for i in range(len(model.pieces), 32000):
        piece = ids.get(i, f"⟨{i}⟩")  # brackets that no text has
        # The earlier a piece merges the higher its score: beginnings in order, so that a word grows from its start.
        score = -float(len(piece)) if i in ids else -1e4 - i
        model.pieces.add(piece=piece, score=score)
    return bytes(model.SerializeToString())


@cache
def trained_bytes() -> bytes:
    """A small trained sentencepiece BPE with byte fallback."""
    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=target,
        model_type="bpe",
        vocab_size=320,
        character_coverage=1.0,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return target.getvalue()


def json_text(model: bytes) -> str:
    """The `tokenizer.json` of Hugging Face's converter for a Llama model: merges in the order of the pieces."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces}
    pairs = [
        (left, right)
        for piece in sorted(vocabulary, key=lambda p: -scores[p])
        if vocabulary[piece] >= 259
        for left, right in ((piece[:n], piece[n:]) for n in range(1, len(piece)))
        if left in vocabulary and right in vocabulary
    ]
    special = [{"content": name, "id": i} for i, name in enumerate(("<unk>", "<s>", "</s>"))]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return json.dumps(
        {
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "padding": None,
            "added_tokens": [token | flags | {"special": True} for token in special],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": SPACE},
                    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
                ],
            },
            "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            },
            "decoder": None,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": "<unk>",
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": vocabulary,
                "merges": [f"{left} {right}" for left, right in pairs],
            },
        }
    )
