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
    its default. `vision_*` is the image tower (of several the SigLIP one), `encoder_*` the language
    model that reads the prefix, `decoder_*` the tower that produces actions. `released` has the
    dimensions of other released models.
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
    dino_dim: int = 1024  # width of the DINOv2 tower beside the first (OpenVLA)
    dino_num_layers: int = 24
    dino_num_heads: int = 16
    dino_mlp_dim: int = 4096
    dino_registers: int = 4  # tokens between the class token and the patches
    num_action_bins: int = 256  # of [-1, 1], where actions are tokens; their ids end the tokenizer's vocabulary
    vocab_padding: int = 64  # of vocab_size, rows behind the tokenizer's vocabulary
    eos_token_id: int = 2  # ends a token decoder
    pad_token_id: int = 32000  # what stands behind the end

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
        for width, heads in (("vision_encoder_dim", "vision_num_heads"), ("dino_dim", "dino_num_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ConfigError(
                    f"ModelConfig.{width}={getattr(self, width)} must be a multiple of "
                    f"{heads}={getattr(self, heads)}; give the image tower's head count"
                )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"ModelConfig.image_size={self.image_size} must be a multiple of patch_size={self.patch_size}"
            )

    @classmethod
    def released(cls, model_type: VLAModelType) -> ModelConfig:
        """The dimensions of a family's released model. Raises `ConfigError` for a family that is not here."""
        if model_type not in RELEASED:
            raise ConfigError(
                f"no released dimensions are known of {model_type!r}; there are {', '.join(t.value for t in RELEASED)}"
            )
        return cls(model_type=model_type, **RELEASED[model_type])

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


# Where released models differ from the defaults.
RELEASED: dict[VLAModelType, dict[str, Any]] = {
    VLAModelType.PI05: {},
    VLAModelType.PI0: {"max_token_len": 48},
    VLAModelType.OPENVLA: {
        "encoder_dim": 4096,
        "decoder_dim": 4096,
        "num_encoder_layers": 32,
        "num_decoder_layers": 32,
        "encoder_mlp_dim": 11008,
        "decoder_mlp_dim": 11008,
        "num_heads": 32,
        "num_kv_heads": 32,
        "head_dim": 128,
        "vocab_size": 32064,
        "action_dim": 7,
        "chunk_size": 1,
        "num_diffusion_steps": 1,
        "max_token_len": 64,
        "num_views": 1,
    },
}


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
