"""OpenVLA's Hugging Face checkpoints: what their config.json says, which tensors are never read, `ModelConfig`.

The graph has the names of these files. Source: openvla `prismatic/extern/hf/*.py`; transformers'
`LlamaConfig`, whose defaults stand for what `text_config` leaves out. Towers other than the released
ones say their dimensions under `vision_towers`, DINOv2 first, or under "cortexflow".
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from cortexflow.checkpoints.dialects import Fact, Facts, family_of, own_facts, section, state, translate
from cortexflow.checkpoints.names import never_read
from cortexflow.checkpoints.shapes import Shape, contradictions, measure_dimensions, need, split_heads
from cortexflow.checkpoints.tensors import LazyTensor
from cortexflow.errors import CheckpointError
from cortexflow.models.config import RELEASED, ModelConfig, VLAModelType

STATISTICS = "dataset_statistics.json"  # of a fine-tuned model, in place of `norm_stats` in config.json
DINO, SIGLIP = "vision_backbone.featurizer.", "vision_backbone.fused_featurizer."
PROJECTOR, LANGUAGE = "projector.", "language_model."
LAYER = LANGUAGE + "model.layers.{}."

# Field, name (`{}` stands for a layer), axis: what single dimensions tell.
DIMENSIONS: tuple[tuple[str, str, int], ...] = (
    ("dino_dim", DINO + "patch_embed.proj.weight", 0),
    ("dino_mlp_dim", DINO + "blocks.{}.mlp.fc1.weight", 0),
    ("dino_registers", DINO + "reg_token", 1),
    ("vision_encoder_dim", SIGLIP + "patch_embed.proj.weight", 0),
    ("vision_mlp_dim", SIGLIP + "blocks.{}.mlp.fc1.weight", 0),
    ("patch_size", SIGLIP + "patch_embed.proj.weight", 2),
    ("encoder_dim", LANGUAGE + "model.embed_tokens.weight", 1),
    ("encoder_mlp_dim", LAYER + "mlp.gate_proj.weight", 0),
    ("vocab_size", LANGUAGE + "model.embed_tokens.weight", 0),
)
LAYERS: tuple[tuple[str, str], ...] = (
    ("dino_num_layers", DINO + "blocks."),
    ("vision_num_layers", SIGLIP + "blocks."),
    ("num_encoder_layers", LANGUAGE + "model.layers."),
)
POSITIONS = SIGLIP + "pos_embed"
ONE_TRANSFORMER = ("encoder_dim", "encoder_mlp_dim", "num_encoder_layers")  # `decoder` is the same tower

TOP = {
    "n_action_bins": "num_action_bins",
    "pad_to_multiple_of": "vocab_padding",
    "pad_token_id": "pad_token_id",
}
TEXT = {
    "hidden_size": "encoder_dim",
    "intermediate_size": "encoder_mlp_dim",
    "num_hidden_layers": "num_encoder_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "pad_token_id": "pad_token_id",
    "eos_token_id": "eos_token_id",
}
TEXT_DEFAULTS: dict[str, Any] = {  # LlamaConfig's own
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "eos_token_id": 2,
}
TOWERS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("dinov2", {"embed_dim": "dino_dim", "depth": "dino_num_layers", "num_heads": "dino_num_heads",
                "mlp_hidden": "dino_mlp_dim", "reg_tokens": "dino_registers"}),
    ("siglip", {"embed_dim": "vision_encoder_dim", "depth": "vision_num_layers", "num_heads": "vision_num_heads",
                "mlp_hidden": "vision_mlp_dim"}),
)  # fmt: skip
TIMM: Mapping[str, Mapping[str, int]] = {  # heads are in no shape; depths tell a shortened file
    "vit_large_patch14_reg4_dinov2.lvd142m": {"dino_num_layers": 24, "dino_num_heads": 16},
    "vit_so400m_patch14_siglip_224": {"vision_num_layers": 27, "vision_num_heads": 16},
}
# Where config.json says something else than this graph computes, it is refused: section, key, what may stand there.
REQUIRED: tuple[tuple[str, str, Any], ...] = (
    ("", "arch_specifier", "no-align+fused-gelu-mlp"),
    ("", "use_fused_vision_backbone", True),
    ("", "timm_override_act_layers", [None, None]),
    ("text_config", "model_type", "llama"),
    ("text_config", "hidden_act", "silu"),
    ("text_config", "attention_bias", False),
    ("text_config", "mlp_bias", False),
    ("text_config", "tie_word_embeddings", False),
    ("text_config", "rope_scaling", None),
)

BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
POOL = ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")
LAST_BLOCK = "last block of an image tower; the features are taken before it"
LAST_NORM = "final norm of an image tower; the features are taken before it"
POOLING = "SigLIP's pooling head; the features are those of the patches"


class Read(NamedTuple):
    """A checkpoint in this format: the tensors that the graph may read, those it never reads, its configuration."""

    tensors: dict[str, LazyTensor]
    skipped: dict[str, str]
    config: ModelConfig


def holds(names: Mapping[str, Any]) -> bool:
    """Whether stored names are those of this format."""
    return any(name.startswith((DINO, SIGLIP)) for name in names)


def read(
    stored: Mapping[str, LazyTensor], config: Mapping[str, Any] | None, where: str, overrides: Facts, notes: list[str]
) -> Read:
    """The checkpoint of these tensors and this config.json. Raises `CheckpointError`; adds to `notes`."""
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    said = [] if config is None else read_config(config, where, overrides)
    found = infer_config(shapes, [overrides, *said], notes)
    reasons = _unread(found)
    skipped = {name: reason for name in stored if (reason := reasons.get(name) or never_read(name))}
    return Read({n: t for n, t in stored.items() if n not in skipped}, skipped, found)


def _unread(c: ModelConfig) -> dict[str, str]:
    """Names of the tensors that such files hold and inference never reads, with the reason of each."""
    found: dict[str, str] = {}
    for tower, depth, scales in ((DINO, c.dino_num_layers, True), (SIGLIP, c.vision_num_layers, False)):
        last = f"{tower}blocks.{depth - 1}."
        found |= {f"{last}{part}.{kind}": LAST_BLOCK for part in BLOCK for kind in ("weight", "bias")}
        found |= {f"{last}{part}.scale_factor": LAST_BLOCK for part in ("ls1", "ls2") if scales}
        found |= {f"{tower}norm.{kind}": LAST_NORM for kind in ("weight", "bias")}
    pool = SIGLIP + "attn_pool."
    return (
        found
        | {f"{pool}{part}.{kind}": POOLING for part in POOL for kind in ("weight", "bias")}
        | {pool + "latent": POOLING}
    )


# ---- config.json -----------------------------------------------------------------------------------


def read_config(config: Mapping[str, Any], where: str = "config.json", known: Collection[str] = ()) -> list[Facts]:
    """What config.json says: layers of facts, the most explicit first. Raises `CheckpointError`.

    `known` are fields that are said elsewhere: it need not be clear about them.
    """
    own, said = own_facts(config, where), Facts()
    kind = family_of(config.get("model_type"), f"{where} 'model_type'")
    state(said, "model_type", kind, f"{where} 'model_type'")
    text = section(config, "text_config", where)
    for part, key, wanted in REQUIRED:
        holder = text if part else config
        if holder.get(key) is not None and holder[key] != wanted:
            place = f"{where} {part!r} {key!r}" if part else f"{where} {key!r}"
            raise CheckpointError(f"{place}: expected {wanted!r}, found {holder[key]!r}; this variant is not supported")
    translate(config, TOP, said, where)
    translate(text, TEXT, said, f"{where} 'text_config'")
    _rope(text, said, where)
    _image_size(config, said, where)
    _towers(config, said, where)
    if "action_dim" not in {*known, *own}:
        _action_dim(config, said, where)
    assumed = f"LlamaConfig's default ({where} 'text_config' does not say)"
    default = {TEXT[key]: Fact(value, assumed) for key, value in TEXT_DEFAULTS.items()}
    if "num_heads" in said:
        default["num_kv_heads"] = said["num_heads"]
    return [own, said, default]


def _rope(text: Mapping[str, Any], said: Facts, where: str) -> None:
    """Newer versions of transformers write the angles' base into a section of its own."""
    rope = section(text, "rope_parameters", f"{where} 'text_config'") if text.get("rope_parameters") else {}
    place = f"{where} 'text_config' 'rope_parameters'"
    if rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"{place} 'rope_type': expected 'default', found {rope['rope_type']!r}")
    translate(rope, {"rope_theta": "rope_theta"}, said, place)


def _image_size(config: Mapping[str, Any], said: Facts, where: str) -> None:
    sizes = config.get("image_sizes")
    if sizes is None:
        return
    if not (isinstance(sizes, list) and sizes and all(size == sizes[0] for size in sizes)):
        raise CheckpointError(f"{where} 'image_sizes': expected one size for both towers, found {sizes!r}")
    state(said, "image_size", sizes[0], f"{where} 'image_sizes'")


def _towers(config: Mapping[str, Any], said: Facts, where: str) -> None:
    """Heads and depths: by timm's names, or as `vision_towers` says."""
    names = config.get("timm_model_ids") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{where} 'timm_model_ids': expected a list of names, found {names!r}")
    for name in names:
        for field, value in TIMM.get(name, {}).items():
            state(said, field, value, f"{where} 'timm_model_ids' {name!r}")
    towers = config.get("vision_towers")
    if towers is None:
        return
    place = f"{where} 'vision_towers'"
    if not (isinstance(towers, list) and len(towers) == 2 and all(isinstance(t, Mapping) for t in towers)):
        raise CheckpointError(f"{place}: expected two objects, DINOv2's and SigLIP's, found {towers!r}")
    for tower, (kind, table) in zip(towers, TOWERS, strict=True):
        if not str(tower.get("kind", kind)).startswith(kind) or tower.get("act", "gelu_erf") != "gelu_erf":
            raise CheckpointError(f"{place}: expected {kind} with 'act' gelu_erf, found {dict(tower)!r}")
        translate(
            tower, {**table, "patch_size": "patch_size", "norm_eps": "vision_norm_eps"}, said, f"{place} ({kind})"
        )


def _action_dim(config: Mapping[str, Any], said: Facts, where: str) -> None:
    """The length of the statistics, where all datasets agree."""
    if config.get("norm_stats") is None:
        return
    place, lengths = f"{where} 'norm_stats'", {}
    for key, stats in section(config, "norm_stats", where).items():
        action = stats.get("action") if isinstance(stats, Mapping) else None
        low = action.get("q01") if isinstance(action, Mapping) else None
        if not isinstance(low, list) or not low:
            raise CheckpointError(
                f"{place} {key!r}: expected an object 'action' with a list 'q01', found {stats!r:.200}"
            )
        lengths[key] = len(low)
    if len(set(lengths.values())) > 1:
        raise CheckpointError(
            f"{place}: expected actions of one length, found {lengths}; say which in config.json under "
            "\"cortexflow\": {'action_dim': ...}, or pass config_overrides={'action_dim': ...}"
        )
    if lengths:
        state(said, "action_dim", next(iter(lengths.values())), f"{place} (length of 'q01')")


# ---- dimensions ------------------------------------------------------------------------------------


def measure(shapes: Mapping[str, Shape]) -> Facts:
    """Every `ModelConfig` field that tensor shapes tell, with the tensor that tells it."""
    facts = measure_dimensions(shapes, DIMENSIONS, LAYERS)
    shape = shapes.get(POSITIONS, ())
    if len(shape) == 3 and "patch_size" in facts:
        where = f"tensor {POSITIONS} {list(shape)}"
        if math.isqrt(shape[1]) ** 2 != shape[1]:
            raise CheckpointError(f"{where}: expected a square number of patches, found {shape[1]}")
        facts["image_size"] = Fact(math.isqrt(shape[1]) * facts["patch_size"].value, where)
    return facts


def infer_config(shapes: Mapping[str, Shape], layers: list[Facts], notes: list[str]) -> ModelConfig:
    """The `ModelConfig` of tensors of these shapes; `layers` is what is said of it, the most explicit first."""
    measured, released = measure(shapes), RELEASED[VLAModelType.OPENVLA]
    needed = [*DIMENSIONS, *((field, f"{prefix}0.*", 0) for field, prefix in LAYERS), ("image_size", POSITIONS, 1)]
    if absent := [name.format(0) for field, name, _ in needed if field not in measured]:
        raise CheckpointError(
            "expected a complete openvla checkpoint; the dimensions cannot be read, these tensors are missing: "
            f"{', '.join(dict.fromkeys(absent))}"
        )
    said: Facts = {}
    for layer in [*layers, _recognised(measured)]:
        for field, fact in layer.items():
            said.setdefault(field, fact)
    if "model_type" in said and said["model_type"].value is not VLAModelType.OPENVLA:
        raise CheckpointError(
            f"model_type: {said['model_type'].where} says {said['model_type'].value.value}, the tensors are those of "
            "openvla; load the checkpoint as what it is, or correct the configuration"
        )
    if lines := contradictions(said, measured, dict(LAYERS)):
        raise CheckpointError(
            "configuration and tensors contradict each other:\n  "
            + "\n  ".join(lines)
            + "\nCorrect the configuration, "
            "or pass the true value in config_overrides"
        )
    values = {**released, **{f: fact.value for f, fact in said.items()}, **{f: m.value for f, m in measured.items()}}
    for field in ("dino_num_heads", "vision_num_heads", "num_heads"):
        if field not in said:
            raise need(field, "heads are in no tensor's shape, and the configuration does not tell")
    values |= split_heads(_rows(shapes, "q"), _rows(shapes, "k"), said, notes)
    if "action_dim" not in said:
        notes.append(f"action_dim: no statistics tell it; {values['action_dim']} is assumed")
    for field in ONE_TRANSFORMER:
        if said.get(other := field.replace("encoder", "decoder"), measured[field]).value != measured[field].value:
            raise CheckpointError(f"{other}: {said[other].where} says {said[other].value}; the decoder is the encoder")
        values[other] = values[field]
    return ModelConfig(**values | {"model_type": VLAModelType.OPENVLA})


def _recognised(measured: Facts) -> Facts:
    """What follows where a tower has the released widths: depths and heads."""
    found: Facts = {}
    for field, width, timm in (("dino_dim", 1024, 0), ("vision_encoder_dim", 1152, 1)):
        if measured[field].value == width:
            name = list(TIMM)[timm]
            found |= {f: Fact(value, f"{name} (width {width})") for f, value in TIMM[name].items()}
    if (measured["encoder_dim"].value, measured["encoder_mlp_dim"].value) == (4096, 11008):
        found |= {field: Fact(32, "Llama-2-7b (width 4096, MLP 11008)") for field in ("num_heads", "num_kv_heads")}
    return found


def _rows(shapes: Mapping[str, Shape], part: str) -> Fact:
    name = LAYER.format(0) + f"self_attn.{part}_proj.weight"
    if not shapes.get(name):
        raise CheckpointError(f"expected {name}, found no such tensor")
    return Fact(shapes[name][0], f"tensor {name} {list(shapes[name])}")
