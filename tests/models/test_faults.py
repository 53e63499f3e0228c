"""The reference cases would notice: one deliberate fault at a time in our graph moves the actions.

Each fault was also made in the reference implementation, where it changed the actions of a case's two
batches by so much (the numbers in the table). The same fault in our graph does the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache

import pytest
import torch

from cortexflow.compiler import load_model
from cortexflow.ir import Module, Op, Value, building, clone, ops, run_module, verify
from cortexflow.ir.core import Block, substitute
from cortexflow.models import Signature
from tests.models.cases import DATA, batches, distance

Edit = Callable[[Module], None]
VISION, PREFIX, EXPERT = "vision_encoder", "transformer_encoder", "transformer_decoder"
TOLERANCE = 1e-4  # of the reference cases


# ---- finding and rewriting -------------------------------------------------------------------------


def all_ops(module: Module, stage: str, name: str, note: str = "") -> list[Op]:
    """The ops of this name in a stage whose note (`layers.3.attn`) has this part."""
    return [op for op in module.funcs[stage].block.walk() if op.name == name and note in op.note]


def values(module: Module, stage: str, label: str) -> list[Value]:
    """The values with this name."""
    return [v for op in module.funcs[stage].block.walk() for v in op.outputs if v.name == label]


def constants(module: Module, stage: str, value: float, dtype: str) -> list[Op]:
    """The constants of this value."""
    found = [o for o in all_ops(module, stage, "const") if o.attrs["dtype"] == dtype]
    return [o for o in found if math.isclose(o.attrs["value"], value, rel_tol=1e-12)]


def follow(module: Module, stage: str, v: Value, make: Callable[[Value], Value]) -> None:
    """What read `v` now reads what is made of it."""
    block = module.funcs[stage].block
    assert v.op is not None
    home = next(b for b in block.blocks() if v.op in b.ops)
    with building(Block()) as new:
        made = make(v)
    substitute(block, {v: made})
    at = home.ops.index(v.op) + 1
    home.ops[at:at] = new.ops


def only(found: Iterable[Op]) -> Op:
    (op,) = found
    return op


def number(like: Value, value: float) -> Value:
    return ops.broadcast_to(ops.scalar(value, like), shape=like.type.shape)


# ---- the faults ------------------------------------------------------------------------------------


def epsilon(stage: str, norm: str) -> Edit:
    def edit(module: Module) -> None:
        for op in all_ops(module, stage, norm):
            op.attrs["eps"] = 1e-5

    return edit


def erf_gelu(stage: str) -> Edit:
    def edit(module: Module) -> None:
        for op in all_ops(module, stage, "act"):
            if op.attrs["kind"] == "gelu_tanh":
                op.attrs["kind"] = "gelu"

    return edit


def causal(stage: str) -> Edit:
    def edit(module: Module) -> None:
        for op in all_ops(module, stage, "attention"):
            op.attrs["causal"] = True

    return edit


def expert_start(make: Callable[[Value], Value]) -> Edit:
    """The first suffix position is the number of valid prefix tokens."""
    return lambda module: follow(module, EXPERT, only(all_ops(module, EXPERT, "reduce_sum")).out, make)


def from_padded_length(module: Module) -> None:
    slots = module.funcs[EXPERT].args["prefix_valid"].type.shape[1]
    expert_start(lambda count: number(count, slots))(module)


def count_padding(module: Module) -> None:
    (valid,) = only(all_ops(module, PREFIX, "cumsum")).inputs
    follow(module, PREFIX, valid, lambda v: number(v, 1))


def no_prefix_mask(module: Module) -> None:
    for op in all_ops(module, PREFIX, "attention"):
        del op.inputs[3]


def no_expert_mask(module: Module) -> None:
    valid = module.funcs[EXPERT].args["prefix_valid"]
    (mask,) = [op.out for op in all_ops(module, EXPERT, "reshape") if op.inputs[0] is valid]
    follow(module, EXPERT, mask, lambda v: number(v, True))


def state_sees_actions(module: Module) -> None:
    follow(module, EXPERT, only(all_ops(module, EXPERT, "or")).out, lambda v: number(v, True))


def unscaled_tokens(module: Module) -> None:
    width = module.funcs[PREFIX].args["image_tokens"].type.shape[2]
    only(constants(module, PREFIX, math.sqrt(width), "f32")).attrs["value"] = 1.0


def scaled_images(power: float) -> Edit:
    def edit(module: Module) -> None:
        (image,) = values(module, VISION, "image_embed")
        factor = image.type.shape[-1] ** power
        follow(module, VISION, image, lambda v: ops.mul(v, ops.scalar(factor, v)))

    return edit


def factor_without_one(module: Module) -> None:
    for op in constants(module, PREFIX, 1.0, "f32"):
        if "rope" not in op.note:
            op.attrs["value"] = 0.0


def rounded_frequencies(module: Module) -> None:
    for stage in (PREFIX, EXPERT):
        frequency = all_ops(module, stage, "div", note="rope")[-1].out
        follow(module, stage, frequency, lambda v: ops.cast(ops.cast(v, dtype="bf16"), dtype="f32"))


def adjacent_pairs(module: Module) -> None:
    """Pair columns (2j, 2j + 1). Queries and keys are permuted alike, so their products need no way back."""

    def halves_of_pairs(x: Value) -> Value:
        *lead, d = x.type.shape
        pairs = ops.reshape(x, shape=(*lead, d // 2, 2))
        n = len(lead)
        return ops.reshape(ops.transpose(pairs, perm=(*range(n), n + 1, n)), shape=(*lead, d))

    for stage in (PREFIX, EXPERT):
        for op in all_ops(module, stage, "rope"):
            follow(module, stage, op.inputs[0], halves_of_pairs)


def modulation(label: str, value: float) -> Edit:
    """Every scale (the whole factor), shift or gate of the adaptive norms becomes one number."""

    def edit(module: Module) -> None:
        for v in values(module, EXPERT, label):
            follow(module, EXPERT, v, lambda v: number(v, value))

    return edit


def swapped_modulation(module: Module) -> None:
    parts = [o for o in all_ops(module, EXPERT, "slice") if o.inputs[0].type.shape[-1] == 3 * o.out.type.shape[-1]]
    for scale, shift in zip(parts[::3], parts[1::3], strict=True):
        scale.attrs, shift.attrs = shift.attrs, scale.attrs


def no_second_silu(module: Module) -> None:
    (condition,) = values(module, EXPERT, "adarms_cond")
    assert condition.op is not None and condition.op.name == "act"
    substitute(module.funcs[EXPERT].block, {condition: condition.op.inputs[0]})


def cosine_first(module: Module) -> None:
    only(op for op in all_ops(module, EXPERT, "concat") if op.note.endswith(".time")).inputs.reverse()


def long_period(module: Module) -> None:
    only(constants(module, EXPERT, 4.0 / 4e-3, "f64")).attrs["value"] = 10000 / 4e-3


def one_step_more(module: Module) -> None:
    loop = only(all_ops(module, EXPERT, "loop"))
    steps = loop.attrs["trips"]
    loop.attrs["trips"] = steps + 1
    for dtype in ("f32", "f64"):
        only(constants(module, EXPERT, -1 / steps, dtype)).attrs["value"] = -1 / (steps + 1)


CASES = ("pi05_tiny", "pi05_tiny2", "pi0_tiny", "pi0_tiny2")
# the edit, a case that shows it, what it does to the reference there (None: there it was made in another way)
FAULTS: dict[str, tuple[Edit, str, float | None]] = {
    "expert RoPE starts one position early": (expert_start(lambda n: ops.sub(n, number(n, 1))), "pi05_tiny", 8.4e-01),
    "expert RoPE starts at the padded prefix length": (from_padded_length, "pi0_tiny", 2.2e00),
    "prefix positions count padding and masked cameras": (count_padding, "pi0_tiny", 1.8e00),
    "padding and masked cameras are attended to (prefix)": (no_prefix_mask, "pi0_tiny", 8.0e-01),
    "padding and masked cameras are attended to (expert)": (no_expert_mask, "pi05_tiny", 1.1e00),
    "expert tokens attend causally": (causal(EXPERT), "pi05_tiny", 1.5e00),
    "prefix attends causally": (causal(PREFIX), "pi0_tiny2", 1.4e00),
    "SigLIP LayerNorm eps 1e-5": (epsilon(VISION, "layer_norm"), "pi05_tiny2", 7.9e-01),
    "prefix RMSNorm eps 1e-5": (epsilon(PREFIX, "rms_norm"), "pi05_tiny2", 6.2e-01),
    "expert RMSNorm eps 1e-5": (epsilon(EXPERT, "rms_norm"), "pi0_tiny2", 6.4e-01),
    "SigLIP gelu: erf": (erf_gelu(VISION), "pi05_tiny2", 1.2e-03),
    "prefix gelu: erf": (erf_gelu(PREFIX), "pi05_tiny2", 4.2e-04),
    "expert gelu: erf": (erf_gelu(EXPERT), "pi05_tiny2", 9.1e-04),
    "token embeddings not scaled": (unscaled_tokens, "pi0_tiny2", 1.5e00),
    "image embeddings divided by sqrt(width)": (scaled_images(-0.5), "pi0_tiny", 1.1e00),
    "image embeddings multiplied by sqrt(width)": (scaled_images(0.5), "pi05_tiny", 1.0e00),
    "prefix RMSNorm multiplies by w": (factor_without_one, "pi05_tiny", 2.3e00),
    "RoPE frequencies rounded to bfloat16": (rounded_frequencies, "pi05_tiny2", 1.9e-02),
    "RoPE pairs adjacent columns": (adjacent_pairs, "pi0_tiny2", None),
    "adaRMS gate ignored": (modulation("gate", 1.0), "pi05_tiny", 1.1e00),
    "adaRMS scale ignored": (modulation("scale", 1.0), "pi05_tiny", 1.4e00),
    "adaRMS shift ignored": (modulation("shift", 0.0), "pi05_tiny2", 1.5e00),
    "adaRMS scale and shift swapped": (swapped_modulation, "pi05_tiny2", 2.4e00),
    "no silu after time_mlp_out": (no_second_silu, "pi05_tiny", 6.9e-01),
    "time embedding is [cos, sin]": (cosine_first, "pi0_tiny", 1.4e00),
    "time max_period 10000": (long_period, "pi0_tiny2", 2.0e00),
    "one Euler step more": (one_step_more, "pi05_tiny", 6.0e-01),
    "state token sees the action tokens": (state_sees_actions, "pi0_tiny2", 2.9e-01),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def built(case: str, batch: int) -> tuple[Module, dict[str, torch.Tensor]]:
    model, weights = load_model(DATA / case)
    return model.build(Signature.of(model.config, batch=batch)), dict(weights)


def change(case: str, edit: Edit) -> float:
    """How far the actions of a case's batches are from the reference's, after an edit of the graph."""
    far = 0.0
    for batch in batches(DATA / case):
        module, weights = built(case, batch.size)
        module = clone(module)
        edit(module)
        verify(module)
        far = max(far, distance(run_module(module, batch.inputs, weights)["actions"], batch.outputs["actions"]))
    return far


@pytest.mark.parametrize("case", CASES)
def test_without_a_fault_the_actions_agree(case: str) -> None:
    assert change(case, lambda module: None) < TOLERANCE


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str) -> None:
    edit, case, reference = FAULTS[fault]
    found = change(case, edit)
    assert found > 2 * TOLERANCE
    if reference is not None:
        assert found == pytest.approx(reference, rel=0.06)  # the table has two digits
