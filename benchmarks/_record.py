"""What measurements share: the machine's description, tables, a JSON file beside them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str]:
    """Processor, cores, versions; the card and its driver where there is one."""
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
        found["driver"] = _driver()
        found["triton"] = importlib.metadata.version("triton")
    return found


@cache
def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as an aligned table."""
    heads = list(rows[0])
    cells = [heads, *[[_shown(r[h]) for h in heads] for r in rows]]
    widths = [max(len(c[i]) for c in cells) for i in range(len(heads))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; what the first column repeats is left blank."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads)]
    last = None
    for row in rows:
        first, *others = (_shown(row[h]) for h in heads)
        lines.append([first if first != last else "", *others])
        last = first
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def record(name: str, rows: list[dict[str, Any]], folder: Path = RESULTS, **more: Any) -> None:
    """Print rows and save them."""
    print(table(rows))
    save(name, rows, folder, **more)


def save(name: str, rows: list[dict[str, Any]], folder: Path = RESULTS, **more: Any) -> None:
    """Write rows, with machine, date and command, to `<name>.json` in a folder, made if absent."""
    content = {
        "name": name,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": machine(),
        **more,
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def saved(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """What `save` wrote."""
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return content


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
