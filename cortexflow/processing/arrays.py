"""Reading a vector or a chunk of vectors: anything array-like becomes float64 numpy, or says why it cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from cortexflow.errors import InputError

Floats = NDArray[np.float64]


def to_numpy(value: Any) -> NDArray[Any]:
    """`value` as a numpy array without changing its dtype. A torch tensor may live on any device; bfloat16,
    which numpy does not have, becomes float32."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
        return np.asarray(value.numpy())
    return np.asarray(value)


def shape_of(value: Any, name: str) -> tuple[int, ...]:
    """The shape of anything array-like, without converting an array. Raises InputError if it has none."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return tuple(value.shape)
    try:
        return np.shape(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as reason:
        raise InputError(f"{name}: expected an array of numbers, found {type(value).__name__} ({reason})") from reason


def as_floats(value: ArrayLike | torch.Tensor, name: str, *, ndim: int | None = None) -> Floats:
    """`value` as a new float64 array, called `name` in errors.

    `ndim` is the expected number of axes (None: one or more). Raises InputError for something that is not
    made of numbers, has other axes, or holds NaN or infinity.
    """
    try:
        found = to_numpy(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as reason:  # RecursionError is a RuntimeError
        raise InputError(f"{name}: expected an array of numbers, found {type(value).__name__} ({reason})") from reason
    if found.dtype.kind not in "fiu":
        raise InputError(f"{name}: expected an array of numbers, found dtype {found.dtype}; convert it to float32")
    if found.ndim == 0 or (ndim is not None and found.ndim != ndim):
        axes = "at least one axis" if ndim is None else f"{ndim} axis" if ndim == 1 else f"{ndim} axes"
        raise InputError(f"{name}: expected an array with {axes}, found shape {found.shape}")
    floats = found.astype(np.float64)
    bad = ~np.isfinite(floats)
    if bad.any():
        where = [int(i) for i in np.argwhere(bad)[0]]
        raise InputError(
            f"{name}: expected finite numbers, found {floats[tuple(where)]} at index {where} "
            f"({int(bad.sum())} of {floats.size} values); repair them before the call"
        )
    return floats
