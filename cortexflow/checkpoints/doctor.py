"""The doctor: strict matching of a checkpoint to the shapes a graph expects, with the likeliest reason.

Every unknown, missing and misshapen tensor ends in one error that names it. Layers are grouped, long
lists are cut with a count, and what usually causes such a picture is said first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from cortexflow.checkpoints import config, openvla
from cortexflow.checkpoints.names import LORA, never_read, norms_family, projections_family
from cortexflow.checkpoints.tensors import LazyTensor
from cortexflow.errors import CheckpointError

if TYPE_CHECKING:
    from cortexflow.checkpoints.checkpoint import Checkpoint

Shape = tuple[int, ...]
SHOWN = 12  # lines of a list before it is cut
LAYER = re.compile(r"\.(layers|blocks)\.(\d+)\.")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
QUANTISED = re.compile(
    r"\.(weight_scale(_inv)?|input_scale|qweight|qzeros|scales|SCB|weight_format|absmax|quant_state)"
)


def ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    parts: list[list[int]] = []
    for n in sorted(set(numbers)):
        if parts and parts[-1][-1] == n - 1:
            parts[-1] = [parts[-1][0], n]
        else:
            parts.append([n])
    return ",".join("-".join(map(str, part)) for part in parts)


def group_names(names: Iterable[str]) -> list[str]:
    """Names with the repeats over layers on one line: `...layers.{0-17}.mlp.up_proj.weight (18)`."""
    groups: dict[str, list[int]] = {}
    for name in names:
        match = LAYER.search(name)
        groups.setdefault(LAYER.sub(r".\1.{}.", name, count=1), []).extend([int(match[2])] if match else [])
    return [
        pattern.replace("{}", "{" + ranges(layers) + "}", 1) + (f" ({len(layers)})" if len(layers) > 1 else "")
        if layers
        else pattern
        for pattern, layers in groups.items()
    ]


def _listed(title: str, lines: list[str], count: int) -> str:
    shown = [f"  {line}" for line in lines[:SHOWN]]
    if len(lines) > SHOWN:
        shown.append(f"  ... and {len(lines) - SHOWN} more such lines")
    return "\n".join([f"{title} ({count}):", *shown])


def _whole_layers_missing(missing: Collection[str], expected: Collection[str]) -> list[str]:
    """Stacks of which the checkpoint lacks whole layers, as text."""
    per_stack: dict[str, dict[int, int]] = {}
    lost: dict[str, dict[int, int]] = {}
    for names, table in ((expected, per_stack), (missing, lost)):
        for name in names:
            if match := LAYER.search(name):
                layers = table.setdefault(f"{name[: match.start()]}.{match[1]}", {})
                layers[int(match[2])] = layers.get(int(match[2]), 0) + 1
    lines = []
    for stack, layers in lost.items():
        if whole := [i for i, count in layers.items() if count == per_stack[stack][i]]:
            lines.append(f"{stack} {ranges(whole)}")
    return lines


def likely_reasons(
    found: Mapping[str, Shape],
    expected: Mapping[str, Shape] | None = None,
    missing: Collection[str] = (),
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> list[str]:
    """The usual causes that fit the picture, the most telling first."""
    reasons: list[str] = []
    if lora := [name for name in found if LORA.search(name)]:
        reasons.append(
            f"LoRA deltas are not merged ({len(lora)} tensors such as {lora[0]}): merge them into the base weights "
            "(PEFT's merge_and_unload, or openpi's LoRA-aware export) and save the result"
        )
    odd = [name for name, dtype in (dtypes or {}).items() if dtype not in FLOATS and not never_read(name)]
    if odd or any(QUANTISED.search(name) for name in found):
        what = f"{odd[0]} is {str((dtypes or {})[odd[0]]).removeprefix('torch.')}" if odd else "scales are stored"
        reasons.append(f"the weights are quantised ({what}): use the bfloat16 or float32 checkpoint")
    if expected is None:
        return reasons
    here = projections_family(found) or norms_family(found)
    there = projections_family(expected) or norms_family(expected)
    if here and there and here != there:
        reasons.append(f"another family: the checkpoint is {here.value}, the graph is {there.value}")
    time_here, time_there = found.get("time_mlp_in.weight"), expected.get("time_mlp_in.weight")
    if time_here and time_there and time_here[-1] == 2 * time_there[-1]:
        reasons.append(
            "another family: time_mlp_in takes action and time together, it is π0's action_time_mlp_in under "
            "π0.5's name (LeRobot renames it when a π0 file is loaded as π0.5)"
        )
    folded_here, folded_there = "folded.time_bias" in found, "folded.time_bias" in expected
    if folded_here != folded_there:
        reasons.append(
            "the checkpoint has its flow times folded in (realtime-vla's π0), the graph is built for an unfolded one"
            if folded_here
            else "the graph is built for a folded π0 checkpoint (realtime-vla's), this one is not folded"
        )
        reasons[-1] += ": build the graph from this checkpoint's config (folded_time_steps)"
    if lines := _whole_layers_missing(missing, expected):
        reasons.append(f"whole layers are absent ({'; '.join(lines)}): the file is truncated or a shard is missing")
    if not (here and there and here != there):
        reasons += _other_dimensions(found, expected)
    return reasons


def _other_dimensions(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """Configuration fields on which checkpoint and graph differ, when the shapes tell."""
    try:
        here, there = (config.measure(shapes) | openvla.measure(shapes) for shapes in (found, expected))
    except CheckpointError:
        return []
    depth = dict(config.LAYERS + openvla.LAYERS)
    lines = [
        f"{field} is {here[field].value} in the checkpoint and {there[field].value} in the graph"
        for field in here
        if field in there and here[field].value != there[field].value and field not in depth
    ]
    return [f"another configuration: {', '.join(lines)}"] if lines else []


def match(
    checkpoint: Checkpoint,
    expected: Mapping[str, Shape],
    *,
    optional: Collection[str] = (),
) -> dict[str, LazyTensor]:
    """The checkpoint's tensors for a graph's expected canonical shapes, in the graph's order.

    Strict: an unknown, a missing, a misshapen or a quantised tensor is an error, and all of them are in
    one `CheckpointError`. Names in `optional` may be absent from either side. Names that are
    known and never read (`names.NEVER_READ`) are skipped.
    """
    tensors = checkpoint.tensors
    unknown = [n for n in tensors if n not in expected and n not in optional and not never_read(n)]
    missing = [n for n in expected if n not in tensors and n not in optional]
    both = [n for n in expected if n in tensors]
    misshapen = [n for n in both if tensors[n].shape != tuple(expected[n])]
    dtypes = {n: tensors[n].dtype for n in both if tensors[n].dtype not in FLOATS}
    if not (unknown or missing or misshapen or dtypes):
        return {n: tensors[n] for n in both}
    shapes = {n: t.shape for n, t in tensors.items()}
    reasons = likely_reasons(shapes, expected, missing, dtypes)
    sections = []
    if missing:
        sections.append(_listed("missing", group_names(missing), len(missing)))
    if unknown:
        sections.append(_listed("unknown", group_names(unknown), len(unknown)))
    if misshapen:
        lines: dict[str, list[str]] = {}
        for n in misshapen:
            lines.setdefault(f": expected {list(expected[n])}, found {list(shapes[n])}", []).append(n)
        text = [name + problem for problem, names in lines.items() for name in group_names(names)]
        sections.append(_listed("misshapen", text, len(misshapen)))
    if dtypes:
        lines = {}
        for n, dtype in dtypes.items():
            lines.setdefault(f": {str(dtype).removeprefix('torch.')}", []).append(n)
        text = [name + problem for problem, names in lines.items() for name in group_names(names)]
        sections.append(_listed("of a dtype that is no float16, bfloat16, float32 or float64", text, len(dtypes)))
    count = len(unknown) + len(missing) + len(misshapen) + len(dtypes)
    where = checkpoint.path or "the dictionary"
    advice = "".join(f"\nlikely: {reason}" for reason in reasons) or (
        "\nlikely: a checkpoint of another model or version; compare the names above with those of the original"
    )
    raise CheckpointError(
        f"{where}: expected the {len(expected)} tensors of the graph; {count} do not fit this {checkpoint.format} "
        f"checkpoint of {checkpoint.family.value}.{advice}\n" + "\n".join(sections)
    )
