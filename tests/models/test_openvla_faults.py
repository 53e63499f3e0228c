"""OpenVLA's cases would notice: a wrong input, a changed weight, or one deliberate fault in the graph moves the logits.

Where the published code was perturbed in the same way, the numbers are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import pytest
import torch
from torch import Tensor

from cortexflow.ir import Module, Value, clone, ops, run_module, verify
from cortexflow.models import Signature, create_model
from cortexflow.passes import expose
from tests.models.cases import distance
from tests.models.openvla_cases import Request, batch_of, requests, weights
from tests.models.test_faults import Edit, all_ops, epsilon, follow, number, only
from tests.models.test_openvla import LOGITS, SLOTS, TINY_CONFIG

VISION, PREFILL, DECODE = "vision_encoder", "transformer_encoder", "transformer_decoder"
LEAST = 7.33e-2  # the least change of the published code's logits when one tensor that it reads is changed

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def built(decoding: bool = True) -> Module:
    module = create_model(TINY_CONFIG.with_(action_dim=7 if decoding else 1)).build(
        Signature.of(TINY_CONFIG, prompt=SLOTS)
    )
    expose(module, *("patches_*", "first_logits", *(("step_logits",) if decoding else ())))
    return module


def results(inputs: Mapping[str, Tensor], edit: Edit = lambda module: None, **changed: Tensor) -> dict[str, Tensor]:
    module = clone(built())
    edit(module)
    verify(module)
    return run_module(module, inputs, {**weights(), **changed})


def change(edit: Edit) -> float:
    """How far the logits of all requests and steps are from the published code's, after an edit of the graph."""
    far = 0.0
    for request in requests():
        found = results(batch_of([request], SLOTS), edit)
        far = max(far, distance(found["first_logits"], request.outputs["prefill_logits_last"]))
        steps = found["step_logits"][:, 0, 31744:]
        far = max(far, distance(steps, request.outputs["step_logits_action_columns"][1:]))
    return far


# ---- inputs ----------------------------------------------------------------------------------------


def with_token(at: int, token: int) -> Callable[[Request], dict[str, Tensor]]:
    def make(request: Request) -> dict[str, Tensor]:
        inputs = batch_of([request], SLOTS)
        inputs["tokens"][0, at] = token
        return inputs

    return make


def with_pixels(make: Callable[[Tensor], Tensor]) -> Callable[[Request], dict[str, Tensor]]:
    return lambda request: {**batch_of([request], SLOTS), "pixel_values": make(request.pixel_values)}


def not_appended(request: Request) -> dict[str, Tensor]:
    inputs = batch_of([request], SLOTS)
    inputs["token_mask"][0, request.tokens.shape[1] - 1] = False
    return inputs


# the published code's largest changes: DINOv2's features, SigLIP's, the logits behind the prompt
INPUTS: dict[str, tuple[Callable[[Request], dict[str, Tensor]], float, float, float]] = {
    "the two towers' channels swapped": (with_pixels(lambda x: torch.cat([x[:, 3:], x[:, :3]], 1)), 6.68, 12.7, 3.8),
    "picture mirrored": (with_pixels(lambda x: x.flip(3)), 10.8, 17.9, 3.52),
    "BOS replaced": (with_token(0, 2), 0.0, 0.0, 2.55),
    "29871 not appended": (not_appended, 0.0, 0.0, 9.24),
}


@pytest.mark.parametrize("what", INPUTS)
def test_a_wrong_input_moves_what_it_moved_in_the_published_code(what: str) -> None:
    make, *wanted = INPUTS[what]
    request = requests()[0]
    found = results(make(request))
    names = {"patches_dino": "patches_dino", "patches_siglip": "patches_siglip", "first_logits": "prefill_logits_last"}
    moved = [distance(found[name], request.outputs[stored]) for name, stored in names.items()]
    assert moved == pytest.approx(wanted, rel=0.02, abs=5e-5)


@pytest.mark.parametrize(("channel", "tower", "other"), [(0, "dino", "siglip"), (4, "siglip", "dino")])
def test_each_tower_reads_its_own_channels(channel: int, tower: str, other: str) -> None:
    request = requests()[0]
    pixels = request.pixel_values.clone()
    pixels[0, channel, 20, 31] += 1
    found, before = results({**batch_of([request], SLOTS), "pixel_values": pixels}), results(batch_of([request], SLOTS))
    assert distance(found[f"patches_{tower}"], before[f"patches_{tower}"]) > 0.1
    assert torch.equal(found[f"patches_{other}"], before[f"patches_{other}"])


# ---- weights ---------------------------------------------------------------------------------------


def test_every_tensor_that_is_read_has_an_effect() -> None:
    request, silent = requests()[0], {}
    inputs, module = batch_of([request], SLOTS), built(decoding=False)
    keys = module.weight_types()
    assert len(keys) == 134
    for key in keys:
        changed = run_module(module, inputs, {**weights(), key: 1.5 * weights()[key].float() + 0.25})["first_logits"]
        moved = distance(changed, request.outputs["prefill_logits_last"])
        if moved < 0.98 * LEAST:
            silent[key] = moved
    assert not silent


# ---- the graph -------------------------------------------------------------------------------------


def tanh_gelu(tower: str) -> Edit:
    def edit(module: Module) -> None:
        for op in all_ops(module, VISION, "act", note=tower):
            op.attrs["kind"] = "gelu_tanh"

    return edit


def no_layer_scale(module: Module) -> None:
    for op in all_ops(module, VISION, "mul", note="dino"):
        follow(module, VISION, op.inputs[1], lambda v: number(v, 1.0))


def one_head(tower: str) -> Edit:
    """Attention scaled as if all heads were one."""

    def edit(module: Module) -> None:
        for op in all_ops(module, VISION, "attention", note=tower):
            heads = op.inputs[0].type.shape[2]
            op.attrs["scale"] /= heads**0.5

    return edit


def sees_later_tokens(module: Module) -> None:
    for op in all_ops(module, PREFILL, "attention"):
        op.attrs["causal"] = False


def end_of_bucket(module: Module) -> None:
    """Decoding goes on behind the padding."""
    (length,) = [v for name, v in module.funcs[PREFILL].results.items() if name == "length"]
    follow(module, PREFILL, length, lambda v: number(v, module.funcs[DECODE].args["k_0"].type.shape[1]))


def sees_padding(module: Module) -> None:
    valid = only(all_ops(module, DECODE, "lt")).out
    follow(module, DECODE, valid, lambda v: number(v, True))


def sees_unwritten(module: Module) -> None:
    follow(module, DECODE, only(all_ops(module, DECODE, "le")).out, lambda v: number(v, True))


def position(by: int) -> Edit:
    """Generated tokens stand so many positions further."""

    def edit(module: Module) -> None:
        loop = only(all_ops(module, DECODE, "loop"))
        at = loop.inputs.index(module.funcs[DECODE].args["length"])
        carried = loop.body.args[1 + at]  # type: ignore[union-attr]
        for op in all_ops(module, DECODE, "gather", note="rope"):
            if shifted := [i for i, v in enumerate(op.inputs) if _comes_from(v, carried)]:
                for i in shifted:
                    follow(module, DECODE, op.inputs[i], lambda v: ops.add(v, number(v, by)))
                return

    return edit


def _comes_from(v: Value, source: Value) -> bool:
    return v is source or (v.op is not None and any(_comes_from(i, source) for i in v.op.inputs))


def bos_behind_the_patches(module: Module) -> None:
    joined = only([op for op in all_ops(module, PREFILL, "concat") if len(op.inputs) == 3])
    joined.inputs[:2] = [joined.inputs[1], joined.inputs[0]]


def siglip_first(module: Module) -> None:
    joined = only([op for op in all_ops(module, VISION, "concat") if not op.note])
    joined.inputs.reverse()


def adjacent_pairs(module: Module) -> None:
    """Pair columns (2j, 2j + 1)."""

    def halves_of_pairs(x: Value) -> Value:
        *lead, d = x.type.shape
        n = len(lead)
        pairs = ops.transpose(ops.reshape(x, shape=(*lead, d // 2, 2)), perm=(*range(n), n + 1, n))
        return ops.reshape(pairs, shape=(*lead, d))

    for stage in (PREFILL, DECODE):
        for op in all_ops(module, stage, "rope"):
            follow(module, stage, op.inputs[0], halves_of_pairs)


def gelu_units(module: Module) -> None:
    for stage in (PREFILL, DECODE):
        for op in all_ops(module, stage, "act"):
            op.attrs["kind"] = "gelu"


def llama_epsilon(module: Module) -> None:
    """Llama-2's own, in place of the class default that the released model runs with."""
    for stage in (PREFILL, DECODE):
        epsilon(stage, "rms_norm")(module)


FAULTS: dict[str, Edit] = {
    "DINOv2 GELU: tanh": tanh_gelu("dino"),
    "SigLIP GELU: tanh": tanh_gelu("siglip"),
    "projector GELU: tanh": tanh_gelu("projector"),
    "LayerNorm eps 1e-5": epsilon(VISION, "layer_norm"),
    "RMSNorm eps 1e-5": llama_epsilon,
    "LayerScale ignored": no_layer_scale,
    "DINOv2 attention scaled by the width": one_head("dino"),
    "SigLIP attention scaled by the width": one_head("siglip"),
    "SigLIP's features first": siglip_first,
    "BOS behind the patches": bos_behind_the_patches,
    "prefill sees later tokens": sees_later_tokens,
    "decoding goes on behind the bucket": end_of_bucket,
    "generated tokens see padding": sees_padding,
    "generated tokens see slots that are not written": sees_unwritten,
    "generated tokens one position early": position(-1),
    "generated tokens one position late": position(1),
    "RoPE pairs adjacent columns": adjacent_pairs,
    "the language model's units are GELU": gelu_units,
}


def test_without_a_fault_the_logits_agree() -> None:
    assert change(lambda module: None) < LOGITS


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str) -> None:
    assert change(FAULTS[fault]) > 1.5 * LOGITS
