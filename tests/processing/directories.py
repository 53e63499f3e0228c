"""Small checkpoint directories as openpi and LeRobot leave them, and openpi's own example observations."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from cortexflow.checkpoints import save_lerobot
from cortexflow.demo import random_weights, train_tokenizer
from cortexflow.models import ModelConfig, VLAModelType, create_model
from cortexflow.processing import save_stats
from cortexflow.processing.stats import Stats, make_stats

SMALL: dict[str, Any] = {
    "vision_encoder_dim": 16,
    "vision_num_layers": 1,
    "vision_num_heads": 2,
    "vision_mlp_dim": 16,
    "patch_size": 14,
    "image_size": 28,
    "encoder_dim": 16,
    "encoder_mlp_dim": 16,
    "num_encoder_layers": 1,
    "decoder_dim": 16,
    "decoder_mlp_dim": 16,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "head_dim": 8,
    "vocab_size": 512,
    "num_diffusion_steps": 2,
}


def small(family: str, **changes: Any) -> ModelConfig:
    """A π0 or π0.5 of a few thousand parameters."""
    slots = 48 if family == "pi0" else 160
    return ModelConfig(**({"model_type": VLAModelType(family), "max_token_len": slots} | SMALL | changes))


@cache
def tokenizer_bytes() -> bytes:
    return train_tokenizer(512)


def random_stats(state: int, actions: int, seed: int = 0) -> Stats:
    """All four statistics, of a plausible size."""
    rng = np.random.default_rng(seed)
    groups = {}
    for group, size in (("state", state), ("actions", actions)):
        mean, std = rng.normal(size=size), rng.uniform(0.2, 0.6, size)
        groups[group] = {"mean": mean, "std": std, "q01": mean - 2 * std, "q99": mean + 2.2 * std}
    return make_stats(groups)


def write_norm_stats(file: Path, stats: Stats) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {group: {name: value.tolist() for name, value in stats[group].items()} for group in stats}
    file.write_text(json.dumps({"norm_stats": content}))


def write_openpi(place: Path, family: str, stats: Stats, asset: str, horizon: int = 10) -> Path:
    """What openpi's converter leaves, with the assets of the training run beside it; and a tokenizer."""
    config = small(family, chunk_size=horizon)
    place.mkdir(parents=True, exist_ok=True)
    save_file(random_weights(create_model(config).get_weight_shapes(), 0), place / "model.safetensors")
    told = {k: v for k, v in dataclasses.asdict(config).items() if v is not None and k != "num_views"}
    told["model_type"] = family
    (place / "config.json").write_text(
        json.dumps({"action_dim": config.action_dim, "action_horizon": horizon, "cortexflow": told})
    )
    write_norm_stats(place / "assets" / asset / "norm_stats.json", stats)
    (place / "tokenizer.model").write_bytes(tokenizer_bytes())
    return place


def write_lerobot(place: Path, family: str, stats: Stats, cameras: tuple[str, ...] = ("image", "image2")) -> Path:
    """What LeRobot's `save_pretrained` leaves; and a tokenizer."""
    config = small(family, num_views=len(cameras))
    save_lerobot(place, random_weights(create_model(config).get_weight_shapes(), 0), config, cameras=cameras)
    save_stats(stats, place, norm="quantile" if family == "pi05" else "mean_std")
    (place / "tokenizer.model").write_bytes(tokenizer_bytes())
    return place


def example(robot: str, seed: int = 0, side: int = 224) -> dict[str, Any]:
    """openpi's make_libero_example, make_droid_example and make_aloha_example (src/openpi/policies)."""
    rng = np.random.default_rng(seed)

    def picture(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, shape, np.uint8)

    if robot == "libero":
        return {
            "observation/state": rng.random(8),
            "observation/image": picture(side, side, 3),
            "observation/wrist_image": picture(side, side, 3),
            "prompt": "do something",
        }
    if robot == "droid":
        return {
            "observation/exterior_image_1_left": picture(side, side, 3),
            "observation/wrist_image_left": picture(side, side, 3),
            "observation/joint_position": rng.random(7),
            "observation/gripper_position": rng.random(1),
            "prompt": "do something",
        }
    return {
        "state": np.ones((14,)),
        "images": {
            camera: picture(3, side, side) for camera in ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
        },
        "prompt": "do something",
    }
