"""The torch target on a CPU in float32 against eager PyTorch on the same weights, in turn, in one run.

Two models: the small reference case, and one of full width with two layers in each tower. Peers are
those of `_peers.py` that are installed; without any, the compiled policy is timed alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cortexflow
from benchmarks._peers import installed
from benchmarks._record import record
from cortexflow.compiler import load_model
from cortexflow.ir.core import Type
from cortexflow.models import ModelConfig, Signature, VLAModelType, create_model
from cortexflow.weights import random_weights

SMALL = Path(__file__).parents[1] / "tests" / "data" / "pi" / "pi05_tiny"
WIDE = ModelConfig(
    vision_num_layers=2,
    num_encoder_layers=2,
    num_decoder_layers=2,
    vocab_size=2048,
    max_token_len=48,
    num_views=2,
    chunk_size=10,
    num_diffusion_steps=10,
    model_type=VLAModelType.PI05,
)


def small() -> tuple[str, ModelConfig, Mapping[str, Tensor]]:
    """The reference case pi05_tiny."""
    model, weights = load_model(SMALL)
    return "small (reference case)", model.config, dict(weights)


def wide() -> tuple[str, ModelConfig, Mapping[str, Tensor]]:
    """Full width, two layers in each tower, random weights."""
    return "full width, depth 2", WIDE, random_weights(create_model(WIDE).build(Signature.of(WIDE)))


def inputs_for(types: Mapping[str, Type], prompt_length: int) -> dict[str, Tensor]:
    """Random inputs: images in [-1, 1], a prompt that is shorter than its bucket."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for name, t in types.items():
        if name == "tokens":
            made[name] = torch.randint(3, 90, t.shape, generator=generator, dtype=torch.int32)
        elif name == "token_mask":
            made[name] = (torch.arange(t.shape[1]) < prompt_length).expand(t.shape)
        elif t.dtype == "bool":
            made[name] = torch.ones(t.shape, dtype=torch.bool)
        else:
            made[name] = torch.randn(t.shape, generator=generator).clamp(-1, 1)
    return made


def in_turn(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, taken in turn so that a slow moment of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def compare(name: str, config: ModelConfig, weights: Mapping[str, Tensor], rounds: int) -> list[dict[str, Any]]:
    """One row for each peer (or one without)."""
    compiled = cortexflow.compile(create_model(config), "torch", weights=weights, progress=False)
    inputs = inputs_for(compiled.inputs, config.max_token_len * 2 // 3)
    calls: dict[str, Callable[[], Any]] = {"compiled": lambda: compiled(**inputs)}
    distances: dict[str, float] = {}
    for peer, make in installed().items():
        act = make(config, weights)
        distances[peer] = float((act(inputs) - compiled(**inputs)).abs().max())
        calls[peer] = lambda act=act: act(inputs)
    times = in_turn(calls, rounds)
    ours = statistics.median(times["compiled"])
    rows = []
    for peer in distances or {"none installed": 0.0}:
        theirs = times.get(peer)
        ratios = [a / b for a, b in zip(theirs, times["compiled"], strict=True)] if theirs else []
        rows.append(
            {
                "model": name,
                "rounds": rounds,
                "compiled ms": round(ours, 2),
                "peer": peer,
                "peer ms": round(statistics.median(theirs), 2) if theirs else "",
                "times faster": round(statistics.median(ratios), 3) if ratios else "",
                "actions differ by": f"{distances[peer]:.1e}" if theirs else "",
            }
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = [row for case in (small, wide) for row in compare(*case(), arguments.rounds)]
    record("cpu_eager", found)
