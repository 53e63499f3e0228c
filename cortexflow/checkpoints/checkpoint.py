"""Opening a checkpoint of any format as canonical, lazily read tensors with their `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cortexflow.checkpoints import lerobot, openvla, orbax, realtime_vla
from cortexflow.checkpoints.config import infer_config, override_facts
from cortexflow.checkpoints.dialects import Facts, read_config
from cortexflow.checkpoints.doctor import likely_reasons
from cortexflow.checkpoints.names import detect_family, group_of
from cortexflow.checkpoints.tensors import LazyTensor, count_nonfinite, read_directory, read_json, read_safetensors
from cortexflow.checkpoints.torch_file import from_mapping, read_torch_file
from cortexflow.errors import CheckpointError
from cortexflow.models.config import ModelConfig, VLAModelType

TORCH_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".bin")


class Size(NamedTuple):
    """Parameters and bytes of a group of tensors."""

    params: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as the rest of CortexFlow sees it: canonical tensors and the configuration they tell."""

    path: Path | None
    format: str  # "lerobot", "openpi", "openpi-jax", "realtime-vla" or "openvla"
    family: VLAModelType
    config: ModelConfig
    tensors: dict[str, LazyTensor]
    notes: list[str] = field(default_factory=list)  # what the user should know: inferences, fixed prompts
    skipped: dict[str, str] = field(default_factory=dict)  # stored names that are never read, with the reason
    fixed_prompt: int | None = None  # tokens of the only prompt that the file knows; they are 0, 1, 2, ...

    def load_checked(self, name: str) -> torch.Tensor:
        """The values of a tensor; NaN or infinity among them is an error."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path or 'the dictionary'}: expected a tensor {name}, found none of this name")
        lazy = self.tensors[name]
        value = lazy.load()
        if tuple(value.shape) != lazy.shape or value.dtype != lazy.dtype:
            raise CheckpointError(
                f"{name}: the checkpoint changed since it was opened: expected {lazy.dtype} {list(lazy.shape)}, "
                f"found {value.dtype} {list(value.shape)}; open it again"
            )
        nan, inf = count_nonfinite(value)
        if nan or inf:
            raise CheckpointError(
                f"{name}: expected finite weights, found {nan} NaN and {inf} infinite among {value.numel()} values. "
                "The training diverged or the file is damaged; use an earlier checkpoint or copy it again"
            )
        return value

    def sizes(self) -> dict[str, Size]:
        """Parameters and bytes by group (vision, projector, embedding, encoder, decoder, action) and in `total`."""
        groups: dict[str, Size] = {}
        for name, tensor in self.tensors.items():
            for group in (group_of(name), "total"):
                size = groups.get(group, Size(0, 0))
                groups[group] = Size(size.params + tensor.numel, size.nbytes + tensor.nbytes)
        return dict(sorted(groups.items(), key=lambda item: item[0] == "total"))


def _read(path: Path, allow_pickle: bool) -> dict[str, LazyTensor]:
    if path.is_dir():
        place = None if any(path.glob("*.safetensors*")) else orbax.find_params(path)
        return orbax.read_params(place) if place else read_directory(path)
    if path.is_file():
        if path.suffix in TORCH_SUFFIXES:
            return read_torch_file(path, allow_pickle=allow_pickle)
        if path.suffix == ".json":
            raise CheckpointError(f"{path}: expected weights, found a JSON file; pass its directory: {path.parent}")
        return read_safetensors(path)
    raise CheckpointError(
        f"{path}: expected a checkpoint directory (with *.safetensors.index.json, model.safetensors or *.safetensors, "
        "or with openpi's params/), a .safetensors file, or a .pt or .pkl file of realtime-vla; there is nothing at "
        "this path"
    )


def _config_beside(path: Path) -> tuple[dict[str, Any] | None, str]:
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return None, str(file)
    content = read_json(file)
    newer = file.with_name(openvla.STATISTICS)
    if content.get("model_type") == "openvla" and newer.is_file():
        content["norm_stats"] = read_json(newer)
    return content, str(file)


def build_checkpoint(
    stored: Mapping[str, LazyTensor],
    config_json: Mapping[str, Any] | None = None,
    *,
    path: Path | None = None,
    config_where: str = "config.json",
    config_overrides: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """A `Checkpoint` from stored tensors and the content of a config.json: the part that touches no file."""
    overrides = override_facts(config_overrides or {})
    try:
        return _build(stored, config_json, path, config_where, overrides)
    except CheckpointError as error:
        if path is None or str(error).startswith(str(path)):
            raise
        raise CheckpointError(f"{path}: {error}") from error


def _build(
    stored: Mapping[str, LazyTensor],
    config_json: Mapping[str, Any] | None,
    path: Path | None,
    config_where: str,
    overrides: Facts,
) -> Checkpoint:
    notes: list[str] = []
    if openvla.holds(stored):
        read = openvla.read(stored, config_json, config_where, overrides, notes)
        return Checkpoint(path, "openvla", VLAModelType.OPENVLA, read.config, read.tensors, notes, read.skipped)
    skipped: dict[str, str] = {}
    layers: list[Facts] = [overrides]
    fixed: Facts = {}
    fixed_prompt: int | None = None
    if realtime_vla.MARK in stored:
        heads = {field: overrides[field].value for field in ("num_kv_heads", "head_dim") if field in overrides}
        converted = realtime_vla.convert(stored, **heads)
        layers.append(converted.facts)
        notes += converted.notes
        fixed, fixed_prompt = converted.fixed, converted.fixed_prompt
        tensors, name, family = converted.tensors, "realtime-vla", converted.family
    else:
        from_jax = any(name.startswith(orbax.MARK) for name in stored)
        if from_jax:
            tree = orbax.convert(stored)
            tensors, fixed, notes = tree.tensors, tree.facts, tree.notes
        else:
            tensors, skipped = lerobot.canonical_tensors(stored)
        found = detect_family(tensors)
        if found is None:
            raise CheckpointError(
                "expected a checkpoint of π0 or π0.5 (tensors of LeRobot, openpi or realtime-vla) or of OpenVLA, "
                f"found {len(stored)} tensors such as {', '.join(list(stored)[:4])}{_because(tensors)}"
            )
        family = found
        dialect = None
        if config_json is not None:
            dialect, said = read_config(config_json, config_where)
            layers += said
        layers.append(fixed)
        name = "lerobot" if lerobot.has_prefix(stored) or dialect == "lerobot" else "openpi"
        if from_jax:
            name = "openpi-jax"
            if not any("chunk_size" in layer for layer in layers):
                notes.append("chunk_size: no file of this format tells the action horizon; 10 is assumed (--chunk N)")
    shapes = {n: t.shape for n, t in tensors.items()}
    config = infer_config(family, shapes, layers, notes, fixed=fixed, explain=lambda: _because(tensors))
    return Checkpoint(path, name, family, config, tensors, notes, skipped, fixed_prompt)


def _because(tensors: Mapping[str, LazyTensor]) -> str:
    reasons = likely_reasons({n: t.shape for n, t in tensors.items()}, dtypes={n: t.dtype for n, t in tensors.items()})
    return "".join(f"\nlikely: {reason}" for reason in reasons)


def open_checkpoint(
    source: str | Path | Mapping[str, Any],
    *,
    config_overrides: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Open a checkpoint directory, file, or dictionary of tensors; values are read when they are loaded.

    `config_overrides` are fields of `ModelConfig`, for what the checkpoint does not tell or tells
    wrongly. `allow_pickle` consents to running the code inside a pickle.
    """
    if isinstance(source, Mapping):
        return build_checkpoint(from_mapping(source), config_overrides=config_overrides)
    path = Path(source).expanduser()
    stored = _read(path, allow_pickle)
    if path.name == "params" and any(name.startswith(orbax.MARK) for name in stored):
        path = path.parent  # where openpi keeps the statistics
    config_json, where = _config_beside(path) if realtime_vla.MARK not in stored else (None, "")
    return build_checkpoint(stored, config_json, path=path, config_where=where, config_overrides=config_overrides)
