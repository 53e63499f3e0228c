"""The triton target with several samples: as many launches as with one, on any machine; actions on a GPU."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import cortexflow
from cortexflow.ir import Op, Type, function, fused, returns
from cortexflow.models import Signature, VLAModelType, create_model
from cortexflow.weights import random_weights

pytest.importorskip("triton")

from cortexflow.codegen.triton.claims import SCRATCH, claims
from cortexflow.kernels.triton import segment_attention
from tests.codegen.test_triton import WIDE, launches, observation, plan_text


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
