"""An instruction becomes the token slots of the prompt bucket.

A prompt format is a row of `PROMPT_FORMATS`: how the text is cleaned, the pieces that are encoded one after the
other, without and with the discretised state, and the id that must end them. Nothing here knows a model's class.

| format | as in |
|---|---|
| `pi0` | openpi: cleaned text, then a newline as a piece of its own |
| `pi05` | openpi and lerobot: `Task: ..., State: ...;\\nAction: `; without the state the same as `pi0` |
| `pi0_lerobot` | lerobot: the text as it is, a newline appended if it has none, encoded in one piece |
| `pi05_realtime` | realtime-vla: as `pi05`, but newlines inside the text stay |
| `openvla` | OpenVLA: `In: What action should the robot take to ...?\\nOut:`, lower case, ended by Llama's lone space |
| `openvla_v01` | OpenVLA v0.1: Vicuna's conversation in place of `In:` and `Out:` |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from cortexflow.errors import ConfigError, InputError
from cortexflow.processing.arrays import as_floats, to_numpy
from cortexflow.processing.tokenizer import PAD_ID

BINS = 256
MAX_PIECE = 64  # characters: no vocabulary here has a longer piece


class Encoder(Protocol):
    """What a tokenizer has to offer: `PromptTokenizer.encode`."""

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of `text`, with BOS first if `bos`."""


class PromptFormat(NamedTuple):
    """One row of `PROMPT_FORMATS`. Pieces contain `{text}` and `{state}`; `with_state` is None if it has no place.

    `closing` is an id that is put behind the last unless it is the last; None: none is.
    """

    clean: Callable[[str], str]
    without_state: tuple[str, ...]
    with_state: tuple[str, ...] | None
    closing: int | None = None


def clean_openpi(text: str) -> str:
    """Outer whitespace removed, then `_` and newlines replaced by spaces (openpi src/openpi/models/tokenizer.py)."""
    return text.strip().replace("_", " ").replace("\n", " ")


def clean_lerobot(text: str) -> str:
    """The text unchanged, with a newline at the end (lerobot src/lerobot/policies/pi0/processor_pi0.py)."""
    return text if text.endswith("\n") else text + "\n"


def clean_realtime(text: str) -> str:
    """Outer whitespace removed, `_` replaced by spaces, inner newlines kept (realtime-vla pi05_infer.py)."""
    return text.strip().replace("_", " ")


_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# The piece of a space alone: the training text goes on with one, and the released model appends it when it predicts
# (openvla prismatic/extern/hf/modeling_prismatic.py, predict_action).
_LLAMA_SPACE = 29871

_PI05_STATE = ("Task: {text}, State: {state};\nAction: ",)

PROMPT_FORMATS: dict[str, PromptFormat] = {
    "pi0": PromptFormat(clean_openpi, ("{text}", "\n"), None),
    "pi05": PromptFormat(clean_openpi, ("{text}", "\n"), _PI05_STATE),
    "pi0_lerobot": PromptFormat(clean_lerobot, ("{text}",), None),
    "pi05_realtime": PromptFormat(clean_realtime, ("{text}", "\n"), _PI05_STATE),
    # openvla experiments/robot/openvla_utils.py (get_vla_action)
    "openvla": PromptFormat(
        str.lower, ("In: What action should the robot take to {text}?\nOut:",), None, closing=_LLAMA_SPACE
    ),
    "openvla_v01": PromptFormat(
        str.lower,
        (_VICUNA + " USER: What action should the robot take to {text}? ASSISTANT:",),
        None,
        closing=_LLAMA_SPACE,
    ),
}


def prompt_format(name: str) -> PromptFormat:
    """The row of `PROMPT_FORMATS` called `name`; ConfigError, listing the rows, if there is none."""
    if name not in PROMPT_FORMATS:
        raise ConfigError(f"prompt format: expected one of {', '.join(PROMPT_FORMATS)}, found {name!r}")
    return PROMPT_FORMATS[name]


def state_bins(state: ArrayLike | torch.Tensor, *, pad_to: int | None = None) -> NDArray[np.int64]:
    """The bin of each value of a NORMALISED state [n]: int64 [n], or [pad_to] with zeros (bin 128) appended first.

    256 bins of width 1/128 from -1: `floor((x + 1) * 128)` in [-1, 1), 255 from 1 upwards and -1 below -1.
    `pad_to=32` is what LeRobot 0.4.0 to 0.4.4 did; openpi and LeRobot from 0.5.0 use the true length.
    Raises InputError if the state is not one finite vector or is longer than `pad_to`.
    Source: openpi src/openpi/models/tokenizer.py, lerobot src/lerobot/policies/pi05/processor_pi05.py.
    """
    values = as_floats(state, "state", ndim=1)
    if pad_to is not None:
        if len(values) > pad_to:
            raise InputError(f"state: expected at most {pad_to} values, found {len(values)}")
        values = np.pad(values, (0, pad_to - len(values)))
    return np.digitize(values, np.linspace(-1, 1, BINS + 1)[:-1]).astype(np.int64) - 1


def as_bins(state_tokens: ArrayLike | torch.Tensor) -> NDArray[np.int64]:
    """Bins given by the caller, checked: int64 [n] from -1 to 255. Raises InputError for anything else."""
    bins = to_numpy(state_tokens)
    if bins.ndim != 1 or bins.dtype.kind not in "iu":
        raise InputError(
            f"state_tokens: expected integers of shape (n,), found dtype {bins.dtype} and shape {bins.shape}; "
            "state_bins() makes them from a normalised state"
        )
    if bins.size and (bins.min() < -1 or bins.max() >= BINS):
        raise InputError(f"state_tokens: expected bins from -1 to {BINS - 1}, found {bins.min()} to {bins.max()}")
    return bins.astype(np.int64)


def prompt_pieces(text: str, *, format: str, bins: Sequence[int] | NDArray[np.int64] | None = None) -> tuple[str, ...]:
    """The strings that are encoded one after the other; BOS goes before the first, nothing between or after.

    `bins` is the discretised state (printed as integers joined by single spaces), None for a prompt without state.
    Raises InputError if `text` is not a string, ConfigError if the format is unknown or has no place for a state.
    """
    row = prompt_format(format)
    if not isinstance(text, str):
        raise InputError(f"prompt: expected a string, found {type(text).__name__}")
    if bins is None:
        return tuple(piece.format(text=row.clean(text)) for piece in row.without_state)
    if row.with_state is None:
        raise ConfigError(f"prompt format {format!r} has no place for the state; use bins=None or another format")
    state = " ".join(str(int(b)) for b in bins)
    return tuple(piece.format(text=row.clean(text), state=state) for piece in row.with_state)


def prompt_ids(
    tokenizer: Encoder, text: str, *, format: str, bins: Sequence[int] | NDArray[np.int64] | None = None
) -> list[int]:
    """The ids of a whole prompt, BOS first. Errors as in `prompt_pieces`."""
    pieces = prompt_pieces(text, format=format, bins=bins)
    ids = [i for n, piece in enumerate(pieces) for i in tokenizer.encode(piece, bos=n == 0)]
    closing = prompt_format(format).closing
    return ids if closing is None or ids[-1:] == [closing] else [*ids, closing]


def encode_prompt(
    tokenizer: Encoder,
    text: str,
    *,
    format: str,
    length: int,
    bins: Sequence[int] | NDArray[np.int64] | None = None,
    truncate: bool = False,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The prompt in its bucket: (int32 [length], bool [length]), padded on the right with id 0 and mask False.

    A prompt longer than the bucket is an InputError; `truncate=True` cuts its end off instead, as openpi and
    LeRobot do (for `pi05` that loses the closing `Action: `). Other errors as in `prompt_pieces`.
    Source: openpi src/openpi/models/tokenizer.py.
    """
    if isinstance(text, str) and len(text) > MAX_PIECE * length and not truncate:
        raise InputError(
            f"prompt: expected at most {length} tokens (the prompt bucket), found {len(text)} characters; "
            "shorten the instruction"
        )
    return pad_tokens(prompt_ids(tokenizer, text, format=format, bins=bins), length, truncate=truncate)


def pad_tokens(
    ids: Sequence[int], length: int, *, truncate: bool = False
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """`ids` padded on the right to `length` slots: (int32 [length], bool [length]). See `encode_prompt`."""
    if len(ids) > length and not truncate:
        raise InputError(
            f"prompt: expected at most {length} tokens (the prompt bucket), found {len(ids)}; shorten the instruction, "
            f"compile for a bucket of at least {len(ids)}, or ask for truncation"
        )
    valid = min(len(ids), length)
    tokens = np.full(length, PAD_ID, np.int32)
    tokens[:valid] = ids[:valid]
    return tokens, np.arange(length) < valid
