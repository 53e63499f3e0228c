"""No pass changes what a module computes: random programs, products amid their neighbours, and every model."""

from __future__ import annotations

import pytest
import torch

from cortexflow.ir import Module, clone, verify
from cortexflow.passes import PIPELINE, legalize
from cortexflow.passes.absorb import absorb
from cortexflow.passes.canonicalize import canonicalize
from cortexflow.passes.merge import merge
from tests.ir.programs import MAKERS
from tests.passes.samples import (
    DISCONTINUOUS,
    MODELS,
    Pass,
    data,
    model,
    moved,
    neighbours,
    program,
    program_data,
    results,
)

ALL: dict[str, Pass] = {**dict(PIPELINE), "legalize": lambda m: legalize(m, lambda op: False)}
# `fold` rounds constants to the dtype that they are declared in: float64 sees that
EXACT, ROUNDED = 1e-10, 1e-6


pytestmark = pytest.mark.usefixtures("one_thread")


def check_pass(run: Pass, module: Module, given, floats: torch.dtype | None, limit: float) -> None:
    before = results(module, given, floats)
    run(module)
    verify(module)
    assert moved(results(module, given, floats), before) <= limit


@pytest.mark.parametrize("name", ALL)
def test_each_pass_on_random_programs(name: str) -> None:
    for seed in range(40):
        module = program(seed)
        check_pass(ALL[name], module, program_data(module, seed), torch.float64, ROUNDED if name == "fold" else EXACT)


@pytest.mark.parametrize("name", ALL)
def test_each_pass_on_random_programs_in_float32(name: str) -> None:
    smooth = [n for n in MAKERS if n not in DISCONTINUOUS]
    for seed in range(20):
        module = program(seed, smooth)
        check_pass(ALL[name], module, program_data(module, seed), torch.float32, 1e-5)


@pytest.mark.parametrize("name", ["fold", "cse", "dce", "layout", "hoist", "fuse", "legalize"])
def test_these_passes_do_not_change_a_bit(name: str) -> None:
    """They move, join or drop computations, each as it is declared."""
    for seed in range(40):
        module = program(seed, [n for n in MAKERS if n != "conv2d"])
        check_pass(ALL[name], module, program_data(module, seed), None, 0.0)


def test_the_pipeline_on_random_programs() -> None:
    for seed in range(100, 140):
        module = program(seed)
        given = program_data(module, seed)
        before = results(module, given, torch.float64)
        for _, run in PIPELINE:
            run(module)
            verify(module)
        assert moved(results(module, given, torch.float64), before) <= ROUNDED, seed


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
def test_products_amid_neighbours(dtype: str) -> None:
    fired = 0
    for seed in range(120):
        module = neighbours(seed, dtype)
        given = program_data(module, seed)
        before = results(module, given, torch.float64)
        canonicalize(module)
        for _ in range(2):
            fired += absorb(module) + merge(module)
            verify(module)
            canonicalize(module)
        # a module that declares float64 is computed there; the casts of others widen, so that nothing is rounded
        assert moved(results(module, given, torch.float64), before) <= EXACT, seed
    assert fired > 100


def test_float64_graphs_are_folded_in_float64() -> None:
    """Without widening: what is declared is what is computed."""
    for seed in range(40):
        module = neighbours(seed, "f64")
        given = program_data(module, seed)
        before = results(module, given, None)
        canonicalize(module)
        absorb(module)
        assert moved(results(module, given, None), before) <= EXACT, seed


def work(module: Module) -> int:
    """Multiplications at each inference: of products whose left operand depends on an input."""
    from cortexflow.passes.dependence import Dependence, Level

    total = 0
    for func in module.funcs.values():
        level = Dependence(func)
        trips = {o: op.attrs["trips"] for op in func.block.ops if op.body for o in op.body.ops}
        for op in func.block.walk():
            if op.name == "matmul" and level(op.out) == Level.DYNAMIC:
                total += op.out.type.size * op.inputs[0].type.shape[-1] * trips.get(op, 1)
    return total


def test_absorb_never_makes_work() -> None:
    from cortexflow.passes.dce import dce

    for seed in range(300):
        module = neighbours(seed)
        canonicalize(module)
        dce(module)
        before = work(module)
        absorb(module)
        dce(module)
        assert work(module) <= before, seed


@pytest.mark.parametrize("name", MODELS)
def test_each_pass_on_each_model(name: str) -> None:
    module = model(name)
    given = data(module)
    for step, run in (*PIPELINE, ("legalize", ALL["legalize"])):
        check_pass(run, module, given, torch.float64, ROUNDED if step == "fold" else EXACT)


@pytest.mark.parametrize("name", MODELS)
def test_each_pass_on_each_model_in_float32(name: str) -> None:
    module = model(name)
    given = data(module)
    for _, run in (*PIPELINE, ("legalize", ALL["legalize"])):
        check_pass(run, module, given, torch.float32, 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_narrow_model_does_not_lose_precision(name: str) -> None:
    """Folds are rounded once: bfloat16 after the passes is about as near to float32 as it was before them."""
    before = model(name, "bf16")
    after = clone(before)
    for _, run in PIPELINE:
        run(after)
    far_before, far_after = 0.0, 0.0
    for seed in range(3):
        given = data(before, seed)
        wanted = results(before, given, torch.float64)["actions"]
        near, new = (results(m, given, None)["actions"].double() for m in (before, after))
        far_before += float((near - wanted).norm() / wanted.norm())
        far_after += float((new - wanted).norm() / wanted.norm())
    assert 0 < far_after <= 1.5 * far_before


@pytest.mark.parametrize("name", MODELS)
def test_passes_that_are_done_have_nothing_to_do(name: str) -> None:
    module = model(name)
    for _, run in PIPELINE:
        run(module)
    for step, run in PIPELINE:
        if step not in ("merge", "absorb"):
            assert not run(module), step
