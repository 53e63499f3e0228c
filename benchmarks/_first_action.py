"""The process that `cold_start` measures: from its start to a first action, and where the time went.

    python -m benchmarks._first_action '{"checkpoint": ..., "started": <the parent's clock>, ...}'

The host's monotonic clock is the same for parent and child. Nothing heavy is imported before it is timed.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

Seconds = defaultdict[str, float]  # by part
clock = time.perf_counter
# what a user's `cortexflow.compile` does, by the names that `cortexflow.compiler` calls it by
PARTS = {
    "load_model": "open the checkpoint",
    "lower": "passes",
    "prepared": "prepare weights",  # plans it; `watch` adds the runs
}
BESIDE = "{}, in other threads"


def main() -> None:
    """Compile, act, print one line of JSON."""
    given = json.loads(sys.argv[1])
    spans: Seconds = defaultdict(float, {"start of Python": clock() - given["started"]})
    import torch

    spans["import torch"] = clock() - given["started"] - spans["start of Python"]
    begun = clock()
    import cortexflow

    spans["import cortexflow"] = clock() - begun
    watch(spans)
    policy = cortexflow.compile(given["checkpoint"], given["target"], progress=False, **given["options"])
    inputs = {name: value(torch, t) for name, t in policy.inputs.items()}
    first = clock()
    actions = act(policy, inputs)
    done = clock()
    spans["first call"] = done - first
    kernels = {"compiled": int(spans.pop("kernels", 0)), "seconds": spans.pop("kernel seconds", 0.0)}
    later = []
    for _ in range(20):
        start = clock()
        again = act(policy, inputs)
        later.append(clock() - start)
    result = {
        "total": done - given["started"],
        "from the import": done - begun,
        "spans": dict(spans),
        "kernels": kernels,
        "a later call": sorted(later)[10],
        "same bits": torch.equal(actions, again),
        "finite": bool(torch.isfinite(actions).all()),
        "peak GB": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0,
        "reserved GB": torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else 0.0,
    }
    print(json.dumps(result))


def watch(spans: Seconds) -> None:
    """Add up the time of the parts of `compile`, of reading tensors, and of Triton's compiler."""
    from dataclasses import replace

    from cortexflow import compiler, large_weights, weights
    from cortexflow.checkpoints import Checkpoint

    inner: list[float] = []  # of each part under way in this thread, what parts within it took
    names = vars(compiler)
    for name, part in PARTS.items():
        if name in names:
            names[name] = timed(spans, inner, part, names[name])
    vars(weights)["run"] = timed(spans, inner, PARTS["prepared"], weights.run)
    vars(large_weights)["make"] = timed(spans, inner, PARTS["prepared"], large_weights.make)
    reading = timed(spans, inner, "read and check tensors", Checkpoint.load_checked)
    Checkpoint.load_checked = reading  # type: ignore[method-assign]
    find = names["find_target"]
    parts = ("build", "plan")
    names["find_target"] = lambda name: replace(
        find(name), **{part: timed(spans, inner, part, getattr(find(name), part)) for part in parts}
    )

    def heard(*, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            spans["kernels"] += 1
            spans["kernel seconds"] += times.total / 1e6

    try:
        from triton import knobs
    except ImportError:  # no Triton on this machine: no kernels to count
        return
    knobs.compilation.listener = heard


def timed(spans: Seconds, inner: list[float], part: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, its own time added up: without that of the parts that it calls."""

    @functools.wraps(call)
    def run(*args: Any, **options: Any) -> Any:
        here, start = threading.current_thread() is threading.main_thread(), clock()
        if here:
            inner.append(0.0)
        try:
            return call(*args, **options)
        finally:
            took = clock() - start
            if here:
                spans[part] += took - inner.pop()
                if inner:
                    inner[-1] += took
            else:
                spans[BESIDE.format(part)] += took

    return run


def act(policy: Any, inputs: dict[str, Any]) -> Any:
    """The actions, on the host."""
    return policy(**inputs).cpu()


def value(torch: Any, t: Any) -> Any:
    """An input of a type, on the host."""
    if t.dtype == "bool":
        return torch.ones(t.shape, dtype=torch.bool)
    if t.dtype == "i32":
        return torch.randint(3, 90, t.shape, dtype=torch.int32)
    return torch.randn(t.shape).clamp(-1, 1)


if __name__ == "__main__":
    main()
