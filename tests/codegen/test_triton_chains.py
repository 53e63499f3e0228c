"""Which small ops are one launch, and that it never reads what it has written."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from cortexflow.codegen.triton import chains as room
from cortexflow.codegen.triton.chains import Chain, find_chains
from cortexflow.codegen.triton.executable import Layout
from cortexflow.ir import Block, Module, Type, Value, function, ops, returns, run_module
from cortexflow.passes.branches import find_branches
from cortexflow.passes.plan import Plan
from cortexflow.passes.plan_buffers import plan_buffers
from tests.kernels.test_triton_pointwise import by_torch
from tests.passes.test_branches import random_towers
from tests.passes.test_plan_buffers import MAT, Arena, numbers, random_module

ROW = Type("f32", (3, 4))


def chains_of(module: Module, plan: Plan | None = None) -> list[Chain]:
    return list(find_chains(module.funcs["f"].block, plan or plan_buffers(module)).values())


def test_a_run_of_small_ops_is_one_launch() -> None:
    """What is read later is stored, the rest stays in registers; numbers are in the text, as their dtype has them."""
    with function("f", x=Type("bf16", (3, 4)), m=Type("bool", (1, 4))) as (f, [x, m]):
        wide = ops.mul(ops.cast(x, dtype="f32"), ops.scalar(0.1, "f32"))
        kept = ops.where(m, wide, ops.scalar(0.0, wide))
        returns(y=ops.cast(ops.neg(kept), dtype="bf16"), kept=kept, x=x)
    (found,) = chains_of(Module({"f": f}))
    assert found.text == (
        "v2: f32 = cast(v0); v3: f32 = mul(v2, 0.10000000149011612); v4: f32 = where(v1, v3, 0.0); v5: f32 = neg(v4); "
        "v6: bf16 = cast(v5)"
    )
    assert found.sources == ((x, (3, 4)), (m, (3, 4))) and found.targets == {"v4": kept, "v6": f.results["y"]}


def test_a_launch_in_between_ends_a_chain() -> None:
    with function("f", x=ROW) as (f, [x]):
        y = ops.neg(ops.abs_(x))
        z = ops.exp(y)
        returns(z=ops.neg(ops.abs_(ops.add(z, y))))
    assert [len(c.ops) for c in chains_of(Module({"f": f}))] == [2, 3]


def test_a_view_of_a_result_is_read_by_another_launch() -> None:
    with function("f", x=ROW) as (f, [x]):
        y = ops.neg(ops.abs_(x))
        turned = ops.slice_(y, axis=0, stop=1)
        returns(z=ops.sub(ops.abs_(x), turned))
    found, behind = chains_of(Module({"f": f}))
    assert [op.name for op in found.ops] == ["abs", "neg", "abs"] and len(found.targets) == 2
    assert [op.name for op in behind.ops] == ["sub"]


def test_a_result_in_another_shape_is_still_at_hand() -> None:
    with function("f", x=ROW) as (f, [x]):
        y = ops.reshape(ops.neg(ops.abs_(x)), shape=(4, 3))
        returns(z=ops.sub(y, ops.reshape(x, shape=(4, 3))))
    (found,) = chains_of(Module({"f": f}))
    assert found.text == "v2: f32 = abs(v0); v3: f32 = neg(v2); v4: f32 = sub(v3, v1)"


def test_a_result_that_would_lie_across_a_source_is_another_launch() -> None:
    """Of a row that all rows read, the first row's result must not take the bytes before the others have read it."""
    with function("f", x=ROW) as (f, [x]):
        y = ops.exp(ops.slice_(x, axis=0, stop=1))
        returns(z=ops.abs_(ops.neg(ops.add(x, y))))
    module = Module({"f": f})
    plan = plan_buffers(module)
    (found,) = chains_of(module, plan)
    row, z = found.sources[1][0], f.results["z"]
    assert row.type.shape == (1, 4)
    plan.offsets[z] = plan.offsets[row]
    assert not chains_of(module, plan) or z not in chains_of(module, plan)[0].targets.values()


def test_chains_can_be_off() -> None:
    with function("f", x=ROW) as (f, [x]):
        returns(z=ops.neg(ops.abs_(x)))
    module = Module({"f": f})
    assert "pointwise(" in Layout(module).text and "torch.abs(" in Layout(module, frozenset({"chains"})).text


# ---- no launch reads what it has written -------------------------------------------------------------


class Chained(Arena):
    """Runs a chain as its kernel does: reads everything, computes, stores what is to be stored."""

    def __init__(self, module: Module, plan: Plan, weights: dict[str, torch.Tensor]) -> None:
        super().__init__(module, plan, weights)
        self.chains = {}
        for stage in module.stages:
            self.chains |= find_chains(stage.block, plan)

    def block(self, block: Block) -> None:
        done = {op for chain in self.chains.values() for op in chain.ops}
        for op in block.ops:
            if op in self.chains:
                self.chain(self.chains[op])
            elif op not in done:
                super().block(Block(block.args, [op]))

    def chain(self, chain: Chain) -> None:
        for part in (slice(0, None, 2), slice(1, None, 2)):  # two programs: each reads, then stores
            sources = [self.at(v).expand(shape).reshape(-1)[part] for v, shape in chain.sources]
            found = {n: torch.empty(len(sources[0]), dtype=self.at(v).dtype) for n, v in chain.targets.items()}
            by_torch(chain.text, sources, found)
            for name, v in chain.targets.items():
                self.at(v).view(-1)[part] = found[name]


def check(module: Module, plan: Plan) -> int:
    weights = {k: numbers(t, i) for i, (k, t) in enumerate(module.weight_types().items())}
    inputs = {n: numbers(t, 50 + i) for i, (n, t) in enumerate(module.inputs.items())}
    expected, arena = run_module(module, inputs, weights), Chained(module, plan, weights)
    for _ in range(2):
        found = arena.run(inputs)
        assert all(torch.equal(found[n], expected[n]) for n in module.outputs)
    return sum(len(c.ops) for c in arena.chains.values())


@pytest.fixture(autouse=True)
def _of_any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "DTYPES", (*room.DTYPES, "f64", "i64"))  # those of the random programs


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_chains_give_what_their_ops_give(seed: int) -> None:
    module = random_module(random.Random(seed))
    check(module, plan_buffers(module))


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_a_chain_is_of_one_branch(seed: int) -> None:
    module = random_towers(random.Random(seed))
    plan = plan_buffers(module, branches=find_branches(module, 1))
    check(module, plan)
    for chain in find_chains(module.funcs["stage"].block, plan).values():
        for branch in plan.branches:
            assert len({op in branch.ops for op in chain.ops}) == 1 and branch.join not in chain.ops[1:]


def test_random_programs_have_chains() -> None:
    modules = [random_module(random.Random(seed)) for seed in range(60)]
    assert sum(check(module, plan_buffers(module)) for module in modules) > 60


def test_a_loop_over_small_ops() -> None:
    """Carried values that trade places, and one that the loop's chain reads and writes where it stands."""

    def body(i: Value, a: Value, b: Value) -> list[Value]:
        return [ops.neg(ops.sub(b, a)), ops.abs_(ops.max_(a, b))]

    with function("f", x=MAT, y=MAT) as (f, [x, y]):
        a, b = ops.loop([x, y], 3, body)
        returns(a=a, b=b)
    assert check(Module({"f": f}), plan_buffers(Module({"f": f}))) > 1
