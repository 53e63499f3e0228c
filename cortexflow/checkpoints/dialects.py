"""What a checkpoint's config.json says, in the terms of `ModelConfig`.

Three dialects: LeRobot's policy config, the few keys that openpi's converter writes beside its PyTorch
weights, and a nested one with a section per tower (`vision`, `vlm`, `expert`). Any of them may hold
`"cortexflow": {...}`, fields of `ModelConfig` by name, for what the dialect cannot say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cortexflow.errors import CheckpointError
from cortexflow.models.config import ModelConfig, VLAModelType


@dataclass(frozen=True)
class Fact:
    """A value of a `ModelConfig` field and the place that says so."""

    value: Any
    where: str


Facts = dict[str, Fact]


@dataclass(frozen=True)
class GemmaVariant:
    """One size of Gemma as openpi and LeRobot name them."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


GEMMA_VARIANTS = {
    "gemma_2b": GemmaVariant(2048, 18, 16384, 8, 1, 256),
    "gemma_300m": GemmaVariant(1024, 18, 4096, 8, 1, 256),
    "dummy": GemmaVariant(64, 4, 128, 8, 1, 16),  # openpi's own test size
}

FAMILIES = ("pi0", "pi05", "openvla")  # whose checkpoints are read here
FIELD_TYPES: dict[str, Any] = {field.name: field.type for field in fields(ModelConfig)}

LEROBOT = {
    "chunk_size": "chunk_size",
    "max_action_dim": "action_dim",
    "max_state_dim": "state_dim",
    "num_inference_steps": "num_diffusion_steps",
    "num_steps": "num_diffusion_steps",  # LeRobot before 0.4
    "tokenizer_max_length": "max_token_len",
    "min_period": "time_min_period",
    "max_period": "time_max_period",
}
OPENPI = {
    "action_dim": "action_dim",
    "action_horizon": "chunk_size",
    "max_token_len": "max_token_len",
}
NESTED = {
    "num_views": "num_views",
    "max_token_len": "max_token_len",
    "vocab_size": "vocab_size",
    "state_dim": "state_dim",
    "action_dim": "action_dim",
    "action_horizon": "chunk_size",
    "num_steps": "num_diffusion_steps",
    "time_min_period": "time_min_period",
    "time_max_period": "time_max_period",
}
NESTED_VISION = {
    "width": "vision_encoder_dim",
    "depth": "vision_num_layers",
    "num_heads": "vision_num_heads",
    "mlp_dim": "vision_mlp_dim",
    "patch_size": "patch_size",
    "image_size": "image_size",
    "layer_norm_eps": "vision_norm_eps",
}
NESTED_TOWER = {
    "width": "{}_dim",
    "depth": "num_{}_layers",
    "mlp_dim": "{}_mlp_dim",
    "num_heads": "num_heads",
    "num_kv_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
}


def state(facts: Facts, field: str, value: Any, where: str) -> None:
    """Record that `where` says `field` is `value`; saying two things is an error."""
    kind = FIELD_TYPES.get(field)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind == "int" and not (whole and value > 0):
        raise CheckpointError(f"{where}: expected a positive integer, found {value!r}")
    if kind == "float" and not ((whole or isinstance(value, float)) and value > 0):
        raise CheckpointError(f"{where}: expected a positive number, found {value!r}")
    if field in facts and facts[field].value != value:
        other = facts[field]
        raise CheckpointError(
            f"{field}: {other.where} says {other.value}, {where} says {value}; expected one value. "
            f"Correct the configuration, or pass config_overrides={{{field!r}: ...}}"
        )
    facts.setdefault(field, Fact(value, where))


def translate(config: Mapping[str, Any], table: Mapping[str, str], facts: Facts, where: str) -> None:
    """Record what a section says: `table` leads from its keys to fields; null says nothing."""
    for key, field in table.items():
        if config.get(key) is not None:
            state(facts, field, config[key], f"{where} {key!r}")


def section(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """An object within a configuration, empty where there is none."""
    section = config.get(key, {})
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{where} {key!r}: expected an object, found {section!r}")
    return section


def family_of(value: Any, where: str) -> VLAModelType:
    """The family that a config's name for it means."""
    if value in FAMILIES:
        return VLAModelType(value)
    if isinstance(value, VLAModelType):
        return value
    raise CheckpointError(
        f"{where}: expected {', '.join(map(repr, FAMILIES))}, found {value!r}; other policies are not read here"
    )


def variant_facts(name: Any, tower: str, where: str) -> Facts:
    """The sizes that a Gemma variant stands for. A LoRA variant has its base's sizes."""
    variant = GEMMA_VARIANTS.get(name.removesuffix("_lora")) if isinstance(name, str) else None
    if variant is None:
        raise CheckpointError(f"{where}: expected one of {', '.join(GEMMA_VARIANTS)}, found {name!r}")
    return tower_facts(variant, tower, f"{where} = {name!r}")


def tower_facts(variant: GemmaVariant, tower: str, where: str) -> Facts:
    """A variant's sizes as facts of `encoder` or `decoder`."""
    return {
        f"{tower}_dim": Fact(variant.width, where),
        f"num_{tower}_layers": Fact(variant.depth, where),
        f"{tower}_mlp_dim": Fact(variant.mlp_dim, where),
        "num_heads": Fact(variant.num_heads, where),
        "num_kv_heads": Fact(variant.num_kv_heads, where),
        "head_dim": Fact(variant.head_dim, where),
    }


def _image_size(config: Mapping[str, Any], facts: Facts, where: str) -> None:
    for key in ("image_resolution", "resize_imgs_with_padding"):
        size = config.get(key)
        if size is None:
            continue
        if not (isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]):
            raise CheckpointError(f"{where} {key!r}: expected two equal numbers (square images), found {size!r}")
        state(facts, "image_size", size[0], f"{where} {key!r}")


def _lerobot_views(config: Mapping[str, Any], facts: Facts, where: str) -> None:
    features = section(config, "input_features", where) if config.get("input_features") else {}
    cameras = {
        name for name, feature in features.items() if isinstance(feature, Mapping) and feature.get("type") == "VISUAL"
    }
    # LeRobot lists its empty cameras among the features once the policy was built, not before.
    empty = config.get("empty_cameras") or 0
    if isinstance(empty, int):
        cameras |= {f"observation.images.empty_camera_{i}" for i in range(empty)}
    if cameras:
        state(facts, "num_views", len(cameras), f"{where} 'input_features' (cameras) and 'empty_cameras'")


def _nested(config: Mapping[str, Any], facts: Facts, where: str) -> None:
    translate(config, NESTED, facts, where)
    translate(section(config, "vision", where), NESTED_VISION, facts, f"{where} 'vision'")
    for key, tower in (("vlm", "encoder"), ("expert", "decoder")):
        table = {k: field.format(tower) for k, field in NESTED_TOWER.items()}
        translate(section(config, key, where), table, facts, f"{where} {key!r}")


def own_facts(config: Mapping[str, Any], where: str) -> Facts:
    """What stands under "cortexflow": fields of `ModelConfig` by name."""
    own: Facts = {}
    for field, value in section(config, "cortexflow", where).items():
        if field not in FIELD_TYPES:
            raise CheckpointError(f"{where} 'cortexflow': ModelConfig has no field {field!r}")
        if field == "model_type":
            value = family_of(value, f"{where} 'cortexflow' 'model_type'")
        state(own, field, value, f"{where} 'cortexflow' {field!r}")
    return own


def read_config(config: Mapping[str, Any], where: str = "config.json") -> tuple[str, list[Facts]]:
    """The dialect of a config.json, and what it says: layers of facts, the most explicit first."""
    own, said = own_facts(config, where), Facts()
    if "type" in config:
        dialect = "lerobot"
        state(said, "model_type", family_of(config["type"], f"{where} 'type'"), f"{where} 'type'")
        translate(config, LEROBOT, said, where)
        _image_size(config, said, where)
        _lerobot_views(config, said, where)
    elif "model" in config and "vlm" in config:
        dialect = "nested"
        state(said, "model_type", family_of(config["model"], f"{where} 'model'"), f"{where} 'model'")
        _nested(config, said, where)
    elif "action_horizon" in config or "paligemma_variant" in config:
        dialect = "openpi"
        if isinstance(config.get("pi05"), bool):
            family = VLAModelType.PI05 if config["pi05"] else VLAModelType.PI0
            state(said, "model_type", family, f"{where} 'pi05'")
        translate(config, OPENPI, said, where)
    elif own:
        dialect = "cortexflow"
    else:
        raise CheckpointError(
            f"{where}: expected LeRobot's config (key 'type'), openpi's (keys 'action_horizon', 'paligemma_variant') "
            f"or a nested one (keys 'model', 'vision', 'vlm', 'expert'); found the keys {', '.join(config) or '(none)'}"
        )
    layers = [own, said]
    for key, tower in (("paligemma_variant", "encoder"), ("action_expert_variant", "decoder")):
        if config.get(key) is not None:
            layers.append(variant_facts(config[key], tower, f"{where} {key!r}"))
    return dialect, layers
