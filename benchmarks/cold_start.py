"""Seconds from the start of a process to a first action, of a full-size checkpoint on disk, with empty caches.

Writes a π0.5 checkpoint of random bfloat16 weights as LeRobot does (7 GB; or takes yours), reads it once so that
the system holds it in memory, then starts a fresh process in which Triton's and this package's caches are empty:
`cortexflow.compile(folder, target="triton", device="cuda", dtype="bfloat16")` and one call. A second process
with the caches that the first one filled shows what they are worth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._first_action import BESIDE
from benchmarks._gpu import drawn
from benchmarks._record import RESULTS, markdown, save
from cortexflow.checkpoints import save_lerobot
from cortexflow.models import ModelConfig, create_model

ROOT = Path(__file__).parents[1]
CONFIG = ModelConfig(max_token_len=48)  # the released π0.5: 2 views, 10 actions
LIMIT = 15.0  # seconds, of the first process on one H100


def write(folder: Path, config: ModelConfig = CONFIG, device: str = "cuda") -> Path:
    """A LeRobot directory of random bfloat16 weights."""
    weights = drawn(create_model(config).get_weight_shapes(), device, torch.bfloat16)
    return save_lerobot(folder, weights, config)


def read(folder: Path) -> int:
    """Read every file, so that the system's page cache holds it; returns bytes."""
    total = 0
    for path in folder.iterdir():
        with path.open("rb") as file:
            while part := file.read(1 << 26):
                total += len(part)
    return total


def start(checkpoint: Path, caches: Path, target: str, **options: Any) -> dict[str, Any]:
    """What a fresh process reports; its caches are in a folder of their own."""
    places = {"TRITON_CACHE_DIR": "triton", "XDG_CACHE_HOME": "xdg", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    environment = os.environ | {name: str(caches / place) for name, place in places.items()}
    given = {"checkpoint": str(checkpoint), "target": target, "options": options, "started": time.perf_counter()}
    command = [sys.executable, "-m", "benchmarks._first_action", json.dumps(given)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each part of the way, then the sums."""
    runs = {"empty caches": first, "filled caches": second}
    rows = []
    beside = [part for part in first["spans"] if part.endswith(BESIDE.format(""))]
    for part in [*(part for part in first["spans"] if part not in beside), "other"]:
        rows.append({"part": part} | {n: f"{_seconds(r, part):.2f} s" for n, r in runs.items()})
    for part in ("from the import", "total"):
        rows.append({"part": f"**{part}**"} | {n: f"{r[part]:.2f} s" for n, r in runs.items()})
    for part in beside:
        rows.append({"part": part} | {n: f"{_seconds(r, part):.2f} s" for n, r in runs.items()})
    notes = {
        "kernels compiled": lambda r: "{compiled}, {seconds:.1f} s in all threads".format(**r["kernels"]),
        "a later call": lambda r: f"{r['a later call'] * 1e3:.2f} ms",
        "peak GPU memory, reserved": lambda r: f"{r['peak GB']:.2f} GB, {r['reserved GB']:.2f} GB",
    }
    return rows + [{"part": name} | {n: text(r) for n, r in runs.items()} for name, text in notes.items()]


def _seconds(run: dict[str, Any], part: str) -> float:
    """Seconds of a part; `other` is what no part accounts for."""
    spans: dict[str, float] = run["spans"]
    known = sum(seconds for name, seconds in spans.items() if not name.endswith(BESIDE.format("")))
    return run["total"] - known if part == "other" else spans.get(part, 0.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Write, read, start twice, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a checkpoint of yours in place of a random one")
    add("--folder", type=Path, help="where the random one goes, and stays (else a temporary folder)")
    add("--target", default="triton")
    add("--device", default="cuda")
    add("--dtype", default="bfloat16")
    add("--out", type=Path, default=RESULTS, help="where results are written")
    arguments = parser.parse_args(argv)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("cold_start: needs an NVIDIA GPU, and PyTorch finds none here")
        return
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = arguments.checkpoint or arguments.folder or Path(temporary) / "checkpoint"
        if not checkpoint.exists():
            write(checkpoint, device=arguments.device)
            torch.cuda.empty_cache()
        size = read(checkpoint)
        caches = Path(temporary) / "caches"
        options = {"device": arguments.device, "dtype": arguments.dtype}
        more = {"checkpoint_bytes": size, "limit_s": LIMIT}
        first = start(checkpoint, caches, arguments.target, **options)
        save("cold_start", [], arguments.out, **more, first=first)  # should the second not come to its end
        second = start(checkpoint, caches, arguments.target, **options)
    rows = rows_of(first, second)
    save("cold_start", rows, arguments.out, **more, first=first, second=second)
    print(markdown(rows))
    print(f"\n{'holds' if first['total'] < LIMIT else 'MISSED'}: {first['total']:.1f} s, less than {LIMIT:.0f} s")


if __name__ == "__main__":
    main()
