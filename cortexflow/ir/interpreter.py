"""Runs functions op by op in torch: the one meaning of every op.

`floats` sets the precision: None obeys every declared dtype; torch.float32 or torch.float64 computes
at least in that precision wherever the module says a narrower one, so that a bfloat16 module can be
compared with what it stands for. float64 values are never narrowed, and a cast out of float64 rounds as
the module says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cortexflow.errors import InputError, VerifyError
from cortexflow.ir.builder import OPS, building
from cortexflow.ir.core import FLOATS, PREPARE, Block, Func, Module, Op, Type, Value, uses
from cortexflow.ir.dtypes import TORCH_DTYPES

Weights = Mapping[str, Tensor]
Watch = Callable[[Op, list[Tensor]], None]
_NAMES = {t: n for n, t in TORCH_DTYPES.items()}
# Ops whose results do not depend on how their operands lie in memory. Others (sums, in which order?) get dense ones.
_AS_THEY_LIE = frozenset({"add", "sub", "mul", "div", "cast", "transpose", "reshape", "slice", "concat"})


def run_module(
    module: Module, inputs: Mapping[str, Any], weights: Weights, floats: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Run `prepare`, where there is one, and all stages. Returns the results of every stage, by name."""
    if PREPARE in module.funcs:
        weights = {**weights, **run(module.funcs[PREPARE], {}, weights, floats)}
    values: dict[str, Tensor] = dict(inputs)
    results: dict[str, Tensor] = {}
    for stage in module.stages:
        results |= run(stage, {n: values[n] for n in stage.args if n in values}, weights, floats)
        values |= results
    return results


def run(
    func: Func,
    inputs: Mapping[str, Any],
    weights: Weights,
    floats: torch.dtype | None = None,
    watch: Watch | None = None,
) -> dict[str, Tensor]:
    """Run one function on named inputs; `watch` sees every op with its results."""
    if missing := [n for n in func.args if n not in inputs]:
        raise InputError(f"@{func.name} needs {', '.join(func.args)}; missing {', '.join(missing)}")
    env: dict[Value, Tensor] = {}
    for name, arg in func.args.items():
        env[arg] = _as_declared(torch.as_tensor(inputs[name]), arg.type, floats, f"@{func.name}: %{name}")
    with torch.no_grad():
        returned = _run_block(func.block, env, weights, floats, watch, uses(func.block))
    return dict(zip(func.results, returned, strict=True))


def count_runs(block: Block) -> int:
    """How many ops `watch` sees in a run: those of a loop's body once a trip, unless the loop stops early."""
    runs = (1 + (op.attrs["trips"] * count_runs(op.body) if op.body else 0) for op in block.ops)
    return sum(runs) - 1  # the last one hands over


def widened(dtype: str, floats: torch.dtype | None) -> str:
    """The dtype in which a value declared as `dtype` is computed."""
    if floats is None or dtype not in FLOATS:
        return dtype
    return dtype if FLOATS.index(dtype) < FLOATS.index(_NAMES[floats]) else _NAMES[floats]


def evaluate(op: Op, inputs: list[Tensor], floats: torch.dtype | None = None) -> Tensor:
    """The result of one op without a body: its evaluation rule, or its decomposition's."""
    definition = OPS[op.name]
    attrs = dict(op.attrs)
    if op.name not in _AS_THEY_LIE:
        inputs = [x.contiguous() for x in inputs]
    if isinstance(attrs.get("dtype"), str):
        if op.name == "cast" and op.inputs[0].type.dtype == "f64" and attrs["dtype"] in FLOATS:
            inputs = [inputs[0].to(TORCH_DTYPES[attrs["dtype"]])]  # float64 is narrowed on purpose: flow times are
        attrs["dtype"] = widened(attrs["dtype"], floats)
    if definition.evaluate is not None:
        return definition.evaluate(*inputs, **attrs)
    if definition.decompose is None:
        raise VerifyError(f"{op.name} has no evaluation rule")
    with building(Block()) as block:
        args = [Value(v.type) for v in op.inputs]
        out = definition.decompose(*args, **op.attrs)
    env = dict(zip(args, inputs, strict=True))
    for inner in block.ops:
        env[inner.out] = evaluate(inner, [env[v] for v in inner.inputs], floats)
    return env[out]


def _as_declared(x: Tensor, t: Type, floats: torch.dtype | None, what: str) -> Tensor:
    if tuple(x.shape) != t.shape:
        raise InputError(f"{what}: expected {t}, found shape {tuple(x.shape)}")
    return x.to(TORCH_DTYPES[widened(t.dtype, floats)])


def _run_block(
    block: Block,
    env: dict[Value, Tensor],
    weights: Weights,
    floats: torch.dtype | None,
    watch: Watch | None,
    remaining: Counter[Value],
) -> list[Tensor]:
    for op in block.ops:
        if op.name in ("return", "yield"):
            return [env[v] for v in op.inputs]
        if op.name == "weight":
            key, t = op.attrs["key"], op.attrs["type"]
            if key not in weights:
                raise InputError(f"weight {key!r} ({t}) is not among the {len(weights)} weights given")
            results = [_as_declared(weights[key], t, floats, f"weight {key!r}")]
        elif op.name == "loop":
            results = _run_loop(op, env, weights, floats, watch, remaining)
        else:
            results = [evaluate(op, [env[v] for v in op.inputs], floats)]
        env.update(zip(op.outputs, results, strict=True))
        if watch:
            watch(op, results)
        for v in _finished(op, remaining):
            env.pop(v, None)
    raise VerifyError("a body without return or yield")


def _finished(op: Op, remaining: Counter[Value]) -> Iterator[Value]:
    """What nothing reads any more, results included: their memory can go. Loop bodies are read as a whole."""
    reads = Counter({v: 0 for v in op.outputs})
    reads.update(op.inputs)
    if op.body:
        reads.update(uses(op.body))
    for v, n in reads.items():
        remaining[v] -= n
        if remaining[v] <= 0:
            yield v


def _run_loop(
    op: Op,
    env: dict[Value, Tensor],
    weights: Weights,
    floats: torch.dtype | None,
    watch: Watch | None,
    remaining: Counter[Value],
) -> list[Tensor]:
    assert op.body is not None
    carried = [env[v] for v in op.inputs]
    env |= {v: env[v].contiguous() for v in uses(op.body) if v in env}  # once, not at every step
    for step in range(op.attrs["trips"]):
        inner = dict(env)
        inner.update(zip(op.body.args, [torch.tensor(step, dtype=torch.int32), *carried], strict=True))
        carried.clear()  # the step alone holds them now, and lets each go at its last reader
        carried = _run_block(op.body, inner, weights, floats, watch, Counter(remaining))
        if op.attrs["early_stop"]:
            stop, *carried = carried
            if bool(stop):
                break
    return carried
