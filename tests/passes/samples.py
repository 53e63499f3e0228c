"""What the passes are tried on: small and full-size models, random programs, random products with neighbours."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from cortexflow.ir import Module, Type, Value, clone, function, ops, returns, run_module
from cortexflow.models import ModelConfig, Signature, VLAModelType, create_model
from tests.ir.programs import random_func, random_tensor

SMALL = ModelConfig(
    vision_encoder_dim=24,
    encoder_dim=32,
    decoder_dim=24,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    head_dim=8,
    action_dim=6,
    chunk_size=3,
    num_diffusion_steps=4,
    vision_num_layers=2,
    vision_num_heads=3,
    vision_mlp_dim=40,
    encoder_mlp_dim=56,
    decoder_mlp_dim=40,
    patch_size=4,
    image_size=8,
    vocab_size=30,
    state_dim=5,
    max_token_len=6,
)
FULL = ModelConfig()
CONFIGS = {
    "pi05": SMALL,
    "pi0": SMALL.with_(model_type=VLAModelType.PI0),
    "pi0_folded": SMALL.with_(model_type=VLAModelType.PI0, folded_time_steps=4),
}
MODELS = tuple(CONFIGS)
FULL_CONFIGS = {"pi05": FULL, "pi0": FULL.with_(model_type=VLAModelType.PI0)}


@cache
def _built(config: ModelConfig, dtype: str, batch: int) -> Module:
    return create_model(config).build(Signature.of(config, batch=batch), dtype)


def model(name: str, dtype: str = "f32", batch: int = 2) -> Module:
    """A small model's graph, a new one at each call."""
    return clone(_built(CONFIGS[name], dtype, batch))


def full_model(name: str, dtype: str = "bf16") -> Module:
    """A released model's graph, from shapes alone, a new one at each call."""
    return clone(_built(FULL_CONFIGS[name], dtype, 1))


def data(module: Module, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and weights that keep a model's values near one: matrices are scaled by their width, masks have holes."""
    inputs = {n: random_tensor(t, f"{seed}/{n}") for n, t in module.inputs.items()}
    inputs = {n: x.abs() if not x.is_floating_point() and x.dtype != torch.bool else x for n, x in inputs.items()}
    weights = {}
    for key, t in module.weight_types().items():
        x = random_tensor(t, f"{seed}/{key}")
        weights[key] = x * t.shape[-1] ** -0.5 if len(t.shape) > 1 and x.is_floating_point() else x * 0.3
    return inputs, weights


Results = dict[str, Tensor]
Pass = Callable[[Module], object]


def results(module: Module, given: tuple[dict[str, Tensor], dict[str, Tensor]], floats: torch.dtype | None) -> Results:
    """The module's outputs."""
    found = run_module(module, *given, floats)
    return {n: found[n] for n in module.outputs}


def moved(new: Results, old: Results) -> float:
    """The largest change of any result's entry, relative to that result's largest entry."""
    assert list(new) == list(old)
    worst = 0.0
    for name, want in old.items():
        have = new[name]
        assert have.shape == want.shape and have.dtype == want.dtype
        if want.numel() and not torch.equal(have, want):
            change = (have.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)
            worst = max(worst, float(change.nan_to_num(nan=torch.inf)))
    return worst


DISCONTINUOUS = ("floor", "lt", "le", "eq", "argmax", "cast", "loop", "where", "const", "iota")


def program(seed: int, only: list[str] | None = None, weights: float = 0.6) -> Module:
    """A random program as a module; most of its arguments are turned into weights, so that passes find some to fold."""
    func = random_func(seed, only)
    rng = random.Random(seed)
    kept = []
    for arg in func.block.args:
        if rng.random() < weights:
            with function("_") as (scratch, _):
                ops.weight(key=f"given.{arg.name}", type=arg.type)
            (op,) = scratch.block.ops
            op.outputs, arg.op, arg.name = [arg], op, ""
            func.block.ops.insert(0, op)
        else:
            kept.append(arg)
    func.block.args = kept
    return Module({func.name: func})


def program_data(module: Module, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and weights of a random program."""
    inputs = {n: random_tensor(t, f"{seed}/{n}") for n, t in module.inputs.items()}
    return inputs, {k: random_tensor(t, f"{seed}/{k}") for k, t in module.weight_types().items()}


class _Neighbours:
    """Builds products of inputs and weights amid norms, scales, sums, concats and repeated rows."""

    def __init__(self, rng: random.Random, dtype: str) -> None:
        self.rng, self.dtype, self.keys = rng, dtype, 0
        self.step: Value | None = None

    def weight(self, *shape: int) -> Value:
        """A weight; in a narrow graph, often one that is cast from float32."""
        self.keys += 1
        stored = self.rng.choice(["f32", self.dtype]) if self.dtype != "f64" else "f64"
        w = ops.weight(key=f"w{self.keys}", type=Type(stored, shape))
        return w if stored == self.dtype else ops.cast(w, dtype=self.dtype)

    def known(self, *shape: int) -> Value:
        """A value that is known before an inference: a weight, a number, or something that the step decides."""
        kind = self.rng.choice(["weight", "weight", "scalar", "step"])
        if kind == "step" and self.step is not None:
            return ops.mul(self.weight(*shape), ops.cast(self.step, dtype=self.dtype))
        return ops.scalar(0.5, self.dtype) if kind == "scalar" else self.weight(*shape)

    def grow(self, pool: list[Value]) -> Value:
        """One more value, of what the pool holds, all of shape [2, 3, width]."""
        x = self.rng.choice(pool[-3:])
        width, n = x.type.shape[-1], self.rng.choice([2, 3, 5, 8])
        match self.rng.randrange(9):
            case 0 | 1 | 2:
                return ops.matmul(x, self.weight(width, n))
            case 3:
                return ops.add(x, self.known(*self.rng.choice([(width,), (1, 1, width), (3, width), (2, 3, width)])))
            case 4:
                return ops.mul(x, self.known(*self.rng.choice([(width,), (1, width), (3, 1), (1,)])))
            case 5:
                return ops.rms_norm(x, *([self.weight(width)] if self.rng.random() < 0.7 else []), eps=1e-3)
            case 6:
                affine = [self.weight(width), self.weight(width)] if self.rng.random() < 0.7 else []
                return ops.layer_norm(x, *affine, eps=1e-3)
            case 7:
                rows = ops.broadcast_to(self.weight(1, 1, n), shape=(2, 3, n))
                parts = [x, rows, self.rng.choice([v for v in pool if v.type.shape[:2] == (2, 3)])]
                return ops.concat(*self.rng.sample(parts, self.rng.choice([2, 3])), axis=-1)
        return ops.matmul(ops.broadcast_to(self.weight(1, 1, width), shape=(2, 3, width)), self.weight(width, n))


def neighbours(seed: int, dtype: str = "f32") -> Module:
    """A random function for `absorb` and `merge`: a few values, some read twice, perhaps inside a loop."""
    rng = random.Random(seed)
    make = _Neighbours(rng, dtype)
    with function("f", x=Type(dtype, (2, 3, 4))) as (f, [x]):
        pool = [x]
        for _ in range(rng.randint(2, 6)):
            pool.append(make.grow(pool))

        def body(step: Value, carried: Value) -> list[Value]:
            make.step, inner = step, [*pool, carried]
            for _ in range(rng.randint(2, 6)):
                inner.append(make.grow(inner))
            end = ops.matmul(inner[-1], make.weight(inner[-1].type.shape[-1], 4))
            return [ops.rms_norm(ops.add(carried, end), eps=1e-3)]

        if rng.random() < 0.6:
            pool += ops.loop([x], 3, body)
        read = rng.sample(pool[1:], min(len(pool) - 1, 2))
        returns(**{f"r{i}": v for i, v in enumerate({*read, pool[-1]})})
    return Module({"f": f})
