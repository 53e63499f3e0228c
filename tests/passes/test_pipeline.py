"""The list of passes, and what surrounds each: listings, the verifier, the check, reports, time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from cortexflow.errors import VerifyError
from cortexflow.ir import Module, Type, building, dump, ops, parse
from cortexflow.models import Signature, create_model
from cortexflow.passes import PIPELINE, report, run_passes
from cortexflow.passes.check import Check
from tests.passes.samples import FULL_CONFIGS, MODELS, full_model, model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_module_given_is_left_alone() -> None:
    module = model("pi05")
    before = dump(module)
    after, steps = run_passes(module)
    assert dump(module) == before != dump(after)
    assert steps[0].name == "input" and dump(steps[0].module) == before
    assert dump(steps[-1].module) == dump(after)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_listings_parse_back_after_every_pass(name: str, dtype: str) -> None:
    _, steps = run_passes(model(name, dtype), lambda op: False)
    for step in steps:
        text = dump(step.module)
        assert dump(parse(text)) == text, step.name


@pytest.mark.parametrize("name", FULL_CONFIGS)
def test_the_listing_of_a_full_model_parses_back(name: str) -> None:
    text = dump(full_model(name))
    assert dump(parse(text)) == text


def test_dump_writes_numbered_listings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEXFLOW_DUMP", str(tmp_path / "new" / "folder"))
    _, steps = run_passes(model("pi05"), lambda op: False)
    files = sorted((tmp_path / "new" / "folder").iterdir())
    wanted = ["input", *(name for name, _ in PIPELINE), "legalize", "dce"]
    assert [f.name for f in files] == [f"{i:02d}_{name}.ir" for i, name in enumerate(wanted)]
    for file, step in zip(files, steps, strict=True):
        assert dump(parse(file.read_text())) == dump(step.module)


def test_check_reports_how_far_each_pass_moved_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CORTEXFLOW_CHECK", "1")
    _, steps = run_passes(model("pi05", batch=1))
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in said] == [name for name, _ in PIPELINE]
    assert all(s.moved is not None and s.moved < 1e-5 for s in steps[1:])
    assert max(s.moved or 0.0 for s in steps[1:]) > 0  # folds do round
    assert f"{steps[4].moved:.1e}" in report(steps).splitlines()[4]


@pytest.mark.parametrize("at", [0, 5, len(PIPELINE)])
def test_check_points_to_a_wrong_pass(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEXFLOW_CHECK", "1")
    passes = (*PIPELINE[:at], ("negated", negated), *PIPELINE[at:])
    _, steps = run_passes(model("pi0", batch=1), passes=passes)
    assert {s.name for s in steps[1:] if s.moved is None or s.moved > 1e-5} == {"negated"}
    assert [s.name for s in steps[1:]][at] == "negated"


def negated(module: Module) -> int:
    """A pass that is wrong: the policy's first result changes its sign."""
    block = module.stages[-1].block
    ret = block.ops.pop()
    with building(block):
        ret.inputs[0] = ops.neg(ret.inputs[0])
    block.ops.append(ret)
    return 1


def test_check_sees_a_number_that_is_none() -> None:
    def broken(value: float) -> Module:
        return parse(
            f"func @f(%x: f32[3]) {{\n%0 = const() {{value={value}}} : f32[]\n"
            "%1 = mul(%x, %0) : f32[3]\nreturn(%x, %1) {names=('a', 'b')}\n}"
        )

    check = Check(broken(1.0))
    assert check.after("same", broken(1.0)) == 0.0
    assert check.after("bad", broken(float("nan"))) == float("inf")
    assert check.after("as bad", broken(float("nan"))) == 0.0
    assert check.after("mended", broken(1.0)) == float("inf")


def test_check_makes_weights_of_any_shape_and_takes_those_given() -> None:
    module = parse(
        "func @f(%x: f32[3]) {\n%0 = weight() {key='s'} : f32[]\n%1 = weight() {key='v'} : f32[3]\n"
        "%2 = mul(%x, %0) : f32[3]\n%3 = add(%2, %1) : f32[3]\nreturn(%3) {names=('y',)}\n}"
    )
    module.weights = {"v": torch.tensor([1.0, 2.0, 3.0])}
    check = Check(module)
    assert torch.equal(check.weights["v"], module.weights["v"]) and check.weights["s"].shape == ()
    assert set(check.inputs) == {"x"}


def test_verification_names_the_fault_that_a_pass_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(module: Module) -> int:
        op = next(op for op in module.stages[0].block.walk() if op.name == "add")
        op.out.type = Type("f64", op.out.type.shape)
        return 1

    monkeypatch.setenv("CORTEXFLOW_VERIFY", "1")
    with pytest.raises(VerifyError, match="add"):
        run_passes(model("pi05"), passes=(("bad", bad),))


def test_a_users_pass_runs_in_the_list() -> None:
    seen: list[int] = []

    def count_products(module: Module) -> int:
        seen.append(sum(op.name == "matmul" for f in module.stages for op in f.block.walk()))
        return 0

    index = [name for name, _ in PIPELINE].index("merge")
    counting = ("count", count_products)
    passes = (*PIPELINE[:index], counting, PIPELINE[index], ("dce", dict(PIPELINE)["dce"]), counting)
    _, steps = run_passes(model("pi05"), passes=passes)
    assert [s.name for s in steps].count("count") == 2
    assert seen[0] > seen[1] > 0


def test_the_report_is_a_table() -> None:
    _, steps = run_passes(model("pi0"), lambda op: op.name == "fused.linear")
    lines = report(steps).splitlines()
    assert len(lines) == len(PIPELINE) + 3
    assert lines[0].split() == ["pass", "fired", "ms", "moved", "detail"]
    (fuse,) = [line for line in lines if line.startswith("fuse ")]
    assert "rotated_attention_segments 2" in fuse and "fused." not in fuse


def test_claims_decide_what_stays_fused() -> None:
    fusions = ("fused.linear", "fused.glu")
    module, _ = run_passes(model("pi0"), lambda op: op.name in fusions)
    found = {op.name for f in module.funcs.values() for op in f.block.walk() if op.name.startswith("fused.")}
    assert found == set(fusions)
    module, steps = run_passes(model("pi0"), lambda op: False)
    assert [s.name for s in steps[-2:]] == ["legalize", "dce"]
    assert not any(op.name.startswith("fused.") for f in module.funcs.values() for op in f.block.walk())


@pytest.mark.parametrize("name", FULL_CONFIGS)
def test_full_models_are_built_and_rewritten_fast(name: str) -> None:
    config = FULL_CONFIGS[name]
    start = time.perf_counter()
    module = create_model(config).build(Signature.of(config), "bf16")
    built = time.perf_counter()
    run_passes(module)
    done = time.perf_counter()
    assert built - start < 3, "the graph of a full-size model builds from shapes in under 3 seconds"
    assert done - built < 10, "the pipeline over it takes under 10 seconds"
