"""What measurements on a card share: cases, weights drawn there, policies, times, and the floor of the work."""

from __future__ import annotations

import math
import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cortexflow.codegen import Executable, find_target
from cortexflow.compiler import lower
from cortexflow.ir import Func, Module
from cortexflow.ir.core import Block
from cortexflow.ir.cost import func_cost
from cortexflow.models import ModelConfig, Signature, VLAModel, VLAModelType, create_model
from cortexflow.weights import Weights, prepare

Case = tuple[VLAModelType, Signature]
CASES: list[Case] = [
    (VLAModelType.PI05, Signature(views=2, prompt=48, chunk=10)),
    (VLAModelType.PI05, Signature(views=3, prompt=200, chunk=50)),
    (VLAModelType.PI0, Signature(views=2, prompt=20, chunk=50)),
    (VLAModelType.OPENVLA, Signature(views=1, prompt=21, chunk=1, steps=1)),
]
WARM_UP = 3


def case_of(text: str) -> Case:
    """A case as it is written on the command line: `family:views:chunk:prompt`, such as `pi05:2:10:48`."""
    family, *numbers = text.split(":")
    views, chunk, prompt = map(int, numbers)
    kind = VLAModelType(family)
    return kind, Signature.of(ModelConfig.released(kind), views=views, prompt=prompt, chunk=chunk)


def label(case: Case) -> str:
    """A case as it stands in tables."""
    kind, s = case
    return f"{kind.value}, {s.views} views, chunk {s.chunk}, prompt {s.prompt}"


def shapes_of(module: Module) -> dict[str, tuple[int, ...]]:
    """The tensors that a module reads."""
    return {key: t.shape for key, t in module.weight_types().items()}


def drawn(shapes: Mapping[str, tuple[int, ...]], device: str = "cuda", dtype: torch.dtype = torch.float32) -> Weights:
    """Normal weights of sensible size, each from its name's own seed, made on the device when read."""

    def load(key: str) -> Tensor:
        generator = torch.Generator(device=device).manual_seed(zlib.crc32(key.encode()))
        x = torch.randn(shapes[key], generator=generator, device=device)
        return (x * (x[0].numel() ** -0.5 if x.ndim > 1 else 0.1)).to(dtype)

    return Weights(list(shapes), load)


def on_host(config: ModelConfig, source: str = "cuda") -> VLAModel:
    """A model with drawn weights that come from the host, as a checkpoint's do; `source` is where they are drawn."""
    model = create_model(config)
    made = drawn(model.get_weight_shapes(), source)
    model.weights = Weights(list(made), lambda key: made[key].cpu())
    return model


def episodes(config: ModelConfig, count: int, views: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Random (pictures [count, views, size, size, 3] uint8, prompts of 5 to 47 token ids)."""
    random, size = np.random.default_rng(0), config.image_size
    pictures = random.integers(0, 256, (count, views, size, size, 3), dtype=np.uint8)
    return pictures, [random.integers(3, 1000, int(n)) for n in random.integers(5, 48, count)]


def build(
    config: ModelConfig,
    signature: Signature,
    target: str,
    dtype: str,
    *,
    without: Sequence[str] = (),
    tune: bool = False,
    device: str = "cuda",
) -> tuple[Module, Executable]:
    """A policy with drawn weights on a device: (its stages, what the target built).

    `without` names the optimisations to leave out, of the passes and of the target; `tune` as in `compile`.
    """
    found = find_target(target)
    module, steps = lower(create_model(config), signature, dtype, target, without=without)
    with torch.device(device):
        stages, weights = prepare(module, drawn(shapes_of(steps[0].module), device))
    options: dict[str, Any] = {"tune": tune} if "tune" in found.options else {}
    if found.switches:
        options["without"] = frozenset(without) & found.switches.keys()
    return stages, found.build(stages, weights, torch.device(device), **options)


def inputs_for(module: Module, seed: int = 0, device: str = "cuda") -> dict[str, Tensor]:
    """Random inputs; every camera is there and the whole prompt bucket counts."""
    generator = torch.Generator(device=device).manual_seed(seed)
    made: dict[str, Tensor] = {}
    for name, t in module.inputs.items():
        if t.dtype == "bool":
            made[name] = torch.ones(t.shape, dtype=torch.bool, device=device)
        elif t.dtype == "i32":
            made[name] = torch.randint(3, 1000, t.shape, generator=generator, device=device, dtype=torch.int32)
        else:
            made[name] = torch.randn(t.shape, generator=generator, device=device).clamp(-1, 1)
    return made


# ---- times ----------------------------------------------------------------------------------------


def by_events(call: Callable[[], Any], runs: int, before: Callable[[], Any] = lambda: None) -> list[float]:
    """Milliseconds by device events, after some runs to warm up; `before` is not timed."""
    times = []
    for i in range(runs + WARM_UP):
        before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        if i >= WARM_UP:
            times.append(start.elapsed_time(end))
    return times


def by_clock(call: Callable[[], Tensor], runs: int) -> tuple[list[float], int]:
    """(milliseconds of each call by the host's clock, how many gave the bits of the first).

    A call is to end with its result on the host, as its caller needs it: that waits for the card.
    """
    for _ in range(WARM_UP):
        first = call()
    times, same = [], 0
    for _ in range(runs):
        start = time.perf_counter()
        result = call()
        times.append((time.perf_counter() - start) * 1e3)
        same += torch.equal(result, first)
    return times, same


def p99(times: Sequence[float]) -> float:
    """The smallest time that 99 in 100 do not exceed."""
    return sorted(times)[math.ceil(0.99 * len(times)) - 1]


# ---- the floor ------------------------------------------------------------------------------------


def ceilings() -> tuple[float, float]:
    """Bytes and operations per millisecond of this card: a large copy, a large bfloat16 product."""
    a, b = (torch.randn(1 << 28, device="cuda").to(torch.bfloat16) for _ in range(2))
    copy = 2 * a.nbytes / statistics.median(by_events(lambda: b.copy_(a), 20))
    x, y = (torch.randn(8192, 8192, device="cuda").to(torch.bfloat16) for _ in range(2))
    return copy, 2 * 8192**3 / statistics.median(by_events(lambda: x @ y, 20))


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
