"""The command line: what can be asked for, and how a command ends. Each command is a module of its own here."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cortexflow
from cortexflow.cli.arguments import PROMPT, add_lowering, add_observation, add_signature, add_target
from cortexflow.codegen import TARGETS
from cortexflow.errors import CortexFlowError

DESCRIPTION = """\
CortexFlow compiles Vision-Language-Action policies. CHECKPOINT is a directory of LeRobot, openpi
(PyTorch or JAX) or OpenVLA, a .safetensors file, or a .pt file of realtime-vla."""
EPILOG = """\
examples:
  cortexflow inspect checkpoints/pi05
  cortexflow doctor checkpoints/pi05
  cortexflow bench checkpoints/pi05 --backend all
  cortexflow run checkpoints/pi05 --image base=base.png --image wrist=wrist.png \\
      --prompt "pick up the red cube" --state 0.1,0.2,0.3
  cortexflow compile checkpoints/pi05 --target onnx -o build/
  cortexflow dump checkpoints/pi05 --after fuse --stage transformer_decoder
  cortexflow diff checkpoints/pi05 hoist fuse

`cortexflow COMMAND --help` says more. The exit code is 0, 2 for an error that is explained, 130 for Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
    return guarded(lambda: _execute(args))


def _execute(args: argparse.Namespace) -> int:
    """Commands are imported when they run: `--help` needs none of them."""
    code: int = importlib.import_module(f"cortexflow.cli.{args.command}").execute(args)
    return code


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


def parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    shape = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("cortexflow", description=DESCRIPTION, epilog=EPILOG, formatter_class=shape)
    top.add_argument("--version", action="version", version=f"cortexflow {cortexflow.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, does: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=does,
            description=f"{does[0].upper()}{does[1:]}.",
            epilog=example,
            formatter_class=shape,
            allow_abbrev=False,
        )
        sub.add_argument("checkpoint", metavar="CHECKPOINT", help="directory or file")
        sub.add_argument("--allow-pickle", action="store_true", help="read .pkl files, which can run any code")
        sub.add_argument("--quiet", action="store_true", help="no progress on stderr")
        return sub

    sub = command(
        "inspect",
        "say what a checkpoint is, what fits, and how to run it (reads no weights)",
        "example:\n  cortexflow inspect checkpoints/pi05 --json",
    )
    sub.add_argument("--json", action="store_true", help="the same as JSON")
    sub = command(
        "doctor",
        "say whether a checkpoint can run on this machine, and if not, why (reads every weight)",
        "example:\n  cortexflow doctor checkpoints/pi05 --quick --json\n\n"
        "The exit code is 0 where it can run, and 2 where it cannot, with the reasons.",
    )
    sub.add_argument("--quick", action="store_true", help="do not look for NaN and infinity: reads no weights")
    sub.add_argument("--json", action="store_true", help="the same as JSON")
    sub = command(
        "compile",
        "compile a checkpoint and write the result",
        "example:\n  cortexflow compile checkpoints/pi05 --target onnx --views 2 --steps 5 -o build/",
    )
    add_target(sub)
    add_signature(sub, "--prompt")
    sub.add_argument("--batch", type=int, default=1, metavar="N", help="observations per call (default 1)")
    sub.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="where policy.py or .onnx goes")
    sub = command(
        "run",
        "compile a checkpoint and act on one observation",
        "examples:\n"
        "  cortexflow run checkpoints/pi05 --image base=base.png --image wrist=wrist.png \\\n"
        f'      --prompt "{PROMPT}" --state 0.1,-0.2,0.3 --save actions.npz\n'
        "  cortexflow run checkpoints/openpi --processing pi05_droid --tokenizer paligemma_tokenizer.model ...\n\n"
        "A camera left out is absent. Its name may be a part of the full one (base, wrist) or its number.",
    )
    add_target(sub)
    add_signature(sub)
    add_observation(sub)
    sub.add_argument("--save", type=Path, metavar="FILE.npz", help="write the actions there, and a plot beside it")
    sub = command(
        "bench",
        "measure backends against each other: latency, memory, agreement",
        "examples:\n"
        "  cortexflow bench checkpoints/pi05 --backend all\n"
        "  cortexflow bench checkpoints/pi05 --backend torch --dtype bfloat16 --device cuda --runs 100",
    )
    sub.add_argument("--backend", default="all", metavar="NAME", help=f"all (default), {', '.join(TARGETS)}")
    sub.add_argument("--runs", type=int, default=20, metavar="N", help="of each backend, after one to warm up")
    sub.add_argument("--dtype", help="float32, bfloat16, float16 (default: float32; bfloat16 for triton)")
    sub.add_argument("--device", help="cpu, cuda, cuda:N (default: cuda where there is a GPU)")
    add_signature(sub, "--prompt")
    sub.add_argument("--batch", type=int, default=1, metavar="N", help="observations per call (default 1)")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the random observation (default 0)")
    sub.add_argument("--json", action="store_true", help="the same as JSON")
    sub = command(
        "dump",
        "print the IR as a target gets it, or after a pass (reads no weights)",
        "examples:\n"
        "  cortexflow dump checkpoints/pi05 --after fuse --stage vision_encoder\n"
        "  cortexflow dump checkpoints/pi05 -o dumps/        every pass, one file each",
    )
    add_lowering(sub)
    sub.add_argument("--after", metavar="PASS", help="input, a pass (fuse), its 2nd run (canonicalize#2), or a number")
    sub.add_argument("-o", "--output", type=Path, metavar="PATH", help="a file with --after, else a folder")
    sub = command(
        "diff",
        "show what changed in the IR between two passes (reads no weights)",
        "examples:\n"
        "  cortexflow diff checkpoints/pi05 hoist fuse --stage transformer_decoder\n"
        "  cortexflow diff checkpoints/pi05 canonicalize#1 canonicalize#2\n\n"
        "A name without a number is the last run of that pass. Values keep their names from the first listing\n"
        "wherever they are the same; new ones are called %new1, %new2, ...",
    )
    sub.add_argument("first", metavar="PASS_A", help="as --after of dump")
    sub.add_argument("second", metavar="PASS_B", help="as --after of dump")
    add_lowering(sub)
    return top


def _joined(argv: Sequence[str]) -> list[str]:
    """A state may begin with a minus, which argparse would take for an option."""
    found: list[str] = []
    for word in argv:
        if found and found[-1] == "--state":
            found[-1] = f"--state={word}"
        else:
            found.append(word)
    return found
