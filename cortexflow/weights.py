"""Weights on their way from a checkpoint to a target: read one by one, prepared once, rounded last."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from cortexflow import large_weights
from cortexflow.errors import CheckpointError, InputError
from cortexflow.ir import PREPARE, Block, Func, Module, Op, Type, Value, run
from cortexflow.ir.core import clone_block, uses
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.passes.dce import sweep

AT_ONCE = 4  # weights made at once on the host for another device
_MOVES = ("transpose", "reshape", "slice")  # ops that only move entries of their one operand


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


def prepare(module: Module, weights: Mapping[str, Tensor]) -> tuple[Module, dict[str, Tensor]]:
    """Run `prepare` and gather what the stages read: (the stages alone, their weights by key, dense)."""
    ready = prepared(module, weights)
    return stages_of(module), {key: x.contiguous() for key, x in ready.items()}


def prepared(
    module: Module,
    weights: Mapping[str, Tensor],
    *,
    there: Container[str] = (),
    known: dict[str, Tensor] | None = None,
    device: torch.device | None = None,
    done: Callable[[int], object] = lambda n: None,
) -> Weights:
    """What the stages read, by key, each made when it is first asked for; its axes may lie in another order.

    With it are made those that share an op with it, less what is `there`: fingerprints of weights that the target has
    from earlier builds, and will hardly ask for. `known` holds, by fingerprint, what other modules of the same
    checkpoint have made, and keeps, dense, what is made here; without it each is let go when it is handed over.
    Checkpoint tensors are dropped after their last use, so that memory holds finished weights and little else. `done`
    is told how many were made. Raises `CheckpointError` for missing tensors, `InputError` for those of another shape.

    For a `device` other than the host, the large ones are made there (see `large_weights`) when they are asked for,
    their checkpoint tensors read ahead; the others at once, in threads.
    """
    check_weights(module, weights)
    types, marks = stages_of(module).weight_types(), fingerprints(module)
    parts = _parts(_narrowed(module.funcs[PREPARE])) if PREPARE in module.funcs else {}
    made: dict[str, Tensor] = {} if known is None else known
    large = {k: f.results[k] for k, f in parts.items() if device and k in types and large_weights.fits(f.results[k])}
    rest = types.keys() - large.keys()
    asked = (large[k] for k in types if k in large and marks[k] not in there)
    read = large_weights.read_ahead(weights, (name for v in asked for name in large_weights.sources(v)))

    def make(key: str) -> dict[str, Tensor]:
        if key not in parts:
            return {key: weights[key].to(TORCH_DTYPES[types[key].dtype])}
        if device and key in large:
            return {key: large_weights.make(large[key], read, device)}
        others = (k for k in parts[key].results if k in rest and marks[k] not in there and marks[k] not in made)
        return run(_only(parts[key], {key, *others}), {}, weights)

    begun = _begun(make, parts, {k for k in rest if marks[k] not in there}) if device else {}

    def load(key: str) -> Tensor:
        mark = marks[key]
        if mark not in made:
            under_way = begun.pop(id(parts[key]), None) if key in parts and key in rest else None
            found = under_way.result() if under_way else make(key)
            for k, x in found.items():
                x = _checked(x, k, types[k].shape)
                made[marks[k]] = x if known is None else x.contiguous()
            done(len(found))
        return made.pop(mark) if known is None else made[mark]

    return Weights(list(types), load)


def _begun(
    make: Callable[[str], dict[str, Tensor]], parts: Mapping[str, Func], keys: Container[str]
) -> dict[int, Future[dict[str, Tensor]]]:
    """What threads make from now on, those first that make most at once, by the part that says how."""
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="weights")
    begun = {}
    for part in sorted({id(f): f for f in parts.values()}.values(), key=lambda f: -len(f.results)):
        if wanted := [k for k in part.results if k in keys]:
            begun[id(part)] = pool.submit(make, wanted[0])
    return begun


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


def _narrowed(func: Func) -> Func:
    """A copy that reads weights in the dtype that they are rounded to, where they are only moved about before.

    Rounding an entry gives the same bits wherever it stands; a large copy in float32 is never made.
    """
    narrowed = Func(func.name, clone_block(func.block, {}))
    reads = uses(narrowed.block)
    for cast in (op for op in narrowed.block.walk() if op.name == "cast" and op.attrs["dtype"] in ("bf16", "f16")):
        chain = [cast.inputs[0]]
        while chain[-1].op is not None and chain[-1].op.name in _MOVES:
            chain += chain[-1].op.inputs
        source = chain[-1].op
        if source is None or source.name != "weight" or any(v.type.dtype != "f32" or reads[v] > 1 for v in chain):
            continue
        for v in chain:
            v.type = Type(cast.out.type.dtype, v.type.shape)
        source.attrs["type"] = chain[-1].type
    return narrowed


def _parts(func: Func) -> dict[str, Func]:
    """A function in parts that share no op but constants: for each result, the part that makes it.

    Without networkx, which `prepared` would load for this alone on the way to a first action.
    """
    above: dict[Op, Op] = {}  # towards the op that stands for a part

    def top(op: Op) -> Op:
        while above.get(op, op) is not op:
            op = above[op]
        return op

    for op in func.block.ops[:-1]:
        for v in (*op.inputs, *(uses(op.body) if op.body else ())):
            if v.op is not None and v.op.name != "const":
                above[top(v.op)] = top(op)
    tops = [top(op) for op in func.block.ops[:-1]]
    number = {op: i for i, op in enumerate(dict.fromkeys(tops))}
    home = {op: number[t] for op, t in zip(func.block.ops, tops, strict=False)}
    bodies: list[list[Op]] = [[] for _ in number]
    results: list[dict[str, Value]] = [{} for _ in bodies]
    for op in func.block.ops[:-1]:
        for body in bodies if op.name == "const" else [bodies[home[op]]]:
            body.append(op)
    for name, v in func.results.items():
        assert v.op is not None
        results[home[v.op]][name] = v
    parts: dict[str, Func] = {}
    for body, some in zip(bodies, results, strict=True):
        end = Op("return", list(some.values()), {"names": tuple(some)})
        parts |= dict.fromkeys(some, Func(func.name, Block([], [*body, end])))
    return parts


def _only(func: Func, names: Container[str]) -> Func:
    """A copy of a function cut down to some of its results."""
    cut = Func(func.name, clone_block(func.block, {}))
    kept = {n: v for n, v in cut.results.items() if n in names}
    ret = cut.block.ops[-1]
    ret.attrs, ret.inputs = {**ret.attrs, "names": tuple(kept)}, list(kept.values())
    sweep(cut)
    return cut


def _checked(x: Tensor, key: str, shape: tuple[int, ...]) -> Tensor:
    if tuple(x.shape) != shape:
        raise InputError(f"weight {key!r}: expected shape {shape}, found {tuple(x.shape)}")
    return x.detach()


def random_weights(module: Module, seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    """Seeded normal weights of sensible size for every tensor that a module names: for tests and timings."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for key, t in module.weight_types().items():
        fan = t.shape[-1] if len(t.shape) == 2 else 25  # a vector: biases and norm factors of size 0.2
        made[key] = torch.randn(t.shape, generator=generator) * (scale * fan**-0.5)
    return made
