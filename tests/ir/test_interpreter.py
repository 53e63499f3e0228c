"""The interpreter: precision as asked for, stages wired by name, clear complaints, memory given back."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from cortexflow.errors import InputError
from cortexflow.ir import PREPARE, Func, Module, Op, Type, Value, function, fused, ops, returns, run, run_module
from cortexflow.ir.interpreter import count_runs, evaluate
from cortexflow.ir.ops import TORCH_DTYPES
from tests.ir.programs import random_func, random_inputs, random_weights

VECTOR = Type("f32", (4,))


# ---- memory order ------------------------------------------------------------------------------------


def test_a_transpose_is_a_view_and_results_do_not_show_it() -> None:
    """Moves and entry-wise ops keep the order in which their operand lies; sums are made over dense operands."""
    w, x, s = torch.randn(96, 40), torch.randn(1, 40), torch.randn(40, 1)
    with function("f", w=Type("f32", (96, 40)), x=Type("f32", (1, 40)), s=Type("f32", (40, 1))) as (f, [w_, x_, s_]):
        turned = ops.transpose(w_, perm=(1, 0))
        scaled = ops.cast(ops.mul(turned, s_), dtype="bf16")
        read = ops.transpose(w_, perm=(1, 0))  # by every step of a loop
        (looped,) = ops.loop([x_], 2, lambda i, y: [ops.slice_(ops.matmul(y, read), axis=1, stop=40)])
        returns(turned=turned, joined=ops.concat(scaled, scaled, axis=1), product=ops.matmul(x_, turned), looped=looped)
    found = run(f, {"w": w, "x": x, "s": s}, {})
    dense = w.t().contiguous()
    assert found["turned"].data_ptr() == w.data_ptr() and found["joined"].t().is_contiguous()
    assert torch.equal(found["joined"], torch.cat([(dense * s).bfloat16()] * 2, dim=1))
    assert torch.equal(found["product"], x @ dense)
    assert torch.equal(found["looped"], ((x @ dense)[:, :40] @ dense)[:, :40])


# ---- precision ---------------------------------------------------------------------------------------


def mixed() -> Func:
    """bf16 and f32 and f64 and integers, with constants and casts of each."""
    with function("f", x=Type("bf16", (4,)), y=Type("f64", (4,)), n=Type("i32", (4,))) as (f, [x, y, n]):
        third = ops.scalar(1 / 3, "bf16")
        narrow = ops.mul(x, third)
        wide = ops.add(ops.cast(narrow, dtype="f64"), y)
        single = ops.cast(wide, dtype="f32")
        product = ops.matmul(ops.reshape(x, shape=(1, 4)), ops.reshape(x, shape=(4, 1)), dtype="f32")
        w = ops.weight(key="w", type=Type("f16", (4,)))
        steps = ops.iota(size=4, dtype="bf16")
        returns(narrow=narrow, wide=wide, single=single, product=product, w=w, steps=steps, n=ops.add(n, n))
    return f


def run_mixed(floats: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(4, dtype=torch.float64), "y": torch.randn(4, dtype=torch.float64)}
    inputs["n"] = torch.arange(4)
    weights = {"w": torch.randn(4, dtype=torch.float64)}
    return run(mixed(), inputs, weights, floats), inputs | weights


def test_declared_dtypes_are_obeyed() -> None:
    found, given = run_mixed(None)
    names = ("bfloat16", "float64", "float32", "float32", "float16", "bfloat16", "int32")
    assert [str(t.dtype) for t in found.values()] == [f"torch.{n}" for n in names]
    x = given["x"].bfloat16()
    assert torch.equal(found["narrow"], x * torch.tensor(1 / 3, dtype=torch.bfloat16))
    assert torch.equal(found["product"], (x.float() @ x.float()).reshape(1, 1))
    assert torch.equal(found["w"], given["w"].half())


@pytest.mark.parametrize("floats", [torch.float32, torch.float64])
def test_a_wider_run_rounds_nothing_narrower(floats: torch.dtype) -> None:
    found, given = run_mixed(floats)
    narrower = {n: t.dtype for n, t in found.items() if n not in ("wide", "n")}
    assert set(narrower.values()) == {floats}
    assert found["wide"].dtype == torch.float64, "float64 is never narrowed"
    assert found["n"].dtype == torch.int32, "integers stay"
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if floats == torch.float32 else {"rtol": 0, "atol": 1e-15}
    torch.testing.assert_close(found["narrow"], (given["x"] / 3).to(floats), **tolerance)
    torch.testing.assert_close(found["product"][0, 0], (given["x"] @ given["x"]).to(floats), **tolerance)


def test_float64_statistics_are_float64_even_in_a_float32_run() -> None:
    with function("f", x=Type("f64", (3, 5))) as (f, [x]):
        returns(y=ops.layer_norm(x, eps=1e-6), z=ops.softmax(x), s=ops.reduce_mean(x, axes=(0, 1)))
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = run(f, {"x": x}, {}, torch.float32)
    torch.testing.assert_close(found["y"], torch.nn.functional.layer_norm(x, (5,), eps=1e-6), rtol=0, atol=1e-14)
    torch.testing.assert_close(found["z"], x.softmax(-1), rtol=0, atol=1e-15)
    torch.testing.assert_close(found["s"], x.mean(), rtol=0, atol=1e-15)


def test_every_value_of_a_wide_run_is_wide() -> None:
    for seed in range(40):
        func = random_func(seed, floats=["bf16", "f16", "f32"], length=5)
        seen: list[Tensor] = []
        run(
            func,
            random_inputs(func, seed),
            random_weights(func, seed),
            torch.float64,
            lambda _, results, seen=seen: seen.extend(results),
        )
        assert {t.dtype for t in seen if t.is_floating_point()} <= {torch.float64}


def test_declared_and_wide_runs_agree_up_to_rounding() -> None:
    """A float32 program gives in float32 what it gives in float64, wherever it does not branch on a rounding."""
    smooth = ["add", "mul", "matmul", "attention", "layer_norm", "rope", "conv2d", "softmax", "fused.norm_glu", "act"]
    for seed in range(20):
        func = random_func(seed, smooth)
        inputs, weights = random_inputs(func, seed), random_weights(func, seed)
        exact = run(func, inputs, weights, torch.float64)
        for name, found in run(func, inputs, weights).items():
            torch.testing.assert_close(found.double(), exact[name].double(), rtol=1e-3, atol=1e-3)


# ---- modules -----------------------------------------------------------------------------------------


def two_stages() -> Module:
    """prepare: v = 2 w; first: h = x + v; second: y = h + n."""
    with function(PREPARE) as (prepare, _):
        w = ops.weight(key="w", type=VECTOR)
        returns(v=ops.add(w, w))
    with function("first", x=VECTOR) as (first, [x]):
        returns(h=ops.add(x, ops.weight(key="v", type=VECTOR)), extra=ops.neg(x))
    with function("second", h=VECTOR, n=VECTOR) as (second, [h, n]):
        returns(y=ops.add(h, n))
    return Module({f.name: f for f in (prepare, first, second)})


def test_stages_are_wired_by_name_and_prepare_runs_first() -> None:
    x, n, w = torch.arange(4.0), torch.ones(4), torch.full((4,), 0.5)
    found = run_module(two_stages(), {"x": x, "n": n}, {"w": w})
    assert list(found) == ["h", "extra", "y"]
    assert torch.equal(found["y"], x + 1 + 1) and torch.equal(found["extra"], -x)


def test_a_stage_reads_the_result_and_not_an_input_of_that_name() -> None:
    given = {"x": torch.zeros(4), "n": torch.zeros(4), "h": torch.full((4,), 99.0)}
    assert torch.equal(run_module(two_stages(), given, {"w": torch.ones(4)})["y"], torch.full((4,), 2.0))


def test_prepared_weights_stand_in_for_given_ones_of_that_name() -> None:
    with function(PREPARE) as (prepare, _):
        returns(w=ops.neg(ops.weight(key="w", type=VECTOR)))
    with function("f") as (f, _):
        returns(y=ops.weight(key="w", type=VECTOR))
    found = run_module(Module({PREPARE: prepare, "f": f}), {}, {"w": torch.ones(4)})
    assert torch.equal(found["y"], -torch.ones(4))


def test_prepare_runs_in_the_precision_of_the_rest() -> None:
    w = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    found = run_module(two_stages(), {"x": torch.zeros(4), "n": torch.zeros(4)}, {"w": w}, torch.float64)
    assert torch.equal(found["y"], 2 * w)


def test_inputs_may_be_numpy_or_numbers() -> None:
    with function("f", x=VECTOR, n=Type("i32", ())) as (f, [x, n]):
        returns(y=ops.gather(x, n))
    assert run(f, {"x": np.arange(4.0), "n": 2}, {})["y"].item() == 2.0


# ---- complaints --------------------------------------------------------------------------------------


def test_missing_inputs_are_named() -> None:
    with pytest.raises(InputError, match="@second needs h, n; missing n"):
        run_module(two_stages(), {"x": torch.zeros(4)}, {"w": torch.zeros(4)})


def test_missing_weights_are_named() -> None:
    with pytest.raises(InputError, match=r"weight 'w' \(f32\[4\]\) is not among the 1 weights given"):
        run_module(two_stages(), {"x": torch.zeros(4), "n": torch.zeros(4)}, {"u": torch.zeros(4)})


def test_misshapen_inputs_and_weights_are_named() -> None:
    with pytest.raises(InputError, match=r"@first: %x: expected f32\[4\], found shape \(2, 2\)"):
        run_module(two_stages(), {"x": torch.zeros(2, 2), "n": torch.zeros(4)}, {"w": torch.zeros(4)})
    with pytest.raises(InputError, match=r"weight 'w': expected f32\[4\], found shape \(5,\)"):
        run_module(two_stages(), {"x": torch.zeros(4), "n": torch.zeros(4)}, {"w": torch.zeros(5)})


# ---- what running leaves behind ------------------------------------------------------------------------


def watched(func: Func, inputs: dict[str, Tensor], at: str) -> dict[str, int]:
    """How many results of each kind of op are alive when ops named `at` have run."""
    alive: dict[str, list[weakref.ref[Tensor]]] = {}
    found: dict[str, int] = {}

    def watch(op: Op, results: list[Tensor]) -> None:
        alive.setdefault(op.name, []).extend(map(weakref.ref, results))
        if op.name == at:
            gc.collect()
            found.update({name: sum(r() is not None for r in refs) for name, refs in alive.items()})

    run(func, inputs, {}, watch=watch)
    return found


def test_memory_is_given_back_when_nothing_reads_a_value_any_more() -> None:
    with function("f", x=VECTOR) as (f, [x]):
        for _ in range(10):
            x = ops.neg(x)
        x = ops.exp(ops.cos(x))
        returns(y=ops.sin(x))
    assert watched(f, {"x": torch.zeros(4)}, "sin") == {"neg": 0, "cos": 0, "exp": 1, "sin": 1}


def test_results_that_nobody_reads_are_given_back_at_once() -> None:
    with function("f", x=VECTOR) as (f, [x]):
        for _ in range(10):
            ops.neg(x)
        kept = ops.exp(x)
        returns(y=ops.sin(x), kept=kept)
    assert watched(f, {"x": torch.zeros(4)}, "sin") == {"neg": 0, "exp": 1, "sin": 1}


def test_loops_give_back_the_values_of_a_step_and_keep_outer_ones() -> None:
    with function("f", x=VECTOR) as (f, [x]):
        outer = ops.exp(x)

        def body(_: Value, c: Value) -> list[Value]:
            return [ops.sin(ops.neg(ops.neg(ops.add(c, outer))))]

        (y,) = ops.loop([x], 5, body)
        returns(y=ops.cos(y))
    assert watched(f, {"x": torch.zeros(4)}, "sin") == {"exp": 1, "add": 0, "neg": 1, "sin": 1}
    after = {"exp": 0, "add": 0, "neg": 0, "sin": 1, "loop": 1, "cos": 1}  # the last sin is the loop's result
    assert watched(f, {"x": torch.zeros(4)}, "cos") == after


def test_an_outer_value_is_there_in_every_step_and_after() -> None:
    with function("f", x=VECTOR) as (f, [x]):
        outer = ops.exp(x)
        (y,) = ops.loop([x], 3, lambda _, c: ops.loop([c], 2, lambda _, d: [ops.add(d, outer)]))
        returns(y=ops.add(y, outer))
    assert torch.equal(run(f, {"x": torch.zeros(4)}, {})["y"], torch.full((4,), 7.0))


def test_nothing_is_recorded_for_gradients_and_inputs_stay_as_they_are() -> None:
    with function("f", x=VECTOR) as (f, [x]):
        new = ops.reshape(ops.weight(key="w", type=Type("f32", ())), shape=(1,))
        returns(y=ops.cache_update(x, new, ops.scalar(1, "i32"), axis=0), same=x)
    x = torch.zeros(4)
    found = run(f, {"x": x}, {"w": torch.nn.Parameter(torch.tensor(5.0))})
    assert found["y"].tolist() == [0, 5, 0, 0] and not found["y"].requires_grad
    assert x.tolist() == [0, 0, 0, 0] and found["same"].tolist() == [0, 0, 0, 0]


def test_watch_sees_every_op_in_order() -> None:
    with function("f", x=VECTOR) as (f, [x]):
        (y,) = ops.loop([ops.neg(x)], 2, lambda _, c: [ops.sin(c)])
        returns(y=ops.cos(y))
    seen: list[str] = []
    run(f, {"x": torch.zeros(4)}, {}, watch=lambda op, _: seen.append(op.name))
    assert seen == ["neg", "sin", "sin", "loop", "cos"]


def test_one_op_evaluates_alone() -> None:
    """What constant folding does: an op and its operands, without a function around them."""
    with function("f", x=Type("bf16", (1, 2)), w=Type("bf16", (2, 2)), b=Type("bf16", (2,))) as (f, values):
        fused.linear(*values)
    (op,) = f.block.ops
    x, w, b = torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([0.5, 0.25])
    assert evaluate(op, [x, w, b], torch.float32).tolist() == [[1.5, 2.25]]
    narrow = evaluate(op, [t.to(TORCH_DTYPES["bf16"]) for t in (x, w, b)])
    assert narrow.dtype == torch.bfloat16


def test_the_ops_that_watch_will_see_are_counted() -> None:
    def outer(_: Value, x: Value) -> list[Value]:
        return ops.loop([ops.neg(x)], 3, lambda _, y: [ops.exp(ops.neg(y))])

    with function("f", x=VECTOR) as (f, [x]):
        (y,) = ops.loop([x], 2, outer)
        returns(y=ops.neg(y))
    seen: list[str] = []
    run(f, {"x": torch.zeros(4)}, {}, watch=lambda op, _: seen.append(op.name))
    assert count_runs(f.block) == len(seen) == 2 * (2 + 3 * 2) + 2  # neg, loop with neg and exp; and the loop, neg
