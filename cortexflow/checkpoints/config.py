"""`ModelConfig` from a checkpoint: what shapes tell, what config.json says, what the caller overrides.

Shapes decide every width, depth and table size. Head counts are in no shape and come from the
configuration, from the known Gemma and SigLIP sizes, or from the one sound inference there is. When
two sources contradict each other the result is an error that names both, never a choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from cortexflow.checkpoints.dialects import FIELD_TYPES, GEMMA_VARIANTS, Fact, Facts, family_of, state, tower_facts
from cortexflow.checkpoints.names import DECODER, EMBEDDING, ENCODER, VISION
from cortexflow.checkpoints.shapes import Shape, contradictions, first_layer, measure_dimensions, need, split_heads
from cortexflow.errors import CheckpointError, ConfigError
from cortexflow.models.config import ModelConfig, VLAModelType

# Field, canonical name (`{}` stands for a layer), axis: what single dimensions tell.
DIMENSIONS: tuple[tuple[str, str, int], ...] = (
    ("vision_encoder_dim", VISION + "embeddings.patch_embedding.weight", 0),
    ("patch_size", VISION + "embeddings.patch_embedding.weight", 2),
    ("vision_mlp_dim", VISION + "encoder.layers.{}.mlp.fc1.weight", 0),
    ("encoder_dim", ENCODER + "layers.{}.self_attn.k_proj.weight", 1),
    ("encoder_mlp_dim", ENCODER + "layers.{}.mlp.gate_proj.weight", 0),
    ("vocab_size", EMBEDDING, 0),
    ("decoder_dim", DECODER + "layers.{}.self_attn.k_proj.weight", 1),
    ("decoder_mlp_dim", DECODER + "layers.{}.mlp.gate_proj.weight", 0),
    ("action_dim", "action_out_proj.weight", 0),
)
FAMILY_DIMENSIONS: tuple[tuple[str, str, int], ...] = (
    ("state_dim", "state_proj.weight", 1),  # π0 only
    ("folded_time_steps", "folded.time_bias", 0),  # folded π0 files only
)
LAYERS: tuple[tuple[str, str], ...] = (
    ("vision_num_layers", VISION + "encoder.layers."),
    ("num_encoder_layers", ENCODER + "layers."),
    ("num_decoder_layers", DECODER + "layers."),
)
SO400M = "SigLIP So400m/14 (width 1152)"


def measure(shapes: Mapping[str, Shape]) -> Facts:
    """Every `ModelConfig` field that tensor shapes tell, with the tensor that tells it."""
    facts = measure_dimensions(shapes, DIMENSIONS + FAMILY_DIMENSIONS, LAYERS)
    positions = VISION + "embeddings.position_embedding.weight"
    if positions in shapes and shapes[positions] and "patch_size" in facts:
        rows = shapes[positions][0]
        where = f"tensor {positions} {list(shapes[positions])}"
        if math.isqrt(rows) ** 2 != rows:
            raise CheckpointError(f"{where}: expected a square number of patches, found {rows}")
        facts["image_size"] = Fact(math.isqrt(rows) * facts["patch_size"].value, where)
    return facts


def recognised_sizes(measured: Facts) -> list[Facts]:
    """What follows when widths are those of a model everybody uses: its depth and heads."""
    layers: list[Facts] = []
    for tower in ("encoder", "decoder"):
        widths = [measured[field].value for field in (f"{tower}_dim", f"{tower}_mlp_dim") if field in measured]
        for name, variant in GEMMA_VARIANTS.items():
            if name != "dummy" and widths == [variant.width, variant.mlp_dim]:
                layers.append(tower_facts(variant, tower, f"{name} (width {variant.width}, MLP {variant.mlp_dim})"))
    if "vision_encoder_dim" in measured and measured["vision_encoder_dim"].value == 1152:
        layers.append({"vision_num_heads": Fact(16, SO400M), "vision_num_layers": Fact(27, SO400M)})
    return layers


def _rows(shapes: Mapping[str, Shape], part: str) -> Fact:
    """Rows of q_proj or k_proj, which prefix and expert must share: they attend to one cache."""
    found = {}
    for tower in (ENCODER, DECODER):
        name = first_layer(shapes, f"{tower}layers.{{}}.self_attn.{part}.weight")
        if name is not None and shapes[name]:
            found[name] = shapes[name][0]
    if not found:
        raise CheckpointError(f"expected {ENCODER}layers.0.self_attn.{part}.weight, found no such tensor in any layer")
    if len(set(found.values())) > 1:
        text = " and ".join(f"{name} {list(shapes[name])}" for name in found)
        raise CheckpointError(f"expected {part} of prefix and expert with the same number of rows, found {text}")
    return Fact(next(iter(found.values())), next(f"tensor {n} {list(shapes[n])}" for n in found))


def override_facts(overrides: Mapping[str, Any]) -> Facts:
    """The caller's overrides, checked: fields that exist, values of their type."""
    facts: Facts = {}
    for field, value in overrides.items():
        if field not in FIELD_TYPES:
            raise ConfigError(
                f"config_overrides: ModelConfig has no field {field!r}; it has {', '.join(sorted(FIELD_TYPES))}"
            )
        if field == "model_type":
            value = family_of(value, "config_overrides 'model_type'")
        state(facts, field, value, f"config_overrides {field!r}")
    return facts


def infer_config(
    family: VLAModelType,
    shapes: Mapping[str, Shape],
    layers: list[Facts],
    notes: list[str],
    *,
    fixed: Facts | None = None,
    explain: Callable[[], str] = lambda: "",
) -> ModelConfig:
    """The `ModelConfig` of a checkpoint of canonical shapes.

    `layers` is what the caller and the configuration say, the most explicit first; `fixed` what the
    format tells beyond the canonical shapes. `explain` adds the likeliest reason to an error about
    tensors that are not there.
    """
    check_square_patches(shapes)
    measured = measure(shapes) | (fixed or {})
    said: Facts = {}
    for layer in [*layers, *recognised_sizes(measured)]:
        for field, fact in layer.items():
            said.setdefault(field, fact)
    if "model_type" in said and said["model_type"].value != family:
        raise CheckpointError(
            f"model_type: {said['model_type'].where} says {said['model_type'].value.value}, the tensors are those of "
            f"{family.value}; load the checkpoint as what it is, or correct the configuration"
        )
    if family is VLAModelType.PI05:
        measured.pop("state_dim", None)
    needed = [*DIMENSIONS, *((field, f"{prefix}0.*", 0) for field, prefix in LAYERS)]
    needed.append(("image_size", VISION + "embeddings.position_embedding.weight", 0))
    if absent := [name.format(0) for field, name, _ in needed if field not in measured]:
        raise CheckpointError(
            f"expected a complete {family.value} checkpoint; the dimensions cannot be read, these tensors are missing: "
            f"{', '.join(dict.fromkeys(absent))}{explain()}"
        )
    lines = contradictions(said, measured, dict(LAYERS))
    encoder, decoder = measured["num_encoder_layers"], measured["num_decoder_layers"]
    if encoder.value != decoder.value and not lines:
        lines = [
            f"num_encoder_layers: {encoder.value}, num_decoder_layers: {decoder.value}; each layer of the expert reads "
            "the keys of the same prefix layer (the file is truncated or a shard is absent)"
        ]
    if lines:
        raise CheckpointError(
            "configuration and tensors contradict each other:\n  "
            + "\n  ".join(lines)
            + "\nCorrect the configuration, "
            "or pass the true value in config_overrides" + explain()
        )
    values: dict[str, Any] = {field: fact.value for field, fact in said.items()}
    values |= {field: fact.value for field, fact in measured.items()}
    values |= split_heads(_rows(shapes, "q_proj"), _rows(shapes, "k_proj"), said, notes)
    if "vision_num_heads" not in values:
        raise need(
            "vision_num_heads", f"not told by the checkpoint (image tower of width {values['vision_encoder_dim']})"
        )
    if family is VLAModelType.PI0:
        values.setdefault("max_token_len", 48)  # π0's tokenizer length; π0.5's 200 is the default
    steps = values.get("folded_time_steps")
    if steps and values.setdefault("num_diffusion_steps", steps) != steps:
        raise CheckpointError(
            f"num_diffusion_steps: {said['num_diffusion_steps'].where} says {values['num_diffusion_steps']}; the file "
            f"has its flow times folded in for {steps} steps and runs no other number. Use a π0 checkpoint that is "
            "not folded to choose the steps"
        )
    values["model_type"] = family
    return ModelConfig(**values)


def check_square_patches(shapes: Mapping[str, Shape]) -> None:
    """The patch embedding must be a square convolution of RGB images."""
    name = VISION + "embeddings.patch_embedding.weight"
    shape = shapes.get(name)
    if shape is not None and (len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]):
        raise CheckpointError(f"tensor {name}: expected [width, 3, patch, patch], found {list(shape)}")
