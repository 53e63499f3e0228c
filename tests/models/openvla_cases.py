"""OpenVLA's reference cases: a small checkpoint as it is on disk, requests, and what the published code computed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DATA = Path(__file__).parents[1] / "data" / "openvla"
TINY = DATA / "openvla_tiny"
INDEX = "model.safetensors.index.json"
SPACE = 29871  # the token that the published code appends to a prompt
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
_DIGESTS = {EMBEDDING: "84660bdbdd5c7989", HEAD: "9ea528e151ae7b59"}
EXPOSED = ("patches_*", "patch_features", "projected", "prefill_embeds", "prefill_layer_*", "prefill_out", "*_logits")


@cache
def weights() -> dict[str, Tensor]:
    """Every tensor of the small checkpoint, bfloat16."""
    return {**load_file(TINY / "weights.safetensors"), EMBEDDING: _drawn(EMBEDDING), HEAD: _drawn(HEAD)}


def _drawn(key: str, rows: int = 32064, width: int = 40) -> Tensor:
    """A large tensor by the rule that made it: seeded by its name, normal, rounded to bfloat16."""
    seed = int.from_bytes(hashlib.sha256(f"openvla-tiny-a9|{key}".encode()).digest()[:8], "little")
    n = np.random.Generator(np.random.PCG64(seed)).standard_normal((rows, width))
    if key == HEAD:
        n /= np.sqrt(width)
        n[31744:32000] *= 2.5
    found = torch.from_numpy(n.astype(np.float32)).bfloat16()
    digest = hashlib.sha256(found.view(torch.int16).numpy().tobytes()).hexdigest()
    assert digest.startswith(_DIGESTS[key]), f"numpy {np.__version__} draws other numbers than those of the case"
    return found


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor] | None = None, **config: Any) -> Path:
    """The small checkpoint as a directory of two files and their index; other tensors and keys of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights() if tensors is None else tensors
    shutil.copyfile(TINY / "preprocessor_config.json", folder / "preprocessor_config.json")
    content = json.loads((TINY / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    known = json.loads((TINY / INDEX).read_text())["weight_map"]
    shards = {name: known.get(name, "model-00002-of-00002.safetensors") for name in tensors}
    for shard in sorted(set(shards.values())):
        save_file({n: t.contiguous() for n, t in tensors.items() if shards[n] == shard}, folder / shard)
    size = sum(t.nbytes for t in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": shards}))
    return folder


@dataclass(frozen=True, eq=False)
class Request:
    """One observation, and what the published code made of it."""

    name: str
    pixel_values: Tensor
    tokens: Tensor  # i64 [1, n], the appended one included
    outputs: dict[str, Tensor]
    told: dict[str, Any]  # of cases.json

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values, "tokens": self.tokens}


@cache
def requests() -> tuple[Request, ...]:
    """All requests."""
    inputs, outputs = load_file(TINY / "inputs.safetensors"), load_file(TINY / "outputs.safetensors")
    found = []
    for told in json.loads((TINY / "cases.json").read_text()):
        ids, name = inputs[f"{told['case']}.input_ids"], told["case"]
        if ids[0, -1] != SPACE:
            ids = torch.cat([ids, torch.tensor([[SPACE]])], 1)
        part = {k.removeprefix(f"{name}."): v for k, v in outputs.items() if k.startswith(f"{name}.")}
        found.append(Request(name, inputs[told["pixel_values"]], ids, part, told))
    return tuple(found)


def padded(tokens: list[Tensor], slots: int) -> dict[str, Tensor]:
    """Prompts [1, n] of different lengths as one batch of `slots`: `tokens`, and the mask of those that count."""
    rows = [torch.nn.functional.pad(t, (0, slots - t.shape[1])) for t in tokens]
    masks = [torch.arange(slots)[None] < t.shape[1] for t in tokens]
    return {"tokens": torch.cat(rows), "token_mask": torch.cat(masks)}


def batch_of(chosen: list[Request], slots: int) -> dict[str, Tensor]:
    """Several requests as one batch."""
    return {"pixel_values": torch.cat([r.pixel_values for r in chosen]), **padded([r.tokens for r in chosen], slots)}
