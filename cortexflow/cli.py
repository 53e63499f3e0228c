"""The command line: inspect a checkpoint, compile it, run it, read its IR and what each pass did to it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

import cortexflow
from cortexflow.checkpoints import Checkpoint, match, open_checkpoint
from cortexflow.codegen import TARGETS, find_target
from cortexflow.compiler import DTYPES, Compiled
from cortexflow.errors import CheckpointError, ConfigError, CortexFlowError, InputError
from cortexflow.ir import Func, Module, Type, clone, dump
from cortexflow.ir.cost import func_cost
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.models import Signature, VLAModelType, create_model
from cortexflow.observation import (
    Frontend,
    camera_names,
    directory,
    find_camera,
    find_processing,
    load_frontend,
    model_inputs,
    robot_actions,
)
from cortexflow.passes import Step, run_passes
from cortexflow.passes.dce import dce
from cortexflow.passes.pipeline import pipeline
from cortexflow.processing import load_stats, load_tokenizer

FAMILIES = {"pi0": "π0", "pi05": "π0.5"}
FORMATS = {"lerobot": "LeRobot", "openpi": "openpi (PyTorch)", "realtime-vla": "realtime-vla"}
PROMPT = "pick up the red cube and put it on the plate"

DESCRIPTION = """\
CortexFlow compiles Vision-Language-Action policies. CHECKPOINT is a directory of LeRobot or openpi
(PyTorch), a .safetensors file, or a .pt file of realtime-vla."""
EPILOG = """\
examples:
  cortexflow inspect checkpoints/pi05
  cortexflow run checkpoints/pi05 --image base=base.png --image wrist=wrist.png \\
      --prompt "pick up the red cube" --state 0.1,0.2,0.3
  cortexflow compile checkpoints/pi05 --target onnx -o build/
  cortexflow dump checkpoints/pi05 --after fuse --stage transformer_decoder
  cortexflow diff checkpoints/pi05 hoist fuse

`cortexflow COMMAND --help` says more. The exit code is 0, 2 for an error that is explained, 130 for Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
    return guarded(lambda: args.run(args))


def guarded(run: Callable[[], int]) -> int:
    """The exit code of a command; errors that explain themselves are printed without a traceback."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except CortexFlowError as error:
        print(f"cortexflow: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `cortexflow dump ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        print(f"cortexflow: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cortexflow: interrupted", file=sys.stderr)
        return 130


# ---- arguments -------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cortexflow", description=DESCRIPTION, epilog=EPILOG, formatter_class=shape)
    parser.add_argument("--version", action="version", version=f"cortexflow {cortexflow.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], does: str, example: str) -> Any:
        sub = commands.add_parser(
            name,
            help=does,
            description=f"{does[0].upper()}{does[1:]}.",
            epilog=example,
            formatter_class=shape,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        sub.add_argument("checkpoint", metavar="CHECKPOINT", help="directory or file")
        sub.add_argument("--allow-pickle", action="store_true", help="read .pkl files, which can run any code")
        sub.add_argument("--quiet", action="store_true", help="no progress on stderr")
        return sub

    sub = command(
        "inspect",
        inspect,
        "say what a checkpoint is, what fits, and how to run it (reads no weights)",
        "example:\n  cortexflow inspect checkpoints/pi05 --json",
    )
    sub.add_argument("--json", action="store_true", help="the same as JSON")
    sub = command(
        "compile",
        compile_,
        "compile a checkpoint and write the result",
        "example:\n  cortexflow compile checkpoints/pi05 --target onnx --views 2 --steps 5 -o build/",
    )
    _add_target(sub)
    _add_signature(sub, "--prompt")
    sub.add_argument("--batch", type=int, default=1, metavar="N", help="observations per call (default 1)")
    sub.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="where policy.py or .onnx goes")
    sub = command(
        "run",
        run,
        "compile a checkpoint and act on one observation",
        "examples:\n"
        "  cortexflow run checkpoints/pi05 --image base=base.png --image wrist=wrist.png \\\n"
        f'      --prompt "{PROMPT}" --state 0.1,-0.2,0.3 --save actions.npz\n'
        "  cortexflow run checkpoints/openpi --processing pi05_droid --tokenizer paligemma_tokenizer.model ...\n\n"
        "A camera left out is absent. Its name may be a part of the full one (base, wrist) or its number.",
    )
    _add_target(sub)
    _add_signature(sub)
    _add_observation(sub)
    sub.add_argument("--save", type=Path, metavar="FILE.npz", help="write the actions there")
    sub = command(
        "dump",
        dump_,
        "print the IR as a target gets it, or after a pass (reads no weights)",
        "examples:\n"
        "  cortexflow dump checkpoints/pi05 --after fuse --stage vision_encoder\n"
        "  cortexflow dump checkpoints/pi05 -o dumps/        every pass, one file each",
    )
    _add_lowering(sub)
    sub.add_argument("--after", metavar="PASS", help="input, a pass (fuse), its 2nd run (canonicalize#2), or a number")
    sub.add_argument("-o", "--output", type=Path, metavar="PATH", help="a file with --after, else a folder")
    sub = command(
        "diff",
        diff,
        "show what changed in the IR between two passes (reads no weights)",
        "examples:\n"
        "  cortexflow diff checkpoints/pi05 hoist fuse --stage transformer_decoder\n"
        "  cortexflow diff checkpoints/pi05 canonicalize#1 canonicalize#2\n\n"
        "A name without a number is the last run of that pass. Values keep their names from the first listing\n"
        "wherever they are the same; new ones are called %new1, %new2, ...",
    )
    sub.add_argument("first", metavar="PASS_A", help="as --after of dump")
    sub.add_argument("second", metavar="PASS_B", help="as --after of dump")
    _add_lowering(sub)
    return parser


def _add_target(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--target", default="torch", metavar="NAME", help=f"{', '.join(TARGETS)} (default torch)")
    sub.add_argument("--dtype", default="float32", help="of the large products: float32, bfloat16, float16")
    sub.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N")


def _add_signature(sub: argparse.ArgumentParser, *names: str) -> None:
    sub.add_argument("--views", type=int, metavar="N", help="camera views (default: the checkpoint's)")
    sub.add_argument(
        *names, "--prompt-length", dest="bucket", type=int, metavar="N", help="tokens of the prompt bucket"
    )
    sub.add_argument("--chunk", type=int, metavar="N", help="actions per prediction")
    sub.add_argument("--steps", type=int, metavar="N", help="steps of the flow")


def _add_lowering(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--stage", metavar="NAME", help="one function only (vision_encoder, ...)")
    sub.add_argument("--target", default="torch", metavar="NAME", help=f"{', '.join(TARGETS)} (default torch)")
    sub.add_argument("--dtype", default="float32", help="of the large products: float32, bfloat16, float16")
    _add_signature(sub, "--prompt")
    sub.add_argument("--batch", type=int, default=1, metavar="N", help="observations per call (default 1)")


def _add_observation(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--image", action="append", default=[], metavar="CAMERA=FILE", help="a picture; once per camera")
    sub.add_argument("--prompt", required=True, metavar="TEXT", help="the instruction")
    sub.add_argument("--state", metavar="X,Y,...", help="the robot's state, in its units")
    add_frontend(sub)


def add_frontend(sub: argparse.ArgumentParser) -> None:
    """Arguments for what a checkpoint's directory may not tell."""
    sub.add_argument("--processing", metavar="NAME", help="the robot's preset (LeRobot checkpoints tell their own)")
    sub.add_argument("--tokenizer", metavar="PATH", help="sentencepiece model (default: in the checkpoint's directory)")
    sub.add_argument(
        "--stats", metavar="PATH", help="normalisation statistics (default: in the checkpoint's directory)"
    )
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default 0)")


def _joined(argv: Sequence[str]) -> list[str]:
    """A state may begin with a minus, which argparse would take for an option."""
    found: list[str] = []
    for word in argv:
        if found and found[-1] == "--state":
            found[-1] = f"--state={word}"
        else:
            found.append(word)
    return found


def numbers(text: str | None, name: str = "--state") -> list[float] | None:
    """Numbers between commas or blanks."""
    if text is None:
        return None
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"{name}: expected numbers between commas, found {text!r}") from None


def _images(given: list[str]) -> dict[str, str]:
    images: dict[str, str] = {}
    for text in given:
        name, separator, file = text.partition("=")
        if not (separator and name and file):
            raise InputError(f"--image: expected CAMERA=FILE (base=base.png), found {text!r}")
        if name in images:
            raise InputError(f"--image: {name!r} is given twice")
        images[name] = file
    return images


def _signature(args: argparse.Namespace, checkpoint: Checkpoint) -> Signature:
    return Signature.of(
        checkpoint.config,
        batch=getattr(args, "batch", 1),
        views=args.views,
        prompt=args.bucket,
        chunk=args.chunk,
        steps=args.steps,
    )


def _open(args: argparse.Namespace) -> Checkpoint:
    return open_checkpoint(args.checkpoint, allow_pickle=args.allow_pickle)


def _compile(args: argparse.Namespace, checkpoint: Checkpoint, signature: Signature) -> Compiled:
    _say(args, f"compiling {args.checkpoint} for {args.target}")
    return cortexflow.compile(
        checkpoint,
        args.target,
        dtype=args.dtype,
        device=args.device,
        progress=not args.quiet,
        **dataclasses.asdict(signature),
    )


# ---- inspect ---------------------------------------------------------------------------------------


def inspect(args: argparse.Namespace) -> int:
    """`cortexflow inspect`: the report, and an error where the tensors do not fit the model."""
    checkpoint = _open(args)
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
                "--stats PATH": statistics["found"],
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
                "ops": sum(1 for op in block.walk() if op.name not in ("weight", "const")),
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
        size = len(next(iter(stats["state"].values())))
        actions = len(next(iter(stats["actions"].values())))
        return f"{', '.join(stats['state'])} of {size} state and {actions} action values"

    def tokenizer() -> str:
        return f"sentencepiece, {load_tokenizer(directory(checkpoint)).vocab_size:,} pieces"

    def processing() -> str:
        rules = find_processing(checkpoint, signature)
        return f"resize {rules.resize}, {rules.norm} for the state, {rules.action_norm or rules.norm} for actions"

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
    words += ["--prompt", PROMPT, "--state", ",".join(["0"] * size) or "0.1,0.2,..."]
    return " ".join([shlex.join(words), *(argument for argument, there in found.items() if not there)])


def _described(facts: Mapping[str, Any]) -> str:
    c, s = facts["config"], facts["signature"]
    heads = f"{c['num_heads']} heads of {c['head_dim']}"
    dtypes = facts["dtypes"]
    what = {
        "format": FORMATS[facts["format"]],
        "family": FAMILIES.get(facts["family"], facts["family"]),
        "stored as": ", ".join(f"{name}" if len(dtypes) == 1 else f"{name} ({n:,})" for name, n in dtypes.items()),
        "image tower": f"{c['vision_num_layers']} layers, width {c['vision_encoder_dim']}, {c['vision_num_heads']}"
        f" heads, MLP {c['vision_mlp_dim']}; {c['image_size']} px in patches of {c['patch_size']}",
        "prefix tower": f"{c['num_encoder_layers']} layers, width {c['encoder_dim']}, {heads}"
        f" ({c['num_kv_heads']} for keys), MLP {c['encoder_mlp_dim']}; vocabulary {c['vocab_size']:,}",
        "action expert": f"{c['num_decoder_layers']} layers, width {c['decoder_dim']}, {heads},"
        f" MLP {c['decoder_mlp_dim']}",
        "signature": f"{s['views']} views, {s['prompt']} prompt tokens, chunk {s['chunk']} x {c['action_dim']},"
        f" {s['steps']} flow steps",
        "cameras": ", ".join(facts["cameras"]),
    }
    parts = [heading(facts["path"]), pairs(what)]
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


# ---- compile ---------------------------------------------------------------------------------------


def compile_(args: argparse.Namespace) -> int:
    """`cortexflow compile`: artefacts in a folder, reports on stdout."""
    checkpoint = _open(args)
    compiled = _compile(args, checkpoint, _signature(args, checkpoint))
    args.output.mkdir(parents=True, exist_ok=True)
    _say(args, f"writing {args.output}")
    written, usage = WRITERS.get(compiled.target, _write_source)(compiled, args.output)
    print(heading("Passes") + "\n" + compiled.pass_report())
    print(heading("Memory") + "\n" + compiled.memory_report())
    print(heading("Cost") + "\n" + compiled.cost_report())
    print(heading("Written"))
    print(table(None, [(str(path), size_text(path.stat().st_size)) for path in written]))
    print(f"\n{usage}")
    return 0


def _write_torch(compiled: Compiled, folder: Path) -> tuple[list[Path], str]:
    """policy.py, which runs alone, and its weights."""
    source, weights = folder / "policy.py", folder / "weights.safetensors"
    policy: torch.nn.Module = compiled.executable.policy  # type: ignore[attr-defined]
    tensors = dict(zip(compiled.module.weight_types(), policy.state_dict().values(), strict=True))
    save_file(_separate(tensors), weights)
    source.write_text(compiled.source() + _torch_usage(compiled), encoding="utf-8")
    usage = f"To run it alone: python {shlex.quote(str(source))}   (its last lines show how to call it)"
    return [source, weights], usage


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the host, each in memory of its own: safetensors takes no tensors that share it."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


_TORCH_USAGE = """

# How to run it: this file needs torch, and safetensors to read the weights beside it.
#
#     from safetensors.torch import load_file
#     from policy import Policy
#
#     policy = Policy(load_file("weights.safetensors")).eval()
#     with torch.inference_mode():
#         results = policy({arguments})
#
{types}
#
# `python policy.py [device]` runs it on random inputs.

if __name__ == "__main__":
    import sys
    from pathlib import Path

    from safetensors.torch import load_file

    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    policy = Policy(load_file(Path(__file__).with_name("weights.safetensors"))).eval().to(device)
    inputs = {{
{inputs}
    }}
    with torch.inference_mode():
        for name, value in policy(**inputs).items():
            print(name, tuple(value.shape), value.dtype)
            print(value)
"""
_MEANING = {
    "images": "RGB in [-1, 1]: [batch, views, height, width, channels]",
    "image_mask": "true: this camera is there",
    "tokens": "token ids of the prompt, padded at the end",
    "token_mask": "true: this token counts",
    "state": "normalised state, padded with zeros",
    "noise": "normal noise that the flow starts from",
    "actions": "normalised actions",
}


def _torch_usage(compiled: Compiled) -> str:
    return _TORCH_USAGE.format(
        arguments=", ".join(f"{n}={n}" for n in compiled.inputs),
        types=_typed(compiled, "# "),
        inputs="\n".join(f"        {n!r}: {_random(t)}," for n, t in compiled.inputs.items()),
    )


def _typed(compiled: Compiled, mark: str) -> str:
    """Inputs and results with their types and meanings, a line each."""
    width = max(map(len, (*compiled.inputs, *compiled.outputs)))
    lines = []
    for title, values in (("Inputs", compiled.inputs), ("Results", compiled.outputs)):
        lines.append(f"{mark}{title}:")
        kinds = {n: str(t) for n, t in values.items()}
        widest = max(map(len, kinds.values()))
        lines += [f"{mark}  {n:<{width}}  {k:<{widest}}  {_MEANING.get(n, '')}".rstrip() for n, k in kinds.items()]
    return "\n".join(lines)


def _random(t: Type) -> str:
    """An expression for a harmless input of a type."""
    made = {"bool": "ones", "i32": "zeros", "i64": "zeros", "u8": "zeros"}.get(t.dtype)
    if made:
        return f"torch.{made}({t.shape}, dtype={TORCH_DTYPES[t.dtype]}, device=device)"
    return f"(torch.rand({t.shape}, device=device) * 2 - 1).to({TORCH_DTYPES[t.dtype]})"


def _write_onnx(compiled: Compiled, folder: Path) -> tuple[list[Path], str]:
    """policy.onnx, with its weights beside it where they are large."""
    written: list[Path] = compiled.executable.save(folder / "policy.onnx")  # type: ignore[attr-defined]
    names = ", ".join(f'"{n}": {n}' for n in compiled.inputs)
    usage = f"To run it alone: onnxruntime.InferenceSession({str(written[0])!r}).run(None, {{{names}}})"
    return written, f"{usage}\n\n{_typed(compiled, '')}"


def _write_source(compiled: Compiled, folder: Path) -> tuple[list[Path], str]:
    """The source of any other target."""
    path = folder / "policy.txt"
    path.write_text(compiled.source(), encoding="utf-8")
    return [path], f"Target {compiled.target!r} has no form of its own on disk: this is its source."


WRITERS: dict[str, Callable[[Compiled, Path], tuple[list[Path], str]]] = {"torch": _write_torch, "onnx": _write_onnx}


# ---- run -------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """`cortexflow run`: one observation through the whole policy."""
    images, state = _images(args.image), numbers(args.state)
    checkpoint = _open(args)
    signature = _signature(args, checkpoint)
    frontend = load_frontend(
        checkpoint, signature, processing=args.processing, tokenizer=args.tokenizer, stats=args.stats
    )
    types = create_model(checkpoint.config).build(signature).inputs
    inputs = model_inputs(frontend, types, images=images, prompt=args.prompt, state=state, seed=args.seed)
    compiled = _compile(args, checkpoint, signature)
    chunk = compiled(**inputs)
    assert isinstance(chunk, torch.Tensor)
    actions = robot_actions(frontend, chunk.cpu(), state)
    print(heading("Observation"))
    print(observed(frontend, inputs, images, args.prompt, state))
    print(heading("Actions"))
    print(action_table(actions))
    print(heading(f"Latency ({args.target}, {args.device}, median of 5)"))
    times = compiled.stage_times(5, **inputs)
    rows = [(name, f"{ms:.2f} ms") for name, ms in (*times.items(), ("sum", sum(times.values())))]
    print(table(None, rows))
    if args.save:
        path = args.save if args.save.suffix == ".npz" else args.save.with_name(args.save.name + ".npz")
        np.savez(path, actions=actions, network=chunk[0].float().cpu().numpy(), noise=inputs["noise"][0].numpy())
        print(f"\nwrote {path}: actions (the robot's units), network (normalised), noise")
    return 0


def observed(
    frontend: Frontend, inputs: Mapping[str, torch.Tensor], images: Mapping[str, str | Path], prompt: str, state: Any
) -> str:
    """Which file went to which camera, how much of the bucket the prompt fills, and the state."""
    from PIL import Image

    rows = dict.fromkeys(frontend.cameras, "absent")
    for name, file in images.items():
        with Image.open(file) as picture:
            size = f"{picture.width} x {picture.height}"
        to = f"{frontend.processing.image_size} x {frontend.processing.image_size}"
        rows[find_camera(name, frontend.cameras)] = f"{Path(file).name}, {size} to {to} with padding"
    tokens, slots = int(inputs["token_mask"].sum()), inputs["token_mask"].shape[1]
    rows["prompt"] = f"{prompt!r}, {tokens} of {slots} tokens"
    if state is not None:
        rows["state"] = ", ".join(f"{x:.4g}" for x in state)
    return pairs(rows)


# ---- dump and diff ---------------------------------------------------------------------------------


def dump_(args: argparse.Namespace) -> int:
    """`cortexflow dump`: the listing after one pass, or after every pass into a folder."""
    steps = _lowered(args)
    if args.output and args.after is None:
        _chosen(steps[-1], args.stage)  # a stage that nobody knows is an error, not an empty folder
        args.output.mkdir(parents=True, exist_ok=True)
        for number, step in enumerate(steps):
            funcs = [f for f in step.module.funcs.values() if args.stage in (None, f.name)]
            text = dump(funcs[0]) if args.stage and funcs else dump(step.module)
            if funcs:
                (args.output / f"{number:02d}_{step.name}.ir").write_text(text, encoding="utf-8")
        _say(args, f"wrote {len(steps)} listings to {args.output}")
        return 0
    step = steps[-1] if args.after is None else find_step(steps, args.after)
    text = dump(_chosen(step, args.stage) if args.stage else step.module)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


def diff(args: argparse.Namespace) -> int:
    """`cortexflow diff`: what two passes' listings differ in."""
    steps = _lowered(args)
    pair = find_step(steps, args.first), find_step(steps, args.second)
    before, after = (step.module.funcs for step in pair)
    names = [*before, *(n for n in after if n not in before)]
    if args.stage:
        if args.stage not in names:
            _chosen(pair[1], args.stage)
        names = [args.stage]
    lines: list[str] = []
    for name in names:
        old, new = (dump(funcs[name]).splitlines() if name in funcs else [] for funcs in (before, after))
        titles = (f"@{name} after {args.first}", f"@{name} after {args.second}")
        lines += difflib.unified_diff(old, renamed(old, new), *titles, lineterm="")
    if not lines:
        print(f"no difference between {args.first} and {args.second}")
    for line in lines:
        print(_coloured(line))
    return 0


def _lowered(args: argparse.Namespace) -> list[Step]:
    """The steps of the pipeline over a checkpoint's graph, from shapes alone."""
    if args.dtype not in DTYPES:
        raise ConfigError(f"dtype: expected float32, bfloat16 or float16, found {args.dtype!r}")
    target = find_target(args.target)
    checkpoint = _open(args)
    module = create_model(checkpoint.config).build(_signature(args, checkpoint), DTYPES[args.dtype])
    _say(args, f"running the passes for {args.target}")
    return run_passes(module, lambda op: op.name in target.claims, pipeline(target.layouts))[1]


def find_step(steps: list[Step], name: str) -> Step:
    """A step by its pass's name (the last run of it), by `name#k` (the k-th run), or by its number."""
    stem, _, count = name.partition("#")
    named = [step for step in steps if step.name == stem]
    if name.isdecimal() and int(name) < len(steps):
        return steps[int(name)]
    if named and not count:
        return named[-1]
    if named and count.isdecimal() and 1 <= int(count) <= len(named):
        return named[int(count) - 1]
    runs = Counter(step.name for step in steps)
    known = ", ".join(n if k == 1 else f"{n}#1 to {n}#{k}" for n, k in runs.items())
    raise ConfigError(f"no pass is {name!r}; there are {known}, and numbers from 0 to {len(steps) - 1}")


def _chosen(step: Step, stage: str | None) -> Func:
    funcs = step.module.funcs
    if stage is not None and stage not in funcs:
        raise ConfigError(f"stage: expected one of {', '.join(funcs)}, found {stage!r} (after {step.name})")
    return funcs[stage or next(iter(funcs))]


_VALUE = re.compile(r"%([\w.\-]+)")
_COUNTED = re.compile(r"%((?:[A-Za-z][\w.\-]*_)?)\d+(?![\w.\-])")  # %12, and %gate_12: printing gave the number


def renamed(old: list[str], new: list[str]) -> list[str]:
    """`new` with the numbers of `old` wherever a value is the same, so that a diff shows changes and not numbers.

    Lines that differ in numbers alone are aligned first. Where lines were replaced, a new value takes the
    name of an old one of the same type and source note; others are called %new1, %new2, ...
    """
    blank, blank_new = ([_COUNTED.sub(r"%\1", line) for line in lines] for lines in (old, new))
    names: dict[str, str] = {}
    taken: set[str] = set()

    def pair(a: str, b: str) -> None:
        for x, y in zip(_defined(a), _defined(b), strict=False):
            if y not in names and x not in taken:
                names[y] = x
                taken.add(x)

    for kind, i, i_end, j, j_end in difflib.SequenceMatcher(None, blank, blank_new, autojunk=False).get_opcodes():
        if kind == "equal":
            for a, b in zip(old[i:i_end], new[j:j_end], strict=True):
                pair(a, b)
        elif kind == "replace":
            free = old[i:i_end]
            for b in reversed(new[j:j_end]):
                alike = [a for a in free if _tail(a) == _tail(b)]
                if alike:
                    free.remove(alike[-1])
                    pair(alike[-1], b)
    for y in (y for line in new for y in _defined(line)):
        if y not in names:
            own = not y.isdecimal() and y not in taken
            names[y] = y if own else f"new{sum(name.startswith('new') for name in names.values()) + 1}"
    return [_VALUE.sub(lambda m: "%" + names.get(m[1], m[1]), line) for line in new]


def _defined(line: str) -> list[str]:
    """Names that a line defines: results, and arguments of a function or of a loop's body."""
    if line.startswith("func "):
        return _VALUE.findall(line)
    results = line.split(" = ", 1)[0] if " = " in line else ""
    body = line.split(" do (", 1)[1] if " do (" in line else ""
    return _VALUE.findall(results) + _VALUE.findall(body)


def _tail(line: str) -> str:
    """Result type and source note of a line."""
    return line.rsplit(" : ", 1)[-1]


def _coloured(line: str) -> str:
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return line
    colour = {"+": "32", "-": "31", "@": "36"}.get(line[:1])
    return f"\033[{colour}m{line}\033[0m" if colour else line


# ---- words and tables ------------------------------------------------------------------------------


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(f"cortexflow: {text}", file=sys.stderr)


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
