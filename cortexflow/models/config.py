"""Dimensions of a policy (`ModelConfig`) and of one compilation of it (`Signature`)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

from cortexflow.errors import ConfigError


class VLAModelType(Enum):
    """The families CortexFlow knows by name. A user's own family registers under a string."""

    PI0 = "pi0"
    PI05 = "pi05"
    OPENVLA = "openvla"
    RT1 = "rt1"
    RT2 = "rt2"


@dataclass(frozen=True)
class ModelConfig:
    """Every dimension a model family is built from. Defaults are those of the released π0.5.

    A checkpoint overrides what it tells (`cortexflow.checkpoints`); what no checkpoint tells keeps
    its default. `vision_*` is the image tower, `encoder_*` the language model that reads the
    prefix, `decoder_*` the tower that produces actions.
    """

    model_type: VLAModelType | str = VLAModelType.PI05
    vision_encoder_dim: int = 1152  # width of the image tower
    encoder_dim: int = 2048
    decoder_dim: int = 1024
    num_encoder_layers: int = 18
    num_decoder_layers: int = 18
    num_heads: int = 8  # query heads, of encoder and decoder alike
    head_dim: int = 256
    action_dim: int = 32
    chunk_size: int = 10  # actions per prediction (the horizon)
    num_diffusion_steps: int = 10  # Euler steps of the flow
    num_kv_heads: int = 1
    vision_num_layers: int = 27
    vision_num_heads: int = 16
    vision_mlp_dim: int = 4304
    encoder_mlp_dim: int = 16384
    decoder_mlp_dim: int = 4096
    patch_size: int = 14  # pixels
    image_size: int = 224  # pixels, square
    vocab_size: int = 257152
    state_dim: int = 32
    max_token_len: int = 200  # the prompt bucket: padded prompt length in tokens
    num_views: int = 2
    vision_norm_eps: float = 1e-6
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    time_min_period: float = 4e-3
    time_max_period: float = 4.0
    folded_time_steps: int | None = None  # π0 file whose time and head are folded for this many steps

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"ModelConfig.{field.name}: expected a positive integer, found {value!r}")
            if field.type == "float" and not (isinstance(value, (int, float)) and value > 0):
                raise ConfigError(f"ModelConfig.{field.name}: expected a positive number, found {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"ModelConfig.num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.vision_encoder_dim % self.vision_num_heads:
            raise ConfigError(
                f"ModelConfig.vision_encoder_dim={self.vision_encoder_dim} must be a multiple of "
                f"vision_num_heads={self.vision_num_heads}; give the image tower's head count"
            )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"ModelConfig.image_size={self.image_size} must be a multiple of patch_size={self.patch_size}"
            )

    @property
    def num_patches(self) -> int:
        """Image tokens per view."""
        return (self.image_size // self.patch_size) ** 2

    def with_(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed; an unknown field is an error that lists the known ones."""
        known = {f.name for f in fields(self)}
        if unknown := sorted(set(changes) - known):
            raise ConfigError(f"ModelConfig has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return replace(self, **changes)


@dataclass(frozen=True)
class Signature:
    """The static shape of one compilation: everything that is not a runtime value."""

    batch: int = 1
    views: int = 2
    prompt: int = 200  # slots of the prompt bucket
    chunk: int = 10
    steps: int = 10

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"Signature.{field.name}: expected a positive integer, found {value!r}")

    @staticmethod
    def of(config: ModelConfig, **changes: int | None) -> Signature:
        """The signature a configuration asks for, with any field given here in its place."""
        base = Signature(1, config.num_views, config.max_token_len, config.chunk_size, config.num_diffusion_steps)
        return replace(base, **{k: v for k, v in changes.items() if v is not None})
