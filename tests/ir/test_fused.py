"""Fused ops: each is its decomposition, in every precision, down to primitive ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cortexflow.ir import OPS, Block, Func, Op, Type, Value, building, function, fused, ops, returns, run
from cortexflow.ir.builder import fused as fusion
from cortexflow.ir.core import clone_op
from cortexflow.ir.fused import FUSED
from cortexflow.ir.interpreter import evaluate
from cortexflow.ir.ops import TORCH_DTYPES
from tests.ir.programs import MAKERS, random_func, random_tensor

NAMES = sorted(n for n in MAKERS if n.startswith("fused."))


def some_op(name: str, seed: int, dtype: str = "f32") -> Op:
    """One fused op on operands of random shapes."""
    func = random_func(seed, [name], floats=[dtype], length=1)
    return next(op for op in func.block.ops if op.name == name)


def expand(op: Op, values: list[Value]) -> Value:
    """Emit what a fused op stands for, one level down."""
    decompose = OPS[op.name].decompose
    assert decompose is not None
    return decompose(*values, **op.attrs)


def expanded(op: Op) -> Func:
    """A function of the primitive ops that a fused op stands for."""
    with function("parts", **{f"x{i}": v.type for i, v in enumerate(op.inputs)}) as (func, values):
        returns(y=expand(op, values))
    while fusion := next((o for o in func.block.ops if o.name.startswith("fused.")), None):
        at = func.block.ops.index(fusion)
        with building(Block()) as block:
            result = expand(fusion, fusion.inputs)
        env = {fusion.out: result}
        rest = [clone_op(o, env) for o in func.block.ops[at + 1 :]]
        func.block.ops = [*func.block.ops[:at], *block.ops, *rest]
    return func


def operands(op: Op, seed: int, floats: torch.dtype | None = None) -> list[Tensor]:
    return [random_tensor(v.type, f"{seed}/{i}", floats) for i, v in enumerate(op.inputs)]


def test_all_fused_ops_are_listed_and_tested() -> None:
    listed = {f"fused.{f.__name__}" for f in FUSED}
    assert len(listed) == len(FUSED)
    assert listed == set(NAMES)
    built = {n for n, f in vars(fused).items() if f"fused.{n}" in OPS and callable(f) and n != "FUSED"}
    assert {f"fused.{n}" for n in built} == listed, "a fused op is missing from FUSED"


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_op_says_what_it_is(name: str) -> None:
    definition = OPS[name]
    assert definition.doc and definition.decompose is not None and definition.evaluate is None and not definition.view


@pytest.mark.parametrize("name", NAMES)
def test_decomposition_ends_in_primitives_of_the_same_type(name: str) -> None:
    for seed in range(8):
        op = some_op(name, seed, dtype=["f32", "bf16", "f64", "f16"][seed % 4])
        func = expanded(op)
        assert all(OPS[o.name].evaluate or o.name == "return" for o in func.block.ops)
        assert len(func.block.ops) > 2, "a fused op of one op is no fusion"
        assert func.results["y"].type == op.out.type


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "f16"])
@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_that_of_the_parts_step_by_step(name: str, dtype: str) -> None:
    """To the bit, rounding between the parts included."""
    for seed in range(4):
        op = some_op(name, seed, dtype)
        given = operands(op, seed)
        (wanted,) = run(expanded(op), {f"x{i}": x for i, x in enumerate(given)}, {}).values()
        found = evaluate(op, given)
        assert found.dtype == TORCH_DTYPES[dtype] and tuple(found.shape) == op.out.type.shape
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_wide_run_widens_the_parts_too(name: str) -> None:
    op = some_op(name, 1, "bf16")
    given = operands(op, 1, torch.float64)
    found = evaluate(op, given, torch.float64)
    (wanted,) = run(expanded(op), {f"x{i}": x for i, x in enumerate(given)}, {}, torch.float64).values()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_wide_run_widens_casts_inside_the_parts() -> None:
    try:

        @fusion
        def test_rounded(x: Value, w: Value) -> Value:
            """A product between two casts."""
            return ops.cast(ops.matmul(ops.cast(x, dtype="bf16"), w, dtype="f16"), dtype="f32")

        with function("f", x=Type("f32", (2, 3)), w=Type("bf16", (3, 4))) as (func, values):
            test_rounded(*values)
        (op,) = func.block.ops
        x, w = operands(op, 0, torch.float64)
        x = x + 1e-9
        torch.testing.assert_close(evaluate(op, [x, w], torch.float64), x @ w, rtol=0, atol=1e-14)
        narrow = evaluate(op, [x.float(), w.bfloat16()])
        assert torch.equal(narrow, (x.float().bfloat16().float() @ w.float()).half().float())
    finally:
        OPS.pop("fused.test_rounded", None)


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def segments(q: Tensor, k0: Tensor, v0: Tensor, k1: Tensor, v1: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, torch.cat([k0, k1], 1), torch.cat([v0, v1], 1)))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.5).transpose(1, 2)


def rotated(q: Tensor, k0: Tensor, v0: Tensor, k1: Tensor, v1: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Each pair (x_j, x_{j + d/2}) as a complex number, times cos + i sin."""

    def turn(x: Tensor) -> Tensor:
        y = torch.complex(*x.chunk(2, -1)) * torch.complex(c, s).unsqueeze(-2)
        return torch.cat([y.real, y.imag], -1)

    return segments(turn(q), k0, v0, turn(k1), v1)


X, W, B, R, ROW = (5, 6), (6, 8), (8,), (5, 8), (1, 6)
EPS = {"eps": 1e-6}
GLU = {"kind": "silu", "width": 4}
FORMULAS: dict[str, tuple[tuple[tuple[int, ...], ...], dict[str, object], Callable[..., Tensor]]] = {
    # operand shapes, attributes, what comes out
    "linear": ((X, W, B), {}, lambda x, w, b: x @ w + b),
    "linear_act": ((X, W, B), {"kind": "gelu"}, lambda x, w, b: F.gelu(x @ w + b)),
    "linear_residual": ((R, X, W, B), {}, lambda r, x, w, b: r + (x @ w + b)),
    "matmul_residual": ((R, X, W), {}, lambda r, x, w: r + x @ w),
    "matmul_gated_residual": ((R, X, W, (1, 8)), {}, lambda r, x, w, gate: r + x @ w * gate),
    "glu": ((R,), GLU, lambda h: F.silu(h[:, :4]) * h[:, 4:]),
    "matmul_glu": ((X, W), GLU, lambda x, w: F.silu(x @ w[:, :4]) * (x @ w[:, 4:])),
    "norm_matmul": ((X, W), EPS, lambda x, w: rms(x) @ w),
    "norm_glu": ((X, W), EPS | GLU, lambda x, w: F.silu(rms(x) @ w[:, :4]) * (rms(x) @ w[:, 4:])),
    "modulated_norm": ((X, ROW, ROW), EPS, lambda x, s, t: rms(x) * s + t),
    "modulated_norm_matmul": ((X, ROW, ROW, W), EPS, lambda x, s, t, w: (rms(x) * s + t) @ w),
    "modulated_norm_glu": (
        (X, ROW, ROW, W),
        EPS | {"kind": "gelu_tanh", "width": 4},
        lambda x, s, t, w: F.gelu((rms(x) * s + t) @ w[:, :4], approximate="tanh") * ((rms(x) * s + t) @ w[:, 4:]),
    ),
    "layer_norm_linear": ((X, W, B), EPS, lambda x, w, b: layer_norm(x) @ w + b),
    "layer_norm_linear_act": ((X, W, B), EPS | {"kind": "relu"}, lambda x, w, b: F.relu(layer_norm(x) @ w + b)),
    "attention_segments": (
        ((2, 3, 4, 5), (2, 6, 2, 5), (2, 6, 2, 7), (2, 3, 2, 5), (2, 3, 2, 7)),
        {"scale": 0.5, "causal": False},
        segments,
    ),
    "rotated_attention_segments": (
        ((2, 3, 4, 6), (2, 6, 2, 6), (2, 6, 2, 7), (2, 3, 2, 6), (2, 3, 2, 7), (2, 3, 3), (2, 3, 3)),
        {"scale": 0.5, "causal": False},
        rotated,
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_each_is_the_formula_that_it_stands_for(name: str) -> None:
    """Written again without the IR's ops: a wrong body would otherwise be its own proof."""
    build = name.removeprefix("fused.")
    shapes, attrs, wanted = FORMULAS[build]
    given = [random_tensor(Type("f64", s), f"{build}/{i}") for i, s in enumerate(shapes)]
    everything = [torch.ones(2, 3, 9, dtype=torch.bool)] if build.endswith("attention_segments") else []
    types = [Type("f64", s) for s in shapes] + [Type("bool", tuple(e.shape)) for e in everything]
    with function("f", **{f"x{i}": t for i, t in enumerate(types)}) as (func, values):
        getattr(fused, build)(*values, **attrs)
    found = evaluate(func.block.ops[0], [*given, *everything])
    torch.testing.assert_close(found, wanted(*given), rtol=1e-12, atol=1e-12)


def test_fused_ops_nest_by_one_level() -> None:
    """The expansion of one level may hold fused ops, so that a target takes the largest that it has."""
    with function("f", x=Type("f32", (2, 6)), w=Type("f32", (6, 8))) as (_, [x, w]):
        y = fused.norm_glu(x, w, eps=1e-6, kind="relu", width=4)
    assert y.op is not None
    with function("parts", x=x.type, w=w.type) as (func, values):
        expand(y.op, values)
    assert [o.name for o in func.block.ops] == ["rms_norm", "fused.matmul_glu"]


def test_a_body_carries_no_note_of_its_own() -> None:
    """Type and cost rules build the parts aside: the function under construction does not see them."""
    with function("f", x=Type("f32", (2, 6)), w=Type("f32", (6, 8))) as (func, [x, w]):
        fused.norm_matmul(x, w, eps=1e-6)
        ops.neg(x)
    assert [o.name for o in func.block.ops] == ["fused.norm_matmul", "neg"]
