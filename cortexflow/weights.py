"""Weights on their way from a checkpoint to a target: read one by one, prepared once, rounded last."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cortexflow.errors import CheckpointError, InputError
from cortexflow.ir import PREPARE, Block, Func, Module, Op, Value, run
from cortexflow.ir.core import clone_block
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.ir.interpreter import count_runs
from cortexflow.passes.dce import sweep


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


def prepare(
    module: Module,
    weights: Mapping[str, Tensor],
    progress: bool = False,
    known: dict[str, Tensor] | None = None,
) -> tuple[Module, dict[str, Tensor]]:
    """Run `prepare` and gather what the stages read: (the stages alone, their weights by key).

    Checkpoint tensors are read one at a time and dropped after their last use, so that memory holds
    the finished weights and little else. `known`, by fingerprint, holds what other modules of the same
    checkpoint have made already; what is made here is put there.
    """
    check_weights(module, weights)
    stages = stages_of(module)
    needed = stages.weight_types()
    marks = fingerprints(module)
    known = known if known is not None else {}
    wanted = [k for k in needed if marks[k] not in known]
    found: dict[str, Tensor] = {}
    if PREPARE in module.funcs:
        func = _only(module.funcs[PREPARE], wanted)
        total = count_runs(func.block)
        bar = tqdm(total=total, desc="preparing weights", unit="op", delay=1.0, leave=False, disable=not progress)
        with bar:
            found = run(func, {}, weights, watch=lambda op, results: bar.update(1))
    direct = [k for k in wanted if k not in found]
    for key in tqdm(direct, desc="reading weights", unit="tensor", delay=1.0, leave=False, disable=not progress):
        t = needed[key]
        found[key] = weights[key].to(TORCH_DTYPES[t.dtype])
    for key in wanted:
        known[marks[key]] = _dense(found.pop(key), key, needed[key].shape)
    return stages, {k: known[marks[k]] for k in needed}


def stages_of(module: Module) -> Module:
    """The module without `prepare`: its results are weights like any other."""
    return Module({f.name: f for f in module.stages}, {}, module.meta)


def fingerprints(module: Module) -> dict[str, str]:
    """How each weight of the stages is made, by key: where two are equal, one checkpoint gives equal tensors."""
    types = stages_of(module).weight_types()
    found = {k: _mark(Op("weight", [], {"key": k, "type": t}), {}) for k, t in types.items()}
    if PREPARE in module.funcs:
        env: dict[Value, str] = {}
        _mark_block(module.funcs[PREPARE].block, env, 0)
        found |= {k: env[v] for k, v in module.funcs[PREPARE].results.items() if k in types}
    return found


def _mark_block(block: Block, env: dict[Value, str], depth: int) -> str:
    """A fingerprint of every value of a block into `env`; returns that of its last op."""
    env |= {arg: f"argument {i} at depth {depth}" for i, arg in enumerate(block.args)}
    mark = ""
    for op in block.ops:
        mark = _mark(op, env, _mark_block(op.body, env, depth + 1) if op.body else "")
        many = len(op.outputs) > 1
        env |= {out: f"{mark} {i}" if many else mark for i, out in enumerate(op.outputs)}
    return mark


def _mark(op: Op, env: Mapping[Value, str], body: str = "") -> str:
    attrs = sorted((k, repr(v)) for k, v in op.attrs.items())
    return hashlib.sha256(repr((op.name, attrs, [env[v] for v in op.inputs], body)).encode()).hexdigest()


def _only(func: Func, names: list[str]) -> Func:
    """A function cut down to some of its results; those that it does not have are left out."""
    cut = Func(func.name, clone_block(func.block, {}))
    kept = {n: v for n, v in cut.results.items() if n in set(names)}
    ret = cut.block.ops[-1]
    ret.attrs, ret.inputs = {**ret.attrs, "names": tuple(kept)}, list(kept.values())
    sweep(cut)
    return cut


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
