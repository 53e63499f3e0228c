"""What the passes make of the models: exact fusion counts, what is prepared, and what no inference does any more."""

from __future__ import annotations

from functools import cache

import pytest

from cortexflow.ir import PREPARE, Module, Op, clone
from cortexflow.models import ModelConfig, Signature, VLAModelType, create_model
from cortexflow.passes import legalize, run_passes
from cortexflow.passes.dependence import Dependence, Level
from tests.passes.samples import FULL, SMALL

TINY = ModelConfig(  # the dimensions of the reference cases
    vision_encoder_dim=64,
    vision_mlp_dim=128,
    vision_num_layers=2,
    vision_num_heads=4,
    image_size=28,
    encoder_dim=128,
    encoder_mlp_dim=256,
    num_encoder_layers=2,
    decoder_dim=64,
    decoder_mlp_dim=128,
    num_decoder_layers=2,
    head_dim=16,
    vocab_size=512,
    num_views=3,
    max_token_len=20,
)
PI05, PI0 = VLAModelType.PI05, VLAModelType.PI0
# The image tower: 27 layers, each a norm with q, k and v, an output with residual, and an MLP of two
# products; the final norm goes into the projector; patches add their positions. The prefix tower: 18
# layers, of which the last stops at its keys and values. The expert: 18 layers and what stands around.
FULL_COUNTS = {
    PI05: {
        "layer_norm_linear_act": 27,
        "layer_norm_linear": 27 + 1,
        "modulated_norm_glu": 18,
        "modulated_norm_matmul": 18 + 1,  # the action head reads the final norm
        "norm_glu": 17,
        "norm_matmul": 18,
        "matmul_gated_residual": 2 * 18,
        "linear_residual": 2 * 27,
        "matmul_residual": 2 * 17,
        "linear_act": 2,  # the time MLP, in `prepare`
        "linear": 1 + 1 + 37,  # patches, action_in_proj; in `prepare`, the modulations of 37 norms
        "rotated_attention_segments": 18,
    },
    PI0: {
        "layer_norm_linear_act": 27,
        "layer_norm_linear": 27 + 1,
        "norm_glu": 17 + 18,
        "norm_matmul": 18 + 18,
        "linear_residual": 2 * 27 + 1,  # the action head: its scaled projection is added to x_t
        "matmul_residual": 2 * 17 + 2 * 18,
        "linear_act": 1,  # the two action-time projections, as one
        "linear": 4,
        "rotated_attention_segments": 18,
    },
}
SMALL_COUNTS = {
    PI05: {
        "layer_norm_linear_act": 2,
        "layer_norm_linear": 3,
        "modulated_norm_glu": 2,
        "modulated_norm_matmul": 3,
        "norm_glu": 1,
        "norm_matmul": 2,
        "matmul_gated_residual": 4,
        "linear_residual": 4,
        "matmul_residual": 2,
        "linear_act": 2,
        "linear": 2 + 5,
        "rotated_attention_segments": 2,
    },
    PI0: {
        "layer_norm_linear_act": 2,
        "layer_norm_linear": 3,
        "norm_glu": 3,
        "norm_matmul": 4,
        "linear_residual": 5,
        "matmul_residual": 6,
        "linear_act": 1,
        "linear": 4,
        "rotated_attention_segments": 2,
    },
}
# In a narrow graph the head computes in float32, and a cast stands between the final norm and its product.
NARROW = {"modulated_norm_matmul": -1, "modulated_norm": 1, "linear_residual": 1}
PREPARED = {
    (PI05, "full", "f32"): 422,
    (PI05, "full", "bf16"): 477,
    (PI05, "tiny", "f32"): 48,
    (PI05, "tiny", "bf16"): 53,
    (PI0, "full", "f32"): 317,
    (PI0, "full", "bf16"): 372,
    (PI0, "tiny", "f32"): 39,
    (PI0, "tiny", "bf16"): 44,
}
CASES = [pytest.param(*key, id=f"{key[0].value}-{key[1]}-{key[2]}") for key in PREPARED]


@cache
def config_of(family: VLAModelType, size: str) -> ModelConfig:
    return {"full": FULL, "tiny": TINY}[size].with_(model_type=family)


@cache
def compiled(family: VLAModelType, size: str, dtype: str) -> tuple[Module, dict[str, int]]:
    """The module after the pipeline, and how often each fusion fired."""
    config = config_of(family, size)
    module, steps = run_passes(create_model(config).build(Signature.of(config), dtype), keep=False)
    (fused,) = [s.fired for s in steps if s.name == "fuse"]
    assert not isinstance(fused, int)
    return module, {name.removeprefix("fused."): n for name, n in fused.items()}


def stage_ops(module: Module) -> list[Op]:
    return [op for stage in module.stages for op in stage.block.walk()]


def flow(module: Module) -> list[Op]:
    """The ops of one flow step."""
    (loop,) = [op for op in module.stages[-1].block.ops if op.name == "loop"]
    assert loop.body is not None
    return loop.body.ops


@pytest.mark.parametrize(("family", "size", "dtype"), CASES)
def test_exact_fusion_counts(family: VLAModelType, size: str, dtype: str) -> None:
    wanted = dict((FULL_COUNTS if size == "full" else SMALL_COUNTS)[family])
    if dtype != "f32" and family is PI05:
        wanted = {k: wanted.get(k, 0) + NARROW.get(k, 0) for k in wanted | NARROW}
    assert compiled(family, size, dtype)[1] == wanted


@pytest.mark.parametrize(("family", "size", "dtype"), CASES)
def test_exact_counts_of_prepared_weights(family: VLAModelType, size: str, dtype: str) -> None:
    module, _ = compiled(family, size, dtype)
    assert len(module.funcs[PREPARE].results) == PREPARED[family, size, dtype]
    read = {op.attrs["key"] for op in stage_ops(module) if op.name == "weight"}
    assert set(module.funcs[PREPARE].results) <= read


@pytest.mark.parametrize(("family", "size", "dtype"), CASES)
def test_the_last_prefix_layer_stops_at_its_keys_and_values(family: VLAModelType, size: str, dtype: str) -> None:
    module, _ = compiled(family, size, dtype)
    tower = "paligemma_with_expert.paligemma.model.language_model"
    last = f"{tower}.layers.{config_of(family, size).num_encoder_layers - 1}."
    keys = module.weight_types()
    assert sorted(k.removeprefix(last) for k in keys if k.startswith(last)) == [
        "input_layernorm.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ]
    assert f"{tower}.norm.weight" not in keys


@pytest.mark.parametrize(("family", "size", "dtype"), CASES)
def test_an_inference_computes_nothing_that_was_known(family: VLAModelType, size: str, dtype: str) -> None:
    """Of weights and steps it reads tables' rows, and nothing more."""
    module, _ = compiled(family, size, dtype)
    for stage in module.stages:
        level = Dependence(stage)
        for op in stage.block.walk():
            if op.outputs and level(op.outputs[0]) < Level.DYNAMIC and op.name not in ("weight", "const"):
                assert op.name == "gather" and op.inputs[0].op is not None
                assert op.inputs[0].op.name == "weight" and level(op.inputs[1]) == Level.STEP


@pytest.mark.parametrize(("family", "size", "dtype"), CASES)
def test_no_weight_is_rearranged_during_an_inference(family: VLAModelType, size: str, dtype: str) -> None:
    moves = ("cast", "transpose", "reshape", "slice", "concat", "broadcast_to", "pad")
    for op in stage_ops(compiled(family, size, dtype)[0]):
        if op.name in moves:
            assert any(v.op is None or v.op.name != "weight" for v in op.inputs), (op.name, op.note)


@pytest.mark.parametrize(("family", "size", "dtype"), CASES)
def test_the_flow_step_is_folded_into_the_head(family: VLAModelType, size: str, dtype: str) -> None:
    module = clone(compiled(family, size, dtype)[0])
    legalize(module, lambda op: False)
    ops = flow(module)
    assert not [op.note for op in ops for v in op.inputs if v.op is not None and v.op.name == "const"]
    head = [op for op in ops if op.note.endswith("head")]
    assert [op.name for op in head if op.name in ("matmul", "mul", "add")][-3:] == ["matmul", "add", "add"]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_time_and_action_projections_are_one_product(dtype: str) -> None:
    module = clone(compiled(PI0, "full", dtype)[0])
    legalize(module, lambda op: False)
    products = [op for op in flow(module) if op.name == "matmul" and "action_time" in op.note]
    assert [op.inputs[1].type.shape for op in products] == [(32, 1024), (1024, 1024)]
    rows = [op for op in flow(module) if op.name == "gather"]
    assert len(rows) == 1  # all that the step still decides is that product's bias
    assert rows[0].out.type.size == 1024


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_modulations_are_rows_of_tables(dtype: str) -> None:
    module, _ = compiled(PI05, "full", dtype)
    rows = [op for op in flow(module) if op.name == "gather"]
    assert len(rows) == 3 * 37 - 1  # scale, shift and gate of 37 norms; the last has no branch to gate
    assert all(op.inputs[0].type.shape[0] == 10 for op in rows)
    assert not [op for op in flow(module) if op.note.split(".")[-1] in ("time", "time_mlp")]


@pytest.mark.parametrize(("family", "size", "dtype"), CASES)
def test_products_that_share_an_operand_are_one(family: VLAModelType, size: str, dtype: str) -> None:
    module = clone(compiled(family, size, dtype)[0])
    legalize(module, lambda op: False)
    for stage in module.stages:
        for block in stage.block.blocks():
            left = [op.inputs[0] for op in block.ops if op.name == "matmul"]
            assert len(left) == len(set(left))


def test_a_folded_file_reads_its_own_table() -> None:
    config = SMALL.with_(model_type=PI0, folded_time_steps=SMALL.num_diffusion_steps)
    module, _ = run_passes(create_model(config).build(Signature.of(config)))
    rows = [op for op in flow(module) if op.name == "gather"]
    assert [op.inputs[0].op.attrs["key"] for op in rows if op.inputs[0].op] == ["folded.time_bias"]
