"""Predictions in a loop for a long time: memory must not grow, and the same noise must give the same bits.

    python -m benchmarks.soak                       # 100,000 on the CPU, with a small model
    python -m benchmarks.soak --gpu --predictions 20000

The model is the small π0.5 of `make demo`, made anew; `--checkpoint` takes another. Two observations alternate,
so that buffers of one cannot pass for those of the other.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks._record import RESULTS, save
from cortexflow import BackendType, create_inference
from cortexflow.checkpoints import open_checkpoint
from cortexflow.demo import write_checkpoint

SAMPLES = 20  # readings of the memory in use


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def run(engine: Any, predictions: int, gpu: bool) -> dict[str, Any]:
    """Predict, compare, and read the memory now and then; growth is counted after the first tenth."""
    size, views = engine.model_config.image_size, engine.inference_config.num_views
    random = np.random.default_rng(0)
    seen = [(random.integers(0, 256, (views, size, size, 3), np.uint8), list(range(3, 9 + 4 * i))) for i in range(2)]
    expected = [engine.predict(*observation, seed=i) for i, observation in enumerate(seen)]
    other, readings = 0, []
    start = time.perf_counter()
    for n in tqdm(range(predictions), unit="prediction", mininterval=5):
        actions = engine.predict(*seen[n % 2], seed=n % 2)
        other += not np.array_equal(actions, expected[n % 2])
        if n % (predictions // SAMPLES) == 0:
            readings.append((resident(), torch.cuda.memory_allocated() if gpu else 0))
    seconds = time.perf_counter() - start
    late = readings[SAMPLES // 10 :]
    return {
        "predictions": predictions,
        "other bits": other,
        "host growth, bytes": late[-1][0] - late[0][0],
        "card growth, bytes": late[-1][1] - late[0][1],
        "host GB": round(late[-1][0] / 1e9, 3),
        "ms each": round(seconds * 1e3 / predictions, 3),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Make an engine, run it, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=int, default=100_000)
    parser.add_argument("--gpu", action="store_true", help="the triton target in bfloat16")
    parser.add_argument("--checkpoint", type=Path, help="in place of a small one made here")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result is written")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    where: dict[str, Any] = {"backend": BackendType.PYTORCH, "device": "cpu", "dtype": torch.float32}
    if arguments.gpu:
        where = {"backend": BackendType.TRITON, "device": "cuda", "dtype": torch.bfloat16}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or write_checkpoint(Path(folder) / "checkpoint")
        family = open_checkpoint(checkpoint).family
        engine = create_inference(family, checkpoint, progress=False, **where)
        row = run(engine, arguments.predictions, arguments.gpu)
    print(row)
    save("soak_gpu" if arguments.gpu else "soak", [row], arguments.out)


if __name__ == "__main__":
    main()
