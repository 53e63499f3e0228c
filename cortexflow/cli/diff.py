"""`cortexflow diff`: what changed in the IR between two passes, with values under the names that they had before."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys

from cortexflow.cli.dump import chosen, find_step, lowered
from cortexflow.ir import dump

_VALUE = re.compile(r"%([\w.\-]+)")
_COUNTED = re.compile(r"%((?:[A-Za-z][\w.\-]*_)?)\d+(?![\w.\-])")  # %12, and %gate_12: printing gave the number


def execute(args: argparse.Namespace) -> int:
    """What two passes' listings differ in."""
    steps = lowered(args)
    pair = find_step(steps, args.first), find_step(steps, args.second)
    before, after = (step.module.funcs for step in pair)
    names = [*before, *(n for n in after if n not in before)]
    if args.stage:
        if args.stage not in names:
            chosen(pair[1], args.stage)
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


def renamed(old: list[str], new: list[str]) -> list[str]:
    """`new` with the numbers of `old` wherever a value is the same, so that a diff shows changes and not numbers.

    Lines that differ in numbers alone are aligned first. Where lines were replaced, a new value takes the
    name of an old one of the same type and source note; others are called %new1, %new2, ...
    """
    blank, blank_new = ([_COUNTED.sub(r"%\1", line) for line in lines] for lines in (old, new))
    names: dict[str, str] = {}
    taken: set[str] = set()

    def pair(a: str, b: str) -> None:
        for x, y in zip(defined(a), defined(b), strict=False):
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
    for y in (y for line in new for y in defined(line)):
        if y not in names:
            own = not y.isdecimal() and y not in taken
            names[y] = y if own else f"new{sum(name.startswith('new') for name in names.values()) + 1}"
    return [_VALUE.sub(lambda m: "%" + names.get(m[1], m[1]), line) for line in new]


def defined(line: str) -> list[str]:
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
