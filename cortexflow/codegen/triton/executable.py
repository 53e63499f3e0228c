"""Running a launch plan: weights and arena on the card, launches captured as CUDA graphs and replayed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cortexflow.codegen.triton.program import Program
from cortexflow.errors import InputError, TargetError
from cortexflow.ir.core import Func, Module, Value
from cortexflow.passes.plan_buffers import plan_buffers

SCRATCH = 1 << 22  # float32 entries for the parts of split products and split keys
COUNTERS = 8192  # one for each tile of a split


class TritonExecutable:
    """The launches with weights and arena, replayed as CUDA graphs: one for all stages, others for what is asked."""

    def __init__(self, module: Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self._module, self._device = module, device
        self._plan = plan_buffers(module)
        program = Program(module, self._plan)
        program.text()  # names every buffer that a launch touches; those of results may be missing yet
        self._places = {v: program.buffer(v).removeprefix("self.") for s in module.stages for v in _wired(s)}
        self._text = program.text()
        scope: dict[str, Any] = {"__name__": "cortexflow_generated"}
        exec(compile(self._text, "<cortexflow triton>", "exec"), scope)
        arena = torch.empty(self._plan.peak, dtype=torch.uint8, device=device)
        parts = torch.empty(SCRATCH, dtype=torch.float32, device=device)
        scratch = (parts, torch.zeros(COUNTERS, dtype=torch.int32, device=device))
        self._policy = scope["Policy"]({k: t.to(device) for k, t in weights.items()}, arena, scratch)
        self._graphs: dict[tuple[str, ...], torch.cuda.CUDAGraph] = {}

    def run_stage(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replay one stage on named inputs."""
        self.replay(inputs, name)
        return {n: self._at(v).clone() for n, v in self._module.funcs[name].results.items()}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replay all stages."""
        self.replay(inputs, *[s.name for s in self._module.stages])
        wired = {n: v for s in self._module.stages for n, v in s.results.items()}
        return {n: self._at(wired[n]).clone() for n in self._module.outputs}

    def replay(self, inputs: Mapping[str, Tensor], *stages: str) -> None:
        """Write the inputs of some stages and replay their graph; the first call captures it."""
        self.write(inputs, *stages)
        if stages not in self._graphs:
            self._graphs[stages] = self._capture(stages)
            self.write(inputs, *stages)  # the plan reuses an input's bytes after its last reader
        self._graphs[stages].replay()

    def write(self, inputs: Mapping[str, Tensor], *stages: str) -> None:
        """Copy the inputs of some stages to their places."""
        made: set[str] = set()
        for stage in map(self._module.funcs.__getitem__, stages):
            for name, arg in stage.args.items():
                if name in made:
                    continue
                if name not in inputs:
                    raise InputError(f"@{stage.name}: missing input {name!r} ({arg.type})")
                self._at(arg).copy_(inputs[name])
                made.add(name)
            made |= set(stage.results)

    def graph(self, *stages: str) -> torch.cuda.CUDAGraph:
        """The captured graph of some stages, for timing; `replay` makes it."""
        return self._graphs[stages]

    def source(self) -> str:
        """The launch plan."""
        return self._text

    def save(self, folder: Path) -> list[Path]:
        """Launch plans run this package's kernels: there is no form that runs alone."""
        raise TargetError("target 'triton' cannot be saved: its plan runs this package's kernels; save target 'torch'")

    def _at(self, v: Value) -> Tensor:
        place: Tensor = getattr(self._policy, self._places[v])
        return place

    def _capture(self, stages: tuple[str, ...]) -> torch.cuda.CUDAGraph:
        """Run once on a side stream, which compiles the kernels, then record every launch."""
        current, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._launch(stages)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._launch(stages)
        return graph

    def _launch(self, stages: tuple[str, ...]) -> None:
        for name in stages:
            getattr(self._policy, name)()


def _wired(stage: Func) -> list[Value]:
    return [*stage.args.values(), *stage.results.values()]


def build(module: Module, weights: Mapping[str, Tensor], device: torch.device) -> TritonExecutable:
    """Build a legalised module for an NVIDIA GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise TargetError(
            f"target 'triton' runs on an NVIDIA GPU, found device {str(device)!r}; "
            "use device='cuda', or target 'torch' or 'onnx'"
        )
    return TritonExecutable(module, weights, device)
