"""The whole product on one page: text to graph, passes, targets; checkpoint to actions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cortexflow
from cortexflow.ir import Type, dump, function, ops, parse, returns, run_module, scope, verify
from cortexflow.ir.core import Module
from cortexflow.passes import run_passes

CHECKPOINT = Path(__file__).parent / "data" / "pi" / "pi05_tiny"


def tiny() -> Module:
    """A norm with a learned factor, a product with a bias, three times in a loop."""
    with function("f", x=Type("f32", (2, 8))) as (f, [x]):
        g, w = ops.weight(key="norm", type=Type("f32", (8,))), ops.weight(key="w", type=Type("f32", (8, 8)))

        def step(_: ops.Value, h: ops.Value) -> list[ops.Value]:
            with scope("layer"):
                return [ops.add(h, ops.matmul(ops.rms_norm(h, g, eps=1e-6), w))]

        (y,) = ops.loop([x], 3, step)
        returns(y=y)
    return Module({"f": f})


def data() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return {"x": torch.randn(2, 8)}, {"norm": torch.randn(8), "w": torch.randn(8, 8)}


def test_build_print_parse_verify() -> None:
    text = dump(tiny())
    verify(parse(text))
    assert dump(parse(text)) == text


def test_passes_keep_the_meaning() -> None:
    module, (inputs, weights) = tiny(), data()
    lowered, steps = run_passes(module)
    assert {s.name: s.fired for s in steps}["fuse"] == {"fused.norm_matmul": 1}
    before, after = run_module(module, inputs, weights)["y"], run_module(lowered, inputs, weights)["y"]
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_the_norm_factor_is_in_the_weights() -> None:
    lowered, _ = run_passes(tiny())
    assert [op.name for op in lowered.funcs["prepare"].block.ops if op.name == "mul"] == ["mul"]
    assert not [op for op in lowered.funcs["f"].block.walk() if op.name in ("mul", "transpose", "cast")]


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_targets_agree_with_the_interpreter(target: str) -> None:
    module, (inputs, weights) = tiny(), data()
    compiled = cortexflow.compile(module, target, weights=weights)
    torch.testing.assert_close(compiled(**inputs), run_module(module, inputs, weights)["y"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_checkpoint_to_actions(target: str) -> None:
    policy = cortexflow.compile(CHECKPOINT, target)
    shape = {n: t.shape for n, t in policy.inputs.items()}
    torch.manual_seed(0)
    actions = policy(
        images=torch.rand(shape["images"]) * 2 - 1, tokens=torch.tensor([[2, 7, 9]]), noise=torch.randn(shape["noise"])
    )
    assert actions.shape == (1, 10, 32)
    assert bool(torch.isfinite(actions).all())
