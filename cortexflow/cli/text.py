"""Words and tables on a terminal: headings, columns, sizes, chunks of actions."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

FAMILIES = {"pi0": "π0", "pi05": "π0.5", "openvla": "OpenVLA"}
FORMATS = {
    "lerobot": "LeRobot",
    "openpi": "openpi (PyTorch)",
    "openpi-jax": "openpi (JAX)",
    "realtime-vla": "realtime-vla",
    "openvla": "OpenVLA (Hugging Face)",
}


def heading(title: str) -> str:
    """A title over a rule, after an empty line."""
    return f"\n{title}\n{'─' * len(title)}"


def pairs(rows: Mapping[str, str]) -> str:
    """Names and what is said of each, in two columns."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def table(header: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> str:
    """Columns in line: the first to the left, the others to the right."""
    lines = [*([header] if header else []), *rows]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def action_table(actions: NDArray[Any]) -> str:
    """A chunk [steps, values], as many columns in a block as the terminal has room for."""
    most = max(1, (shutil.get_terminal_size((100, 24)).columns - 4) // 10)
    blocks = []
    for start in range(0, actions.shape[1], most):
        part = actions[:, start : start + most]
        header = ("step", *(f"a{start + k}" for k in range(part.shape[1])))
        blocks.append(table(header, [(str(i), *(f"{v:+8.4f}" for v in row)) for i, row in enumerate(part)]))
    return "\n\n".join(blocks)


def size_text(n: float) -> str:
    """Bytes in a unit that reads well."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"
