"""`cortexflow compile`: the artefact of a target in a folder, and what it will cost."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from cortexflow.cli.arguments import compiled, opened, say, signature_of
from cortexflow.cli.text import heading, size_text, table
from cortexflow.codegen import interface_text
from cortexflow.ir import Module


def execute(args: argparse.Namespace) -> int:
    """Artefacts in a folder, reports on stdout."""
    checkpoint = opened(args)
    policy = compiled(args, checkpoint, signature_of(args, checkpoint))
    say(args, f"writing {args.output}")
    written = policy.save(args.output)
    print(heading("Passes") + "\n" + policy.pass_report())
    print(heading("Memory") + "\n" + policy.memory_report())
    print(heading("Cost") + "\n" + policy.cost_report())
    print(heading("Written"))
    print(table(None, [(str(path), size_text(path.stat().st_size)) for path in written]))
    print(f"\n{usage(written[0], policy.module)}".rstrip())
    return 0


def usage(file: Path, module: Module) -> str:
    """How to run an artefact alone."""
    if file.suffix == ".py":
        return f"To run it alone: python {shlex.quote(str(file))}   (its last lines show how to call it)"
    if file.suffix == ".onnx":
        names = ", ".join(f'"{n}": {n}' for n in module.inputs)
        call = f"onnxruntime.InferenceSession({str(file)!r}).run(None, {{{names}}})"
        return f"To run it alone: {call}\n\n{interface_text(module)}"
    return interface_text(module)
