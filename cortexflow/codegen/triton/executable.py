"""Running a launch plan: weights and arena on the card, launches captured as CUDA graphs and replayed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cortexflow.codegen.triton.claims import SCRATCH
from cortexflow.codegen.triton.placement import Forms, Staging, allot, fill_new, host_weights
from cortexflow.codegen.triton.program import Program
from cortexflow.codegen.triton.rules import RULES
from cortexflow.errors import TargetError
from cortexflow.ir.core import Module, Value
from cortexflow.passes.branches import find_branches
from cortexflow.passes.early import split_early
from cortexflow.passes.plan import Plan
from cortexflow.passes.plan_buffers import plan_buffers

COUNTERS = 8192  # one for each tile of a split

SWITCHES = {
    "cuda_graph": "the launches recorded once and replayed; off: Python launches each kernel at every call",
    "overlap": "a kernel starts before the one ahead of it has ended (programmatic dependent launch)",
    "host_tables": "large tables read by rows stay in host memory",
    "streaming": "few rows: kernels that fetch their weights before they wait for their input; off: the library",
    "epilogues": "gated units and biases inside a product's kernel; off: the library's product, then a kernel behind",
    "resident": "few rows: products and attention that leave room for the next kernels, in CUDA C++ (Hopper)",
    "tiles": "image towers: tiles of any width and norms without a launch, in CUDA C++ (Hopper)",
    "chains": "small ops that work entry by entry, one behind the other, are one launch",
    "branches": "long chains that read nothing of each other run side by side",
    "early": "what reads nothing but inputs runs beside the first stage",
    "joined": "neighbouring kernels in one launch: a norm behind a sum, rotation with the move to the cache, casts",
}


def planned(module: Module, without: frozenset[str] = frozenset()) -> tuple[Module, Plan]:
    """A module as it is launched, and where its values live."""
    split, early = (module, {}) if "early" in without else split_early(module)
    late = Module({name: f for name, f in split.funcs.items() if name not in early.values()})
    return split, plan_buffers(split, branches=() if "branches" in without else find_branches(late), early=early)


class Layout:
    """A module's launch plan as text, and what it takes to run; without `tune` no card is needed to make one.

    Attributes:
        module, early: as it is launched; by stage, its function that may run beside the first one.
        text: the source.
        places: the attribute of the plan that holds each wired value.
        weights: (key, form) → attribute.
        host: keys of the weights that stay on the host.
        scratches: numbers in each that the plan takes, for parts of results; counters stand behind them.
        bytes: by purpose: `weights`, `arena` and `scratch` on the card, `host` in pinned host memory.
    """

    def __init__(self, module: Module, without: frozenset[str] = frozenset(), tune: bool = False) -> None:
        self.module, plan = planned(module, without)
        program = Program(self.module, plan, without, tune, capability())
        program.text()  # names every buffer that a launch touches; those of results may be missing yet
        wired = [v for s in self.module.stages for v in (*s.args.values(), *s.results.values())]
        self.places = {v: program.buffer(v).removeprefix("self.") for v in wired}
        self.text, self.weights = program.text(), program.weights
        by_kernel = "gather" in RULES and "host_tables" not in without  # PyTorch's lookup reads the card's memory alone
        self.host = host_weights(module) if by_kernel else frozenset()
        types = module.weight_types()
        host = sum(types[key].nbytes for key, _ in self.weights if key in self.host)
        weights = sum(types[key].nbytes for key, _ in self.weights) - host
        self.early: Mapping[str, str] = plan.early
        self.scratches: tuple[int, ...] = (SCRATCH,)
        if plan.branches or plan.early:
            beside = plan.branches or not program.busy.isdisjoint(plan.early.values())
            self.scratches += (SCRATCH if beside else 0,)
        scratch = sum(4 * (n + COUNTERS) for n in self.scratches)
        self.bytes = {"weights": weights, "arena": plan.peak, "scratch": scratch, "host": host}


def capability() -> int:
    """Compute capability of the current card, times ten; Hopper's where there is none."""
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


class TritonExecutable:
    """The launches with weights and arena, replayed as CUDA graphs: one for all stages, others for what is asked.

    `without`: names of SWITCHES. `forms`: what other buckets of the same policy have placed of each weight.
    """

    def __init__(
        self,
        module: Module,
        weights: Mapping[str, Tensor],
        device: torch.device,
        *,
        without: frozenset[str] = frozenset(),
        forms: Forms | None = None,
        tune: bool = False,
        progress: bool = False,
    ) -> None:
        self.layout, self._device, self._without = Layout(module, without, tune), device, without
        scope: dict[str, Any] = {"__name__": "cortexflow_generated"}
        exec(compile(self.layout.text, "<cortexflow triton>", "exec"), scope)
        types, size = module.weight_types(), self.layout.bytes
        forms = forms if forms is not None else {key: {} for key in types}
        besides = size["scratch"] + size["arena"]
        named, empty, work = allot(self.layout.weights, types, device, self.layout.host, forms, besides)
        counts = self.layout.scratches
        *scratches, arena = work.split([4 * (n + COUNTERS) for n in counts] + [size["arena"]])
        scratch = [
            (s.view(torch.float32)[:n], s.view(torch.int32)[n:].zero_()) for s, n in zip(scratches, counts, strict=True)
        ]
        self._policy = scope["Policy"](named, arena, *scratch)
        self._graphs: dict[tuple[str, ...], torch.cuda.CUDAGraph] = {}
        self._staging = Staging(module.inputs, device)
        self._all = tuple(s.name for s in module.stages)
        made = {n: v for s in self.layout.module.stages for n, v in s.results.items()}
        self._outputs = {n: self._at(made[n]) for n in module.outputs}
        self._reads = {names: self._places(names) for names in (self._all, *((n,) for n in self._all))}
        from cortexflow.kernels.triton.warmup import compiling

        with compiling(lambda: self._launch(self._all), progress):  # in other threads, meanwhile
            fill_new(empty, weights, forms)
        self._policy.add_up()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # a matrix on its way to another form lay beside it

    def run_stage(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replay one stage on named inputs."""
        self.replay(inputs, name)
        return {n: self._at(v).clone() for n, v in self.layout.module.funcs[name].results.items()}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replay all stages."""
        self.replay(inputs, *self._all)
        return {n: place.clone() for n, place in self._outputs.items()}

    def replay(self, inputs: Mapping[str, Tensor], *stages: str) -> None:
        """Write the inputs of some stages and replay their graph; the first call captures it."""
        self.write(inputs, *stages)
        if "cuda_graph" in self._without:
            return self._launch(stages)
        if stages not in self._graphs:
            self._graphs[stages] = self._capture(stages)
            self.write(inputs, *stages)  # the plan reuses an input's bytes after its last reader
        self._graphs[stages].replay()

    def write(self, inputs: Mapping[str, Tensor], *stages: str) -> None:
        """Copy the inputs of some stages to their places."""
        if stages not in self._reads:
            self._reads[stages] = self._places(stages)
        self._staging.write(self._reads[stages], inputs, f"@{stages[0]}")

    def graph(self, *stages: str) -> torch.cuda.CUDAGraph:
        """The captured graph of some stages, for timing; `replay` makes it."""
        return self._graphs[stages]

    def source(self) -> str:
        """The launch plan."""
        return self.layout.text

    def memory_report(self) -> str:
        """Bytes on the card by purpose, and those in pinned host memory."""
        size = self.layout.bytes
        on_card = ", ".join(f"{what} {size[what]:,}" for what in ("weights", "arena", "scratch"))
        return f"on the card: {on_card} bytes; on the host: weights {size['host']:,} bytes"

    def save(self, folder: Path) -> list[Path]:
        """Launch plans run this package's kernels: there is no form that runs alone."""
        raise TargetError("target 'triton' cannot be saved: its plan runs this package's kernels; save target 'torch'")

    def _at(self, v: Value) -> Tensor:
        place: Tensor = getattr(self._policy, self.layout.places[v])
        return place

    def _places(self, stages: tuple[str, ...]) -> list[tuple[str, Tensor]]:
        """What must be written before some stages run: their arguments that none of them makes."""
        found: dict[str, Tensor] = {}
        made = {n for name in self.layout.early.values() for n in self.layout.module.funcs[name].results}
        for stage in map(self.layout.module.funcs.__getitem__, stages):
            found |= {n: self._at(v) for n, v in stage.args.items() if n not in made and n not in found}
            made |= set(stage.results)
        return list(found.items())

    def _capture(self, stages: tuple[str, ...]) -> torch.cuda.CUDAGraph:
        """Run once on a side stream, which loads the kernels, then record every launch."""
        current, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._launch(stages)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):  # the default is one of the GPU that captured first
            self._launch(stages)
        return graph

    def _launch(self, stages: tuple[str, ...]) -> None:
        """Launch some stages: early functions beside the module's first one, or each before its own."""
        from cortexflow.kernels.triton.common import OVERLAP
        from cortexflow.kernels.triton.streams import beside, meet

        policy, early = self._policy, self.layout.early
        ahead = [early[name] for name in stages if name in early and stages[0] == self._all[0]]
        before = OVERLAP.set("overlap" not in self._without)
        try:
            if ahead:
                with beside(policy):
                    for name in ahead:
                        getattr(policy, name)()
            for name in stages:
                if ahead and name == stages[1]:
                    meet(policy)
                if not ahead and name in early:
                    getattr(policy, early[name])()
                getattr(policy, name)()
        finally:
            OVERLAP.reset(before)


def build(module: Module, weights: Mapping[str, Tensor], device: torch.device, **options: Any) -> TritonExecutable:
    """Build a legalised module for an NVIDIA GPU; `options` as of `TritonExecutable`."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise TargetError(
            f"target 'triton' runs on an NVIDIA GPU, found device {str(device)!r}; "
            "use device='cuda', or target 'torch' or 'onnx'"
        )
    return TritonExecutable(module, weights, device, **options)
