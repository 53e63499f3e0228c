"""From a checkpoint to a model with its weights, its tokenizer and the form of its prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from cortexflow.checkpoints import Checkpoint, count_nonfinite, open_checkpoint
from cortexflow.checkpoints.dialects import FAMILIES
from cortexflow.compiler import load_model
from cortexflow.configuration import InferenceConfig
from cortexflow.errors import CheckpointError, ConfigError
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.models import ModelConfig, VLAModel, VLAModelType, create_model
from cortexflow.observation import checkpoint_towers, directory
from cortexflow.processing import FAMILIES as FAMILY_RULES
from cortexflow.processing import load_tokenizer
from cortexflow.processing.prompts import Encoder
from cortexflow.processing.tokenizer import FILE_NAMES
from cortexflow.processing.towers import Tower

Source = str | os.PathLike[str] | Mapping[str, Any] | Checkpoint | VLAModel

# How a family writes its prompt; a checkpoint that LeRobot saved may differ. Others say it in `prompt_format`.
PROMPTS = {"pi0": "pi0", "pi05": "pi05", "openvla": "openvla"}
LEROBOT_PROMPTS = {"pi0": "pi0_lerobot", "pi05": "pi05"}


def family_name(config: ModelConfig) -> str:
    """The name of a configuration's family."""
    kind = config.model_type
    return kind.value if isinstance(kind, VLAModelType) else kind


def open_model(
    source: Source, config: ModelConfig | None = None, *, allow_pickle: bool = False
) -> tuple[VLAModel, Checkpoint | None]:
    """The model of a checkpoint with its weights, read when asked for: (the model, the opened checkpoint).

    `config` says the family, and by fields that are not the defaults what the checkpoint does not tell. A family
    that no checkpoint format tells is read by its own `preprocess_checkpoint`: then there is no `Checkpoint`.
    Raises CheckpointError, ConfigError.
    """
    if isinstance(source, VLAModel):
        if source.weights is None:
            raise ConfigError(f"{type(source).__name__} has no weights: give the engine its checkpoint")
        return source, None
    told = set(FAMILIES)  # by the checkpoint's tensors
    if config is not None and family_name(config) not in told and not isinstance(source, Checkpoint):
        model = create_model(config)
        tensors = model.preprocess_checkpoint(source)
        _check_tensors(tensors, model.get_weight_shapes())
        model.weights = tensors
        return model, None
    if isinstance(source, Checkpoint):
        opened = source
    else:
        said = {} if config is None else _said(config)
        place = source if isinstance(source, Mapping) else Path(source)
        opened = open_checkpoint(place, config_overrides=said, allow_pickle=allow_pickle)
    if config is not None and opened.family.value != family_name(config):
        found = opened.family.value
        raise ConfigError(
            f"expected a checkpoint of {family_name(config)}, found one of {found} "
            f"({opened.path or 'the dictionary'}); use create_{found}_inference"
        )
    model, _ = load_model(opened)
    return model, opened


def _said(config: ModelConfig) -> dict[str, Any]:
    """The fields in which a configuration differs from the defaults, but for the family."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    return {name: value for name, value in values.items() if name != "model_type"}


def _check_tensors(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `CheckpointError` for tensors that are missing, misshapen or not finite."""
    if missing := [n for n in shapes if n not in tensors]:
        raise CheckpointError(f"{len(missing)} of {len(shapes)} tensors are missing: {', '.join(missing[:5])}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise CheckpointError(f"{name}: expected shape {tuple(shape)}, found {tuple(tensors[name].shape)}")
        nan, inf = count_nonfinite(tensors[name])
        if nan or inf:
            raise CheckpointError(f"{name}: expected finite weights, found {nan} NaN and {inf} infinite")


def weights_for(model: VLAModel, config: InferenceConfig) -> dict[str, Tensor]:
    """Every tensor of the model on the device; floats in the configuration's dtype."""
    found = {}
    for name in model.get_weight_shapes():
        x = (model.weights or {})[name].to(config.device)
        found[name] = x.to(TORCH_DTYPES[config.precision]) if x.is_floating_point() else x
    return found


def find_prompt_format(config: ModelConfig, opened: Checkpoint | None) -> str | None:
    """How the checkpoint's family writes a prompt, a key of `PROMPT_FORMATS`; None for one that is not known."""
    formats = LEROBOT_PROMPTS if opened and opened.format == "lerobot" else PROMPTS
    return formats.get(family_name(config))


def find_towers(config: ModelConfig, opened: Checkpoint | None) -> tuple[Tower, ...]:
    """How each image tower scales pixels; none of a family whose graph takes RGB in [-1, 1] as it is.

    Without a directory these are the constants of the released model. Raises CheckpointError for a directory whose
    file is missing, damaged or asks for arithmetic that is not offered.
    """
    rules = FAMILY_RULES.get(family_name(config))
    if rules is None or not rules.towers:
        return ()
    return checkpoint_towers(opened) if opened else rules.towers


def find_tokenizer(config: InferenceConfig, opened: Checkpoint | None) -> Encoder | None:
    """The tokenizer that was named, or the one beside the checkpoint; None where no file is there.

    Raises CheckpointError for one that is named and not there, or that is there and cannot be read.
    """
    if config.tokenizer_path is not None:
        return load_tokenizer(os.fspath(config.tokenizer_path))
    if opened is None or opened.path is None:
        return None
    beside = directory(opened)
    there = any((beside / name).is_file() for name in FILE_NAMES)  # one that is there and damaged is an error
    return load_tokenizer(beside) if there else None
