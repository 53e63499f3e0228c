"""The torch target against the interpreter: every op, loops, names, memory, and source that stands alone."""

from __future__ import annotations

import ast
import gc
import math
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import cortexflow
from cortexflow.codegen import find_target
from cortexflow.codegen.torch import CLAIMS, RULES, TARGET, TorchExecutable, emit_source, load_source, source
from cortexflow.errors import TargetError
from cortexflow.ir import OPS, Func, Module, Type, Value, function, fused, named, ops, returns, run, run_module, scope
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.ir.ops import scalar
from cortexflow.kernels.torch import functions
from cortexflow.passes.legalize import legalize
from tests.ir.programs import MAKERS, random_func, random_inputs, random_module, random_tensor, random_weights
from tests.models.cases import DATA, batches, case_folders, distance

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NAMES = {torch_dtype: name for name, torch_dtype in TORCH_DTYPES.items()}
TOLERANCES = {"f64": 1e-10, "f32": 2e-5, "f16": 2e-2, "bf16": 1e-1}
LARGE = 1 << 16  # bytes: the smallest value that is deleted when it has been read for the last time

Build = Callable[..., Value | Sequence[Value]]


pytestmark = pytest.mark.usefixtures("one_thread")


def build(module: Module, weights: Mapping[str, Tensor] | None = None, device: torch.device = CPU) -> TorchExecutable:
    legalize(module, lambda op: op.name in CLAIMS)
    made = TARGET.build(module, weights or {}, device)
    assert isinstance(made, TorchExecutable)
    return made


def func_of(make: Build, *args: Tensor) -> Func:
    types = {f"a{i}": Type(NAMES[t.dtype], tuple(t.shape)) for i, t in enumerate(args)}
    with function("f", **types) as (func, values):
        made = make(*values)
        returns(**{f"r{i}": v for i, v in enumerate([made] if isinstance(made, Value) else made)})
    return func


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    assert list(found) == list(wanted)
    for name, want in wanted.items():
        have = found[name].cpu()
        assert (have.dtype, have.shape) == (want.dtype, want.shape), name
        torch.testing.assert_close(
            have.double(),
            want.double(),
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def compare(func: Func, seed: int, tolerance: float, device: torch.device = CPU) -> TorchExecutable:
    inputs, weights = random_inputs(func, seed), random_weights(func, seed)
    wanted = run(func, inputs, weights)
    made = build(Module({func.name: func}), weights, device)
    same(made.run(inputs), wanted, tolerance)
    return made


def agree(make: Build, *args: Tensor, tolerance: float = 1e-6) -> TorchExecutable:
    """Compare the target with the interpreter on these arguments, and return what was built."""
    func = func_of(make, *args)
    inputs = {f"a{i}": t for i, t in enumerate(args)}
    wanted = run(func, inputs, {})
    made = build(Module({"f": func}))
    same(made.run(inputs), wanted, tolerance)
    return made


def rand(*shape: int, dtype: str = "f32", seed: int = 0) -> Tensor:
    return random_tensor(Type(dtype, shape), f"{seed}/{shape}")


# ---- every op --------------------------------------------------------------------------------------


def test_every_primitive_op_has_a_rule() -> None:
    primitive = {n for n, d in OPS.items() if d.decompose is None} - {"return", "yield", "loop", "weight"}
    assert {"matmul", "attention", "cache_update", "relative_position_bias"} <= primitive
    assert primitive | CLAIMS == set(RULES), "add the op to codegen/torch/rules.py"
    assert set(OPS) >= CLAIMS


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_op_equals_the_interpreter(name: str, dtype: str) -> None:
    for seed in range(5):
        compare(random_func(seed, [name], [dtype], length=3), seed, TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_op_equals_the_interpreter_on_a_gpu(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for seed in range(3):
        compare(random_func(seed, [name], [dtype], length=2), seed, {"f32": 1e-4}.get(dtype, TOLERANCES[dtype]))


@settings(max_examples=60, derandomize=True)
@given(seed=st.integers(0, 10**6), keep=st.sampled_from([1, LARGE]))
def test_random_programs(seed: int, keep: int) -> None:
    """Also with every value deleted after its last use, however small it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_KEEP_BYTES", keep)
        made = compare(random_func(seed, floats=["f64"], length=20), seed, 1e-6)
    assert keep == LARGE or " del " in made.source()


@settings(max_examples=15, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_random_modules_of_two_stages(seed: int) -> None:
    module = random_module(seed, floats=["f64"])
    inputs, weights = {}, {}
    for func in module.stages:
        inputs |= random_inputs(func, seed)
        weights |= random_weights(func, seed)
    everything = run_module(module, inputs, weights)
    made = build(module, weights)
    wanted = {n: everything[n] for n in module.outputs}
    same(made.run(inputs), wanted, 1e-6)
    same(made.policy(*[inputs[n] for n in module.inputs]), wanted, 1e-6)


@pytest.mark.parametrize("kind", sorted(ops.ACTIVATIONS))
def test_activations(kind: str) -> None:
    agree(lambda x: ops.act(x, kind=kind), torch.linspace(-9, 9, 211))


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "f16"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -0.0, -1.5, 3, 1e-30, 1e300])
def test_constants_of_every_value(dtype: str, value: float) -> None:
    x = rand(5, dtype=dtype)
    agree(lambda x: [f(x, scalar(value, x)) for f in (ops.add, ops.mul, ops.max_, ops.lt, ops.le)], x)
    agree(lambda x: [f(scalar(value, x), x) for f in (ops.sub, ops.div, ops.min_)], x, tolerance=1e-3)
    agree(lambda x: [scalar(value, x), ops.neg(scalar(value, x)), ops.broadcast_to(scalar(value, x), shape=(2, 3))], x)
    agree(lambda _: ops.const(value=(1.0, value, -value, 2.0), dtype=dtype, shape=(2, 2)), x)
    if value != 1e300 or dtype == "f64":  # torch refuses to pad with a number that the dtype cannot hold
        agree(lambda x: ops.pad(x, pads=((2, 1),), value=value), x)


@pytest.mark.parametrize("dtype", ["i64", "i32", "u8"])
def test_integer_constants(dtype: str) -> None:
    x = rand(7, dtype=dtype)
    value = 200 if dtype == "u8" else -200
    agree(lambda x: [f(x, scalar(value, x)) for f in (ops.add, ops.sub, ops.mul, ops.max_, ops.lt, ops.eq)], x)
    agree(lambda x: [f(scalar(value, x), x) for f in (ops.sub, ops.le)], x)
    agree(lambda _: ops.const(value=(1, 2, 3, 4), dtype=dtype, shape=(2, 2)), x)
    agree(lambda x: [ops.pad(x, pads=((1, 2),), value=7), ops.reduce_sum(x, axes=(0,)), ops.cumsum(x, axis=0)], x)


def test_boolean_constants() -> None:
    x = rand(6, dtype="bool")
    for value in (True, False):
        agree(lambda x, value=value: [f(x, scalar(value, x)) for f in (ops.and_, ops.or_, ops.eq)], x)
        agree(lambda x, value=value: [ops.not_(scalar(value, x)), ops.where(x, scalar(value, x), x)], x)
    agree(lambda _: ops.const(value=(True, False), dtype="bool", shape=(2,)), x)


def test_a_number_divided_by_a_tensor_is_that_quotient() -> None:
    """Not the product with a reciprocal, which is infinite for the smallest numbers."""
    x = torch.tensor([1e-39, 3.0, 7.0, -1e-40])
    agree(lambda x: ops.div(scalar(1e-10, "f32"), x), x, tolerance=0.0)


@pytest.mark.parametrize("dtype", ["i64", "i32", "u8"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gather_by_every_kind_of_index(dtype: str, shape: tuple[int, ...], axis: int) -> None:
    table, index = rand(4, 5, 6), torch.randint(0, 2, shape).to(TORCH_DTYPES[dtype])
    agree(lambda t, i: ops.gather(t, i, axis=axis), table, index)
    agree(lambda t, i: ops.gather(t, i, axis=min(axis, 0)), rand(4, 5), index)
    agree(lambda t, i: ops.gather(t, i, axis=0), rand(4, 5, dtype="bool"), index)


@pytest.mark.parametrize("kinds", [("f32", "bf16"), ("bf16", "f32"), ("f64", "f32"), ("f32", "f64"), ("f16", "f16")])
def test_norms_with_factors_of_another_dtype(kinds: tuple[str, str]) -> None:
    x, g, b = rand(3, 7, dtype=kinds[0]), rand(7, dtype=kinds[1]), rand(7, dtype=kinds[1], seed=1)
    tolerance = 1e-2 if kinds[0] in ("bf16", "f16") else 1e-6
    agree(lambda x, g, b: ops.layer_norm(x, g, b, eps=1e-6), x, g, b, tolerance=tolerance)
    agree(lambda x, g: ops.rms_norm(x, g, eps=1e-6), x, g, tolerance=tolerance)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "f64"])
@pytest.mark.parametrize("segments", [False, True])
def test_a_query_that_may_look_nowhere_attends_uniformly(dtype: str, segments: bool) -> None:
    q, k, v = (rand(1, n, h, 4, dtype=dtype, seed=s) * 3 for n, h, s in ((3, 4, 0), (5, 2, 1), (5, 2, 2)))
    mask = torch.tensor([[[True] * 5, [False] * 5, [False, False, True, False, True]]])

    def whole(q: Value, k: Value, v: Value, mask: Value) -> Value:
        return ops.attention(q, k, v, mask, scale=0.5)

    def split(q: Value, k: Value, v: Value, mask: Value) -> Value:
        parts = [ops.slice_(x, axis=1, start=a, stop=b) for a, b in ((0, 2), (2, 5)) for x in (k, v)]
        return fused.attention_segments(q, *parts, mask, scale=0.5, causal=False)

    made = agree(split if segments else whole, q, k, v, mask, tolerance=TOLERANCES[dtype])
    (found,) = made.run({"a0": q, "a1": k, "a2": v, "a3": mask}).values()
    uniform = v.double().mean(1).repeat_interleave(2, 1)
    torch.testing.assert_close(found[:, 1].double(), uniform, rtol=0, atol=TOLERANCES[dtype])


# ---- loops -----------------------------------------------------------------------------------------

BIG = (LARGE // 4 + 3,)  # float32 values of this shape are deleted as soon as they may be


def looped(make: Build, *args: Tensor) -> str:
    """Compare a function with loops with every value deleted as soon as possible, and as it is; the source."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_KEEP_BYTES", 1)
        agree(make, *args)
    return agree(make, *args).source()


def test_carried_values_are_assigned_together() -> None:
    def swap(a: Value, b: Value) -> list[Value]:
        return ops.loop([a, b], 3, lambda _, a, b: [b, a])

    def rotate(a: Value, b: Value) -> list[Value]:
        return ops.loop([a, b, a], 4, lambda i, a, b, c: [ops.add(b, c), c, a])

    for make in (swap, rotate):
        looped(make, rand(*BIG), rand(*BIG, seed=1))


def test_values_are_there_after_a_loop_that_read_them() -> None:
    def make(x: Value, y: Value) -> list[Value]:
        outer = ops.exp(x)
        (z,) = ops.loop([ops.neg(y)], 3, lambda _, c: [ops.add(ops.sin(c), outer)])
        later = ops.mul(outer, z)
        (w,) = ops.loop([z], 2, lambda _, c: [ops.add(c, outer)])
        return [later, ops.add(w, y), ops.add(outer, x)]

    looped(make, rand(*BIG), rand(*BIG, seed=1))


def test_what_a_loop_starts_from_may_be_read_in_it_and_after_it() -> None:
    def make(x: Value) -> list[Value]:
        start = ops.cos(x)
        (y,) = ops.loop([start], 3, lambda _, c: [ops.add(ops.mul(c, c), start)])
        (z,) = ops.loop([start, start], 2, lambda _, a, b: [b, ops.add(a, b)])[:1]
        return [y, z, start]

    looped(make, rand(*BIG))


def test_nested_loops() -> None:
    def make(x: Value, y: Value) -> list[Value]:
        outer = ops.sin(x)

        def step(i: Value, a: Value, b: Value) -> list[Value]:
            kept = ops.mul(a, outer)
            inner, _ = ops.loop(
                [b, a], 3, lambda j, c, d: [ops.add(c, ops.mul(kept, ops.cast(ops.add(i, j), dtype="f32"))), ops.neg(c)]
            )
            return [ops.sin(inner), ops.add(kept, a)]

        return [*ops.loop([x, y], 4, step), outer]

    looped(make, rand(*BIG), rand(*BIG, seed=1))


@pytest.mark.parametrize("limit", [0, 2, 9])
def test_early_stop(limit: int) -> None:
    def make(x: Value) -> list[Value]:
        def step(i: Value, c: Value) -> list[Value]:
            return [ops.le(scalar(limit, "i32"), i), ops.add(c, c)]

        return ops.loop([x], 5, step, early_stop=True)

    source = looped(make, rand(*BIG))
    assert "break" in source


def test_early_stop_on_what_the_step_began_with() -> None:
    """The stop that is yielded is a carried value, and the step gives that another one."""

    def make(x: Value, stop: Value) -> list[Value]:
        return ops.loop([stop, x], 4, lambda _, s, c: [s, ops.not_(s), ops.add(c, x)], early_stop=True)

    for stop in (True, False):
        looped(make, rand(3), torch.tensor(stop))


def test_a_step_can_be_a_number_or_a_tensor() -> None:
    def rows(table: Value, x: Value) -> list[Value]:
        return ops.loop([x], 3, lambda i, c: [ops.add(c, ops.gather(table, i, axis=0))])

    def columns(table: Value, x: Value) -> list[Value]:
        return ops.loop([x], 3, lambda i, c: [ops.add(c, ops.gather(table, i, axis=1))])

    def counted(table: Value, x: Value) -> list[Value]:
        return ops.loop([x, scalar(0, "i32")], 3, lambda i, c, n: [ops.mul(c, ops.cast(i, dtype="f32")), i])

    def written(table: Value, x: Value) -> list[Value]:
        row = ops.reshape(x, shape=(1, 4))
        return ops.loop([table], 3, lambda i, t: [ops.cache_update(t, row, i, axis=0)])

    for make, number in ((rows, True), (columns, True), (counted, False), (written, True)):
        source = looped(make, rand(4, 4), rand(4))
        assert ("torch.tensor(step_number" not in source) == number


def test_loops_that_carry_nothing_new() -> None:
    looped(lambda x: [*ops.loop([x], 2, lambda _, c: [c]), x], rand(3))
    looped(lambda x: ops.loop([x], 2, lambda _, c: [x]), rand(*BIG))


def test_unread_results_of_a_loop() -> None:
    looped(lambda x: ops.loop([x, x], 2, lambda _, a, b: [ops.neg(a), ops.sin(b)])[1], rand(*BIG))


# ---- what comes back -------------------------------------------------------------------------------


def test_results_are_the_callers_own() -> None:
    """Arguments and weights returned as they are, views of them, a value twice: nothing shares memory."""
    with function("f", x=Type("f32", (2, 3))) as (f, [x]):
        w = ops.weight(key="w", type=Type("f32", (3,)))
        y = ops.neg(x)
        row, wide = ops.reshape(x, shape=(3, 2)), ops.broadcast_to(w, shape=(2, 3))
        returns(same=x, row=row, w=w, wide=wide, y=y, again=y, last=ops.slice_(y, axis=0, start=1))
    made = build(Module({"f": f}), {"w": torch.arange(3.0)})
    given = {"x": rand(2, 3)}
    before, first = given["x"].clone(), made.run(given)
    wanted = {n: t.clone() for n, t in first.items()}
    for t in first.values():
        t.zero_()  # also allowed: they are no longer inference tensors
        t.requires_grad_()
    assert torch.equal(given["x"], before)
    same(made.run(given), wanted, 0.0)
    with torch.no_grad():
        first["y"].fill_(5.0)
    assert not first["again"].any() and not first["last"].any()


def test_a_cache_is_not_updated_in_place() -> None:
    with function("f", cache=Type("f32", (4, 2)), new=Type("f32", (1, 2)), i=Type("i32", ())) as (f, [c, new, i]):
        returns(a=ops.cache_update(c, new, i, axis=0), b=ops.cache_update(c, ops.neg(new), i, axis=-2), c=c)
    cache, new = rand(4, 2), rand(1, 2)
    found = build(Module({"f": f})).run({"cache": cache, "new": new, "i": torch.tensor(2, dtype=torch.int32)})
    assert torch.equal(found["c"], cache)
    assert torch.equal(found["a"][2:3], new) and torch.equal(found["b"][2:3], -new)
    assert torch.equal(found["a"][:2], cache[:2])


def test_a_cache_of_repeated_rows_can_be_written() -> None:
    def make(x: Value, row: Value) -> Value:
        return ops.cache_update(ops.broadcast_to(x, shape=(4, 3)), row, scalar(1, "i32"), axis=0)

    agree(make, rand(1, 3), rand(1, 3, seed=1))


# ---- names -----------------------------------------------------------------------------------------

AWKWARD = ["lambda", "x-y", "x_y", "x.y", "self", "torch", "F", "math", "attention", "rope", "wide", "range", "bool"]
AWKWARD += ["2nd", "", "π", "²", "None", "stop", "step", "step_number", "int", "t1", "w0", "a b", "class", "Tensor"]


def test_values_of_any_name() -> None:
    def make(x: Value) -> list[Value]:
        found = [named(ops.rms_norm(ops.exp(x), eps=1e-6), n) for n in AWKWARD]
        total = found[0]
        for v in found[1:]:
            total = ops.add(total, v)
        q = named(ops.reshape(total, shape=(1, 2, 1, 3)), "q")
        y = named(ops.attention(q, q, q, scale=1.0), "cache_update")

        def step(i: Value, c: Value) -> list[Value]:
            return [named(ops.add(c, ops.cast(i, dtype="f32")), "step_number")]

        return [*found, *ops.loop([y], 2, step), ops.cache_update(q, y, scalar(0, "i32"), axis=0)]

    agree(make, rand(2, 3))


def test_arguments_results_and_stages_of_any_name() -> None:
    stages, previous = {}, "first"
    for name in (
        "forward",
        "device",
        "import",
        "train",
        "w0",
        "tuple",
        "Tensor",
        "a-1",
        "a_1",
        "__init__",
        "__x",
        "to",
    ):
        with function(name) as (f, _):
            args = [Value(Type("f32", (3,)), n) for n in (previous, "x-y", "x_y", "self", "lambda")]
            f.block.args += args
            w = ops.weight(key="torch", type=Type("f32", (3,)))
            returns(**{f"{name}!": ops.add(args[0], ops.add(w, ops.sub(args[1], ops.mul(args[2], args[3]))))})
        stages[name], previous = f, f"{name}!"
    module = Module(stages)
    inputs = {n: random_tensor(t, n) for n, t in module.inputs.items()}
    weights = {"torch": rand(3)}
    wanted = run_module(module, inputs, weights)
    made = build(module, weights)
    same(made.run(inputs), {n: wanted[n] for n in module.outputs}, 1e-6)
    same(made.policy(*inputs.values()), {n: wanted[n] for n in module.outputs}, 1e-6)


def test_notes_and_facts_of_any_text() -> None:
    with function("f", x=Type("f32", (3,))) as (f, [x]), scope('a\nimport os  """'):
        (y,) = ops.loop([x], 2, lambda _, c: [ops.sin(c)])
        returns(y=y)
    module = Module({"f": f}, {}, {"family": 'my"""robot', "path": "C:\\new\\unit", "steps": 3})
    made = build(module)
    ast.parse(made.source())
    same(made.run({"x": rand(3)}), run(f, {"x": rand(3)}, {}), 1e-6)


def test_weights_of_any_name() -> None:
    with function("f") as (f, _):
        keys = ["a.b", "it's", 'b "c"', "h\\", "a\nb", "{x}"]
        returns(**{f"r{i}": ops.neg(ops.weight(key=k, type=Type("f32", (2,)))) for i, k in enumerate(keys)})
    weights = {k: torch.full((2,), float(i)) for i, k in enumerate(keys)}
    same(build(Module({"f": f}), weights).run({}), run(f, {}, weights), 0.0)


def test_a_stage_without_results() -> None:
    with function("empty", x=Type("f32", (3,))) as (empty, _):
        returns()
    with function("f", x=Type("f32", (3,))) as (f, [x]):
        returns(y=ops.neg(x))
    made = build(Module({"empty": empty, "f": f}))
    same(made.run({"x": rand(3)}), {"y": -rand(3)}, 0.0)
    same(made.policy(rand(3)), {"y": -rand(3)}, 0.0)


# ---- what it refuses -------------------------------------------------------------------------------


def test_an_op_without_a_rule_is_named_with_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, "sin")
    with function("f", x=Type("f32", (3,))) as (f, [x]), scope("layers.3"):
        returns(y=ops.sin(x))
    with pytest.raises(TargetError, match=r"target 'torch' has no rule for op 'sin' at layers\.3"):
        build(Module({"f": f}))


def test_a_fused_op_that_is_not_claimed_is_refused() -> None:
    with function("f", x=Type("f32", (3, 4)), w=Type("f32", (4, 2))) as (f, [x, w]):
        returns(y=fused.norm_matmul(x, w, eps=1e-6))
    with pytest.raises(TargetError, match=r"'torch'.*'fused\.norm_matmul'"):
        TARGET.build(Module({"f": f}), {}, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_is_said() -> None:
    with pytest.raises(TargetError, match=r"'torch' on device 'cuda'.*no CUDA GPU.*'cpu'"):
        TARGET.build(Module({"f": func_of(ops.neg, rand(3))}), {}, torch.device("cuda"))


def test_the_registry_finds_it() -> None:
    assert find_target("torch") is TARGET


# ---- the source ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> cortexflow.Compiled:
    return cortexflow.compile(DATA / "pi0_tiny2", progress=False)


ALONE = """
    import importlib.util, sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "cortexflow":
                raise ImportError("cortexflow is not here")

    sys.meta_path.insert(0, Blocked())
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("policy", "policy.py")
    policy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(policy)
    model = policy.Policy(load_file("weights.safetensors")).eval()
    with torch.inference_mode():
        save_file(model(**load_file("inputs.safetensors")), "results.safetensors")
    assert "cortexflow" not in sys.modules
"""


def test_the_source_runs_alone(compiled: cortexflow.Compiled, tmp_path: Path) -> None:
    batch = batches(DATA / "pi0_tiny2")[0]
    executable = compiled.executable
    assert isinstance(executable, TorchExecutable)
    weights = {k: getattr(executable.policy, f"w{i}") for i, k in enumerate(compiled.module.weight_types())}
    save_file({k: t.clone() for k, t in weights.items()}, tmp_path / "weights.safetensors")
    save_file(compiled.check(batch.inputs), tmp_path / "inputs.safetensors")
    (tmp_path / "policy.py").write_text(compiled.source())
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(ALONE)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "results.safetensors")["actions"], compiled(**batch.inputs))


def sources() -> list[str]:
    folders = [DATA / name for name in ("pi05_tiny", "pi0_tiny2")]
    made = [cortexflow.compile(f, progress=False, dtype=d) for f, d in zip(folders, ("f32", "bf16"), strict=True)]
    programs = [random_func(seed, length=30) for seed in range(4)]
    return [c.source() for c in made] + [build(Module({f.name: f}), random_weights(f, 0)).source() for f in programs]


def test_the_source_is_readable() -> None:
    """A docstring, the functions that it calls and no others, lines that fit, and nothing to warn about."""
    for text in sources():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compile(text, "policy.py", "exec")
        tree = ast.parse(text)
        assert ast.get_docstring(tree)
        defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert defined == called & set(vars(functions))
        methods = text[text.index("class Policy") :]
        assert max(map(len, methods.splitlines())) < 140
        assert not re.search(r"[ \t]+$", text, flags=re.MULTILINE)
        assert "cortexflow" not in text


def test_values_keep_their_names_and_notes(compiled: cortexflow.Compiled) -> None:
    text = compiled.source()
    for part in (
        "def vision_encoder(",
        "def transformer_encoder(",
        "for step_number in range(5):",
        "suffix_layer_1 = ",
    ):
        assert part in text
    assert "# f32[1,8,64]  expert.layers.1.attn" in text
    assert text.startswith('"""pi0: dtype=f32, batch=1, views=2, prompt=11, chunk=7, steps=5')


def test_a_traceback_shows_the_line() -> None:
    func = func_of(lambda x: ops.reshape(ops.neg(x), shape=(6,)), rand(2, 3))
    policy = load_source(emit_source(Module({"f": func})), {})
    try:
        policy(rand(7))
    except RuntimeError as e:
        import traceback

        assert ".reshape((6,))" in "".join(traceback.format_exception(e))
    else:
        raise AssertionError("a tensor of seven elements cannot have six")


# ---- memory ----------------------------------------------------------------------------------------


def alive(size: int) -> int:
    """Large tensors that exist now; views of one storage count once."""
    found = [t for t in gc.get_objects() if type(t) is Tensor and t.untyped_storage().nbytes() >= size]
    return len({t.untyped_storage().data_ptr() for t in found})


def peak(func: Func, inputs: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch, size: int) -> int:
    """The most large tensors that exist when any `sin` has been computed, less those that exist before."""
    made = build(Module({"f": func}))
    counts: list[int] = []
    true_sin = torch.sin

    def sin(x: Tensor) -> Tensor:
        y = true_sin(x)
        counts.append(alive(size))
        return y

    monkeypatch.setattr(torch, "sin", sin)
    before = alive(size)
    made.run(inputs)
    return max(counts) - before


def test_a_long_chain_needs_no_more_memory_than_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rand(*BIG)

    def chain(length: int) -> Build:
        def make(x: Value) -> Value:
            for _ in range(length):
                x = ops.neg(ops.sin(x))
            return x

        return make

    assert [peak(func_of(chain(n), x), {"a0": x}, monkeypatch, LARGE) for n in (2, 9)] == [2, 2]


def test_a_loop_needs_no_more_memory_for_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rand(*BIG)

    def steps(trips: int) -> Build:
        def step(_: Value, c: Value) -> list[Value]:
            return [ops.neg(ops.sin(ops.neg(ops.sin(c))))]

        return lambda x: ops.loop([ops.neg(x)], trips, step)

    assert [peak(func_of(steps(n), x), {"a0": x}, monkeypatch, LARGE) for n in (1, 4)] == [2, 2]


# ---- the models on a GPU ---------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("folder", case_folders(), ids=lambda p: p.name)
def test_reference_cases_on_a_gpu(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for batch in batches(folder):
        compiled = cortexflow.compile(folder, dtype=dtype, device="cuda", batch=batch.size, progress=False)
        actions = compiled(**batch.inputs)
        assert isinstance(actions, Tensor) and actions.is_cuda and actions.dtype == torch.float32
        wanted = batch.outputs["actions"]
        if dtype == "float32":
            assert distance(actions.cpu(), wanted) < 1e-3
        else:
            found = actions.cpu().double().flatten()
            assert float(torch.cosine_similarity(found, wanted.double().flatten(), dim=0)) > 0.999
        assert torch.equal(actions, compiled(**{n: t.cuda() for n, t in batch.inputs.items()}))
