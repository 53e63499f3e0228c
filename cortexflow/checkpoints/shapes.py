"""What the shapes of a checkpoint's tensors tell of a `ModelConfig`, and where they contradict what is said of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from cortexflow.checkpoints.dialects import Fact, Facts
from cortexflow.errors import CheckpointError

Shape = tuple[int, ...]


def first_layer(shapes: Mapping[str, Shape], pattern: str) -> str | None:
    """The stored name that fits a pattern, in the lowest layer there is."""
    if "{}" not in pattern:
        return pattern if pattern in shapes else None
    head, tail = pattern.split("{}")
    found = [n for n in shapes if n.startswith(head) and n.endswith(tail) and n[len(head) : -len(tail)].isdigit()]
    return min(found, key=lambda n: int(n[len(head) : -len(tail)])) if found else None


def layer_count(shapes: Mapping[str, Shape], prefix: str) -> int:
    numbers = (re.match(r"(\d+)\.", name[len(prefix) :]) for name in shapes if name.startswith(prefix))
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


def measure_dimensions(
    shapes: Mapping[str, Shape], dimensions: Iterable[tuple[str, str, int]], layers: Iterable[tuple[str, str]]
) -> Facts:
    """What single dimensions and the numbers of layers tell: see the tables of each format."""
    facts: Facts = {}
    for field, pattern, axis in dimensions:
        name = first_layer(shapes, pattern)
        if name is not None and axis < len(shapes[name]):
            facts[field] = Fact(shapes[name][axis], f"tensor {name} {list(shapes[name])}")
    for field, prefix in layers:
        if count := layer_count(shapes, prefix):
            facts[field] = Fact(count, f"the layers under {prefix}")
    return facts


def need(field: str, why: str) -> CheckpointError:
    """The error for a field that the checkpoint should tell and does not."""
    return CheckpointError(
        f'{field}: {why}. Say it in config.json under "cortexflow": {{{field!r}: ...}}, '
        f"or pass config_overrides={{{field!r}: ...}}"
    )


def contradictions(said: Facts, measured: Facts, depths: Collection[str]) -> list[str]:
    """Where what is said and what shapes tell differ, a line each; `depths` are the fields that count layers."""
    lines = []
    for field, fact in measured.items():
        if field in said and said[field].value != fact.value:
            line = f"{field}: {said[field].where} says {said[field].value}, {fact.where} says {fact.value}"
            if field in depths and fact.value < said[field].value:
                line += " (layers are missing: the file is truncated or a shard is absent)"
            lines.append(line)
    return lines


def split_heads(q_rows: Fact, k_rows: Fact, said: Facts, notes: list[str]) -> dict[str, int]:
    """num_heads, num_kv_heads and head_dim from the rows of q and k and whatever is said of the three."""
    heads, kv, dim = (said[f].value if f in said else None for f in ("num_heads", "num_kv_heads", "head_dim"))
    if dim is None and heads is not None and q_rows.value % heads == 0:
        dim = q_rows.value // heads
    if dim is None and kv is not None and k_rows.value % kv == 0:
        dim = k_rows.value // kv
    if dim is None and heads is None and kv is None:
        # Every published π0 and π0.5 has one key-value head, and then its rows are the head. A model with
        # several must say so in its configuration; q rows that this head does not divide are refused.
        dim = k_rows.value
        notes.append(f"head_dim {dim}: inferred from {k_rows.where} with one key-value head")
    if dim is None:
        text = ", ".join(f"{f} = {said[f].value} ({said[f].where})" for f in ("num_heads", "num_kv_heads") if f in said)
        raise CheckpointError(f"{text} does not divide {q_rows.where} and {k_rows.where}; correct the configuration")
    if q_rows.value % dim or k_rows.value % dim:
        if "head_dim" not in said:
            raise need("head_dim", f"not told by the checkpoint, and {dim} does not divide {q_rows.where}")
        raise CheckpointError(
            f"head_dim = {dim} ({said['head_dim'].where}) does not divide {q_rows.where} and {k_rows.where}"
        )
    split = {"num_heads": q_rows.value // dim, "num_kv_heads": k_rows.value // dim, "head_dim": dim}
    rows = {"num_heads": q_rows, "num_kv_heads": k_rows, "head_dim": k_rows}
    for field, value in split.items():
        if field in said and said[field].value != value:
            raise CheckpointError(
                f"{field}: {said[field].where} says {said[field].value}; {rows[field].where} with head_dim {dim} "
                f"gives {value}. Correct the configuration, or pass config_overrides"
            )
    return split
