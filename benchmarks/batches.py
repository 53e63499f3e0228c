"""Milliseconds of `predict_batch` by the number of episodes, on a GPU, and how far a batch is from its episodes alone.

A full-size π0.5 of random weights through `VLAInferenceEngine` (Triton, bfloat16, 2 views, 10 actions), prompts of 5 to
47 tokens; medians by the host's clock, from pictures on the host to actions on the host.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._gpu import by_clock, episodes, on_host
from benchmarks._record import RESULTS, markdown, save
from cortexflow import InferenceConfig, ModelConfig, VLAInferenceEngine

WANTED = 4.0  # times the actions a second of one episode, with eight
VIEWS, CHUNK = 2, 10


def engine(most: int) -> VLAInferenceEngine:
    """An engine of random weights for up to so many episodes at once."""
    model = on_host(ModelConfig())
    return VLAInferenceEngine(model, None, InferenceConfig(VIEWS, CHUNK, max_batch=most, discrete_state_input=False))


def measure(policy: VLAInferenceEngine, sizes: Sequence[int], runs: int) -> Iterator[list[dict[str, Any]]]:
    """A row for each number of episodes, all rows so far after each; the first is what others are compared with."""
    pictures, prompts = episodes(policy.model_config, max(sizes), VIEWS)
    rows: list[dict[str, Any]] = []
    for b in sizes:
        times, same = by_clock(lambda b=b: torch.from_numpy(policy.predict_batch(pictures[:b], prompts[:b])), runs)
        together = policy.predict_batch(pictures[:b], prompts[:b])
        alone = np.stack([policy.predict(*episode) for episode in zip(pictures[:b], prompts[:b], strict=True)])
        ms = statistics.median(times)
        each = rows[0]["ms"] / rows[0]["episodes"] if rows else ms / b
        rows.append(
            {
                "episodes": b,
                "ms": round(ms, 2),
                "times the actions a second": round(each * b / ms, 2),
                "relative distance from alone": float(np.linalg.norm(together - alone) / np.linalg.norm(alone)),
                "same bits": f"{same} of {runs}",
                "card GB": round(torch.cuda.memory_allocated() / 1e9, 2),
            }
        )
        yield rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, save as it goes, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result is written")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("batches: needs an NVIDIA GPU, and PyTorch finds none here")
        return
    for rows in measure(engine(max(arguments.episodes)), arguments.episodes, arguments.runs):
        save("batches", rows, arguments.out, wanted=WANTED)
    print(markdown(rows))


if __name__ == "__main__":
    main()
