"""Episodes a second of one replica and of one on each GPU, through `predict_batch`; the actions must be the same bits.

A full-size π0.5 of random weights (Triton, bfloat16, 2 views, 10 actions, prompts of 5 to 47 tokens), one episode at a
time on each device, so that what a device computes does not depend on how many there are. By the host's clock, from
pictures on the host to actions on the host; the median of the runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._gpu import by_clock, episodes, on_host
from benchmarks._record import RESULTS, markdown, save
from cortexflow import InferenceConfig, ModelConfig
from cortexflow.replicas import ReplicatedEngine

WANTED = 1.9  # times the episodes a second of one, with two
VIEWS, CHUNK = 2, 10


def measure(
    config: ModelConfig, devices: Sequence[str], count: int, runs: int, source: str = "cuda:0", **options: Any
) -> Iterator[list[dict[str, Any]]]:
    """A row for the first device alone and one for all, all rows so far after each; weights are drawn on `source`."""
    model = on_host(config, source)
    pictures, prompts = episodes(config, count, VIEWS)
    given = InferenceConfig(VIEWS, CHUNK, max_batch=1, discrete_state_input=False, **options)
    rows: list[dict[str, Any]] = []
    alone = torch.empty(0)
    for used in (devices[:1], devices):
        with ReplicatedEngine(model, None, given, devices=used) as engine:
            times, same = by_clock(lambda e=engine: torch.from_numpy(e.predict_batch(pictures, prompts)), runs)
            actions = torch.from_numpy(engine.predict_batch(pictures, prompts))
        rate = 1e3 * count / statistics.median(times)
        alone = alone if rows else actions
        rows.append(
            {
                "devices": ", ".join(used),
                "episodes a second": round(rate, 1),
                "times one": round(rate / rows[0]["episodes a second"], 2) if rows else 1.0,
                "same bits": f"{same} of {runs}",
                "bits of one": torch.equal(actions, alone),
            }
        )
        yield rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, save as it goes, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", help="such as cuda:0 cuda:1; left out: every GPU")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result is written")
    arguments = parser.parse_args(argv)
    devices = arguments.devices or [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if not torch.cuda.is_available() or len(devices) < 2:
        print(f"replicas: needs an NVIDIA GPU, and two devices; found {', '.join(devices) or 'none'}")
        return
    for rows in measure(ModelConfig(), devices, arguments.episodes, arguments.runs):
        save("replicas", rows, arguments.out, wanted=WANTED)
    print(markdown(rows))


if __name__ == "__main__":
    main()
