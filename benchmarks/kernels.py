"""Where a prediction's time goes on the card: its kernels by name and grid, from PyTorch's profiler over one call.

A kernel's time is from its start to the start of the next one, so that the sum is the whole: launches overlap, and how
long each is resident says little. Full size, random weights, Triton, bfloat16; cases as `latency` names them, with
`@8` behind for a batch of eight.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks._gpu import WARM_UP, Case, build, case_of, inputs_for, label
from benchmarks._record import RESULTS, markdown, save
from cortexflow.models import ModelConfig

MOST = 25  # rows of a case


def batched(text: str) -> Case:
    """A case as it is written on the command line: `pi05:2:10:48`, or `pi05:2:10:48@8`."""
    case, _, batch = text.partition("@")
    kind, signature = case_of(case)
    return kind, replace(signature, batch=int(batch or 1))


def launches(case: Case) -> list[dict[str, Any]]:
    """The kernels of one call, as the profiler's trace has them."""
    kind, signature = case
    module, policy = build(ModelConfig.released(kind), signature, "triton", "bf16")
    given = inputs_for(module)
    for _ in range(WARM_UP):
        policy.run(given)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        policy.run(given)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return [e for e in events if e.get("cat") == "kernel"]


def rows_of(case: str, events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kernel and grid, those that take most first; `µs each` is from its start to the next one's."""
    events = sorted(events, key=lambda e: e["ts"])
    ends = [e["ts"] for e in events[1:]] + [events[-1]["ts"] + events[-1]["dur"]]
    spans: dict[tuple[str, str], list[float]] = {}
    for event, end in zip(events, ends, strict=True):
        grid = " x ".join(map(str, event["args"]["grid"]))
        spans.setdefault((event["name"][:70], grid), []).append(end - event["ts"])
    found = [
        {
            "case": case,
            "kernel": name,
            "grid": grid,
            "launches": len(took),
            "µs each": round(sum(took) / len(took), 2),
            "ms in all": round(sum(took) / 1e3, 3),
        }
        for (name, grid), took in spans.items()
    ]
    return sorted(found, key=lambda r: -r["ms in all"])[:MOST]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, save after each case, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", type=batched, metavar="FAMILY:VIEWS:CHUNK:PROMPT[@BATCH]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result is written")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("kernels: needs an NVIDIA GPU, and PyTorch finds none here")
        return
    rows: list[dict[str, Any]] = []
    for case in arguments.cases or [batched("pi05:2:10:48")]:
        rows += rows_of(f"{label(case)}, batch {case[1].batch}", launches(case))
        save("kernels", rows, arguments.out)
    print(markdown(rows))


if __name__ == "__main__":
    main()
