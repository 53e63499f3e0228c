"""Before-and-after listings: `listings/PASS.ir` holds cases, each a text, the pass, and the text it becomes.

    // ===== what the case shows
    // with words for the pass, where it takes any
    func @f(...) {...}
    // ----- what it becomes (left out where nothing changes; the title then starts with 'unchanged')
    func @f(...) {...}

`python -m tests.passes.listing` writes what the passes now make of every case; read the difference.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cortexflow.ir import Module, dump, parse, verify
from cortexflow.passes import expose, fuse, legalize
from cortexflow.passes.absorb import absorb
from cortexflow.passes.canonicalize import canonicalize
from cortexflow.passes.cse import cse
from cortexflow.passes.dce import dce
from cortexflow.passes.fold import fold
from cortexflow.passes.hoist import hoist
from cortexflow.passes.layout import layout
from cortexflow.passes.merge import merge
from cortexflow.passes.predicate import predicate

FOLDER = Path(__file__).parent / "listings"
_CASE, _BECOMES = "// ===== ", "// -----\n"

# The pass, and what clears up behind it where that makes the listing easier to read.
PASSES: dict[str, Callable[[Module, list[str]], object]] = {
    "canonicalize": lambda m, _: canonicalize(m) and dce(m),
    "fold": lambda m, _: fold(m) and dce(m),
    "cse": lambda m, _: cse(m),
    "dce": lambda m, _: dce(m),
    "absorb": lambda m, _: absorb(m) and canonicalize(m),
    "layout": lambda m, _: layout(m) and dce(m),
    "merge": lambda m, _: merge(m) and dce(m),
    "hoist": lambda m, _: hoist(m) and dce(m),
    "fuse": lambda m, _: fuse(m),
    "predicate": lambda m, _: predicate(m),
    "legalize": lambda m, words: legalize(m, lambda op: op.name in words),
    "expose": lambda m, words: expose(m, *words),
}


@dataclass(frozen=True)
class Case:
    """One listing: its title, the words for the pass, the text before and the text expected after."""

    passed: str
    title: str
    words: list[str]
    before: str
    after: str

    @property
    def unchanged(self) -> bool:
        return self.title.startswith("unchanged")

    def run(self) -> str:
        """What the pass makes of the text, verified."""
        module = parse(self.before)
        verify(module)
        PASSES[self.passed](module, self.words)
        verify(module)
        return listed(module)


def listed(module: Module) -> str:
    """A module as the cases show it: without the header of one that has no facts."""
    return dump(module).removeprefix("module {}\n\n")


def cases(name: str) -> list[Case]:
    """The cases of one pass."""
    found = []
    for text in re.split(rf"^{re.escape(_CASE)}", (FOLDER / f"{name}.ir").read_text(encoding="utf-8"), flags=re.M)[1:]:
        title, body = text.split("\n", 1)
        words = re.match(r"// with (.*)\n", body)
        body = body[words.end() :] if words else body
        before, _, after = body.partition(_BECOMES)
        found.append(Case(name, title, words[1].split() if words else [], before.strip() + "\n", after.strip() + "\n"))
    return found


def write(name: str) -> None:
    """Write a pass's cases again, each with what the pass makes of it."""
    parts = []
    for case in cases(name):
        with_words = f"// with {' '.join(case.words)}\n" if case.words else ""
        after = "" if case.unchanged else _BECOMES + case.run()
        parts.append(f"{_CASE}{case.title}\n{with_words}{case.before}{after}")
    (FOLDER / f"{name}.ir").write_text("".join(parts), encoding="utf-8")


if __name__ == "__main__":
    for each in PASSES:
        write(each)
