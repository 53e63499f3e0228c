"""The rules of the house, read off the source itself: links, floors, names, sizes."""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "cortexflow"
ROOMS = ("ir", "passes", "codegen", "kernels")
COMPILER = ("ir", "passes", "codegen")  # the rooms that know no model

# What each room may import of the package: itself, and the floors that it stands on.
FLOORS = {
    "ir": ("ir", "errors"),
    "passes": ("ir", "passes", "errors"),
    "codegen": ("ir", "passes", "codegen", "kernels", "errors"),
}
FAMILIES = ("pi0", "pi05", "π0", "openvla", "rt1", "rt2", "siglip", "gemma", "llama", "dinov2", "paligemma")
MAX_COMPILER_LINES = 8340  # without kernels and model families
MAX_ENVIRONMENT_VARIABLES = 5


def sources(folder: Path = PACKAGE) -> list[Path]:
    return sorted(folder.rglob("*.py"))


@functools.cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything of this package that a module imports, or names as a whole string."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                start = package[: len(package) - level + 1] if level else []
                origin = ".".join([*start, *([base] if base else [])])
                for alias in names:  # `from cortexflow import ir` imports cortexflow.ir; elsewhere the origin tells
                    yield node.lineno, f"{origin}.{alias.name}" if origin == "cortexflow" else origin
            case ast.Constant(value=str(name)) if re.fullmatch(r"cortexflow(\.\w+)+", name):
                yield node.lineno, name  # for importlib


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_is_linked_from_the_root(room: str) -> None:
    link = ROOT / room
    assert link.is_symlink(), f"{room} is not a symbolic link: restore it with `ln -sfn cortexflow/{room} {room}`"
    assert os.readlink(link) == f"cortexflow/{room}", "the link is to be relative"
    assert (PACKAGE / room).is_dir()


def test_git_holds_the_links_as_links() -> None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "--stage", "--", *ROOMS]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    modes = {line.split("\t")[1]: line.split()[0] for line in listing.splitlines()}
    assert modes == dict.fromkeys(ROOMS, "120000")


def test_kernels_itself_is_a_namespace() -> None:
    """With an __init__.py, the root's `kernels` link would hide another package of that name."""
    assert not (PACKAGE / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("room", COMPILER)
def test_a_room_imports_only_the_floors_below(room: str) -> None:
    allowed = tuple(f"cortexflow.{name}" for name in FLOORS[room])
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(PACKAGE / room)
        for line, name in imported(ast.parse(text(path)), module_name(path), path.name == "__init__.py")
        if name.split(".")[0] == "cortexflow" and not any(name == a or name.startswith(f"{a}.") for a in allowed)
    ]
    assert not wrong, f"{room} may import only {', '.join(allowed)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import cortexflow.models.pi0", "cortexflow.models.pi0"),
        ("from cortexflow import models", "cortexflow.models"),
        ("from cortexflow.models import pi0", "cortexflow.models"),
        ("from ..models import pi0", "cortexflow.models"),
        ("from .. import models", "cortexflow.models"),
        ("def f():\n    from ..models.pi0 import Pi0", "cortexflow.models.pi0"),
        ("load('cortexflow.models.pi0')", "cortexflow.models.pi0"),
    ],
)
def test_every_way_to_import_is_seen(line: str, name: str) -> None:
    assert name in {found for _, found in imported(ast.parse(line), "cortexflow.passes.fold", False)}


def test_the_compiler_names_no_model() -> None:
    word = re.compile(rf"(?<![A-Za-z0-9])({'|'.join(FAMILIES)})(?![A-Za-z0-9])", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for room in COMPILER
        for path in sources(PACKAGE / room)
        for number, line in enumerate(text(path).splitlines(), 1)
        if word.search(line)
    ]
    assert not found, "\n".join(found)


def test_every_module_says_what_it_is() -> None:
    silent = [str(path.relative_to(ROOT)) for path in sources() if not ast.get_docstring(ast.parse(text(path)))]
    assert not silent, f"no docstring: {', '.join(silent)}"


def test_the_compiler_stays_small() -> None:
    lines = {room: sum(len(text(path).splitlines()) for path in sources(PACKAGE / room)) for room in COMPILER}
    assert sum(lines.values()) < MAX_COMPILER_LINES, f"growth past this is a design question: {lines}"


def test_few_environment_variables() -> None:
    names = {name for path in sources() for name in re.findall(r"\bCORTEXFLOW_[A-Z0-9_]+", text(path))}
    assert len(names) <= MAX_ENVIRONMENT_VARIABLES, f"{sorted(names)}"
