"""Actions as tokens: each value is one of the last ids of the vocabulary, and each id stands for a bin of [-1, 1].

With a vocabulary of 32000 pieces and 256 bin edges: 31999 is the lowest of the 255 bins between the edges, 31745 the
highest; the id of the edge 1 itself, 31744, decodes as 31745 does.
Source: openvla prismatic/vla/action_tokenizer.py, prismatic/extern/hf/modeling_prismatic.py (predict_action).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from cortexflow.errors import InputError
from cortexflow.processing.arrays import Floats, as_floats, to_numpy


class Bins(NamedTuple):
    """How actions are tokens: the edges of the bins, the pieces of the vocabulary whose last ids they take, and the id
    that ends an answer."""

    edges: int = 256
    vocabulary: int = 32000
    end: int = 2


LLAMA_BINS = Bins()


def bin_centres(edges: int = 256) -> Floats:
    """The middles between `edges` points spread evenly over [-1, 1]: float64 [edges - 1], rising."""
    points = np.linspace(-1.0, 1.0, edges)
    return (points[:-1] + points[1:]) / 2.0


def decode_actions(ids: ArrayLike | torch.Tensor, bins: Bins = LLAMA_BINS) -> Floats:
    """Token ids as the middles of their bins: float64 of the shape of `ids`.

    Ids outside the action range take the nearest end of it: those below (text) become the highest value, those
    from `bins.vocabulary` upwards (padding of the embedding) the lowest. Raises InputError for other than integers.
    """
    found = _integers(ids)
    centres = bin_centres(bins.edges)
    return centres[np.clip(bins.vocabulary - found - 1, 0, len(centres) - 1)]


def check_ended(ids: ArrayLike | torch.Tensor, bins: Bins = LLAMA_BINS) -> None:
    """Raise InputError where an answer [..., tokens] ended before it was complete: what stands there is no action.

    The released code lets such an answer pass, and padding moves the robot.
    """
    found = _integers(ids)
    if (found == bins.end).any():
        first = int(np.argwhere(found == bins.end)[0][-1])
        raise InputError(
            f"actions: the network ended its answer at token {first + 1} of {found.shape[-1]} (id {bins.end}); "
            "expected a token for each value of an action: is the checkpoint trained for this robot, the prompt one of "
            "its tasks?"
        )


def encode_actions(actions: ArrayLike | torch.Tensor, bins: Bins = LLAMA_BINS) -> NDArray[np.int64]:
    """The token ids of normalised actions, clipped to [-1, 1]: int64 of their shape. Raises InputError."""
    values = np.clip(as_floats(actions, "actions"), -1.0, 1.0)
    return (bins.vocabulary - np.digitize(values, np.linspace(-1.0, 1.0, bins.edges))).astype(np.int64)


def _integers(ids: Any) -> NDArray[np.int64]:
    try:
        found = to_numpy(ids)
    except (TypeError, ValueError, RuntimeError) as reason:
        raise InputError(f"action tokens: expected token ids, found {type(ids).__name__} ({reason})") from reason
    if found.dtype.kind not in "iu":
        raise InputError(f"action tokens: expected integers, found dtype {found.dtype}; give ids, not logits")
    return found.astype(np.int64)
