"""Early functions: what is in them, and that a plan holds whenever they run before their stage."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortexflow.compiler import lower
from cortexflow.errors import VerifyError
from cortexflow.ir import Block, Module, Type, function, ops, returns, run, run_module, verify
from cortexflow.ir.core import SOURCES
from cortexflow.ir.text import dump
from cortexflow.models import ModelConfig, Signature, VLAModelType, create_model
from cortexflow.passes.branches import find_branches
from cortexflow.passes.check_plan import check_plan
from cortexflow.passes.dce import dce
from cortexflow.passes.early import split_early
from cortexflow.passes.plan import Plan
from cortexflow.passes.plan_buffers import plan_buffers
from cortexflow.weights import stages_of
from tests.models.test_openvla import TINY_CONFIG as TOKENS
from tests.passes.samples import SMALL
from tests.passes.test_branches import InAnyOrder, random_towers
from tests.passes.test_plan_buffers import FLAT, MAT, ROW, WIDTH, Maker, numbers, random_module, weight

FAMILIES = {"pi05": SMALL, "pi0": SMALL.with_(model_type=VLAModelType.PI0), "openvla": TOKENS}
VIEWS = ("reshape", "slice", "broadcast_to")


@cache
def stages_for(family: str) -> Module:
    config: ModelConfig = FAMILIES[family]
    return stages_of(lower(create_model(config), Signature.of(config), "f32", target="triton")[0])


# ---- what is early ---------------------------------------------------------------------------------

POSITIONS = ["cast", "cumsum", "sub", "max"]
LENGTH = ["cast", "reduce_sum", "add"]
EXPECTED = {
    "pi05": {
        "transformer_encoder": ["gather", "mul", "concat", *POSITIONS, "gather", "gather"],
        "transformer_decoder": [*LENGTH, "gather", "gather", "concat"],
    },
    "pi0": {
        "transformer_encoder": ["gather", "mul", "concat", *POSITIONS, "gather", "gather"],
        "transformer_decoder": ["fused.linear", *LENGTH, "gather", "gather", "concat"],
    },
    "openvla": {"transformer_encoder": ["gather", *LENGTH, "sub", "add"], "transformer_decoder": ["lt"]},
}


def computed(block: Block) -> list[str]:
    return [op.name for op in block.ops if op.name not in (*SOURCES, *VIEWS, "return")]


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_positions_and_embeddings_are_early(family: str) -> None:
    module = stages_for(family)
    text = dump(module)
    split, early = split_early(module)
    verify(split)
    found = {stage: computed(split.funcs[name].block) for stage, name in early.items()}
    assert found == EXPECTED[family]
    for stage, name in early.items():
        before, after = (computed(m.funcs[stage].block) for m in (module, split))
        assert sorted(found[stage] + after) == sorted(before), "each op runs once"
        assert set(split.funcs[name].args) <= {*module.inputs, *split.funcs[early["transformer_encoder"]].results}
        assert [*split.funcs[stage].args][: len(module.funcs[stage].args)] == [*module.funcs[stage].args]
    assert dump(module) == text and split.funcs["vision_encoder"] is module.funcs["vision_encoder"]
    assert split.outputs == module.outputs and dict(sorted(split.inputs.items())) == dict(sorted(module.inputs.items()))


def test_what_stays() -> None:
    """Loops, views, what reads another stage; an input that a stage's result hides is no input any more."""
    with function("first", x=MAT, y=MAT, hidden=MAT) as (first, [x, y, hidden]):
        returns(z=ops.add(x, y), hidden=ops.neg(hidden))
    with function("second", x=MAT, y=MAT, z=MAT, hidden=MAT) as (second, [x, y, z, hidden]):
        early = ops.neg(ops.reshape(x, shape=FLAT.shape))
        back = ops.reshape(early, shape=MAT.shape)
        looped = ops.loop([y], 2, lambda i, c: [ops.add(c, back)])[0]
        returns(a=ops.add(looped, ops.exp(z)), b=ops.exp(hidden), early=early, same=x)
    with function("third", a=MAT, b=MAT, early=FLAT, same=MAT) as (third, [a, b, early, x]):
        returns(y=ops.sub(ops.add(a, b), ops.reshape(ops.abs_(early), shape=MAT.shape)), w=ops.sub(ops.abs_(x), a))
    module = Module({"first": first, "second": second, "third": third})
    split, names = split_early(module)
    verify(split)
    assert list(split.funcs) == ["early_second", "early_third", "first", "second", "third"]
    assert [[op.name for op in split.funcs[name].block.ops] for name in names.values()] == [
        ["reshape", "neg", "return"],
        ["abs", "abs", "return"],  # of what an early function made, and of an input that a stage hands on
    ]
    assert list(split.funcs["early_third"].args) == ["early_second.0", "x"]
    assert computed(split.funcs["second"].block) == ["loop", "exp", "add", "exp"]
    check_at_any_time(module, random.Random(0))


def test_names_that_come_twice() -> None:
    """A result under the name of an input, which another stage hands on; and one under an early value's name."""
    with function("first", x=MAT, row=MAT) as (first, [x, row]):
        returns(z=ops.neg(x), same=row)
    with function("second", x=MAT, z=MAT) as (second, [x, z]):
        returns(a=ops.abs_(x), row=ops.exp(z))
    with function("third", a=MAT, z=MAT, same=MAT, row=MAT) as (third, [a, z, same, row]):
        returns(a=ops.add(ops.neg(a), z), b=ops.abs_(same), r=row)
    with function("fourth", a=MAT, b=MAT, r=MAT) as (fourth, [a, b, r]):
        returns(y=ops.add(ops.neg(a), ops.sub(b, r)))
    module = Module({f.name: f for f in (first, second, third, fourth)})
    split, early = split_early(module)
    assert {s: computed(split.funcs[n].block) for s, n in early.items()} == {"second": ["abs"], "third": ["neg"]}
    check_at_any_time(module, random.Random(0))


def test_one_stage_has_nothing_early() -> None:
    with function("stage", x=MAT) as (f, [x]):
        returns(y=ops.neg(x))
    split, early = split_early(module := Module({"stage": f}))
    assert not early and split.funcs == module.funcs


# ---- buffers: at any time before the second stage, or right before their own -------------------------


class AtAnyTime(InAnyOrder):
    """Launches early functions at some time beside the first stage, or each before its own; `when`: which."""

    when = "between"

    def stages(self) -> None:
        late = [s for s in self.module.stages if s.name not in self.plan.early.values()]
        early = [op for name in self.plan.early.values() for op in self.module.funcs[name].block.ops]
        if self.when == "each":
            for stage in late:
                self.stage(stage.name)
            return
        first = self.shuffled(late[0].block.ops)
        most = {"first": 0, "between": len(first), "behind": len(first)}[self.when]
        least = most if self.when == "behind" else 0
        places = sorted(self.rng.randint(least, most) for _ in early)
        mixed = sorted([*zip(places, early, strict=True), *enumerate(first)], key=lambda pair: pair[0])
        self.block(Block([], [op for _, op in mixed]))
        for stage in late[1:]:
            self.block(stage.block)

    def stage(self, name: str) -> None:
        """One stage, behind its early function."""
        for part in (self.plan.early.get(name), name):
            if part:
                self.block(self.module.funcs[part].block)


def check_at_any_time(module: Module, rng: random.Random) -> Plan:
    """Every order gives the interpreter's bits for the module as it was; so does each stage alone."""
    split, early = split_early(module)
    verify(split)
    late = Module({name: f for name, f in split.funcs.items() if name not in early.values()})
    plan = plan_buffers(split, branches=find_branches(late, 1), early=early)
    check_plan(split, plan)
    weights, inputs = given_to(module.weight_types(), 0), given_to(module.inputs, 50)
    expected, arena = run_module(module, inputs, weights), AtAnyTime(split, plan, weights)
    arena.rng = rng
    for arena.when in ("first", "between", "behind", "each", "between", "first"):
        found = arena.run(inputs)
        assert all(torch.equal(found[n], expected[n]) for n in module.outputs), arena.when
    values = dict(inputs)
    for stage in module.stages:
        arena.bytes.fill_(0xA5)
        for name in stage.args:
            arena.at(split.funcs[stage.name].args[name]).copy_(values[name])
        arena.stage(stage.name)
        wanted = run(stage, values, weights)
        assert all(torch.equal(arena.at(v), wanted[n]) for n, v in split.funcs[stage.name].results.items())
        values |= wanted
    return plan


def given_to(types: Mapping[str, Type], seed: int) -> dict[str, torch.Tensor]:
    """Whole numbers; those that may be places in a table, or marks, are none below 0."""
    made = {name: numbers(t, seed + i) for i, (name, t) in enumerate(types.items())}
    return {name: x if x.is_floating_point() or x.dtype == torch.bool else x.abs() for name, x in made.items()}


def random_stages(rng: random.Random) -> Module:
    """Random stages; or two chains with their join, and behind them a stage that reads inputs and their results."""
    if rng.random() < 0.5:
        module = random_module(rng)
    else:
        maker, first = Maker(rng), random_towers(rng).funcs["stage"]
        with function("behind", x=MAT, y=MAT, row=ROW, both=MAT, z=MAT) as (f, args):
            pool = list(args)
            for _ in range(rng.randint(4, 14)):
                pool += maker.emit(pool, None, 1)
            returns(end=pool[-1], **{f"r{i}": v for i, v in enumerate(rng.sample(pool, 3))})
        module = Module({"stage": first, "behind": f})
    dce(module)
    verify(module)
    return module


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_no_time_changes_a_result(seed: int) -> None:
    rng = random.Random(seed)
    check_at_any_time(random_stages(rng), rng)


def test_random_stages_have_early_functions() -> None:
    found = [split_early(random_stages(random.Random(seed))) for seed in range(100)]
    sizes = [len(computed(split.funcs[name].block)) for split, early in found for name in early.values()]
    assert len(sizes) > 40 and max(sizes) > 5
    assert any(len(early) > 1 for _, early in found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("one_thread")
def test_no_time_changes_what_a_policy_computes(family: str) -> None:
    plan = check_at_any_time(stages_for(family), random.Random(0))
    assert len(plan.early) == 2


# ---- the checker sees faults -----------------------------------------------------------------------


def two_stages() -> Module:
    """The second computes from an input what it reads at its end; both have buffers to reuse."""
    with function("first", x=MAT) as (first, [x]):
        for _ in range(4):
            x = ops.matmul(x, weight("w", WIDTH, WIDTH))
        returns(y=x)
    with function("second", y=MAT, given=MAT) as (second, [y, z]):
        z = ops.matmul(ops.matmul(z, weight("w", WIDTH, WIDTH)), weight("v", WIDTH, WIDTH))
        for _ in range(4):
            y = ops.matmul(y, weight("w", WIDTH, WIDTH))
        returns(end=ops.add(y, z))
    verify(module := Module({"first": first, "second": second}))
    return module


def test_a_plan_that_gives_early_bytes_to_the_first_stage_is_refused() -> None:
    split, early = split_early(two_stages())
    plan = plan_buffers(split)
    check_plan(split, plan)
    with pytest.raises(VerifyError, match="beside early functions"):
        check_plan(split, replace(plan, early=early))


def test_a_plan_that_holds_only_at_the_beginning_is_refused() -> None:
    """Bytes of an early function that another stage's results have when a stage is run alone."""
    module = two_stages()
    with function("third", end=MAT, other=MAT) as (third, [end, other]):
        returns(last=ops.add(end, ops.matmul(ops.matmul(other, weight("w", WIDTH, WIDTH)), weight("v", WIDTH, WIDTH))))
    module.funcs["third"] = third
    split, early = split_early(module)
    plan = plan_buffers(split, early=early)
    check_plan(split, plan)
    (made,) = [op.out for op in split.funcs["early_third"].block.ops[:-1] if op.name == "matmul"][:1]
    end = split.funcs["second"].results["end"]
    offsets = {**plan.offsets, made: plan.offsets[end]}
    with pytest.raises(VerifyError, match="overwritten"):
        check_plan(split, replace(plan, offsets=offsets))


def test_an_early_function_that_reads_a_stage_is_refused() -> None:
    module = two_stages()
    with pytest.raises(VerifyError, match="beside early functions"):
        check_plan(module, replace(plan_buffers(module), early={"second": "first"}))
