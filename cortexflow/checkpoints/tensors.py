"""Lazy tensors, and reading them from safetensors files and directories.

A `LazyTensor` knows its name, shape and dtype; its values come from the file when `load` is called.
Each load maps the file anew and the mapping ends with the tensor it returned, so pages of tensors that
were already converted leave the process: peak memory follows what the caller keeps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cortexflow.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

SHARD = re.compile(r"(?P<stem>.*)-(?P<part>\d+)-of-(?P<parts>\d+)\.safetensors")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint whose values are read when `load()` is called."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def numel(self) -> int:
        """Number of values."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the values in `dtype`."""
        return self.numel * self.dtype.itemsize

    def named(self, name: str) -> LazyTensor:
        """The same tensor under another name."""
        return replace(self, name=name)


def lazy(name: str, tensor: torch.Tensor) -> LazyTensor:
    """A tensor in memory as a `LazyTensor`; `load()` returns it without a copy."""
    return LazyTensor(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def count_nonfinite(tensor: torch.Tensor) -> tuple[int, int]:
    """How many values are NaN and how many infinite.

    One pass without temporaries decides the usual case: a minimum and a maximum that are both finite
    leave no place for a NaN (which both propagate) or an infinity. Only a bad tensor is counted.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0, 0
    if tensor.dtype.itemsize == 1:  # float8 has no minimum
        tensor = tensor.float()
    low, high = torch.aminmax(tensor)
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return 0, 0
    return int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())


def _broken(path: Path, reason: object) -> CheckpointError:
    """The error for a file that is not readable as safetensors, with the cause where the bytes tell."""
    try:
        with path.open("rb") as file:
            head, size = file.read(128), path.stat().st_size
    except OSError:
        head, size = b"-", -1
    if size == 0:
        reason = "the file is empty"
    elif head.startswith(b"version https://git-lfs"):
        reason = "the file is a Git LFS pointer, not the weights; run `git lfs pull` where it was cloned"
    elif head.startswith(b"PK\x03\x04") or head[:1] == b"\x80":
        reason = "the bytes are a PyTorch or pickle file; rename it to .pt or .pkl"
    return CheckpointError(
        f"{path}: expected a complete safetensors file, cannot read it: {reason}. "
        "A truncated or damaged download is the usual cause: compare its size with the original and copy it again"
    )


def _load(path: Path, stored: str) -> torch.Tensor:
    # A mapping of its own for every tensor: a shared one would keep the pages of all tensors read so far.
    try:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(stored)
            return tensor
    except (SafetensorError, OSError) as error:
        raise _broken(path, error) from error


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one safetensors file under their stored names; only the header is read."""
    tensors: dict[str, LazyTensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                entry = file.get_slice(name)
                code = entry.get_dtype()
                if code not in DTYPES:
                    raise CheckpointError(
                        f"{path}: tensor {name} has dtype {code}; expected one of {', '.join(DTYPES)}. "
                        "Save the checkpoint in bfloat16 or float32"
                    )
                tensors[name] = LazyTensor(name, tuple(entry.get_shape()), DTYPES[code], partial(_load, path, name))
    except (SafetensorError, OSError) as error:
        raise _broken(path, error) from error
    if not tensors:
        raise CheckpointError(f"{path}: expected weights, found a safetensors file without tensors")
    return tensors


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, cannot read it: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _read_files(paths: list[Path]) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    home: dict[str, Path] = {}
    for path in paths:
        for name, tensor in read_safetensors(path).items():
            if name in home:
                raise CheckpointError(
                    f"{path.parent}: tensor {name} is in both {home[name].name} and {path.name}; expected one. "
                    "Keep the files of one checkpoint in the directory, or pass one file"
                )
            home[name], tensors[name] = path, tensor
    return tensors


def _read_indexed(index: Path) -> dict[str, LazyTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: expected a 'weight_map' from tensor names to file names, found {weight_map!r}")
    shards = sorted(set(weight_map.values()))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise CheckpointError(f"{index}: expected shards beside the index, found the paths {', '.join(outside)}")
    if absent := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise CheckpointError(
            f"{index}: the index names {len(shards)} shards, {len(absent)} of them not there: {', '.join(absent)}. "
            "The checkpoint is incomplete; download the missing files"
        )
    tensors = _read_files([index.parent / shard for shard in shards])
    if lost := sorted(set(weight_map) - set(tensors)):
        raise CheckpointError(
            f"{index}: {len(lost)} tensors of the index are in no shard, such as {', '.join(lost[:5])}. "
            "Index and shards are of different versions; download all of them again"
        )
    return tensors


def _check_shards(paths: list[Path]) -> None:
    """Files named part-of-parts must be all there even when no index lists them."""
    parts: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if match := SHARD.fullmatch(path.name):
            parts.setdefault((match["stem"], int(match["parts"])), set()).add(int(match["part"]))
    for (stem, count), found in parts.items():
        if absent := sorted(set(range(1, count + 1)) - found):
            raise CheckpointError(
                f"{paths[0].parent}: {stem} has {count} shards, missing {', '.join(f'number {n}' for n in absent)}. "
                "The checkpoint is incomplete; download the missing files"
            )


def read_directory(directory: Path) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint directory: an index with its shards, model.safetensors, or every *.safetensors."""
    if indices := sorted(directory.glob("*.safetensors.index.json")):
        if len(indices) > 1:
            raise CheckpointError(f"{directory}: expected one index, found {', '.join(i.name for i in indices)}")
        return _read_indexed(indices[0])
    single = directory / "model.safetensors"
    if single.is_file():
        return read_safetensors(single)
    paths = sorted(directory.glob("*.safetensors"))
    if any(path.name == "adapter_model.safetensors" for path in paths):
        raise CheckpointError(
            f"{directory}: adapter_model.safetensors holds LoRA deltas, not a model. Merge them into the base model "
            "(PEFT's merge_and_unload) and save the result"
        )
    # LeRobot keeps normalisation statistics of its processors beside the weights.
    paths = [path for path in paths if not path.name.startswith(("policy_preprocessor", "policy_postprocessor"))]
    if not paths:
        raise CheckpointError(f"{directory}: {_what_is_there(directory)}")
    _check_shards(paths)
    return _read_files(paths)


def _what_is_there(directory: Path) -> str:
    looked = "looked for *.safetensors.index.json, model.safetensors and *.safetensors, found none"
    if (directory / "pretrained_model").is_dir():
        return f"{looked}. LeRobot keeps the weights one level down: pass {directory / 'pretrained_model'}"
    steps = sorted((p.name for p in directory.iterdir() if p.name.isdecimal() and (p / "params").is_dir()), key=int)
    if steps:
        return f"{looked}. openpi keeps one checkpoint for each training step: pass {directory / steps[-1]}"
    if (directory / "params").is_dir() or any(directory.glob("ocdbt.process_*")):
        return f"{looked}. openpi's JAX checkpoint has _METADATA and manifest.ocdbt in params/: the copy is incomplete"
    torch_files = sorted(p.name for p in directory.iterdir() if p.suffix in {".pt", ".pth", ".pkl", ".bin"})
    if torch_files:
        return f"{looked}, but {', '.join(torch_files[:5])}: pass that file itself"
    return f"{looked}. The directory holds {', '.join(sorted(p.name for p in directory.iterdir())[:8]) or 'nothing'}"
