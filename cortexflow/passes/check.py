"""Which rewrite changed my action? The interpreter before and after each pass, on the same random inputs."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from cortexflow.ir.core import FLOATS, Module, Type
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.ir.interpreter import run_module


class Check:
    """Random inputs and weights for a module, and its outputs so far."""

    def __init__(self, module: Module, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = {n: random_input(t, generator) for n, t in module.inputs.items()}
        given = module.weights
        self.weights = {
            k: given[k] if k in given else random_input(t, generator) * (t.shape or (1,))[-1] ** -0.5
            for k, t in module.weight_types().items()
        }
        self.results = self._run(module)

    def after(self, name: str, module: Module) -> float:
        """The largest change of an output since the last call, relative to the output's largest entry."""
        new = self._run(module)
        moved = max((_distance(new[n], old) for n, old in self.results.items()), default=0.0)
        print(f"cortexflow: {name} moved the result by {moved:.1e}", file=sys.stderr)
        self.results = new
        return moved

    def _run(self, module: Module) -> dict[str, Tensor]:
        results = run_module(module, self.inputs, self.weights, torch.float32)
        return {n: results[n].double() for n in module.outputs}


def _distance(new: Tensor, old: Tensor) -> float:
    """The largest change of an entry relative to the largest entry; infinite where a number appears or goes."""
    changed = ~((new == old) | (new.isnan() & old.isnan()))
    moved = ((new - old).abs() / old.nan_to_num().abs().max().clamp(min=1e-30))[changed]
    return float(moved.nan_to_num(nan=torch.inf).max()) if changed.any() else 0.0


def random_input(t: Type, generator: torch.Generator) -> Tensor:
    """Random data for an input: normal floats, true masks, small integers."""
    if t.dtype in FLOATS:
        return torch.randn(t.shape, generator=generator).to(TORCH_DTYPES[t.dtype])
    if t.dtype == "bool":
        return torch.ones(t.shape, dtype=torch.bool)
    return torch.randint(0, 4, t.shape, generator=generator, dtype=torch.int32).to(TORCH_DTYPES[t.dtype])
