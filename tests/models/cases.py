"""Reference cases: checkpoints, inputs and outputs made by the models' own implementations.

`config.json` holds the dimensions and, for each batch, prompt lengths and masked cameras. Tensors of a
batch are stored under `<batch>.<name>`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parents[1] / "data" / "pi"
# our name: the reference's, to which it adds the camera
STACKED = {
    "vision_embed": "vision_embed",
    "vision_layer_0": "vision_layer0",
    "siglip": "siglip",
    "image_embed": "image_embed",
}


@dataclass(frozen=True)
class Batch:
    """One batch of a case: inputs as the compiled policy takes them, outputs as the reference stored them."""

    case: Path
    name: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    layers: int
    vision_layers: int

    @property
    def size(self) -> int:
        return self.inputs["noise"].shape[0]


def case_folders(root: Path = DATA) -> list[Path]:
    """Every folder that holds a case."""
    return sorted(p.parent for p in root.glob("*/outputs.safetensors"))


@cache
def batches(folder: Path) -> tuple[Batch, ...]:
    """The batches of a case."""
    config = json.loads((folder / "config.json").read_text())
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    return tuple(
        Batch(
            folder,
            name,
            _policy_inputs(_part(inputs, name), config),
            _part(outputs, name),
            config["vlm"]["depth"],
            config["vision"]["depth"],
        )
        for name in config["batches"]
    )


def _part(tensors: dict[str, Tensor], batch: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{batch}."): v for k, v in tensors.items() if k.startswith(f"{batch}.")}


def _policy_inputs(stored: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    views = range(config["num_views"])
    given = {
        "images": torch.stack([stored[f"image_{i}"] for i in views], 1).movedim(2, -1).contiguous(),
        "image_mask": torch.stack([stored[f"image_mask_{i}"] for i in views], 1).bool(),
        "tokens": stored["tokens"],
        "token_mask": stored["token_mask"].bool(),
        "noise": stored["noise"],
    }
    return given | ({"state": stored["state"]} if config["model"] == "pi0" else {})


EXPOSED = (
    "vision_embed",
    "vision_layer_0",
    "siglip",
    "image_embed",
    "prefix_embeds",
    "prefix_position_ids",
    "prefix_layer_*",
    "prefix_out",
    "suffix_embeds",
    "suffix_layer_*",
    "suffix_out",
    "time",
    "x_t",
    "v_t",
)


def compared(batch: Batch, results: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs (ours, the reference's) by name; prefix tensors only where a token is valid."""
    ref, valid = batch.outputs, batch.outputs["prefix_pad_mask"].bool()
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, stored in STACKED.items():
        ours = results[name].unflatten(0, (batch.size, -1))
        for i in range(ours.shape[1]):
            pairs[f"{stored}_{i}"] = (ours[:, i], ref[f"{stored}_{i}"])
    for name in ("prefix_embeds", "prefix_position_ids", "prefix_out", *_layers("prefix_layer", batch)):
        pairs[name] = (results[name][valid], ref[name][valid])
    for side in "kv":
        for i in range(batch.layers):
            stored = f"prefix_{side}_{i}"
            pairs[stored] = (results[f"{side}_{i}"][valid], ref[stored].transpose(1, 2)[valid])
    horizon = ref["actions"].shape[1]
    pairs["suffix_embeds_first"] = (results["suffix_embeds"][0], ref["suffix_embeds_first"])
    pairs["suffix_out_first"] = (results["suffix_out"][0][:, -horizon:], ref["suffix_out_first"][:, -horizon:])
    for i in range(batch.layers):
        pairs[f"suffix_first_layer_{i}"] = (results[f"suffix_layer_{i}"][0], ref[f"suffix_first_layer_{i}"])
    pairs["times"] = (results["time"], ref["times"].reshape(-1))
    pairs["x_steps"], pairs["v_steps"] = (results["x_t"], ref["x_steps"]), (results["v_t"], ref["v_steps"])
    return pairs


def _layers(stem: str, batch: Batch) -> list[str]:
    return [f"{stem}_{i}" for i in range(batch.layers)]


def distance(ours: Tensor, reference: Tensor) -> float:
    """The largest absolute difference; NaN counts as infinite."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    worst = (ours.double() - reference.double()).abs().max() if ours.numel() else torch.zeros(())
    return float(worst.nan_to_num(nan=float("inf")))
