"""`cortexflow bench`: the same observation through each backend, with the time, the memory and how far they agree."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import cortexflow
from cortexflow.checkpoints import Checkpoint
from cortexflow.cli.arguments import opened, say, signature_of
from cortexflow.cli.text import heading, size_text, table
from cortexflow.codegen import TARGETS
from cortexflow.compiled import Compiled
from cortexflow.errors import ConfigError, CortexFlowError
from cortexflow.ir import Type
from cortexflow.models import Signature, create_model
from cortexflow.observation import network_actions

DTYPES = ("float32", "bfloat16", "float16")
HALF_ONLY = {"triton": "bfloat16"}  # backends that float32 does not suit, and what they get where nothing is said


def execute(args: argparse.Namespace) -> int:
    """The table; 2 where no backend ran."""
    names = list(TARGETS) if args.backend == "all" else [args.backend]
    if unknown := [name for name in names if name not in TARGETS]:
        raise ConfigError(f"--backend: expected all, {', '.join(TARGETS)}, found {unknown[0]!r}")
    if args.dtype not in (None, *DTYPES):
        raise ConfigError(f"--dtype: expected float32, bfloat16 or float16, found {args.dtype!r}")
    if args.runs < 1:
        raise ConfigError(f"--runs: expected a positive number, found {args.runs}")
    checkpoint = opened(args)
    signature = signature_of(args, checkpoint)
    inputs = observation(create_model(checkpoint.config).build(signature).inputs, checkpoint, args.seed)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = measured(args, checkpoint, signature, inputs, names, device)
    facts = {"path": str(checkpoint.path), "device": device, "runs": args.runs, "rows": rows}
    print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else _described(facts))
    return 0 if any(row["ran"] for row in rows[-len(names) :]) else 2  # a reference that nobody asked for is in front


def observation(types: Mapping[str, Type], checkpoint: Checkpoint, seed: int) -> dict[str, Tensor]:
    """Random inputs of a policy: every camera there, every slot of the prompt taken."""
    generator = torch.Generator().manual_seed(seed)
    most = checkpoint.fixed_prompt or checkpoint.config.vocab_size
    made: dict[str, Tensor] = {}
    for name, t in types.items():
        if t.dtype == "bool":
            made[name] = torch.ones(t.shape, dtype=torch.bool)
        elif t.dtype.startswith("i"):
            made[name] = torch.randint(0, most, t.shape, generator=generator, dtype=torch.int32)
        elif name == "noise":
            made[name] = torch.randn(t.shape, generator=generator)
        else:
            made[name] = torch.rand(t.shape, generator=generator) * 2 - 1
    return made


def measured(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    signature: Signature,
    inputs: Mapping[str, Tensor],
    names: list[str],
    device: str,
) -> list[dict[str, Any]]:
    """A row for each backend, compared with the first of them that float32 suits, in float32."""
    jobs = [(name, args.dtype or HALF_ONLY.get(name, "float32"), args.runs) for name in names]
    full = next((name for name in names if name not in HALF_ONLY), "torch")
    if (full, "float32") not in [job[:2] for job in jobs]:
        jobs.insert(0, (full, "float32", 1))
    rows: list[dict[str, Any]] = []
    chunks: list[Tensor | None] = []
    for name, dtype, runs in jobs:
        row, chunk = _measure(args, checkpoint, signature, inputs, (name, dtype, device, runs))
        rows.append(row)
        chunks.append(chunk)
    full_rows = (c for row, c in zip(rows, chunks, strict=True) if row["dtype"] == "float32" and c is not None)
    reference = next(full_rows, None)
    for row, chunk in zip(rows, chunks, strict=True):
        if chunk is not None and reference is not None:
            row |= {"difference": float((chunk - reference).abs().max()), "cosine": _cosine(chunk, reference)}
    return rows


def _measure(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    signature: Signature,
    inputs: Mapping[str, Tensor],
    job: tuple[str, str, str, int],
) -> tuple[dict[str, Any], Tensor | None]:
    """Compile, act, measure; a backend that cannot says why."""
    name, dtype, device, runs = job
    row: dict[str, Any] = {"backend": name, "dtype": dtype, "device": device, "ran": False, "reason": None}
    row |= dict.fromkeys(
        ("runs", "median_ms", "p99_ms", "compile_s", "weights_bytes", "arena_bytes", "difference", "cosine")
    )
    say(args, f"compiling for {name} in {dtype}")
    try:
        start = time.perf_counter()
        policy = cortexflow.compile(
            checkpoint,
            name,
            dtype=dtype,
            device=device,
            batch=signature.batch,
            views=signature.views,
            prompt=signature.prompt,
            chunk=signature.chunk,
            steps=signature.steps,
            progress=not args.quiet,
        )
        seconds = time.perf_counter() - start
        given = {n: x.to(device) for n, x in inputs.items()}
        chunk = network_actions(policy(**given))  # warms up, too
        times = _times(policy, given, name, runs, not args.quiet)
    except (CortexFlowError, torch.OutOfMemoryError) as error:
        return row | {"reason": str(error).strip()}, None
    row |= {"ran": True, "runs": runs, "compile_s": seconds, "median_ms": times[len(times) // 2]}
    row |= {"p99_ms": times[-(-99 * len(times) // 100) - 1]}  # nearest rank: the largest of fewer than 100
    row |= {"weights_bytes": policy.weight_bytes, "arena_bytes": policy.plan.peak}
    return row, chunk.detach().float().cpu()


def _times(policy: Compiled, inputs: Mapping[str, Tensor], name: str, runs: int, progress: bool) -> list[float]:
    """Milliseconds of whole predictions, in rising order."""
    found = []
    for _ in tqdm(range(runs), desc=f"running {name}", unit="run", delay=1.0, leave=False, disable=not progress):
        start = time.perf_counter()
        result = network_actions(policy(**inputs))
        if result.is_cuda:
            torch.cuda.synchronize(result.device)
        found.append((time.perf_counter() - start) * 1e3)
    return sorted(found)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def _described(facts: Mapping[str, Any]) -> str:
    header = ("", "median", "p99", "weights", "arena", "to compile", "difference", "cosine")
    ran = [row for row in facts["rows"] if row["ran"]]
    rows = [
        (
            f"{r['backend']} {r['dtype']}",
            f"{r['median_ms']:.2f} ms",
            f"{r['p99_ms']:.2f} ms",
            size_text(r["weights_bytes"]),
            size_text(r["arena_bytes"]),
            f"{r['compile_s']:.2f} s",
            "-" if r["difference"] is None else f"{r['difference']:.1e}",
            "-" if r["cosine"] is None else f"{r['cosine']:.7f}",
        )
        for r in ran
    ]
    parts = [heading(f"{facts['path']} on {facts['device']}, {facts['runs']} runs")]
    parts += [table(header, rows)] if rows else []
    parts += [f"{r['backend']} {r['dtype']}: cannot run here: {r['reason']}" for r in facts["rows"] if not r["ran"]]
    if first := next((r for r in ran if r["dtype"] == "float32"), None):
        parts += [f"\ndifference: the largest of the normalised actions to {first['backend']} in float32"]
    return "\n".join(parts).strip()
