"""Branches: which chains may run side by side, and that no order of their launches changes a result."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortexflow.errors import VerifyError
from cortexflow.ir import Block, Module, Op, Value, function, ops, returns, run_module, verify
from cortexflow.passes.branches import LEAST, find_branches
from cortexflow.passes.check_plan import check_plan
from cortexflow.passes.dce import dce
from cortexflow.passes.plan import Plan
from cortexflow.passes.plan_buffers import plan_buffers
from tests.passes.test_plan_buffers import MAT, WIDTH, Arena, Maker, numbers, weight

Chain = Callable[[Value], Value]


def chain(x: Value, length: int = LEAST) -> Value:
    """Some layers, each of two ops that compute."""
    for _ in range(length // 2):
        x = ops.act(ops.matmul(x, weight("w", WIDTH, WIDTH)), kind="relu")
    return x


def towers(first: Chain, second: Chain, join: Callable[[Value, Value], Value] = ops.add) -> Module:
    """A stage in which two chains meet."""
    with function("stage", x=MAT, y=MAT) as (f, [x, y]):
        a = first(x)
        returns(z=ops.matmul(join(a, second(y)), weight("out", WIDTH, WIDTH)))
    verify(module := Module({"stage": f}))
    return module


def test_the_first_of_two_chains_is_a_branch() -> None:
    for join in (ops.add, lambda a, b: ops.slice_(ops.concat(a, b, axis=0), axis=0, stop=4)):
        module = towers(chain, chain, join)
        (branch,) = find_branches(module)
        made = [op for op in module.funcs["stage"].block.ops if op.name in ("matmul", "act")]
        assert list(branch.ops) == made[:LEAST] and branch.join.name in ("add", "concat")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (chain, lambda y: chain(y, LEAST - 2)),
        (lambda x: chain(x, LEAST - 2), chain),
        (lambda x: chain(ops.loop([x], 2, lambda i, c: [ops.neg(c)])[0]), chain),
    ],
    ids=["the other is short", "short", "has a loop"],
)
def test_what_is_no_branch(first: Chain, second: Chain) -> None:
    assert not find_branches(towers(first, second))


def test_a_chain_that_is_read_before_the_join_is_no_branch() -> None:
    with function("stage", x=MAT, y=MAT) as (f, [x, y]):
        a = chain(x)
        early = ops.mul(a, y)
        returns(z=ops.add(a, chain(y)), early=early)
    assert not find_branches(Module({"stage": f}))


def test_chains_in_turns_are_no_branch() -> None:
    with function("stage", x=MAT, y=MAT) as (f, [x, y]):
        for _ in range(LEAST):
            x, y = ops.act(x, kind="relu"), ops.act(y, kind="relu")
        returns(z=ops.add(x, y))
    assert not find_branches(Module({"stage": f}))


# ---- buffers ---------------------------------------------------------------------------------------


def random_towers(rng: random.Random) -> Module:
    """What both chains and the ops behind them read, two chains of random ops, their join, and more."""
    maker = Maker(rng)
    with function("stage", x=MAT, y=MAT) as (f, args):

        def more(pool: list[Value], most: int, depth: int = 2) -> list[Value]:
            for _ in range(rng.randint(1, most)):
                pool += maker.emit(pool, None, depth)
            return pool

        def tower() -> list[Value]:
            return more(more([*before], 12)[len(before) :] or [ops.neg(before[0])], 6)

        before = more([*args], 4, 0)
        one, two = tower(), tower()
        both = ops.add(maker.pick(one, MAT), maker.pick(two, MAT))
        after = more([*before, both, *one[-2:], *two[-2:]], 8, 0)
        returns(z=maker.pick(after, MAT), both=both, last=after[-1])
    module = Module({"stage": f})
    dce(module)
    verify(module)
    return module


class InAnyOrder(Arena):
    """Launches a branch's ops at random times between its first one's place and the join."""

    rng: random.Random

    def block(self, block: Block) -> None:
        super().block(Block(block.args, self.shuffled(block.ops)))

    def shuffled(self, given: list[Op]) -> list[Op]:
        found = given
        for branch in (branch for branch in self.plan.branches if branch.join in given):
            own = set(branch.ops)
            start, end = found.index(branch.ops[0]), found.index(branch.join)
            rest = [op for op in found[start:end] if op not in own]
            places = sorted(self.rng.choices([0, len(rest), self.rng.randint(0, len(rest))], k=len(own)))
            mixed = sorted([*zip(places, branch.ops, strict=True), *enumerate(rest)], key=lambda pair: pair[0])
            found = [*found[:start], *(op for _, op in mixed), *found[end:]]
        return found


def check_in_any_order(module: Module, plan: Plan, rng: random.Random) -> None:
    check_plan(module, plan)
    weights = {k: numbers(t, i) for i, (k, t) in enumerate(module.weight_types().items())}
    inputs = {n: numbers(t, 50 + i) for i, (n, t) in enumerate(module.inputs.items())}
    expected, arena = run_module(module, inputs, weights), InAnyOrder(module, plan, weights)
    arena.rng = rng
    for _ in range(4):
        found = arena.run(inputs)
        assert all(torch.equal(found[n], expected[n]) for n in module.outputs)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_no_order_of_launches_changes_a_result(seed: int) -> None:
    rng = random.Random(seed)
    module = random_towers(rng)
    check_in_any_order(module, plan_buffers(module, branches=find_branches(module, 1)), rng)


def test_random_towers_have_branches() -> None:
    found = [find_branches(random_towers(random.Random(seed)), 1) for seed in range(100)]
    assert sum(map(bool, found)) > 20 and max(len(branch.ops) for branches in found for branch in branches) > 5


def test_a_branch_reuses_its_own_part_of_the_arena() -> None:
    module = towers(chain, chain)
    plan = plan_buffers(module, branches=find_branches(module))
    check_in_any_order(module, plan, random.Random(0))
    assert plan.peak == plan.lower_bound <= 7 * MAT.nbytes  # two inputs, two values of each chain, a result


def test_a_plan_that_shares_bytes_between_branches_is_refused() -> None:
    module = towers(chain, chain)
    plan = replace(plan_buffers(module), branches=find_branches(module))
    with pytest.raises(VerifyError, match="beside a branch"):
        check_plan(module, plan)
