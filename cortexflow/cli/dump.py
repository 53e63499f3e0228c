"""`cortexflow dump`: the IR as a target gets it, after a pass, or after every pass."""

from __future__ import annotations

import argparse
from collections import Counter

from cortexflow.cli.arguments import opened, say, signature_of
from cortexflow.codegen import find_target
from cortexflow.compiler import lower
from cortexflow.errors import ConfigError
from cortexflow.ir import Func, dump
from cortexflow.models import create_model
from cortexflow.passes import Step


def execute(args: argparse.Namespace) -> int:
    """The listing after one pass, or after every pass into a folder."""
    steps = lowered(args)
    if args.output and args.after is None:
        chosen(steps[-1], args.stage)  # a stage that nobody knows is an error, not an empty folder
        args.output.mkdir(parents=True, exist_ok=True)
        for number, step in enumerate(steps):
            funcs = [f for f in step.module.funcs.values() if args.stage in (None, f.name)]
            text = dump(funcs[0]) if args.stage and funcs else dump(step.module)
            if funcs:
                (args.output / f"{number:02d}_{step.name}.ir").write_text(text, encoding="utf-8")
        say(args, f"wrote {len(steps)} listings to {args.output}")
        return 0
    step = steps[-1] if args.after is None else find_step(steps, args.after)
    text = dump(chosen(step, args.stage) if args.stage else step.module)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


def lowered(args: argparse.Namespace) -> list[Step]:
    """The steps of the pipeline over a checkpoint's graph, from shapes alone."""
    target, checkpoint = find_target(args.target), opened(args)
    say(args, f"running the passes for {args.target}")
    return lower(create_model(checkpoint.config), signature_of(args, checkpoint), args.dtype, target)[1]


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


def chosen(step: Step, stage: str | None) -> Func:
    """The function of that name after a step, or the first."""
    funcs = step.module.funcs
    if stage is not None and stage not in funcs:
        raise ConfigError(f"stage: expected one of {', '.join(funcs)}, found {stage!r} (after {step.name})")
    return funcs[stage or next(iter(funcs))]
