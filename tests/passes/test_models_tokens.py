"""What the pipeline makes of a model that emits tokens: exact counts of fused ops, prepared weights, what is shared."""

from __future__ import annotations

from functools import cache

import pytest

from cortexflow.ir import PREPARE, Module, clone
from cortexflow.models import ModelConfig, Signature, VLAModelType, create_model
from cortexflow.passes import legalize, run_passes
from cortexflow.passes.dependence import Dependence, Level
from cortexflow.weights import fingerprints
from tests.models.test_openvla import TINY_CONFIG

CONFIGS = {"full": ModelConfig.released(VLAModelType.OPENVLA), "tiny": TINY_CONFIG}
CASES = [(size, dtype) for size in CONFIGS for dtype in ("f32", "bf16")]


@cache
def compiled(size: str, dtype: str) -> tuple[Module, dict[str, int]]:
    """The module after the pipeline, and how often each fusion fired."""
    config = CONFIGS[size]
    module, steps = run_passes(create_model(config).build(Signature.of(config), dtype), keep=False)
    (fused,) = [s.fired for s in steps if s.name == "fuse"]
    assert not isinstance(fused, int)
    return module, {name.removeprefix("fused."): n for name, n in fused.items()}


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_exact_fusion_counts(size: str, dtype: str) -> None:
    c = CONFIGS[size]
    blocks, layers = c.dino_num_layers - 1 + c.vision_num_layers - 1, c.num_encoder_layers
    # behind the first and behind every further token stands a head, whose norm cannot join a product with wider results
    heads = 2 if dtype == "f32" else 0
    assert compiled(size, dtype)[1] == {
        "layer_norm_linear_act": blocks,
        "layer_norm_linear": blocks,  # queries, keys and values
        "linear_residual": 2 * blocks,  # LayerScale is in the weights
        "linear": 2 + 1,  # patches of both towers, the projector's last layer
        "linear_act": 2,
        "norm_matmul": 2 * layers + heads,
        "norm_glu": 2 * layers,
        "matmul_residual": 4 * layers,
        "attention_segments": layers,
    }


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_exact_counts_of_prepared_weights(size: str, dtype: str) -> None:
    module, _ = compiled(size, dtype)
    wanted = {("full", "f32"): 484, ("full", "bf16"): 540, ("tiny", "f32"): 76, ("tiny", "bf16"): 88}
    assert len(module.funcs[PREPARE].results) == wanted[size, dtype]


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_the_prefill_and_a_step_read_the_same_weights(size: str, dtype: str) -> None:
    """Every layer's products are prepared once: two copies would not fit a card."""
    module, _ = compiled(size, dtype)
    assert len(set(fingerprints(module).values())) == len(fingerprints(module))
    read = [
        {o.attrs["key"] for o in module.funcs[name].block.walk() if o.name == "weight"}
        for name in ("transformer_encoder", "transformer_decoder")
    ]
    only_once = {key for key in read[0] ^ read[1] if "layers" in key}
    assert not only_once


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_an_inference_computes_nothing_that_was_known(size: str, dtype: str) -> None:
    """Of weights and steps it reads tables' rows, and nothing more."""
    module, _ = compiled(size, dtype)
    for stage in module.stages:
        level = Dependence(stage)
        for op in stage.block.walk():
            if op.outputs and level(op.outputs[0]) < Level.DYNAMIC and op.name not in ("weight", "const"):
                assert op.name == "gather" and op.inputs[0].op is not None
                assert op.inputs[0].op.name == "weight" and level(op.inputs[1]) == Level.STEP


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_no_weight_is_rearranged_during_an_inference(size: str, dtype: str) -> None:
    moves = ("cast", "transpose", "reshape", "slice", "concat", "broadcast_to", "pad")
    for stage in compiled(size, dtype)[0].stages:
        for op in stage.block.walk():
            if op.name in moves:
                assert any(v.op is None or v.op.name != "weight" for v in op.inputs), (op.name, op.note)


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_products_that_share_an_operand_are_one(size: str, dtype: str) -> None:
    module = clone(compiled(size, dtype)[0])
    legalize(module, lambda op: False)
    for stage in module.stages:
        for block in stage.block.blocks():
            left = [op.inputs[0] for op in block.ops if op.name == "matmul"]
            assert len(left) == len(set(left))


def test_decoding_is_one_loop_that_carries_its_own_cache() -> None:
    module, _ = compiled("full", "bf16")
    (loop,) = [op for op in module.stages[-1].block.ops if op.name == "loop"]
    assert loop.attrs["trips"] == 6 and loop.attrs["early_stop"]  # the prompt's end gives the first of seven
    carried = [str(v.type) for v in loop.inputs]
    assert carried.count("bf16[1,6,32,128]") == 64  # and the prefix' cache, of 320 slots, is only read
    assert not [t for t in carried if "320" in t]
