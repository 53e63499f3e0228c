"""Milliseconds that the host works in a call, the network left out, and that it takes to fit cameras' pictures.

`VLAInferenceEngine.predict` with two pictures of 224 x 224 and 20 token ids, its backend answering at once; then
`as_model_images` for one to three pictures of 640 x 480. Medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks._record import record
from cortexflow import BackendType, InferenceConfig, ModelConfig, VLAInferenceEngine
from cortexflow.models import create_model
from cortexflow.processing import as_model_images
from cortexflow.weights import Weights

RUNS = 300
SMALL = {
    **dict.fromkeys(("vision_num_layers", "num_encoder_layers", "num_decoder_layers"), 1),
    **dict.fromkeys(("vision_encoder_dim", "vision_mlp_dim", "encoder_dim", "encoder_mlp_dim", "decoder_dim"), 32),
    **{"decoder_mlp_dim": 32, "vision_num_heads": 2, "num_heads": 2, "head_dim": 16, "vocab_size": 512},
}


def engine() -> VLAInferenceEngine:
    """A π0.5 of the released pictures and chunk, with next to no network behind."""
    model = create_model(ModelConfig().with_(**SMALL))
    shapes = model.get_weight_shapes()
    model.weights = Weights(list(shapes), lambda key: torch.zeros(shapes[key]))
    options: dict[str, Any] = {"backend": BackendType.PYTORCH, "device": "cpu", "dtype": torch.float32}
    found = VLAInferenceEngine(model, None, InferenceConfig(2, 10, discrete_state_input=False, **options))
    actions = torch.zeros(1, *found.action_shape)
    found.backend.run = lambda inputs, weights, steps: actions  # type: ignore[method-assign]
    return found


def median(call: Callable[[], Any]) -> float:
    """Milliseconds of a call."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(times), 3)


def measure() -> list[dict[str, Any]]:
    """A row for each kind of call."""
    random, act = np.random.default_rng(0), engine()
    levels = random.integers(0, 256, (2, 224, 224, 3), np.uint8)
    prompt = list(range(3, 23))
    kinds = {"uint8": levels, "float32": levels.astype(np.float32) / 255 * 2 - 1}
    rows = [
        {"what": f"predict, {kind} pictures", "ms": median(lambda x=x: act.predict(x, prompt))}
        for kind, x in kinds.items()
    ]
    for views in (1, 2, 3):
        wide = [random.integers(0, 256, (480, 640, 3), np.uint8) for _ in range(views)]
        for method in ("pil", "lerobot"):
            ms = median(lambda m=method, v=views, w=wide: as_model_images(w, views=v, size=224, method=m))
            rows.append({"what": f"{views} pictures of 640 x 480, {method}", "ms": ms})
    return rows


if __name__ == "__main__":
    record("host", measure())
