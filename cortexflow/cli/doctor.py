"""`cortexflow doctor`: can this checkpoint run on this machine, and if not, why: tensors, values, backends, memory."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import torch
from tqdm import tqdm

from cortexflow.checkpoints import Checkpoint, count_nonfinite
from cortexflow.cli.arguments import opened
from cortexflow.cli.inspect import describe, dimensions
from cortexflow.cli.text import heading, pairs, size_text, table
from cortexflow.codegen import find_target
from cortexflow.compiler import lower
from cortexflow.errors import CheckpointError, CortexFlowError
from cortexflow.models import Signature, VLAModel, create_model
from cortexflow.observation import directory, family_of
from cortexflow.processing import PROCESSINGS, load_stats, stats_file, suits
from cortexflow.processing.stats_lerobot import PREPROCESSOR
from cortexflow.processing.tokenizer import FILE_NAMES
from cortexflow.weights import stages_of

PARTS = {  # of the report → groups of a checkpoint
    "vision": ("vision", "projector"),
    "prefix tower": ("embedding", "encoder"),
    "action expert": ("decoder",),
    "heads": ("action",),
}
CAPABILITY = (8, 0)  # the first cards with bfloat16 products
SHOWN = 8  # names of a list before it is cut


def execute(args: argparse.Namespace) -> int:
    """The report; 2 where the checkpoint cannot run here."""
    facts = examine(args)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else _described(facts))
    return 0 if facts["ok"] else 2


def examine(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the report says, by stable keys; `problems` are the reasons why it is not `ok`."""
    try:
        checkpoint = opened(args)
        known, misfit = describe(checkpoint)
    except CortexFlowError as error:
        return {"path": str(args.checkpoint), "ok": False, "problems": [str(error)]}
    signature = Signature(**known["signature"])
    model = create_model(checkpoint.config)
    values = _scan(checkpoint, args.quick, not args.quiet)
    backends = _backends(model, signature, not args.quiet)
    fast = backends["triton"]["available"]
    problems = [str(misfit)] if misfit else []
    problems += values["problems"]
    if not any(backend["available"] for backend in backends.values()):
        problems.append("no backend can run on this machine: see what each of them needs")
    sizes = {name: {"parameters": 0, "bytes": 0} for name in (*PARTS, "total")}
    for group, size in known["groups"].items():
        part = next((name for name, groups in PARTS.items() if group in groups), "total")
        for key, number in size.items():
            sizes[part][key] += number
    statistics = known["statistics"] | _statistics(checkpoint, known["statistics"]["found"])
    around = {"statistics": statistics, "tokenizer": known["tokenizer"], "processing": known["processing"]}
    around["tokenizer"] |= {"file": _file(checkpoint, FILE_NAMES) if known["tokenizer"]["found"] else None}
    return {
        "path": known["path"],
        "ok": not problems,
        "problems": problems,
        "needs": [name for name, found in around.items() if not found["found"]],
        **{key: known[key] for key in ("format", "family", "config", "signature", "dtypes", "cameras")},
        "parameters": sizes,
        "values": values,
        "tensors": {key: known[key] for key in ("fits", "missing", "unknown", "misshapen", "never_read")}
        | {"without_effect": _without_effect(checkpoint, model, signature)},
        **around,
        "presets": _presets(checkpoint, statistics),
        "backends": backends,
        "notes": known["notes"],
        "command": known["command"] + (" --target triton --device cuda --dtype bfloat16" if fast else ""),
    }


# ---- the checkpoint --------------------------------------------------------------------------------


def _scan(checkpoint: Checkpoint, quick: bool, progress: bool) -> dict[str, Any]:
    """NaN and infinity by tensor, read one tensor at a time; what cannot be read is a problem too."""
    found: dict[str, Any] = {"checked": not quick, "tensors": 0, "nan": {}, "inf": {}, "problems": []}
    if quick:
        return found
    total = checkpoint.sizes()["total"].nbytes
    bar = tqdm(total=total, desc="checking values", unit="B", unit_scale=True, delay=1.0, disable=not progress)
    with bar:
        for name, tensor in checkpoint.tensors.items():
            try:
                nan, inf = count_nonfinite(tensor.load())
            except CheckpointError as error:
                found["problems"].append(f"{name}: {error}")
                if len(found["problems"]) == SHOWN:
                    break
                continue
            found["tensors"] += 1
            found["nan"] |= {name: nan} if nan else {}
            found["inf"] |= {name: inf} if inf else {}
            bar.update(tensor.nbytes)
    if bad := [*dict.fromkeys((*found["nan"], *found["inf"]))]:
        found["problems"].append(
            f"{len(bad)} tensors hold NaN or infinity: {_shortened(bad)}. The training diverged or the file is damaged"
        )
    return found


def _without_effect(checkpoint: Checkpoint, model: VLAModel, signature: Signature) -> list[str]:
    """Tensors that belong to the model and that no action depends on."""
    read = lower(model, signature)[0].weight_types()
    expected = model.get_weight_shapes()
    return [name for name in checkpoint.tensors if name in expected and name not in read]


def _file(checkpoint: Checkpoint, names: tuple[str, ...]) -> str | None:
    """The first of some files that the directory has; a name may be a pattern."""
    if checkpoint.path is None:
        return None
    files = (file for name in names for file in sorted(directory(checkpoint).glob(name)))
    return next((str(file) for file in files if file.is_file()), None)


def _statistics(checkpoint: Checkpoint, found: bool) -> dict[str, Any]:
    """The file that `load_stats` reads, and the length of each vector."""
    if not found:
        return {"file": None, "lengths": {}}
    lengths = {
        group: {name: len(vector) for name, vector in vectors.items()}
        for group, vectors in load_stats(directory(checkpoint)).items()
    }
    file = stats_file(directory(checkpoint))
    return {"file": str(file / PREPROCESSOR if file.is_dir() else file), "lengths": lengths}


def _presets(checkpoint: Checkpoint, statistics: Mapping[str, Any]) -> list[str]:
    """Names for --processing of this family whose actions the network and the statistics are long enough for."""
    family = family_of(checkpoint)
    length = min([checkpoint.config.action_dim, *statistics["lengths"].get("actions", {}).values()])
    return [
        name
        for name, rules in PROCESSINGS.items()
        if suits(rules, family)
        and (checkpoint.format == "lerobot" or not name.startswith("lerobot"))
        and (rules.output_dim or 1) <= length
    ]


# ---- the machine -----------------------------------------------------------------------------------


def _need(what: str, there: bool, detail: str) -> dict[str, Any]:
    return {"what": what, "there": there, "detail": detail}


def _package(name: str, *distributions: str) -> dict[str, Any]:
    for distribution in distributions or (name,):
        try:
            return _need(name, True, metadata.version(distribution))
        except metadata.PackageNotFoundError:
            continue
    return _need(name, False, f"pip install {name}")


def _gpu() -> dict[str, Any]:
    wanted = f"an NVIDIA GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer"
    if not torch.cuda.is_available():
        return _need(wanted, False, f"PyTorch {torch.__version__} finds none")
    capability = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()}, {capability[0]}.{capability[1]}"
    memory = size_text(torch.cuda.get_device_properties(0).total_memory)
    return _need(wanted, capability >= CAPABILITY, f"{name}, {memory}")


def _torch() -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    devices = f"{torch.__version__}, on {'cpu and cuda' if torch.cuda.is_available() else 'cpu'}"
    return [_need("torch", True, devices)], ("float32", "bfloat16", "float16")


def _onnx() -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    needs = [_package("onnx"), _package("onnxruntime", "onnxruntime-gpu", "onnxruntime")]
    providers: list[str] = []
    try:
        import onnxruntime

        providers = onnxruntime.get_available_providers()
        needs[1]["detail"] = onnxruntime.__version__
    except ImportError as error:
        needs[1] |= {"there": False, "detail": str(error)}
    if not torch.cuda.is_available():  # the GPU package offers them on any machine
        providers = [name for name in providers if not name.startswith(("CUDA", "Tensorrt"))]
    cuda = "CUDAExecutionProvider" in providers
    needs.append(_need("an execution provider", bool(providers), ", ".join(providers) or "none"))
    return needs, ("float32", *(("bfloat16",) if cuda else ()), "float16")


def _triton() -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    linux = platform.system() == "Linux"
    system = _need("Linux", linux, platform.system())
    return [system, _package("triton"), _gpu()], ("bfloat16", "float16")


BACKENDS: dict[str, Callable[[], tuple[list[dict[str, Any]], tuple[str, ...]]]] = {
    "torch": _torch,
    "onnx": _onnx,
    "triton": _triton,
}


def _backends(model: VLAModel, signature: Signature, progress: bool) -> dict[str, Any]:
    """By backend: what it needs and whether that is there, and the memory that it will take by dtype."""
    found: dict[str, Any] = {}
    jobs: dict[tuple[str, int], list[str]] = {}  # dtypes of one size take the same bytes: planned once
    for name, look in BACKENDS.items():
        needs, dtypes = look()
        found[name] = {"available": all(need["there"] for need in needs), "needs": needs, "memory": {}}
        for dtype in dtypes:
            jobs.setdefault((name, getattr(torch, dtype).itemsize), []).append(dtype)
    bar = tqdm(jobs.items(), desc="planning memory", unit="plan", delay=1.0, leave=False, disable=not progress)
    for (name, _), dtypes_of_a_size in bar:
        if planned := _planned(model, signature, name, dtypes_of_a_size[0]):
            found[name]["memory"] |= dict.fromkeys(dtypes_of_a_size, planned)
    return found


def _planned(model: VLAModel, signature: Signature, name: str, dtype: str) -> dict[str, int] | None:
    """Bytes of the prepared weights and of the planned arena; None where the target's library is absent."""
    try:
        target = find_target(name)
    except CortexFlowError:
        return None
    stages = stages_of(lower(model, signature, dtype, target)[0])
    weights, arena = sum(t.nbytes for t in stages.weight_types().values()), target.plan(stages, frozenset()).peak
    return {"weights": weights, "arena": arena, "total": weights + arena}


# ---- in words --------------------------------------------------------------------------------------


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _described(facts: Mapping[str, Any]) -> str:
    if "format" not in facts:
        return f"{heading(facts['path'])}\nIt cannot be read:\n{facts['problems'][0]}".strip()
    parts = [heading(facts["path"]), pairs(dimensions(facts))]
    rows = [(name, f"{s['parameters']:,}", size_text(s["bytes"])) for name, s in facts["parameters"].items()]
    parts += [heading("Parameters"), table(("", "parameters", "on disk"), rows)]
    parts += [heading("Tensors"), *_tensors(facts)]
    parts += [f"note: {note}" for note in facts["notes"]]
    parts += [heading("Around the network"), pairs(_around(facts))]
    parts += [heading("Backends on this machine")]
    for name, backend in facts["backends"].items():
        parts.append(f"{name}: {'can run' if backend['available'] else 'cannot run here'}")
        parts += [f"  {'there' if n['there'] else 'NOT there'}: {n['what']} ({n['detail']})" for n in backend["needs"]]
    memory = [
        (f"{name} {dtype}", *(size_text(m[k]) for k in ("weights", "arena", "total")))
        for name, backend in facts["backends"].items()
        for dtype, m in backend["memory"].items()
    ]
    parts += [heading("Expected memory"), table(("", "weights", "arena", "together"), memory)]
    parts += ["onnxruntime's CPU provider packs a second copy of the weights"]
    if facts["ok"]:
        needs = f" It takes from you: {', '.join(facts['needs'])}." if facts["needs"] else ""
        parts += [heading("It can run"), f"{facts['command']}\n{needs}".rstrip()]
    else:
        parts += [heading("It cannot run"), *(f"* {problem}" for problem in facts["problems"])]
    return "\n".join(parts).strip()


def _tensors(facts: Mapping[str, Any]) -> list[str]:
    t, values = facts["tensors"], facts["values"]
    lines = ["every tensor that the model needs is there, in the right shape"] if t["fits"] else []
    lines += [f"{len(t[k])} {k}: {_shortened(t[k])}" for k in ("missing", "unknown", "misshapen") if t[k]]
    by_reason: dict[str, list[str]] = {}
    for name, reason in t["never_read"].items():
        by_reason.setdefault(reason, []).append(name)
    lines += [f"unused: {_shortened(names)} ({reason})" for reason, names in by_reason.items()]
    if t["without_effect"]:
        lines.append(f"{len(t['without_effect'])} have no effect on actions, such as {t['without_effect'][0]}")
    if values["checked"]:
        clean = not (values["nan"] or values["inf"])
        lines.append(f"{values['tensors']} read, {'every value finite' if clean else 'NaN or infinity among them'}")
        for kind in ("nan", "inf"):
            lines += [f"  {count} {kind} in {name}" for name, count in list(values[kind].items())[:SHOWN]]
    else:
        lines.append("values not checked (--quick)")
    return lines


def _around(facts: Mapping[str, Any]) -> dict[str, str]:
    rows = {}
    for name in ("statistics", "tokenizer", "processing"):
        found = facts[name]
        where = f" ({found['file']})" if found.get("file") else ""
        detail = found["detail"].removeprefix(f"{name}: ").removeprefix("statistics: ")
        rows[name] = f"{detail}{where}" if found["found"] else f"not found: {detail}"
    return rows | {"presets that fit": ", ".join(facts["presets"]) or "none"}
