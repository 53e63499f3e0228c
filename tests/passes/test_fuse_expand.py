"""Fusing, then expanding, gives back the same graph: for every fused op, random programs and every model."""

from __future__ import annotations

from collections import Counter

import pytest

from cortexflow.ir import Module, Type, clone, dump, function, ops, parse, returns, scope, verify
from cortexflow.ir.builder import OPS
from cortexflow.ir.compare import same_func
from cortexflow.ir.fused import FUSED
from cortexflow.passes import PIPELINE, fuse, legalize
from cortexflow.passes.canonicalize import canonicalize
from tests.ir.programs import MAKERS
from tests.passes.samples import FULL_CONFIGS, MODELS, full_model, model, program

X, R, W, B, H = (Type("f32", s) for s in ((2, 3), (2, 8), (3, 8), (8,), (2, 8)))
MOD, GATE, Q, KV, MASK = Type("f32", (1, 3)), Type("f32", (1, 8)), (1, 2, 4, 8), (1, 3, 2, 8), Type("bool", (1, 1, 6))
EPS, GLU = {"eps": 1e-6}, {"kind": "silu", "width": 4}
OPERANDS: dict[str, tuple[list[Type], dict]] = {
    "linear": ([X, W, B], {}),
    "linear_act": ([X, W, B], {"kind": "gelu"}),
    "linear_residual": ([R, X, W, B], {}),
    "matmul_residual": ([R, X, W], {}),
    "matmul_gated_residual": ([R, X, W, GATE], {}),
    "glu": ([H], GLU),
    "matmul_glu": ([X, W], GLU),
    "norm_matmul": ([X, W], EPS),
    "norm_glu": ([X, W], {**EPS, **GLU}),
    "modulated_norm": ([X, MOD, MOD], EPS),
    "modulated_norm_matmul": ([X, MOD, MOD, W], EPS),
    "modulated_norm_glu": ([X, MOD, MOD, W], {**EPS, **GLU}),
    "layer_norm_linear": ([X, W, B], EPS),
    "layer_norm_linear_act": ([X, W, B], {**EPS, "kind": "gelu_tanh"}),
    "attention_segments": (
        [Type("f32", s) for s in (Q, KV, KV, KV, KV)] + [MASK],
        {"scale": 0.35, "causal": True},
    ),
    "rotated_attention_segments": (
        [Type("f32", s) for s in ((1, 3, 4, 8), KV, KV, KV, KV)] + [Type("f32", (1, 3, 4))] * 2 + [MASK],
        {"scale": 0.35, "causal": True},
    ),
}


def ground(module: Module) -> int:
    return legalize(module, lambda op: False)


def test_every_fused_op_is_tried() -> None:
    names = [f.__name__ for f in FUSED]
    assert sorted(names) == sorted(OPERANDS)
    assert sorted(f"fused.{n}" for n in names) == sorted(n for n in OPS if n.startswith("fused."))


@pytest.mark.parametrize("in_loop", [False, True], ids=["straight", "in a loop"])
@pytest.mark.parametrize("build", FUSED, ids=lambda f: f.__name__)
def test_a_fused_op_is_found_and_expanded(build, in_loop: bool) -> None:
    types, attrs = OPERANDS[build.__name__]
    with function("f", **{f"x{i}": t for i, t in enumerate(types)}) as (f, args):
        with scope("layers.0"):
            if in_loop:
                (y,) = ops.loop(
                    [args[0]],
                    2,
                    lambda i, c: [ops.mul(c, ops.reduce_sum(build(*args, **attrs), axes=AXES[build.__name__]))],
                )
            else:
                y = build(*args, **attrs)
        returns(y=y)
    module = Module({"f": f})
    assert ground(module) >= 1
    verify(module)
    before = clone(module)

    fired = fuse(module, [build])
    verify(module)
    assert fired == Counter({f"fused.{build.__name__}": 1})
    (op,) = [op for op in module.funcs["f"].block.walk() if op.name.startswith("fused.")]
    assert op.attrs == OPS[op.name].complete(attrs) and op.note == "layers.0"
    assert same_func(parse(dump(module)).funcs["f"], module.funcs["f"])

    ground(module)
    verify(module)
    assert same_func(module.funcs["f"], before.funcs["f"])


AXES = {name: tuple(range(4 if name.endswith("attention_segments") else 2)) for name in OPERANDS}


def test_random_programs_of_fused_ops() -> None:
    names = [n for n in MAKERS if n.startswith("fused.")]
    fired: Counter[str] = Counter()
    for seed in range(80):
        module = program(seed, [*names, "add", "mul", "concat"])
        ground(module)
        canonicalize(module)
        before = clone(module)
        fired += fuse(module)
        verify(module)
        ground(module)
        verify(module)
        for name, func in module.funcs.items():
            assert same_func(func, before.funcs[name]), seed
    assert len(fired) >= len(FUSED) - 2


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, dtype: str) -> None:
    check_module(model(name, dtype))


@pytest.mark.parametrize("name", FULL_CONFIGS)
def test_full_models(name: str) -> None:
    check_module(full_model(name))


def check_module(module: Module) -> None:
    for step, run in PIPELINE:
        if step == "fuse":
            before = clone(module)
            assert run(module)
            break
        run(module)
    ground(module)
    assert list(module.funcs) == list(before.funcs)
    for name, func in module.funcs.items():
        assert same_func(func, before.funcs[name]), name
