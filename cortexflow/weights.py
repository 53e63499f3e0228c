"""Weights on their way from a checkpoint to a target: read one by one, prepared once, rounded last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cortexflow.errors import CheckpointError, InputError
from cortexflow.ir import PREPARE, Module, run
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.ir.interpreter import count_runs


class Weights(Mapping[str, Tensor]):
    """Tensors by checkpoint name, read when asked for and not kept.

    `load(name)` must return a tensor of the shape that the graph names, checked for NaN.
    """

    def __init__(self, names: list[str], load: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._load = load

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._load(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def check_weights(module: Module, weights: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` that lists the weights a module reads and does not find."""
    missing = [k for k in module.weight_types() if k not in weights]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CheckpointError(
            f"{len(missing)} of {len(module.weight_types())} weights are missing: {shown}. Give compile() a checkpoint "
            "path, or the tensors by these names as weights="
        )


def prepare(module: Module, weights: Mapping[str, Tensor], progress: bool = False) -> tuple[Module, dict[str, Tensor]]:
    """Run `prepare` and gather what the stages read: (the stages alone, their weights by key).

    Checkpoint tensors are read one at a time and dropped after their last use, so that memory holds
    the finished weights and little else.
    """
    check_weights(module, weights)
    stages = Module({f.name: f for f in module.stages}, {}, module.meta)
    needed = stages.weight_types()
    found: dict[str, Tensor] = {}
    if PREPARE in module.funcs:
        func = module.funcs[PREPARE]
        total = count_runs(func.block)
        bar = tqdm(total=total, desc="preparing weights", unit="op", delay=1.0, leave=False, disable=not progress)
        with bar:
            found = run(func, {}, weights, watch=lambda op, results: bar.update(1))
    direct = [k for k in needed if k not in found]
    for key in tqdm(direct, desc="reading weights", unit="tensor", delay=1.0, leave=False, disable=not progress):
        t = needed[key]
        found[key] = weights[key].to(TORCH_DTYPES[t.dtype])
    return stages, {k: _dense(found[k], k, needed[k].shape) for k in needed}


def _dense(x: Tensor, key: str, shape: tuple[int, ...]) -> Tensor:
    if tuple(x.shape) != shape:
        raise InputError(f"weight {key!r}: expected shape {shape}, found {tuple(x.shape)}")
    return x.detach().contiguous()


def random_weights(module: Module, seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    """Seeded normal weights of sensible size for every tensor that a module names: for tests and timings."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for key, t in module.weight_types().items():
        fan = t.shape[-1] if len(t.shape) == 2 else 25  # a vector: biases and norm factors of size 0.2
        made[key] = torch.randn(t.shape, generator=generator) * (scale * fan**-0.5)
    return made
