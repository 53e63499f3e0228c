"""`Compiled`: what `compile` returns; it acts, and shows the IR, source, memory and time that it is made of."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cortexflow.codegen import Executable
from cortexflow.errors import ConfigError, TargetError
from cortexflow.inputs import check_inputs
from cortexflow.ir import Module, Type, dump
from cortexflow.ir.cost import cost_report
from cortexflow.passes import Step, report
from cortexflow.passes.plan import Plan


class Compiled:
    """A policy for one signature on one target: call it, save it, or look at how it came about.

    Compiled for several prompt buckets, it is the largest, and a call goes to the smallest that holds its prompt.

    Attributes:
        executable: what the target built.
        module: the stages as the target runs them, without `prepare`.
        steps: what each pass did, with the module after it.
        plan: where each temporary lives in one arena, and the least that any plan needs.
        weight_bytes: size of the weights as prepared, those of all buckets together.
        target: the target's name.
        device: where it runs, whichever GPU is the current one.
    """

    def __init__(
        self,
        executable: Executable,
        module: Module,
        steps: list[Step],
        plan: Plan,
        weight_bytes: int,
        vocabulary: int | None,
        target: str,
        device: torch.device,
    ) -> None:
        self.executable = executable
        self.module = module
        self.steps = steps
        self.plan = plan
        self.weight_bytes = weight_bytes
        self.target = target
        self.device = device
        self._smaller: tuple[Compiled, ...] = ()
        self._inputs, self._vocabulary = module.inputs, vocabulary

    @property
    def inputs(self) -> dict[str, Type]:
        """What a call takes, by name."""
        return dict(self._inputs)

    @property
    def buckets(self) -> dict[int, Compiled]:
        """Slots of each prompt bucket → the policy compiled for it, in rising order; empty for a single signature."""
        return {b.inputs["tokens"].shape[1]: b for b in (*self._smaller, self)} if self._smaller else {}

    @property
    def outputs(self) -> dict[str, Type]:
        """What a call returns, by name."""
        return self.module.outputs

    def __call__(self, **inputs: Any) -> Tensor | dict[str, Tensor]:
        """Run the policy: tensors (or arrays) in by name, the result out; a dictionary where there are several.

        Masks may be left out, prompts may be shorter than their bucket. Raises `InputError`.
        """
        bucket = self.bucket(inputs)
        results = bucket.run(bucket.check(inputs))
        return next(iter(results.values())) if len(results) == 1 else results

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All stages on checked inputs of this signature; results by name."""
        with on_device(self.device):
            return self.executable.run(inputs)

    def run_stage(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One stage on named tensors; results by name."""
        with on_device(self.device):
            return self.executable.run_stage(name, inputs)

    def bucket(self, inputs: Mapping[str, Any]) -> Compiled:
        """The policy of the smallest bucket with a slot for every token given; the largest where none is, or too many.

        What counts is the extent of `tokens`, not of its mask: a prompt that comes padded to 200 slots takes 200.
        """
        tokens = inputs.get("tokens")
        if not self._smaller or tokens is None:
            return self
        given = np.shape(tokens)[-1:] or (0,)
        return next((b for b in self._smaller if b._inputs["tokens"].shape[1] >= given[0]), self)

    def check(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inputs as tensors of their declared types; raises `InputError`."""
        return check_inputs(self._inputs, inputs, self._vocabulary, self.module.meta.get("padding") == "end")

    def stage_times(self, repeats: int = 5, **inputs: Any) -> dict[str, float]:
        """Milliseconds of each stage, the median of some runs after one to warm up."""
        bucket = self.bucket(inputs)
        values: dict[str, Tensor] = bucket.check(inputs)
        times: dict[str, float] = {}
        for stage in bucket.module.stages:
            runs = []
            for _ in range(repeats + 1):
                start = time.perf_counter()
                results = bucket.run_stage(stage.name, values)
                if bucket.device.type == "cuda":
                    torch.cuda.synchronize(bucket.device)
                runs.append((time.perf_counter() - start) * 1e3)
            times[stage.name] = sorted(runs[1:])[repeats // 2]
            values |= results
        return times

    def dump_ir(self, after: str | None = None) -> str:
        """The listing of the module as it runs; as it came in (`"input"`); or after the last pass of a name."""
        if after is None:
            return dump(self.module)
        named = [s for s in self.steps if s.name == after]
        if not named:
            known = ", ".join(dict.fromkeys(s.name for s in self.steps))
            raise ConfigError(f"no pass is named {after!r}; there are {known}")
        return dump(named[-1].module)

    def source(self) -> str:
        """The target's artefact as text."""
        return self.executable.source()

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the artefact into a folder, made if absent, so that it runs without this package.

        Returns the files written; several buckets are written each into a folder `prompt_SLOTS`, weights included.
        Raises `TargetError` where the target has no form on disk.
        """
        if self._smaller:
            parts = {f"prompt_{slots}": b.executable for slots, b in self.buckets.items()}
        else:
            parts = {"": self.executable}
        written: list[Path] = []
        for name, executable in parts.items():
            save = getattr(executable, "save", None)  # a target of one's own may do without
            if save is None:
                raise TargetError(
                    f"target {self.target!r} cannot be saved: what it builds has no form on disk; source() is its text"
                )
            written += save(Path(folder) / name)
        return written

    def pass_report(self) -> str:
        """A table of what each pass did."""
        return report(self.steps)

    def memory_report(self) -> str:
        """Bytes of the weights, and of the temporaries of each bucket as planned, beside their lower bound."""
        plans = [f"prompts of {n}: {b.plan.report()}" for n, b in self.buckets.items()] or [self.plan.report()]
        own = getattr(self.executable, "memory_report", None)  # where a target has more to tell
        return "\n".join([f"weights: {self.weight_bytes:,} bytes", *plans, *([own()] if own else [])])

    def cost_report(self) -> str:
        """Operations and bytes of each stage."""
        return cost_report(self.module)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels and graphs of this thread go to this GPU; nothing to do for other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def with_index(device: torch.device) -> torch.device:
    """`cuda` as the GPU that is current now, which later builds and calls then mean as well."""
    unnamed = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if unnamed else device
