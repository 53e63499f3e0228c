"""What a model family is: a configuration, the graph built from it, and the facts that follow from both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from cortexflow.errors import ConfigError
from cortexflow.ir import Module
from cortexflow.models.config import ModelConfig, Signature, VLAModelType


class VLAModel:
    """A policy of three stages: `vision_encoder`, `transformer_encoder`, `transformer_decoder`.

    A family implements `build`. A user's own is registered with `register_model` and needs no change
    here.
    """

    family: ClassVar[VLAModelType | str]
    weights: Mapping[str, Tensor] | None = None  # those of its checkpoint, where it was made from one

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def build(self, signature: Signature, dtype: str = "f32") -> Module:
        """The graph for one signature; `dtype` (`f32`, `bf16`, `f16`) is the precision of the large products."""
        raise NotImplementedError(f"{type(self).__name__} must implement build(signature, dtype)")

    def get_weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the graph names, by checkpoint name."""
        return {key: t.shape for key, t in self.build(Signature.of(self.config)).weight_types().items()}

    def get_buffer_shapes(self, num_views: int, chunk_size: int) -> dict[str, tuple[int, ...]]:
        """The inputs of the policy and what its stages hand on, by name, for batch 1."""
        module = self.build(Signature.of(self.config, views=num_views, chunk=chunk_size))
        shapes = {n: t.shape for n, t in module.inputs.items()}
        for stage in module.stages:
            shapes |= {n: v.type.shape for n, v in stage.results.items()}
        return shapes

    def preprocess_checkpoint(self, checkpoint: Any) -> dict[str, Tensor]:
        """The tensors of a checkpoint (a path or a dictionary) under the graph's names, checked strictly."""
        from cortexflow.checkpoints import match, open_checkpoint

        opened = open_checkpoint(checkpoint)
        return {name: t.load() for name, t in match(opened, self.get_weight_shapes()).items()}


MODELS: dict[str, type[VLAModel]] = {}


def register_model(cls: type[VLAModel]) -> type[VLAModel]:
    """Make a family known by its name (a class decorator)."""
    family = cls.family
    MODELS[family.value if isinstance(family, VLAModelType) else family] = cls
    return cls


def create_model(config: ModelConfig) -> VLAModel:
    """The model of `config.model_type`. Raises `ConfigError` for a family that nobody registered."""
    kind = config.model_type
    name = kind.value if isinstance(kind, VLAModelType) else kind
    if name not in MODELS:
        raise ConfigError(f"model family {name!r} is not registered; there are {', '.join(sorted(MODELS))}")
    return MODELS[name](config)
