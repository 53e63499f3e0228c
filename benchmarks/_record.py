"""What measurements share: the machine's description, a table on the screen, a JSON file beside it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str]:
    """Processor, cores, versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), cpu)
    found = {"cpu": cpu, "threads": str(torch.get_num_threads()), "python": platform.python_version()}
    found["torch"] = torch.__version__
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
        found["triton"] = importlib.metadata.version("triton")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as an aligned table."""
    heads = list(rows[0])
    cells = [heads, *[[_shown(r[h]) for h in heads] for r in rows]]
    widths = [max(len(c[i]) for c in cells) for i in range(len(heads))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def record(name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Print rows and write them, with machine, date and command, to `results/<name>.json`."""
    print(table(rows))
    content = {
        "name": name,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": machine(),
        **more,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
