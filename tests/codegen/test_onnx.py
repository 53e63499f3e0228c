"""The ONNX target against the interpreter: every op, loops, stages, files, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from cortexflow.codegen import find_target
from cortexflow.codegen.onnx import OPSET, RULES, TARGET, OnnxExecutable
from cortexflow.errors import InputError, TargetError
from cortexflow.ir import (
    OPS,
    Func,
    Module,
    Op,
    Type,
    Value,
    function,
    fused,
    named,
    ops,
    returns,
    run,
    run_module,
    scope,
)
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.ir.ops import scalar
from cortexflow.passes.legalize import legalize
from tests.ir.programs import MAKERS, random_func, random_inputs, random_tensor, random_weights

CPU = torch.device("cpu")
NAMES = {torch_dtype: name for name, torch_dtype in TORCH_DTYPES.items()}
Build = Callable[..., Value | Sequence[Value]]


def executable(module: Module, weights: Mapping[str, Tensor] | None = None) -> OnnxExecutable:
    """The module built for onnxruntime, checked as strictly as onnx can without its weights."""
    made = TARGET.build(module, weights or {}, CPU)
    assert isinstance(made, OnnxExecutable)
    onnx.shape_inference.infer_shapes(made.model.proto, check_type=True, strict_mode=True)
    return made


def func_of(build: Build, *args: Tensor, name: str = "f") -> Func:
    types = {f"a{i}": Type(NAMES[t.dtype], tuple(t.shape)) for i, t in enumerate(args)}
    with function(name, **types) as (func, values):
        built = build(*values)
        returns(**{f"r{i}": v for i, v in enumerate([built] if isinstance(built, Value) else built)})
    return func


def compare(
    func: Func, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor], tolerance: float
) -> OnnxExecutable:
    wanted = run(func, inputs, weights)
    module = Module({func.name: func})
    legalize(module, TARGET.claims.__contains__)
    made = executable(module, weights)
    for name, found in made.run(inputs).items():
        assert found.dtype == wanted[name].dtype
        torch.testing.assert_close(
            found.double(),
            wanted[name].double(),
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    return made


def agree(build: Build, *args: Tensor, tolerance: float = 2e-6) -> OnnxExecutable:
    """Compare ONNX with the interpreter on these arguments, and return what was built."""
    return compare(func_of(build, *args), {f"a{i}": t for i, t in enumerate(args)}, {}, tolerance)


def rand(*shape: int, dtype: str = "f32", seed: int = 0) -> Tensor:
    return random_tensor(Type(dtype, shape), f"{seed}/{shape}")


def nodes(made: OnnxExecutable) -> list[onnx.NodeProto]:
    return list(made.model.proto.graph.node)


def body(node: onnx.NodeProto) -> onnx.GraphProto:
    return next(a.g for a in node.attribute if a.name == "body")


# ---- every op ------------------------------------------------------------------------------------


def test_every_primitive_op_has_a_rule() -> None:
    primitive = {n for n, d in OPS.items() if d.decompose is None} - {"return", "yield"}
    assert {"matmul", "attention", "loop", "cache_update"} <= primitive
    assert primitive == set(RULES), "add the op to codegen/onnx/rules.py"
    assert TARGET.claims <= set(RULES)
    assert primitive | {n for n, d in OPS.items() if d.decompose} == set(MAKERS)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_op_equals_the_interpreter(name: str) -> None:
    for seed in range(6):
        func = random_func(seed, [name], length=3)
        compare(func, random_inputs(func, seed), random_weights(func, seed), 2e-4)


@pytest.mark.parametrize("seed", range(20))
def test_random_programs_of_all_ops(seed: int) -> None:
    func = random_func(seed, length=25)
    compare(func, random_inputs(func, seed), random_weights(func, seed), 2e-3)


@pytest.mark.parametrize("kind", sorted(ops.ACTIVATIONS))
def test_activations(kind: str) -> None:
    agree(lambda x: ops.act(x, kind=kind), torch.linspace(-9, 9, 211), tolerance=1e-6)


@pytest.mark.parametrize("dtype", ["i32", "i64", "u8", "f32", "f64"])
def test_arithmetic_in_every_dtype(dtype: str) -> None:
    a, b = rand(3, 1, 5, dtype=dtype), rand(4, 1, dtype=dtype, seed=1)
    for op in (ops.add, ops.sub, ops.mul, ops.max_, ops.min_, ops.lt, ops.le, ops.eq):
        agree(op, a, b)
    for reduce in (ops.reduce_sum, ops.reduce_max):
        agree(lambda x, r=reduce: [r(x, axes=(-1, 0)), r(x, axes=(1,), keepdims=True)], a)
    agree(lambda x: [ops.cumsum(x, axis=-1), ops.argmax(x, axis=0), ops.cast(x, dtype="f32")], a)
    agree(lambda x: ops.pad(x, pads=((1, 0), (0, 2), (3, 1)), value=2.0), a)


def test_bool_values() -> None:
    c, a, b = (rand(3, 4, dtype="bool", seed=i) for i in range(3))
    agree(lambda c, a, b: [ops.where(c, a, b), ops.reduce_max(a, axes=(1,)), ops.concat(a, b, axis=1)], c, a, b)
    agree(lambda c, a: [ops.pad(c, pads=((1, 1), (0, 2)), value=True), ops.cast(c, dtype="i32"), ops.eq(c, a)], c, a)
    agree(lambda c: [ops.broadcast_to(c, shape=(2, 3, 4)), ops.gather(c, scalar(2, "i64"), axis=0)], c)


def test_ties_and_truncation() -> None:
    x = torch.tensor([[1.5, -1.5, 2.5, -0.5], [3.0, 3.0, -7.9, 3.0]])
    agree(lambda x: [ops.argmax(x, axis=1), ops.cast(x, dtype="i32"), ops.floor(x), ops.cast(x, dtype="bool")], x)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_cache_update_and_gather_by_a_runtime_index(axis: int) -> None:
    cache = rand(4, 5, 3)
    new = cache.narrow(axis, 0, 2) + 1
    at = torch.tensor(1, dtype=torch.int32)
    agree(lambda c, n, i: [ops.cache_update(c, n, i, axis=axis), ops.gather(c, i, axis=axis)], cache, new, at)
    agree(lambda c, i: ops.gather(c, i, axis=axis), cache, torch.tensor([[2, 0], [1, 1]], dtype=torch.uint8))


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (3, 3), (1, 1)])
@pytest.mark.parametrize("extra", ["", "mask", "bias", "mask bias", "causal", "mask bias causal"])
def test_attention(heads: int, groups: int, extra: str) -> None:
    b, m, n, d = 2, 5, 7, 6
    q, k, v = rand(b, m, heads, d), rand(b, n, groups, d), rand(b, n, groups, d + 1)
    args = [q, k, v]
    if "mask" in extra:
        mask = torch.rand(b, m, n, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[0, 2] = False  # a query that may look nowhere attends uniformly
        args.append(mask)
    if "bias" in extra:
        args.append(rand(1, heads, m, n))
    made = agree(lambda *a: ops.attention(*a, scale=0.3, causal="causal" in extra), *args)
    shapes = [[d.dim_value for d in i.type.tensor_type.shape.dim] for i in made.model.proto.graph.value_info]
    assert not any(s[-2:] == [heads, d] and s[1] == n for s in shapes if groups < heads), "keys were repeated"
    assert made.run({f"a{i}": t for i, t in enumerate(args)})["r0"].isfinite().all()


def test_attention_more_queries_than_keys() -> None:
    """Causal queries before the first key see nothing, and attend uniformly."""
    agree(
        lambda q, k, v: ops.attention(q, k, v, scale=1.0, causal=True),
        rand(1, 5, 2, 4),
        rand(1, 3, 1, 4),
        rand(1, 3, 1, 4),
    )


def test_convolution_with_uneven_padding_and_groups() -> None:
    x, w, b = rand(2, 6, 9, 7), rand(4, 3, 3, 2), rand(4)
    attrs = {"stride": (2, 1), "padding": ((0, 2), (1, 3)), "dilation": (2, 1), "groups": 2}
    agree(lambda x, w, b: ops.conv2d(x, w, b, **attrs), x, w, b, tolerance=1e-5)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_relative_position_bias(bidirectional: bool, fixed: bool) -> None:
    table = rand(32, 3)

    def build(table: Value, *positions: Value) -> Value:
        q, k = positions or (ops.iota(size=200), ops.mul(ops.iota(size=300), scalar(2, "i32")))
        return ops.relative_position_bias(table, q, k, bidirectional=bidirectional)

    positions = [torch.arange(200), torch.arange(0, 600, 2)]
    made = agree(build, table, *([] if fixed else positions), tolerance=0)
    if fixed:
        assert {n.op_type for n in nodes(made)} == {"Transpose", "Gather"}, "the buckets are a constant"


def test_constants_of_any_size_are_computed_once() -> None:
    made = agree(
        lambda x: [
            ops.add(x, ops.cos(ops.mul(ops.iota(size=300, dtype="f32"), scalar(0.1, "f32")))),
            ops.const(value=(1.0, -0.0, float("inf"), float("nan")), dtype="f32", shape=(2, 2)),
            ops.iota(size=5000, dtype="f64"),
            ops.broadcast_to(scalar(True, "bool"), shape=(2, 3)),
        ],
        rand(300),
    )
    assert {n.op_type for n in nodes(made)} == {"Add", "Identity"}


# ---- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"cast"}))
def test_float16_is_near_the_interpreter(name: str) -> None:
    func = random_func(3, [name], floats=("f16",), length=2)
    inputs, weights = random_inputs(func, 3), random_weights(func, 3)
    compare(func, inputs, weights, 2e-2)


def test_statistics_are_float32_in_float16() -> None:
    x = (rand(3, 600) * 100).half()  # squares sum to more than float16 holds
    agree(
        lambda x: [ops.rms_norm(x, eps=1e-6), ops.layer_norm(x, eps=1e-6), ops.reduce_mean(x, axes=(1,))],
        x,
        tolerance=2e-3,
    )
    q = (rand(1, 4, 2, 8) * 100).half()
    agree(lambda q: ops.attention(q, q, q, scale=1.0), q, tolerance=2e-3)
    # terms of one sign: a sum that cancels has no digits left to compare
    agree(lambda x, w: ops.matmul(x, w, dtype="f32"), x.abs(), rand(600, 5).half().abs(), tolerance=1e-5)


def test_float64_stays_float64() -> None:
    x = rand(3, 8, dtype="f64")
    agree(
        lambda x: [ops.rms_norm(x, eps=1e-6), ops.softmax(x), ops.layer_norm(x, eps=1e-6), ops.sin(x), ops.exp(x)],
        x,
        tolerance=1e-13,
    )


def test_no_needless_casts() -> None:
    q = rand(2, 3, 4, 8)

    def build(x: Value) -> Value:
        y = ops.attention(x, x, x, scale=0.5)
        return ops.softmax(ops.rms_norm(ops.layer_norm(y, eps=1e-6), eps=1e-6))

    assert "Cast" not in {n.op_type for n in nodes(agree(build, q))}


def test_bfloat16_on_a_cpu_is_refused_by_name() -> None:
    func = func_of(lambda x: ops.cast(ops.exp(ops.cast(x, dtype="bf16")), dtype="f32"), rand(3))
    with pytest.raises(TargetError, match=r"CPUExecutionProvider cannot run this model in bf16.*f32 or f16.*CUDA"):
        TARGET.build(Module({"f": func}), {}, CPU)


def test_bfloat16_weights_are_shared_by_their_bits() -> None:
    with function("f") as (func, _):
        returns(y=ops.cast(ops.weight(key="w", type=Type("bf16", (3, 5))), dtype="f32"))
    w = rand(3, 5).bfloat16()
    assert torch.equal(executable(Module({"f": func}), {"w": w}).run({})["y"], w.float())


# ---- loops ---------------------------------------------------------------------------------------


def counted(stop_at: int, trips: int = 6) -> Func:
    """x doubles until the step reaches `stop_at`; counts the steps done."""
    with function("f", x=Type("f32", (2,)), n=Type("i32", ())) as (func, [x, n]):

        def step(i: Value, x: Value, n: Value) -> list[Value]:
            return [ops.eq(i, scalar(stop_at, "i32")), ops.add(x, x), ops.add(n, scalar(1, "i32"))]

        y, count = ops.loop([x, n], trips, step, early_stop=True)
        returns(y=y, count=count)
    return func


@pytest.mark.parametrize("stop_at", [0, 3, 5, 99])
def test_early_stop(stop_at: int) -> None:
    inputs = {"x": rand(2), "n": torch.tensor(0, dtype=torch.int32)}
    made = compare(counted(stop_at), inputs, {}, 0)
    assert int(made.run(inputs)["count"]) == min(stop_at + 1, 6)


def test_stop_known_outside_the_body() -> None:
    def build(x: Value, stop: Value) -> Sequence[Value]:
        return ops.loop([x], 4, lambda i, x: [stop, ops.add(x, x)], early_stop=True)

    for stop in (True, False):
        agree(build, rand(3), torch.tensor(stop))
    agree(lambda x: ops.loop([x], 4, lambda i, x: [scalar(True, "bool"), ops.add(x, x)], early_stop=True), rand(3))


def test_nested_loops_capture_values_of_every_level() -> None:
    def build(x: Value, outer: Value) -> Sequence[Value]:
        def step(i: Value, x: Value, total: Value) -> list[Value]:
            scaled = ops.mul(x, outer)

            def inner(j: Value, t: Value) -> list[Value]:
                both = ops.add(ops.cast(i, dtype="f32"), ops.cast(j, dtype="f32"))
                return [ops.add(t, ops.mul(ops.sin(scaled), ops.mul(both, ops.exp(outer))))]

            (total,) = ops.loop([total], 3, inner)
            return [ops.act(total, kind="tanh"), total]

        return ops.loop([x, ops.neg(x)], 4, step)

    made = agree(build, rand(5), rand(5, seed=1), tolerance=1e-5)
    (loop,) = [n for n in nodes(made) if n.op_type == "Loop"]
    assert [n.op_type for n in body(loop).node].count("Loop") == 1, "one Loop for each, not unrolled"
    assert "Exp" in {n.op_type for n in nodes(made)}, "what no loop changes is computed before the loops"
    (inside,) = [n for n in body(loop).node if n.op_type == "Loop"]
    assert not {"Exp", "Sin"} & {n.op_type for n in body(inside).node}


def test_bodies_that_yield_what_they_did_not_compute() -> None:
    """Swapped and repeated carries, outer values, constants and weights."""

    def build(a: Value, b: Value, c: Value) -> Sequence[Value]:
        def step(i: Value, x: Value, y: Value, z: Value, w: Value) -> list[Value]:
            return [y, x, c, scalar(2.5, "f32")]

        first = ops.loop([a, b, a, scalar(0.0, "f32")], 3, step)
        again = ops.loop([a, b], 2, lambda i, x, y: [ops.add(x, y)] * 2)
        return [*first, *again, first[0], a]

    agree(build, rand(3), rand(3, seed=1), rand(3, seed=2))


def test_equal_ops_in_two_loops_do_not_mix() -> None:
    def build(x: Value) -> Sequence[Value]:
        def step(i: Value, y: Value) -> list[Value]:
            return [named(ops.add(ops.mul(y, x), ops.exp(x)), "same")]

        return [*ops.loop([x], 2, step), *ops.loop([x], 3, step), ops.exp(x)]

    agree(build, rand(4), tolerance=1e-5)


def test_cache_carried_through_a_loop() -> None:
    def build(x: Value, cache: Value) -> Sequence[Value]:
        def step(i: Value, x: Value, cache: Value) -> list[Value]:
            cache = ops.cache_update(cache, ops.reshape(x, shape=(1, 1, 3)), i, axis=1)
            return [ops.add(x, ops.reduce_mean(cache, axes=(0, 1))), cache]

        return ops.loop([x, cache], 5, step)

    agree(build, rand(3), rand(1, 5, 3), tolerance=1e-5)


# ---- stages, names and text ----------------------------------------------------------------------


def three_stages() -> tuple[Module, dict[str, Tensor], dict[str, Tensor]]:
    """Results wired by name over one and two stages, an input read twice, a result that replaces an input."""
    x, h = Type("f32", (2, 4)), Type("f32", (2, 3))
    w = {"a.weight": rand(4, 3), "b.weight": rand(3, 3), "bf.weight": rand(300, 3)}
    with function("one", x=x, mask=Type("bool", (2, 1))) as (one, [vx, mask]), scope("layers.0.attn"):
        y = ops.matmul(vx, ops.weight(key="a.weight", type=Type("f32", (4, 3))))
        returns(h=named(y, "hidden"), same=vx, seen=ops.where(mask, y, scalar(0.0, "f32")))
    with function("two", h=h, seen=h) as (two, [vh, seen]):
        returns(g=ops.add(ops.matmul(vh, ops.weight(key="b.weight", type=Type("f32", (3, 3)))), seen), h=ops.neg(vh))
    with function("three", x=x, g=h, h=h) as (three, [vx, vg, vh]):
        big = ops.weight(key="bf.weight", type=Type("f32", (300, 3)))
        total = ops.add(vg, ops.add(vh, ops.reduce_sum(big, axes=(0,))))
        returns(actions=total, again=total, x=ops.exp(vx), mask=scalar(1.0, "f32"))
    module = Module({f.name: f for f in (one, two, three)}, {}, {"family": "test", "keep": ("seen", "same")})
    return module, w, {"x": rand(2, 4, seed=5), "mask": torch.tensor([[True], [False]])}


def test_stages_are_wired_by_name_and_run_alone() -> None:
    module, weights, inputs = three_stages()
    made, wanted = executable(module, weights), run_module(module, inputs, weights)
    found = made.run(inputs)
    assert list(found) == list(module.outputs) == ["same", "seen", "actions", "again", "x", "mask"]
    values = dict(inputs)
    for stage in module.stages:
        results = made.run_stage(stage.name, values)
        assert list(results) == list(stage.results)
        values |= results
    for name, result in found.items():
        torch.testing.assert_close(result, wanted[name])
        torch.testing.assert_close(result, values[name])


def test_names_are_those_of_the_model() -> None:
    module, weights, _ = three_stages()
    proto = executable(module, weights).model.proto
    assert [i.name for i in proto.graph.input] == ["x", "mask"]
    assert [o.name for o in proto.graph.output] == ["same", "seen", "actions", "again", "x_1", "mask_1"]
    assert {t.name for t in proto.graph.initializer} >= set(weights)
    first = proto.graph.node[0]
    assert (first.name, list(first.output)) == ("layers.0.attn/MatMul", ["hidden"])
    assert proto.producer_name == "cortexflow"
    assert {p.key: p.value for p in proto.metadata_props}["producer"] == "cortexflow"
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", OPSET)]


def test_source_is_readable() -> None:
    module, weights, _ = three_stages()
    text = executable(module, weights).source()
    assert 'float[300,3] "bf.weight"' in text and "hidden = MatMul" in text and "actions = Add" in text
    assert len(text) < 3000 and max(map(len, text.splitlines())) < 200


def test_results_are_fresh_and_weights_are_shared() -> None:
    module, weights, inputs = three_stages()
    made = executable(module, weights)
    first = made.run(inputs)["x"]
    kept = first.clone()
    made.run({**inputs, "x": inputs["x"] + 1})
    assert torch.equal(first, kept)
    assert all(t.data_ptr() == weights[n].data_ptr() for n, t in made.model.tensors.items())


def test_strided_inputs_and_other_dtypes_are_read_as_declared() -> None:
    module, weights, inputs = three_stages()
    made = executable(module, weights)
    strided = {**inputs, "x": inputs["x"].T.contiguous().T.double()}
    torch.testing.assert_close(made.run(strided)["actions"], made.run(inputs)["actions"])


# ---- files ---------------------------------------------------------------------------------------

LOAD = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
with numpy.load(sys.argv[2]) as inputs:
    found = session.run(["actions"], dict(inputs))[0]
assert not any(m.split(".")[0] in ("cortexflow", "torch") for m in sys.modules)
numpy.save(sys.argv[3], found)
"""


@pytest.mark.parametrize("threshold", [None, 100])
def test_a_saved_model_runs_without_this_package(threshold: int | None, tmp_path: Path) -> None:
    module, weights, inputs = three_stages()
    made = executable(module, weights)
    path = tmp_path / "policy.onnx"
    written = made.write(path) if threshold is None else made.write(path, external_over=threshold)
    assert sorted(written) == sorted(tmp_path.iterdir())
    assert [p.name for p in written] == ["policy.onnx", "policy.onnx.data"][: len(written)]
    assert len(written) == (1 if threshold is None else 2)
    onnx.checker.check_model(str(path), full_check=True)
    np.savez(tmp_path / "inputs.npz", **{n: t.numpy() for n, t in inputs.items()})
    files = [str(path), str(tmp_path / "inputs.npz"), str(tmp_path / "found.npy")]
    subprocess.run([sys.executable, "-c", LOAD, *files], check=True, cwd=tmp_path, timeout=60)
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), made.run(inputs)["actions"].numpy())


def test_saving_leaves_the_executable_as_it_was(tmp_path: Path) -> None:
    module, weights, _ = three_stages()
    made = executable(module, weights)
    before = made.model.proto.SerializeToString()
    made.write(tmp_path / "a.onnx")
    made.write(tmp_path / "b.onnx", external_over=0)
    assert made.model.proto.SerializeToString() == before
    for name in ("a", "b"):
        loaded = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / f"{name}.onnx").graph.initializer}
        assert all(np.array_equal(loaded[n], w.numpy()) for n, w in weights.items())


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f64", "u8", "bool"])
def test_every_dtype_survives_a_file(dtype: str, tmp_path: Path) -> None:
    with function("f") as (func, _):
        returns(y=ops.cast(ops.weight(key="w", type=Type(dtype, (7, 3))), dtype="f32"))
    w = rand(7, 3, dtype=dtype)
    made = executable(Module({"f": func}), {"w": w})
    for over in (0, 10**6):
        made.write(tmp_path / "m.onnx", external_over=over)
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(session.run(None, {})[0], w.float().numpy())


def test_a_loop_and_a_fused_op_pass_the_checker(tmp_path: Path) -> None:
    def build(x: Value, w: Value, b: Value) -> Sequence[Value]:
        return ops.loop([x], 3, lambda i, x: [fused.linear_act(x, w, b, kind="gelu_tanh")])

    made = agree(build, rand(2, 5), rand(5, 5), rand(5), tolerance=1e-5)
    made.write(tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)


# ---- refusals ------------------------------------------------------------------------------------


def test_an_op_without_a_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with function("f", x=Type("f32", (2,))) as (func, [x]), scope("layers.3.mlp"):
        returns(y=ops.exp(x))
    monkeypatch.delitem(RULES, "exp")
    with pytest.raises(TargetError, match=r"'onnx' has no rule for op 'exp' at layers\.3\.mlp"):
        TARGET.build(Module({"f": func}), {}, CPU)
    monkeypatch.undo()
    exp: Op = func.block.ops[0]
    exp.name = "fused.unheard_of"
    with pytest.raises(TargetError, match=r"'onnx'.*'fused\.unheard_of'"):
        TARGET.build(Module({"f": func}), {}, CPU)


def test_what_the_provider_lacks_is_an_error_at_build() -> None:
    func = func_of(lambda x: ops.act(x, kind="gelu"), rand(3, dtype="f64"))
    with pytest.raises(TargetError, match=r"onnxruntime .*CPUExecutionProvider cannot run this model.*Erf"):
        TARGET.build(Module({"f": func}), {}, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    module, weights, _ = three_stages()
    with pytest.raises(TargetError, match=r"device cuda.*'cpu'"):
        TARGET.build(module, weights, torch.device("cuda"))


@pytest.mark.gpu
def test_cuda_agrees_or_says_what_is_missing() -> None:
    module, weights, inputs = three_stages()
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(TargetError, match=r"CUDAExecutionProvider.*onnxruntime-gpu"):
            TARGET.build(module, weights, torch.device("cuda"))
        return
    made = TARGET.build(module, weights, torch.device("cuda"))
    for name, found in made.run(inputs).items():
        torch.testing.assert_close(found.cpu(), run_module(module, inputs, weights)[name])


def test_other_devices_are_refused() -> None:
    module, weights, _ = three_stages()
    with pytest.raises(TargetError, match=r"'onnx' runs on cpu, cuda, not on device meta"):
        TARGET.build(module, weights, torch.device("meta"))


def test_inputs_are_checked_by_name() -> None:
    module, weights, inputs = three_stages()
    made = executable(module, weights)
    with pytest.raises(InputError, match=r"missing mask"):
        made.run({"x": inputs["x"]})
    with pytest.raises(InputError, match=r"@two needs h, seen; missing seen"):
        made.run_stage("two", {"h": rand(2, 3)})
    with pytest.raises(InputError, match=r"input 'x': expected f32\[2,4\], found shape \(2, 5\)"):
        made.run({**inputs, "x": rand(2, 5)})
    with pytest.raises(InputError, match=r"unknown stage 'four'; there are one, two, three"):
        made.run_stage("four", {})


def test_an_index_outside_its_table_is_an_error() -> None:
    made = executable(Module({"f": func_of(ops.gather, rand(3), torch.tensor([0]))}))
    with pytest.raises(TargetError, match=r"onnxruntime .* failed in the policy: .*Gather"):
        made.run({"a0": rand(3), "a1": torch.tensor([7])})


def test_weights_are_checked_by_name() -> None:
    module, weights, _ = three_stages()
    with pytest.raises(InputError, match=r"weight 'b\.weight' \(f32\[3,3\]\)"):
        TARGET.build(module, {n: w for n, w in weights.items() if n != "b.weight"}, CPU)
    with pytest.raises(InputError, match=r"weight 'b\.weight': expected f32\[3,3\], found shape \(2, 3\)"):
        TARGET.build(module, {**weights, "b.weight": rand(2, 3)}, CPU)


def test_the_registry_finds_it() -> None:
    assert find_target("onnx") is TARGET
