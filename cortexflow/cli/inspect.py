"""`cortexflow inspect`: what a checkpoint is, what fits, and how to run it, without reading weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from cortexflow.checkpoints import Checkpoint, match
from cortexflow.cli.arguments import PROMPT, opened
from cortexflow.cli.text import FAMILIES, FORMATS, heading, pairs, size_text, table
from cortexflow.errors import CheckpointError, CortexFlowError
from cortexflow.ir import Module, clone
from cortexflow.ir.core import SOURCES
from cortexflow.ir.cost import func_cost
from cortexflow.models import Signature, VLAModelType, create_model
from cortexflow.observation import camera_names, directory, find_processing, reads_state, several_statistics
from cortexflow.passes.dce import dce
from cortexflow.processing import load_stats, load_tokenizer


def execute(args: argparse.Namespace) -> int:
    """The report, and an error where the tensors do not fit the model."""
    checkpoint = opened(args)
    facts, misfit = describe(checkpoint)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else _described(facts))
    if misfit:
        raise misfit
    return 0


def describe(checkpoint: Checkpoint) -> tuple[dict[str, Any], CheckpointError | None]:
    """What there is to know of a checkpoint without reading weights, and the error where it does not fit."""
    config, signature = checkpoint.config, Signature.of(checkpoint.config)
    module = create_model(config).build(signature)
    expected = {key: t.shape for key, t in module.weight_types().items()}
    misfit: CheckpointError | None = None
    try:
        match(checkpoint, expected)
    except CheckpointError as error:
        misfit = error
    tensors, dtypes = checkpoint.tensors, Counter[str]()
    for tensor in tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    statistics, tokenizer, processing, size = _surroundings(checkpoint, signature)
    facts = {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "family": VLAModelType(config.model_type).value,
        "dtypes": dict(dtypes.most_common()),
        "config": fields | {"model_type": VLAModelType(config.model_type).value},
        "signature": dataclasses.asdict(signature),
        "cameras": list(camera_names(checkpoint, signature.views)),
        "stages": _stages(module, checkpoint),
        "groups": {n: {"parameters": s.params, "bytes": s.nbytes} for n, s in checkpoint.sizes().items()},
        "fits": misfit is None,
        "missing": [n for n in expected if n not in tensors],
        "unknown": [n for n in tensors if n not in expected],
        "misshapen": [n for n in expected if n in tensors and tensors[n].shape != expected[n]],
        "never_read": checkpoint.skipped,
        "notes": checkpoint.notes,
        "statistics": statistics,
        "tokenizer": tokenizer,
        "processing": processing,
        "command": _run_command(
            checkpoint,
            signature,
            size,
            {
                "--processing NAME": processing["found"],
                "--asset ID" if several_statistics(checkpoint) else "--stats PATH": statistics["found"],
                "--tokenizer PATH": tokenizer["found"],
            },
        ),
    }
    return facts, misfit


def _stages(module: Module, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """A row for each stage: parameters that it names, and the work that is left without dead code."""
    live = clone(module)
    dce(live)
    rows = []
    for stage in module.stages:
        keys = {op.attrs["key"] for op in stage.block.walk() if op.name == "weight"}
        stored = [checkpoint.tensors[key] for key in keys if key in checkpoint.tensors]
        block = live.funcs[stage.name].block
        rows.append(
            {
                "name": stage.name,
                "ops": sum(1 for op in block.walk() if op.name not in SOURCES),
                "parameters": sum(t.numel for t in stored),
                "bytes": sum(t.nbytes for t in stored),
                "flops": func_cost(live.funcs[stage.name]).flops,
            }
        )
    return rows


def _surroundings(
    checkpoint: Checkpoint, signature: Signature
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]:
    """Statistics, tokenizer and processing: found or not, with the details; and the length of the state."""
    size = 0

    def statistics() -> str:
        nonlocal size
        stats = load_stats(directory(checkpoint))
        size = len(next(iter(stats["state"].values()), ()))
        actions = len(next(iter(stats["actions"].values())))
        state = f"{size} state and " if size else ""
        return f"{', '.join(stats['actions'])} of {state}{actions} action values"

    def tokenizer() -> str:
        if checkpoint.fixed_prompt:
            return f"none is needed: the file holds one prompt, of {checkpoint.fixed_prompt} tokens"
        return f"{load_tokenizer(directory(checkpoint)).vocab_size:,} pieces"

    def processing() -> str:
        rules = find_processing(checkpoint, signature)
        state = f"{rules.norm} for the state, " if reads_state(checkpoint) else ""
        return f"resize {rules.resize}, {state}{rules.action_norm or rules.norm} for actions"

    return _found(statistics), _found(tokenizer), _found(processing), size


def _found(look: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"found": True, "detail": look()}
    except CortexFlowError as error:
        return {"found": False, "detail": str(error)}


def _run_command(checkpoint: Checkpoint, signature: Signature, size: int, found: Mapping[str, bool]) -> str:
    """The command to run a checkpoint, with arguments for what was not found in its directory."""
    words = ["cortexflow", "run", str(checkpoint.path)]
    for camera in camera_names(checkpoint, signature.views):
        words += ["--image", f"{camera}={camera}.png"]
    words += [] if checkpoint.fixed_prompt else ["--prompt", PROMPT]
    if reads_state(checkpoint):
        words += ["--state", ",".join(["0"] * size) or "0.1,0.2,..."]
    return " ".join([shlex.join(words), *(argument for argument, there in found.items() if not there)])


def dimensions(facts: Mapping[str, Any]) -> dict[str, str]:
    """What a checkpoint is and how large, for two columns."""
    c, s, dtypes = facts["config"], facts["signature"], facts["dtypes"]
    rows = {
        "format": FORMATS[facts["format"]],
        "family": FAMILIES.get(facts["family"], facts["family"]),
        "stored as": ", ".join(f"{name}" if len(dtypes) == 1 else f"{name} ({n:,})" for name, n in dtypes.items()),
        "image tower": f"{c['vision_num_layers']} layers, width {c['vision_encoder_dim']}, {c['vision_num_heads']}"
        f" heads, MLP {c['vision_mlp_dim']}; {c['image_size']} px in patches of {c['patch_size']}",
    }
    rows |= _token_rows(c, s) if facts["family"] == VLAModelType.OPENVLA.value else _flow_rows(c, s)
    return rows | {"cameras": ", ".join(facts["cameras"])}


def _flow_rows(c: Mapping[str, Any], s: Mapping[str, int]) -> dict[str, str]:
    """The towers and the signature of a family whose expert follows a flow."""
    heads = f"{c['num_heads']} heads of {c['head_dim']}"
    return {
        "prefix tower": f"{c['num_encoder_layers']} layers, width {c['encoder_dim']}, {heads}"
        f" ({c['num_kv_heads']} for keys), MLP {c['encoder_mlp_dim']}; vocabulary {c['vocab_size']:,}",
        "action expert": f"{c['num_decoder_layers']} layers, width {c['decoder_dim']}, {heads},"
        f" MLP {c['decoder_mlp_dim']}",
        "signature": f"{s['views']} views, {s['prompt']} prompt tokens, chunk {s['chunk']} x {c['action_dim']},"
        f" {s['steps']} flow steps",
    }


def _token_rows(c: Mapping[str, Any], s: Mapping[str, int]) -> dict[str, str]:
    """The same of a family whose language model emits actions as tokens."""
    return {
        "DINOv2 tower": f"{c['dino_num_layers']} layers, width {c['dino_dim']}, {c['dino_num_heads']} heads,"
        f" MLP {c['dino_mlp_dim']}; {c['dino_registers']} registers",
        "language model": f"{c['num_encoder_layers']} layers, width {c['encoder_dim']}, {c['num_heads']} heads of"
        f" {c['head_dim']} ({c['num_kv_heads']} for keys), MLP {c['encoder_mlp_dim']}; vocabulary {c['vocab_size']:,}",
        "signature": f"{s['prompt']} prompt tokens, {s['chunk'] * c['action_dim']} action tokens of"
        f" {c['num_action_bins'] - 1} bins",
    }


def _described(facts: Mapping[str, Any]) -> str:
    parts = [heading(facts["path"]), pairs(dimensions(facts))]
    rows = [
        (r["name"], f"{r['ops']:,}", f"{r['parameters']:,}", size_text(r["bytes"]), f"{r['flops'] / 1e9:,.3f}")
        for r in facts["stages"]
    ]
    parts += [heading("Stages"), table(("", "ops", "parameters", "on disk", "GFLOP"), rows)]
    groups = [(n, f"{g['parameters']:,}", size_text(g["bytes"])) for n, g in facts["groups"].items()]
    parts += [heading("Parameters"), table(("", "parameters", "on disk"), groups)]
    parts += [heading("Tensors")]
    if facts["fits"]:
        parts += ["every tensor that the model needs is there, in the right shape"]
    parts += [f"{len(facts[k])} {k}" for k in ("missing", "unknown", "misshapen") if facts[k]]
    parts += [f"never read: {name} ({reason})" for name, reason in _shortened(facts["never_read"])]
    parts += [f"note: {note}" for note in facts["notes"]]
    parts += [heading("Around the network")]
    around = {n: (facts[n]["found"], facts[n]["detail"]) for n in ("statistics", "tokenizer", "processing")}
    parts += [pairs({n: d if found else f"not found: {d.removeprefix(n + ': ')}" for n, (found, d) in around.items()})]
    parts += [heading("To run it"), facts["command"]]
    return "\n".join(parts).strip()


def _shortened(skipped: Mapping[str, str], most: int = 6) -> list[tuple[str, str]]:
    """The tensors of one reason on one line."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        by_reason.setdefault(reason, []).append(name)
    lines = [(names[0] + (f" and {len(names) - 1} more" if names[1:] else ""), r) for r, names in by_reason.items()]
    return lines[:most]
