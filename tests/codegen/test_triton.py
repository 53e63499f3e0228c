"""The triton target: its launch plan on any machine, its actions on a GPU."""

from __future__ import annotations

import re

import pytest
import torch

import cortexflow
from cortexflow.codegen import find_target
from cortexflow.compiler import lower
from cortexflow.errors import TargetError
from cortexflow.ir import Module, Type, function, ops, returns
from cortexflow.models import ModelConfig, Signature, VLAModelType, create_model
from cortexflow.passes.plan_buffers import plan_buffers
from cortexflow.weights import random_weights
from tests.models.cases import Batch, batches, case_folders, distance

pytest.importorskip("triton")

from cortexflow.codegen.triton import build
from cortexflow.codegen.triton.claims import skinny_config
from cortexflow.codegen.triton.program import Program

WIDE = ModelConfig(vision_num_layers=1, num_encoder_layers=2, num_decoder_layers=2, vocab_size=512, max_token_len=48)


def plan_text(config: ModelConfig, dtype: str = "bf16", **signature: int) -> tuple[str, int]:
    """The launch plan and the bytes of its arena."""
    module, _ = lower(create_model(config), Signature.of(config, **signature), dtype, target="triton")
    stages = Module({f.name: f for f in module.stages}, {}, module.meta)
    plan = plan_buffers(stages)
    return Program(stages, plan).text(), plan.peak


def test_the_decoder_is_five_launches_a_layer() -> None:
    text, _ = plan_text(ModelConfig(), prompt=48)
    decoder = text[text.index("def transformer_decoder") :]
    assert decoder.count("decode_attention(") == 18
    assert len(re.findall(r"^ +skinny\(", decoder, re.M)) == 4 * 18
    assert ".copy_(" not in "\n".join(line for line in decoder.splitlines() if "expert.layers" in line)


def test_large_products_go_to_the_library_and_nothing_hot_is_copied() -> None:
    text, _ = plan_text(ModelConfig(), prompt=48)
    encoder = text[text.index("def transformer_encoder") : text.index("def transformer_decoder")]
    hot = [line.strip() for line in encoder.splitlines() if "prefix.layers.3." in line]
    kinds = ["copy" if ".copy_(" in line else line.split("(")[0] for line in hot]
    attention = ["rms_norm", "torch.mm", "copy", "rope", "rope", "attention", "torch.addmm"]  # v moves into the cache
    assert kinds == [*attention, "rms_norm", "torch.mm", "glu", "torch.addmm"]


@pytest.mark.parametrize("chunk", [10, 50])
@pytest.mark.parametrize("kind", [VLAModelType.PI05, VLAModelType.PI0])
def test_every_buffer_lies_in_the_arena(kind: VLAModelType, chunk: int) -> None:
    text, peak = plan_text(ModelConfig(model_type=kind), prompt=48, chunk=chunk)
    scope: dict = {}
    exec("import torch\n" + text[text.index("BUFFERS = {") : text.index("\nclass Policy")], scope)
    for offset, dtype, shape, strides in scope["BUFFERS"].values():
        last = sum((d - 1) * s for d, s in zip(shape, strides, strict=True)) + 1
        assert offset >= 0 and offset + last * dtype.itemsize <= peak


def test_a_cpu_is_refused_by_name() -> None:
    with pytest.raises(TargetError, match=r"NVIDIA GPU.*device='cuda'.*'torch' or 'onnx'"):
        build(Module(), {}, torch.device("cpu"))
    assert find_target("triton").name == "triton"


def test_a_norm_sees_whole_rows_and_tiles_fit_the_card() -> None:
    """Splitting k would norm each part alone; a tile beyond the shared memory would not launch."""
    assert skinny_config(1024, 4096, glu=False, norm=False) == (16, 4, 4, 4)
    norms = [skinny_config(1024, k, glu, True) for k in (256, 1024, 2048, 4096) for glu in (False, True)]
    assert all(c is None or c[1] == 1 for c in norms)
    assert skinny_config(1024, 4096, glu=True, norm=True) is None


def test_early_stop_is_refused() -> None:
    with function("f", x=Type("f32", (4,))) as (f, [x]):
        (y,) = ops.loop([x], 3, lambda i, c: [ops.scalar(True, "bool"), c], early_stop=True)
        returns(y=y)
    module = Module({"f": f})
    with pytest.raises(TargetError, match="cannot stop a loop early"):
        Program(module, plan_buffers(module)).text()


# ---- on a GPU ---------------------------------------------------------------------------------------

BATCHES = [b for folder in case_folders() for b in batches(folder)]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: f"{b.case.name}-{b.name}")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_cases(batch: Batch, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    compiled = cortexflow.compile(batch.case, "triton", device="cuda", dtype=dtype, batch=batch.size, progress=False)
    actions, wanted = compiled(**batch.inputs).cpu(), batch.outputs["actions"]
    if dtype == "float32":
        assert distance(actions, wanted) < 1e-3
    else:
        assert torch.cosine_similarity(actions.double().flatten(), wanted.double().flatten(), 0) > 0.999


def observation(compiled: cortexflow.Compiled, seed: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(t.shape, generator=generator).clamp(-1, 1) for n, t in compiled.inputs.items()}
    made["tokens"] = torch.randint(3, 500, compiled.inputs["tokens"].shape, generator=generator)
    made["token_mask"] = (torch.arange(made["tokens"].shape[1]) < length).expand(made["tokens"].shape)
    made["image_mask"] = torch.ones(compiled.inputs["image_mask"].shape, dtype=torch.bool)
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [VLAModelType.PI05, VLAModelType.PI0])
@pytest.mark.parametrize("chunk", [10, 50])
def test_full_width(kind: VLAModelType, chunk: int) -> None:
    """No farther from float32 than 1.5 times eager bfloat16; runtime lengths and masks; the same bits every time."""
    config = WIDE.with_(model_type=kind, chunk_size=chunk)
    model = create_model(config)
    weights = random_weights(model.build(Signature.of(config)))
    triton, exact, eager = (
        cortexflow.compile(model, target, weights=weights, device="cuda", dtype=dtype, progress=False)
        for target, dtype in (("triton", "bfloat16"), ("torch", "float32"), ("torch", "bfloat16"))
    )
    for seed, length in ((0, 48), (1, 7), (2, 30)):
        given = observation(triton, seed, length)
        if seed == 2:
            given["image_mask"][:, 1] = False
        ours, wanted, theirs = (c(**given).double() for c in (triton, exact, eager))
        far, limit = (float((x - wanted).norm() / wanted.norm()) for x in (ours, theirs))
        assert far < 1.5 * limit and torch.cosine_similarity(ours.flatten(), wanted.flatten(), 0) > 0.999
        assert all(torch.equal(triton(**given).double(), ours) for _ in range(20))
