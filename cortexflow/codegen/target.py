"""What a target is, and the registry of targets by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cortexflow.errors import TargetError
from cortexflow.ir import Module


class Executable(Protocol):
    """A module built for a target: stages by name, weights inside, source for readers."""

    def run_stage(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one stage on named inputs and return its results by name."""

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run all stages; returns the module's outputs by name."""

    def source(self) -> str:
        """The artefact as text."""


@dataclass(frozen=True)
class Target:
    """A name, the fused ops it can run as they are, and how it builds a module.

    `build(module, weights, device)`: the module is legalised, has no `prepare`, and reads exactly
    the weights given; it must refuse, with `TargetError`, what it cannot run.
    """

    name: str
    claims: frozenset[str]
    build: Callable[[Module, Mapping[str, Tensor], torch.device], Executable]
    layouts: frozenset[str] = frozenset()  # rewrites of `passes/layout.py` that suit it: `patches`


# Built-in targets are imported when somebody asks for one: each needs its own libraries.
TARGETS: dict[str, str | Target] = {
    "torch": "cortexflow.codegen.torch",
    "onnx": "cortexflow.codegen.onnx",
}


def register_target(target: Target) -> None:
    """Make a target known by its name, in place of one of that name."""
    TARGETS[target.name] = target


def find_target(name: str) -> Target:
    """The target of that name. Raises `TargetError` for an unknown one or one that lacks its library."""
    found = TARGETS.get(name)
    if found is None:
        raise TargetError(f"unknown target {name!r}; there are {', '.join(sorted(TARGETS))}")
    if isinstance(found, Target):
        return found
    try:
        module = importlib.import_module(found)
    except ImportError as e:
        raise TargetError(f"target {name!r} needs the package {e.name!r}: pip install {e.name}") from e
    target: Target = module.TARGET
    return target
