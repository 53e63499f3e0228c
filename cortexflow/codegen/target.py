"""What a target is, and the registry of targets by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from cortexflow.errors import TargetError
from cortexflow.ir import Module, Op
from cortexflow.passes.plan import Plan
from cortexflow.passes.plan_buffers import plan_buffers


class Executable(Protocol):
    """A module built for a target: stages by name, weights inside, source for readers."""

    def run_stage(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one stage on named inputs and return its results by name."""

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run all stages; returns the module's outputs by name."""

    def source(self) -> str:
        """The artefact as text."""

    def save(self, folder: Path) -> list[Path]:
        """Write the artefact, so that it runs without this package; returns the files.

        Makes the folder if absent. Raises `TargetError` where there is no such form.
        """


@dataclass(frozen=True)
class Target:
    """A name, the fused ops it can run as they are, and how it builds a module.

    `build(module, weights, device, **options)`: the module is legalised, has no `prepare`, and reads
    exactly the weights given. A weight is prepared when it is read, and not kept: read each once, and
    only those that are needed; its axes may lie in memory in another order. It must refuse, with
    `TargetError`, what it cannot run. Keywords come only to a target that asks for them:

    * `without` (if it has `switches`): the frozenset of those that are off.
    * `forms`: by weight key, a dictionary in which it finds what earlier builds made of an equal weight,
      and leaves what it makes. Several prompt buckets of one policy so share what is on the device.
    * `tune`: measure on the device what is not known yet. `progress`: show bars for work over a second.

    `accepts(op, without)`: of the ops claimed, those of a shape or dtype that it can run.
    """

    name: str
    claims: frozenset[str]
    build: Callable[..., Executable]
    accepts: Callable[[Op, frozenset[str]], bool] = lambda op, without: True
    wants: frozenset[str] = frozenset()  # passes that run for a target that asks for them: `pipeline.ON_REQUEST`
    switches: Mapping[str, str] = field(default_factory=dict)  # optimisations that can be off, a line on each
    needs: frozenset[str] = frozenset()  # passes that it cannot do without: they cannot be off
    plan: Callable[[Module, frozenset[str]], Plan] = lambda module, without: plan_buffers(module)  # as it will run
    options: frozenset[str] = frozenset()  # of `forms`, `tune`, `progress`, those that `build` takes

    def runs(self, op: Op, without: frozenset[str] = frozenset()) -> bool:
        """Whether this target runs a fused op as it is, with these switches off (its own, or `fuse.NAME`)."""
        off = op.name.replace("fused.", "fuse.", 1) in without
        return op.name in self.claims and not off and self.accepts(op, without)


# What an input or a result holds, where its name is one that policies use.
MEANINGS = {
    "images": "RGB in [-1, 1]: [batch, views, height, width, channels]",
    "pixel_values": "RGB, normalised for each image tower: [batch, channels, height, width]",
    "image_mask": "true: this camera is there",
    "tokens": "token ids of the prompt, padded at the end",
    "token_mask": "true: this token counts",
    "state": "normalised state, padded with zeros",
    "noise": "normal noise that the flow starts from",
    "actions": "normalised actions",
    "token_ids": "tokens that the policy emitted",
}


def interface_text(module: Module, mark: str = "") -> str:
    """Inputs and results of a module with types and meanings, a line each, every line after `mark`."""
    width = max(map(len, (*module.inputs, *module.outputs)), default=0)
    lines = []
    for title, values in (("Inputs", module.inputs), ("Results", module.outputs)):
        widest = max((len(str(t)) for t in values.values()), default=0)
        lines.append(f"{mark}{title}:")
        lines += [f"{mark}  {n:<{width}}  {t!s:<{widest}}  {MEANINGS.get(n, '')}".rstrip() for n, t in values.items()]
    return "\n".join(lines)


# Built-in targets are imported when somebody asks for one: each needs its own libraries.
TARGETS: dict[str, str | Target] = {
    "torch": "cortexflow.codegen.torch",
    "onnx": "cortexflow.codegen.onnx",
    "triton": "cortexflow.codegen.triton",
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
