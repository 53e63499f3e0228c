"""Reading dictionaries of tensors from PyTorch files (.pt) and pickles (.pkl).

A pickle is a program: unpickling a file from someone else runs whatever they put in it. A `.pt` file is
therefore read with `weights_only=True`, which admits tensors and nothing else, and a raw pickle is
read only with the caller's consent.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cortexflow.checkpoints.tensors import LazyTensor, lazy
from cortexflow.errors import CheckpointError

LEGACY_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch.save before PyTorch 1.6


def from_mapping(values: Mapping[str, Any], where: str = "the dictionary") -> dict[str, LazyTensor]:
    """Tensors of a dictionary in memory; a nested `state_dict` is entered."""
    if isinstance(values.get("state_dict"), Mapping):
        values = values["state_dict"]
    tensors: dict[str, LazyTensor] = {}
    for name, value in values.items():
        if isinstance(value, LazyTensor):
            tensors[name] = value
        elif isinstance(value, torch.Tensor):
            tensors[name] = lazy(name, value.detach())
        elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            tensors[name] = lazy(name, torch.from_numpy(value))
        else:
            raise CheckpointError(
                f"{where}: expected tensors by name, found {type(value).__name__} under {name!r}. "
                "Pass the dictionary of weights itself"
            )
    if not tensors:
        raise CheckpointError(f"{where}: expected tensors by name, found none")
    return tensors


def _as_mapping(content: object, path: Path) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    return content


def _torch_load(path: Path, *, weights_only: bool, mmap: bool) -> Mapping[str, Any]:
    try:
        return _as_mapping(torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mmap), path)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: expected tensors only, found other Python objects, which run code when they are loaded: "
            f"{_first_line(error)}. If you trust where the file comes from, pass allow_pickle=True; better, save "
            "the tensors alone with safetensors.torch.save_file"
        ) from error
    except Exception as error:  # torch.load reports damage through many types
        raise CheckpointError(
            f"{path}: expected a complete PyTorch file, cannot read it: {_first_line(error)}. "
            "A truncated or damaged download is the usual cause"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _reload(path: Path, name: str) -> torch.Tensor:
    # Mapped anew for every tensor, so that pages of earlier ones do not stay in the process.
    content = _torch_load(path, weights_only=True, mmap=True)
    inner = content.get("state_dict")
    value = (inner if isinstance(inner, Mapping) else content)[name]
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(value)


def read_torch_file(path: Path, *, allow_pickle: bool = False) -> dict[str, LazyTensor]:
    """The tensors of a .pt or .pkl file. What the bytes are decides how they are read, not the suffix."""
    with path.open("rb") as file:
        head = file.read(len(LEGACY_TORCH))
    if not head:
        raise CheckpointError(f"{path}: expected weights, the file is empty")
    where = str(path)
    if zipfile.is_zipfile(path):
        try:
            tensors = from_mapping(_torch_load(path, weights_only=True, mmap=True), where)
        except CheckpointError:
            if not allow_pickle:
                raise
            return from_mapping(_torch_load(path, weights_only=False, mmap=True), where)
        return {n: LazyTensor(n, t.shape, t.dtype, partial(_reload, path, n)) for n, t in tensors.items()}
    if head == LEGACY_TORCH:
        return from_mapping(_torch_load(path, weights_only=not allow_pickle, mmap=False), where)
    if head[:2] == b"PK":
        raise CheckpointError(f"{path}: expected a complete PyTorch file, found one that is cut short; copy it again")
    if not allow_pickle:
        raise CheckpointError(
            f"{path}: this is a pickle, and unpickling runs whatever code its author put in it. "
            "If you made the file or trust who did, consent with allow_pickle=True. To be rid of the question, "
            "convert it once: `torch.save(pickle.load(open(path, 'rb')), 'weights.pt')`, and pass weights.pt"
        )
    try:
        with path.open("rb") as file:
            content = pickle.load(file)  # the caller consented
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path}: expected a pickled dictionary of tensors, cannot read it: {_first_line(error)}"
        ) from error
    return from_mapping(_as_mapping(content, path), where)
