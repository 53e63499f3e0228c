"""LeRobot's and openpi's PyTorch checkpoints of π0 and π0.5: one set of names, with and without `model.`.

openpi's converter and LeRobot's base files on the hub store names without the prefix and the token
embedding only as the tied head; files that LeRobot saved carry the prefix, and newer ones both names.
`save_lerobot` writes such a directory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cortexflow.checkpoints.dialects import GEMMA_VARIANTS
from cortexflow.checkpoints.names import EMBEDDING, TIED_HEAD, WRAPPERS, never_read
from cortexflow.checkpoints.tensors import LazyTensor
from cortexflow.errors import CheckpointError
from cortexflow.models.config import ModelConfig, VLAModelType

PREFIX = "model."
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")  # the slots of π0 and π0.5, in order


def canonical_tensors(stored: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Tensors under canonical names, and the stored names that are skipped with the reason of each."""
    tensors: dict[str, LazyTensor] = {}
    skipped: dict[str, str] = {}
    head: LazyTensor | None = None
    origin: dict[str, str] = {}
    for stored_name, tensor in stored.items():
        name = WRAPPERS.sub("", stored_name)
        if name == TIED_HEAD:
            head = tensor
        if reason := never_read(name):
            skipped[stored_name] = reason
            continue
        if name in tensors:
            raise CheckpointError(f"{stored_name} and {origin[name]} are both {name}; expected one tensor of this name")
        tensors[name], origin[name] = tensor.named(name), stored_name
    if EMBEDDING not in tensors and head is not None:
        tensors[EMBEDDING] = head.named(EMBEDDING)
    return tensors, skipped


def has_prefix(stored: Mapping[str, LazyTensor]) -> bool:
    """Whether names carry LeRobot's `model.`."""
    return any(name.startswith(PREFIX) for name in stored)


def _variant(width: int, depth: int, mlp_dim: int, config: ModelConfig) -> str | None:
    for name, v in GEMMA_VARIANTS.items():
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        same = (v.width, v.depth, v.mlp_dim) == (width, depth, mlp_dim)
        if same and (v.num_heads, v.num_kv_heads, v.head_dim) == heads:
            return name
    return None


def lerobot_config(config: ModelConfig, cameras: Sequence[str] | None = None) -> dict[str, Any]:
    """LeRobot's config.json for a `ModelConfig`; what it has no field for stands under "cortexflow"."""
    if config.model_type not in (VLAModelType.PI0, VLAModelType.PI05):
        raise CheckpointError(f"LeRobot's format here is that of pi0 and pi05, found {config.model_type}")
    if config.folded_time_steps is not None:
        raise CheckpointError(
            f"a π0 checkpoint folded for {config.folded_time_steps} flow steps has lost its time MLP; LeRobot's format "
            "cannot hold it. Start from the original checkpoint"
        )
    if cameras is None:
        cameras = [CAMERAS[i] if i < len(CAMERAS) else f"camera_{i}_rgb" for i in range(config.num_views)]
    if len(cameras) != config.num_views:
        raise CheckpointError(f"expected {config.num_views} camera names, found {', '.join(cameras)}")
    family = VLAModelType(config.model_type)
    mode = "QUANTILES" if family is VLAModelType.PI05 else "MEAN_STD"
    image = [3, config.image_size, config.image_size]
    features: dict[str, Any] = {f"observation.images.{name}": {"type": "VISUAL", "shape": image} for name in cameras}
    features["observation.state"] = {"type": "STATE", "shape": [config.state_dim]}
    content: dict[str, Any] = {
        "type": family.value,
        "n_obs_steps": 1,
        "chunk_size": config.chunk_size,
        "n_action_steps": config.chunk_size,
        "max_state_dim": config.state_dim,
        "max_action_dim": config.action_dim,
        "num_inference_steps": config.num_diffusion_steps,
        "min_period": config.time_min_period,
        "max_period": config.time_max_period,
        "image_resolution": [config.image_size, config.image_size],
        "empty_cameras": 0,
        "tokenizer_max_length": config.max_token_len,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
        "input_features": features,
        "output_features": {"action": {"type": "ACTION", "shape": [config.action_dim]}},
    }
    towers = {
        "paligemma_variant": (config.encoder_dim, config.num_encoder_layers, config.encoder_mlp_dim),
        "action_expert_variant": (config.decoder_dim, config.num_decoder_layers, config.decoder_mlp_dim),
    }
    for key, (width, depth, mlp_dim) in towers.items():
        if (variant := _variant(width, depth, mlp_dim, config)) not in (None, "dummy"):
            content[key] = variant
    told_nowhere = ("vision_num_layers", "vision_num_heads", "num_heads", "num_kv_heads", "head_dim")
    numerics = ("vision_norm_eps", "norm_eps", "rope_theta")
    content["cortexflow"] = {field: getattr(config, field) for field in told_nowhere + numerics}
    return content


def save_lerobot(
    directory: str | Path,
    tensors: Mapping[str, torch.Tensor | LazyTensor],
    config: ModelConfig,
    *,
    cameras: Sequence[str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write canonical tensors as a LeRobot checkpoint directory: model.safetensors and config.json.

    The token embedding is stored once, as the tied head that LeRobot and openpi both read. `extra`
    adds or replaces keys of config.json. All tensors are in memory while they are written.
    """
    content = lerobot_config(config, cameras) | dict(extra or {})
    values: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.load() if isinstance(tensor, LazyTensor) else tensor.detach()
        stored = TIED_HEAD if name == EMBEDDING else name
        if WRAPPERS.match(name) or PREFIX + stored in values:
            raise CheckpointError(f"{name}: expected canonical names, each once (no `model.` prefix)")
        # safetensors refuses tensors that share memory, and a file of views would hold them twice anyway
        values[PREFIX + stored] = value.to("cpu", copy=True).contiguous()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(values, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    return directory
