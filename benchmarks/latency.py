"""Milliseconds of one prediction on a GPU, stage by stage, beside the floor of the work and eager PyTorch.

Full-size graphs in bfloat16, batch 1, weights drawn on the card from a seed. The floor of a stage is the
larger of its operations over the card's measured matrix rate and its weights' bytes over the measured
copy bandwidth (weights of the flow are read once a step). The peer is this package's torch target in
bfloat16, eager: an ordinary PyTorch program with the same folds.
"""

from __future__ import annotations

import argparse
import statistics
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._record import record
from cortexflow.codegen import Executable, find_target
from cortexflow.compiler import lower
from cortexflow.ir import Func, Module
from cortexflow.ir.core import Block
from cortexflow.ir.cost import func_cost
from cortexflow.models import ModelConfig, Signature, VLAModelType, create_model
from cortexflow.weights import Weights, prepare

CASES = [
    (VLAModelType.PI05, Signature(views=2, prompt=48, chunk=10)),
    (VLAModelType.PI05, Signature(views=3, prompt=200, chunk=50)),
    (VLAModelType.PI0, Signature(views=2, prompt=20, chunk=50)),
]
STAGES = ("vision_encoder", "transformer_encoder", "transformer_decoder")


def drawn(module: Module) -> Weights:
    """Normal weights of sensible size, each from its name's own seed, made on the card when read."""
    types = module.weight_types()

    def load(key: str) -> Tensor:
        t = types[key]
        generator = torch.Generator(device="cuda").manual_seed(zlib.crc32(key.encode()))
        x = torch.randn(t.shape, generator=generator, device="cuda")
        return x * (x[0].numel() ** -0.5 if x.ndim > 1 else 0.1)

    return Weights(list(types), load)


def build(kind: VLAModelType, signature: Signature, target: str, dtype: str) -> tuple[Module, Executable]:
    """A full-size policy on the card."""
    model = create_model(ModelConfig(model_type=kind))
    module, _ = lower(model, signature, dtype, target)
    with torch.device("cuda"):
        stages, weights = prepare(module, drawn(model.build(signature, "bf16")))
    return stages, find_target(target).build(stages, weights, torch.device("cuda"))


def inputs_for(module: Module) -> dict[str, Tensor]:
    """Random inputs; the whole prompt bucket counts."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    made: dict[str, Tensor] = {}
    for name, t in module.inputs.items():
        if t.dtype == "bool":
            made[name] = torch.ones(t.shape, dtype=torch.bool, device="cuda")
        elif t.dtype == "i32":
            made[name] = torch.randint(3, 1000, t.shape, generator=generator, device="cuda", dtype=torch.int32)
        else:
            made[name] = torch.randn(t.shape, generator=generator, device="cuda").clamp(-1, 1)
    return made


def milliseconds(call: Callable[[], Any], runs: int, before: Callable[[], Any] = lambda: None) -> list[float]:
    """Times by device events, after three runs to warm up; `before` is not timed."""
    times = []
    for i in range(runs + 3):
        before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return times


def ceilings() -> tuple[float, float]:
    """Bytes and operations per millisecond of this card: a large copy, a large bfloat16 product."""
    a, b = (torch.randn(1 << 28, device="cuda").to(torch.bfloat16) for _ in range(2))
    copy = 2 * a.nbytes / statistics.median(milliseconds(lambda: b.copy_(a), 20))
    x, y = (torch.randn(8192, 8192, device="cuda").to(torch.bfloat16) for _ in range(2))
    return copy, 2 * 8192**3 / statistics.median(milliseconds(lambda: x @ y, 20))


def weight_traffic(block: Block, times: int = 1) -> int:
    """Bytes of weights read, those in a loop once a trip; a table gives one row a trip."""
    total = 0
    for op in block.ops:
        if op.body:
            total += weight_traffic(op.body, times * op.attrs["trips"])
        elif op.name == "gather":
            total += op.out.type.nbytes * times
        else:
            total += sum(v.type.nbytes for v in op.inputs if v.op and v.op.name == "weight") * times
    return total


def floor(func: Func, bandwidth: float, rate: float) -> float:
    """Milliseconds below which no schedule of a stage runs."""
    return max(weight_traffic(func.block) / bandwidth, func_cost(func).flops / rate)


def measure(kind: VLAModelType, signature: Signature, runs: int, ceilings: tuple[float, float]) -> list[dict[str, Any]]:
    """A row for each stage and one for the whole, the latter beside the peer."""
    torch.cuda.empty_cache()
    module, policy = build(kind, signature, "triton", "bf16")
    held = torch.cuda.memory_allocated() / 1e9
    given = inputs_for(module)
    name = f"{kind.value}, {signature.views} views, chunk {signature.chunk}, prompt {signature.prompt}"
    rows = [{"case": name, **row} for row in stage_rows(module, policy, given, runs, ceilings)]
    policy = None
    torch.cuda.empty_cache()
    _, eager = build(kind, signature, "torch", "bf16")
    peer = statistics.median(milliseconds(lambda: eager.run(given), 5))
    return [*rows[:-1], rows[-1] | {"eager ms": round(peer, 1), "weights and arena GB": round(held, 2)}]


def stage_rows(
    module: Module, policy: Any, given: dict[str, Tensor], runs: int, ceilings: tuple[float, float]
) -> list[dict[str, Any]]:
    """Replays of each stage's graph, then of the whole; identical runs must give identical bits."""
    values, rows = dict(given), []
    for stage in (*STAGES, "whole"):
        names, start = (STAGES, given) if stage == "whole" else ((stage,), dict(values))
        policy.replay(start, *names)
        write = partial(policy.write, start, *names)
        times = sorted(milliseconds(policy.graph(*names).replay, runs, write))
        low, middle = sum(floor(module.funcs[n], *ceilings) for n in names), statistics.median(times)
        row = {"stage": stage, "median ms": round(middle, 3), "p99 ms": round(times[-1 - runs // 100], 3)}
        row |= {"floor ms": round(low, 3), "share of floor": round(low / middle, 3)}
        rows.append(row | {"eager ms": "", "weights and arena GB": ""})
        if stage != "whole":
            values |= policy.run_stage(stage, values)
    actions = policy.run(given)["actions"]
    assert all(torch.equal(policy.run(given)["actions"], actions) for _ in range(20)), "identical runs differ"
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    arguments = parser.parse_args()
    card = ceilings()
    found = [row for kind, signature in CASES for row in measure(kind, signature, arguments.runs, card)]
    record("latency", found, copy_TB_s=card[0] / 1e9, bf16_TFLOP_s=card[1] / 1e9)
