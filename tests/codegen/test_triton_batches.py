"""The triton target with several samples: as many launches as with one, on any machine; actions on a GPU."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
import torch

import cortexflow
from cortexflow.checkpoints import open_checkpoint
from cortexflow.ir import Module, Op, Type, function, fused, ops, returns
from cortexflow.models import Signature, VLAModelType, create_model
from cortexflow.passes.plan_buffers import plan_buffers
from cortexflow.weights import random_weights

pytest.importorskip("triton")

from cortexflow.codegen.triton.claims import SCRATCH, claims
from cortexflow.codegen.triton.program import Program
from cortexflow.kernels.triton import segment_attention
from tests.codegen.test_triton import LAYER_OF_SOME_ROWS, WIDE, launches, observation, plan_text
from tests.models.cases import DATA


@pytest.mark.parametrize("kind", [VLAModelType.PI05, VLAModelType.PI0])
@pytest.mark.parametrize(("batch", "chunk"), [(3, 10), (8, 10), (8, 50)])
def test_attention_and_rotation_take_a_batch_in_one_launch(kind: VLAModelType, batch: int, chunk: int) -> None:
    """Nothing is copied and nothing is launched sample by sample."""
    text, _ = plan_text(WIDE.with_(model_type=kind), batch=batch, chunk=chunk)
    for i in range(WIDE.num_decoder_layers):
        layer = launches(text, "transformer_decoder", f"expert.layers.{i}")
        assert layer.count("segment_attention") == 1 and not {"rope", "copy"} & {*layer}, layer
    for i in range(WIDE.num_encoder_layers - 1):
        layer = launches(text, "transformer_encoder", f"prefix.layers.{i}")
        assert layer.count("rope_and_cache") == 1 and not {"rope", "copy"} & {*layer}, layer


NORMED = ["torch.mm", "segment_attention", "summed_norm", "torch.mm", "glu", "summed_norm"]
PLAIN = ["torch.mm", "segment_attention", "torch.addmm", "rms_norm", "torch.mm", "glu", "torch.addmm"]


@pytest.mark.parametrize(
    ("kind", "norm", "layer"),
    [(VLAModelType.PI05, "modulated_norm", NORMED), (VLAModelType.PI0, "rms_norm", PLAIN)],
)
def test_a_layer_of_sixteen_samples(kind: VLAModelType, norm: str, layer: list[str]) -> None:
    """160 rows: the library's products; a gated sum is added up, and normed, in the launch behind its product."""
    text, _ = plan_text(WIDE.with_(model_type=kind), batch=16)
    first, second = (launches(text, "transformer_decoder", f"expert.layers.{i}") for i in range(2))
    assert first == [norm, *layer]
    assert second == layer if kind is VLAModelType.PI05 else [norm, *layer]
    sums = [line for line in text.splitlines() if line.lstrip().startswith("summed_norm(torch.mm(")]
    assert len(sums) == (4 if kind is VLAModelType.PI05 else 0)
    assert all(f"{name}=" in line for line in sums for name in ("residual", "gate", "scale", "shift"))


@pytest.mark.parametrize(("kind", "chunk", "batch"), [(VLAModelType.PI05, 10, 8), (VLAModelType.PI0, 50, 2)])
def test_a_layer_of_up_to_128_rows_streams_its_weights(kind: VLAModelType, chunk: int, batch: int) -> None:
    text, _ = plan_text(WIDE.with_(model_type=kind), batch=batch, chunk=chunk)
    assert launches(text, "transformer_decoder", "expert.layers.1") == LAYER_OF_SOME_ROWS


def test_a_part_of_a_prefix_is_one_launch_for_all_samples() -> None:
    text, _ = plan_text(WIDE, batch=8)
    moved = re.findall(r"^ +(epilogue\(self\.b\d+, self\.b\d+\[:, \d+:\d+\]\))  # prefix$", text, re.M)
    assert len(moved) == 2, "images, then the prompt"


@pytest.mark.parametrize("without", [(), ("joined",)])
def test_a_norm_comes_with_the_gated_sum_that_it_reads(without: tuple[str, ...]) -> None:
    lines = gated(frozenset(without))
    assert [line.split("(")[0] for line in lines] == (["epilogue", "rms_norm"] if without else ["summed_norm"])


def test_a_norm_onto_the_gate_of_its_sum_is_launched_apart() -> None:
    """The gate may be overwritten when the last row has read it."""
    assert [line.split("(")[0] for line in gated(onto="gate")] == ["epilogue", "rms_norm"]
    assert [line.split("(")[0] for line in gated(onto="x")] == ["summed_norm"], "the product is done"


def gated(without: frozenset[str] = frozenset(), onto: str = "") -> list[str]:
    """What is launched for a gated sum of 160 rows and its norm; `onto`: where the plan has the norm's result."""
    wide = Type("bf16", (160, 1024))
    with function("f", x=wide, r=wide, gate=wide) as (f, [x, r, gate]):
        gate = ops.act(ops.slice_(gate, axis=0, stop=1), kind="silu")
        y = fused.matmul_gated_residual(r, x, ops.weight(key="w", type=Type("bf16", (1024, 1024))), gate)
        n = ops.rms_norm(y, eps=1e-6)
        returns(y=y, n=n)
    module = Module({"f": f})
    plan = plan_buffers(module)
    if onto:
        plan.offsets[n] = plan.offsets[{"gate": gate, "x": x}[onto]]
    lines = [line.strip() for line in Program(module, plan, without).text().splitlines()]
    return [line for line in lines if re.match(r"(summed_norm|rms_norm|epilogue)\((?!.*silu)", line)]


def test_a_reference_case_of_three_samples_runs_the_kernels_for_batches() -> None:
    """`test_reference_cases` of bfloat16 checks the numbers on a GPU."""
    config = open_checkpoint(DATA / "pi05_tiny2").config
    text, _ = plan_text(config, batch=3)
    plan = text[text.index("class Policy") :]
    assert plan.count(" segment_attention(") == config.num_decoder_layers
    assert plan.count("summed_norm(") and plan.count(" rope_and_cache(") == config.num_encoder_layers


def attending(
    b: int, m: int, n: int, heads: int = 8, d: int = 256, mask: Type | None = None, angles: tuple[int, ...] = ()
) -> Op:
    """Attention of m rotated queries to n cached keys and their own."""
    q, cache, own = (Type("bf16", (b, *s, d)) for s in ((m, heads), (n, 1), (m, 1)))
    table = Type("f32", angles or (b, m, d // 2))
    given = {"q": q, "k0": cache, "v0": cache, "k1": own, "v1": own, "c": table, "s": table}
    with function("f", **given, mask=mask or Type("bool", (b, 1, n + m))) as (_, values):
        y = fused.rotated_attention_segments(*values, scale=0.1, causal=False)
        returns(y=y)
    assert y.op is not None
    return y.op


@pytest.mark.parametrize("warpgroups", [False, True])
def test_attention_is_claimed_where_its_scratch_is_large_enough(warpgroups: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(segment_attention, "_has_warpgroups", lambda: warpgroups)
    claimed = set()
    for b, m, n, d in product((1, 2, 3, 8, 24, 64, 200), (1, 10, 50, 64), (5, 560, 968, 2000), (32, 256)):
        if claims(attending(b, m, n, d=d)):
            claimed.add((b, m, n, d))
            config = segment_attention.default(b, m, 8, d, n, room=SCRATCH)
            assert segment_attention.scratch_size(b, m, 8, n, config) <= SCRATCH
    assert {(1, 64, 2000, 256), (8, 50, 968, 256), (24, 10, 560, 256)} <= claimed
    assert not {c for c in claimed if c[:3] == (200, 64, 2000)}


def test_masks_and_angles_of_one_sample_or_of_all_are_claimed() -> None:
    for mask in ((1, 1, 30), (1, 10, 30), (3, 1, 30), (3, 10, 30)):
        assert claims(attending(3, 10, 20, mask=Type("bool", mask)))
    assert claims(attending(3, 10, 20, angles=(1, 10, 128)))
    assert not claims(attending(3, 10, 20, angles=(3, 1, 128))), "a token's angles are its own"
    assert not claims(attending(3, 10, 20, mask=Type("f32", (3, 1, 1, 30)))), "a bias"
    assert not claims(attending(3, 65, 20)) and not claims(attending(3, 10, 20, d=48))


# ---- on a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [VLAModelType.PI05, VLAModelType.PI0])
@pytest.mark.parametrize(("batch", "chunk"), [(3, 10), (8, 10), (8, 50)])
def test_samples_of_a_batch_at_full_width(kind: VLAModelType, batch: int, chunk: int) -> None:
    """Prompts of several lengths and a camera that some lack: no farther from float32 than 1.5 times eager bfloat16,
    and as near for each sample alone; the same bits every time.
    """
    config = WIDE.with_(model_type=kind, chunk_size=chunk)
    model = create_model(config)
    weights = random_weights(model.build(Signature.of(config)))
    triton, exact, eager, alone = (
        cortexflow.compile(model, target, weights=weights, device="cuda", dtype=dtype, batch=b, progress=False)
        for target, dtype, b in (
            ("triton", "bfloat16", batch), ("torch", "float32", batch), ("torch", "bfloat16", batch),
            ("triton", "bfloat16", 1),
        )
    )  # fmt: skip
    given = observation(triton, 0, 48)
    lengths = torch.linspace(1, 48, batch).round().int()
    given["token_mask"] = torch.arange(48) < lengths[:, None]
    given["image_mask"][1::2, 1] = False
    ours, wanted, theirs = (c(**given).double() for c in (triton, exact, eager))
    far, limit = (float((x - wanted).norm() / wanted.norm()) for x in (ours, theirs))
    assert far < 1.5 * limit
    for i in range(batch):
        single = alone(**{n: x[i : i + 1] for n, x in given.items()})[0].double()
        assert float((single - ours[i]).norm() / wanted[i].norm()) < 3 * limit, f"sample {i}: two such distances apart"
        assert torch.cosine_similarity(ours[i].flatten(), wanted[i].flatten(), 0) > 0.999
    assert all(torch.equal(triton(**given).double(), ours) for _ in range(20))
