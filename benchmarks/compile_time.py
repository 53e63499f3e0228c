"""How long the compiler takes on full-size graphs, from shapes alone, and how tight its buffer plan is."""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks._record import record
from cortexflow.ir import Module
from cortexflow.ir.cost import func_cost
from cortexflow.models import ModelConfig, Signature, VLAModelType, create_model
from cortexflow.passes import run_passes
from cortexflow.passes.pipeline import pipeline
from cortexflow.passes.plan_buffers import plan_buffers

CASES = [
    (VLAModelType.PI05, Signature(views=2, prompt=200, chunk=10)),
    (VLAModelType.PI05, Signature(views=3, prompt=200, chunk=50)),
    (VLAModelType.PI0, Signature(views=2, prompt=48, chunk=50)),
    (VLAModelType.OPENVLA, Signature(views=1, prompt=21, chunk=1, steps=1)),
]
REPEATS = 5


def measure(kind: VLAModelType, signature: Signature) -> dict[str, Any]:
    """Median seconds of building, of the passes and of planning, and the plan's figures."""
    model = create_model(ModelConfig.released(kind))
    seconds: dict[str, list[float]] = {"build s": [], "passes s": [], "plan s": []}
    for _ in range(REPEATS):
        start = time.perf_counter()
        module = model.build(signature, "bf16")
        built = time.perf_counter()
        lowered, _steps = run_passes(module, lambda op: op.name.startswith("fused."), pipeline())
        lowered_at = time.perf_counter()
        stages = Module({f.name: f for f in lowered.stages}, {}, lowered.meta)
        plan = plan_buffers(stages)
        done = time.perf_counter()
        for key, took in zip(seconds, (built - start, lowered_at - built, done - lowered_at), strict=True):
            seconds[key].append(took)
    return {
        "model": kind.value,
        "views": signature.views,
        "prompt": signature.prompt,
        "chunk": signature.chunk,
        "ops in": sum(1 for f in module.funcs.values() for _ in f.block.walk()),
        "ops out": sum(1 for f in lowered.stages for _ in f.block.walk()),
        **{key: round(statistics.median(v), 3) for key, v in seconds.items()},
        "arena bytes": plan.peak,
        "lower bound": plan.lower_bound,
        "ratio": plan.peak / plan.lower_bound,
        "TFLOP": sum(func_cost(f).flops for f in lowered.stages) / 1e12,
    }


if __name__ == "__main__":
    record("compile_time", [measure(kind, signature) for kind, signature in CASES])
