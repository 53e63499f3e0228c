"""OpenVLA against the published code's outputs and a reference of our own: interpreter, torch and ONNX, in float32."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import cortexflow
from cortexflow import ConfigError, InputError
from cortexflow.codegen.onnx import OnnxExecutable
from cortexflow.compiler import load_model
from cortexflow.ir import Module, run_module, verify
from cortexflow.models import ModelConfig, Signature, VLAModelType, create_model
from cortexflow.passes import expose
from tests.models.cases import distance
from tests.models.openvla_cases import DATA, EXPOSED, Request, batch_of, padded, requests, weights, write_checkpoint
from tests.models.openvla_reference import random_tensors, reference, write_random

FEATURES, LOGITS = 3e-5, 1e-4
FEATURE_NAMES = ("patches_dino", "patches_siglip", "patch_features", "projected", "prefill_hidden")
TINY_CONFIG = ModelConfig.released(VLAModelType.OPENVLA).with_(
    vision_encoder_dim=72, vision_num_layers=5, vision_num_heads=4, vision_mlp_dim=269,
    dino_dim=48, dino_num_layers=4, dino_num_heads=3, dino_mlp_dim=192,
    encoder_dim=40, num_encoder_layers=3, encoder_mlp_dim=108, num_heads=4, num_kv_heads=4, head_dim=10,
    decoder_dim=40, num_decoder_layers=3, decoder_mlp_dim=108, image_size=56,
)  # fmt: skip
RUNS = ("interpreter", "torch", "onnx")
SLOTS = 32

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("openvla") / "tiny")


def run(
    folder: Path,
    how: str,
    inputs: dict[str, Tensor],
    exposed: tuple[str, ...] = EXPOSED,
    dtype: str = "f32",
    without: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The results of a checkpoint, and inner values, for a batch of prompts in one bucket."""
    model, tensors = load_model(folder)
    batch, slots = inputs["tokens"].shape
    module = model.build(Signature.of(model.config, batch=batch, prompt=slots), dtype)
    verify(module)
    if exposed:
        expose(module, *exposed)
    if how == "interpreter":
        return run_module(module, inputs, tensors)
    found = cortexflow.compile(module, how, weights=tensors, dtype=dtype, without=without, progress=False)(**inputs)
    assert isinstance(found, dict)
    return found


def row(results: dict[str, Tensor], i: int, length: int) -> dict[str, Tensor]:
    """What the results say of one episode, in the reference's terms; `length` positions of its sequence are real."""
    layers = sorted(n for n in results if n.startswith("prefill_layer_"))[:-1]  # the last is stored behind its norm
    states = [results[n][i, :length] for n in ("prefill_embeds", *layers, "prefill_out")]
    found = {n: results[n][i : i + 1] for n in ("patches_dino", "patches_siglip", "patch_features", "projected")}
    logits = torch.cat([results["first_logits"][i : i + 1], results["step_logits"][:, i]])
    return found | {"prefill_hidden": torch.stack(states), "logits": logits}


@cache
def exact(request: Request) -> dict[str, Tensor]:
    """The graph in float64, every tensor."""
    model = create_model(TINY_CONFIG)
    module = model.build(Signature.of(model.config, prompt=SLOTS))
    expose(module, *EXPOSED)
    results = run_module(module, batch_of([request], SLOTS), weights(), torch.float64)
    return row(results, 0, request.told["sequence_length_in_llm"])


def check_golden(request: Request, results: dict[str, Tensor], i: int) -> None:
    """One episode of a batch: features within 3e-5 of the published code, logits within 1e-4, ids and actions exactly.

    The published code's outputs are float32 and themselves up to 4.3e-5 from float64 (attention over large logits
    amplifies rounding): features that are no farther from float64 than those are, times 1.5, count too.
    """
    ref = request.outputs
    found = row(results, i, request.told["sequence_length_in_llm"])
    for name in FEATURE_NAMES:
        if distance(found[name], ref[name]) > FEATURES:
            limit = 1.5 * distance(ref[name], exact(request)[name])
            assert distance(found[name], exact(request)[name]) < limit < 1e-4, name
    assert distance(found["logits"][:1], ref["prefill_logits_last"]) < LOGITS
    assert distance(found["logits"][:, 31744:], ref["step_logits_action_columns"]) < LOGITS
    assert results["token_ids"][i].tolist() == request.told["generated_ids"]
    assert results["actions"][i].flatten().tolist() == request.told["actions_normalised"]


# ---- the published code's outputs ------------------------------------------------------------------


@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize("request_", requests(), ids=lambda r: r.name)
def test_each_request(tiny: Path, request_: Request, how: str) -> None:
    slots = SLOTS if how == "interpreter" else request_.tokens.shape[1]  # with padding, and without
    check_golden(request_, run(tiny, how, batch_of([request_], slots)), 0)


@pytest.mark.parametrize("request_", requests(), ids=lambda r: r.name)
def test_the_graph_as_it_was_built_rounds_as_the_published_code(tiny: Path, request_: Request) -> None:
    """Without folds into weights features stand within 3e-5, with no allowance."""
    found = [run(tiny, "interpreter", batch_of([request_], SLOTS))]
    found.append(run(tiny, "torch", batch_of([request_], SLOTS), without=("absorb",)))
    for results in found:
        features = row(results, 0, request_.told["sequence_length_in_llm"])
        for name in FEATURE_NAMES:
            assert distance(features[name], request_.outputs[name]) < FEATURES, name


@pytest.mark.parametrize("how", RUNS)
def test_all_requests_as_one_batch(tiny: Path, how: str) -> None:
    """Prompts of three lengths: each episode comes out as it does alone."""
    results = run(tiny, how, batch_of(list(requests()), SLOTS))
    for i, request in enumerate(requests()):
        check_golden(request, results, i)


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_from_a_directory_to_actions(tiny: Path, target: str) -> None:
    """The road a user takes: nothing exposed, a prompt shorter than its bucket, no mask given."""
    compiled = cortexflow.compile(tiny, target, progress=False)
    assert {n: str(t) for n, t in compiled.inputs.items()} == {
        "pixel_values": "f32[1,6,56,56]",
        "tokens": "i32[1,64]",
        "token_mask": "bool[1,64]",
    }
    assert {n: str(t) for n, t in compiled.outputs.items()} == {"actions": "f64[1,1,7]", "token_ids": "i32[1,7]"}
    for request in requests():
        found = compiled(**request.inputs)
        assert isinstance(found, dict)
        assert found["token_ids"].flatten().tolist() == request.told["generated_ids"]
        assert found["actions"].flatten().tolist() == request.told["actions_normalised"]


@pytest.mark.parametrize("bucket", [29, 30, 64])
def test_the_bucket_changes_nothing(tiny: Path, bucket: int) -> None:
    request = requests()[2]
    check_golden(request, run(tiny, "torch", batch_of([request], bucket)), 0)


def test_bfloat16_is_no_farther_off_than_eager_code_in_bfloat16(tiny: Path) -> None:
    """Logits behind the prompt, against the published float32 ones."""
    ours, eager = torch.zeros(()), torch.zeros(())
    for request in requests():
        found = run(tiny, "torch", batch_of([request], SLOTS), ("first_logits",), "bf16")
        assert found["first_logits"].dtype == torch.float32 and found["actions"].dtype == torch.float64
        plain = reference(weights(), TINY_CONFIG, request.pixel_values, request.tokens, torch.bfloat16)["logits"][:1]
        exact = request.outputs["prefill_logits_last"]
        ours, eager = (n + (x - exact).norm() for n, x in ((ours, found["first_logits"]), (eager, plain)))
    assert ours < 1.5 * eager


def test_onnx_decodes_in_one_loop_and_loads_from_external_data(tiny: Path, tmp_path: Path) -> None:
    """The file alone, in plain onnxruntime: the cache is carried, the first token stands before the loop."""
    compiled = cortexflow.compile(tiny, "onnx", prompt=SLOTS, progress=False)
    executable = compiled.executable
    assert isinstance(executable, OnnxExecutable)
    files = executable.write(tmp_path / "policy.onnx", external_over=0)
    assert [f.name for f in files] == ["policy.onnx", "policy.onnx.data"]
    onnx.checker.check_model(files[0])
    (loop,) = [n for n in onnx.load(files[0], load_external_data=False).graph.node if n.op_type == "Loop"]
    body = loop.attribute[0].g
    shapes = [[d.dim_value for d in value.type.tensor_type.shape.dim] for value in body.input]
    assert shapes.count([1, 6, 4, 10]) == 2 * TINY_CONFIG.num_encoder_layers
    session = onnxruntime.InferenceSession(files[0], providers=["CPUExecutionProvider"])
    for request in requests():
        given = {n: x.numpy() for n, x in batch_of([request], SLOTS).items()}
        ids = dict(
            zip(("actions", "token_ids"), session.run(["actions", "token_ids"], _typed(session, given)), strict=True)
        )
        assert ids["token_ids"].flatten().tolist() == request.told["generated_ids"]
        assert ids["actions"].flatten().tolist() == request.told["actions_normalised"]


def _typed(session: onnxruntime.InferenceSession, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    types = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
    return {i.name: given[i.name].astype(types[i.type]) for i in session.get_inputs()}


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_a_saved_policy_runs_alone(tiny: Path, tmp_path: Path, target: str) -> None:
    files = cortexflow.compile(tiny, target, prompt=SLOTS, progress=False).save(tmp_path)
    if target == "torch":
        done = subprocess.run([sys.executable, files[0]], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "token_ids (1, 7)" in done.stdout, done.stderr
    else:
        assert onnxruntime.InferenceSession(files[0], providers=["CPUExecutionProvider"]).get_outputs()


# ---- other dimensions ------------------------------------------------------------------------------

BASE = ModelConfig.released(VLAModelType.OPENVLA).with_(
    vocab_size=608, vocab_padding=32, pad_token_id=576, max_token_len=12
)
SIZES = {
    "odd": {
        "vision_encoder_dim": 36, "vision_num_layers": 2, "vision_num_heads": 3, "vision_mlp_dim": 77,
        "dino_dim": 40, "dino_num_layers": 5, "dino_num_heads": 2, "dino_mlp_dim": 90, "dino_registers": 3,
        "encoder_dim": 52, "num_encoder_layers": 2, "encoder_mlp_dim": 70, "num_heads": 3, "num_kv_heads": 3,
        "head_dim": 14, "patch_size": 5, "image_size": 15, "action_dim": 4, "norm_eps": 1e-3, "rope_theta": 500.0,
    },
    "grouped heads, a long action": {
        "vision_encoder_dim": 32, "vision_num_layers": 4, "vision_num_heads": 1, "vision_mlp_dim": 50,
        "dino_dim": 24, "dino_num_layers": 2, "dino_num_heads": 4, "dino_mlp_dim": 31, "dino_registers": 1,
        "encoder_dim": 32, "num_encoder_layers": 4, "encoder_mlp_dim": 64, "num_heads": 6, "num_kv_heads": 2,
        "head_dim": 8, "patch_size": 4, "image_size": 8, "action_dim": 14, "vision_norm_eps": 1e-4,
    },
    "one token": {
        "vision_encoder_dim": 16, "vision_num_layers": 3, "vision_num_heads": 2, "vision_mlp_dim": 20,
        "dino_dim": 20, "dino_num_layers": 3, "dino_num_heads": 2, "dino_mlp_dim": 24, "dino_registers": 4,
        "encoder_dim": 16, "num_encoder_layers": 1, "encoder_mlp_dim": 24, "num_heads": 1, "num_kv_heads": 1,
        "head_dim": 16, "patch_size": 3, "image_size": 3, "action_dim": 1, "num_action_bins": 9,
    },
}  # fmt: skip


def sized(name: str, **changes: object) -> ModelConfig:
    d = {**SIZES[name], **changes}
    decoder = {"decoder_dim": "encoder_dim", "decoder_mlp_dim": "encoder_mlp_dim"}
    decoder |= {"num_decoder_layers": "num_encoder_layers"}
    return BASE.with_(**d, **{a: d[b] for a, b in decoder.items()})


def episodes(c: ModelConfig, seed: int, lengths: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Pictures and prompts of these lengths."""
    random = torch.Generator().manual_seed(seed)
    pixels = [torch.randn(1, 6, c.image_size, c.image_size, generator=random) for _ in lengths]
    return pixels, [torch.randint(3, c.vocab_size - 1, (1, n), generator=random) for n in lengths]


@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize(("name", "seed"), [(name, seed) for name in SIZES for seed in (1, 2)])
def test_other_dimensions_and_seeds(tmp_path: Path, name: str, seed: int, how: str) -> None:
    """A batch of three lengths against the whole sequence run anew for every token, in float64."""
    config = sized(name)
    folder, tensors = write_random(tmp_path, config, seed), random_tensors(config, seed)
    lengths = (5, 2, 9)
    pixels, prompts = episodes(config, seed, lengths)
    exposed = EXPOSED if config.action_dim > 1 else tuple(p for p in EXPOSED if p != "*_logits")
    results = run(folder, how, {"pixel_values": torch.cat(pixels), **padded(prompts, 11)}, exposed)
    for i, (picture, prompt) in enumerate(zip(pixels, prompts, strict=True)):
        wanted = reference(tensors, config, picture, prompt, torch.float64)
        if config.action_dim > 1:
            found = row(results, i, config.num_patches + lengths[i])
            for part in FEATURE_NAMES:
                assert distance(found[part], wanted[part].float()) < FEATURES, part
            assert distance(found["logits"], wanted["logits"].float()) < LOGITS
        assert results["token_ids"][i].tolist() == wanted["token_ids"][0].tolist()
        assert torch.equal(results["actions"][i], wanted["actions"][0])


def test_the_reference_agrees_with_the_published_code(tiny: Path) -> None:
    for request in requests():
        found = reference(weights(), TINY_CONFIG, request.pixel_values, request.tokens, torch.float32)
        assert found["token_ids"].flatten().tolist() == request.told["generated_ids"]
        for name in ("patches_dino", "patches_siglip", "projected", "prefill_hidden"):
            assert distance(found[name], request.outputs[name]) < FEATURES
        assert distance(found["logits"][:, 31744:], request.outputs["step_logits_action_columns"]) < LOGITS


# ---- the end of a sequence -------------------------------------------------------------------------


@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_episode_that_ends_early_is_padded_and_leaves_the_others_alone(tmp_path: Path, how: str, at: int) -> None:
    config = sized("odd", action_dim=6)
    tensors = random_tensors(config, 5)
    pixels, prompts = episodes(config, 5, (4, 7))
    free = [
        reference(tensors, config, x, t, torch.float64)["token_ids"][0].tolist()
        for x, t in zip(pixels, prompts, strict=True)
    ]
    eos = free[0][at]  # what the first episode says there becomes its end
    assert eos not in free[0][:at] and eos not in free[1], "pick another seed"
    config = sized("odd", action_dim=6, eos_token_id=eos)
    folder = write_random(tmp_path, config, 5)
    both = run(folder, how, {"pixel_values": torch.cat(pixels), **padded(prompts, 8)}, ())
    ended = [*free[0][: at + 1], *[config.pad_token_id] * (5 - at)]
    assert both["token_ids"].tolist() == [ended, free[1]]
    alone = run(folder, how, {"pixel_values": pixels[0], **padded(prompts[:1], 8)}, ())
    assert alone["token_ids"].tolist() == [ended]
    assert torch.equal(alone["actions"][0], both["actions"][0])


def test_the_loop_stops_when_all_have_ended(tmp_path: Path) -> None:
    """Steps that no episode needs are not run: what is recorded of them stays zero."""
    config = sized("odd", action_dim=6)
    pixels, prompts = episodes(config, 5, (4,))
    ids = reference(random_tensors(config, 5), config, pixels[0], prompts[0], torch.float64)["token_ids"][0].tolist()
    folder = write_random(tmp_path, sized("odd", action_dim=6, eos_token_id=ids[2]), 5)
    for how in RUNS:
        logits = run(folder, how, {"pixel_values": pixels[0], **padded(prompts, 8)}, ("step_logits",))["step_logits"]
        assert [bool(step.any()) for step in logits] == [True, True, False, False, False], how


def test_bins_are_those_of_the_published_code() -> None:
    """By the head's choice of one id: every bin, what lies outside, in float64."""
    from cortexflow.models.openvla import _centres

    config = ModelConfig.released(VLAModelType.OPENVLA)
    ids = torch.arange(config.vocab_size)
    edges = np.linspace(-1, 1, 256)
    wanted = ((edges[:-1] + edges[1:]) / 2)[np.clip(32000 - ids.numpy() - 1, 0, 254)]
    with cortexflow.ir.function("f", ids=cortexflow.ir.Type("i32", tuple(ids.shape))) as (f, [x]):
        cortexflow.ir.returns(y=_centres(x, config))
    assert np.array_equal(run_module(Module({"f": f}), {"ids": ids}, {})["y"].numpy(), wanted)
    assert wanted[31999] == wanted[32000] == -0.996078431372549 and wanted[31872] == 0.0


# ---- the released size -----------------------------------------------------------------------------


@cache
def released() -> Module:
    config = ModelConfig.released(VLAModelType.OPENVLA)
    return create_model(config).build(Signature.of(config))


def stored_keys(read: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released checkpoint, by whether its forward pass reads them."""
    found = {}
    for line in (DATA / "keys.tsv").read_text().splitlines():
        if line.startswith("#"):
            continue
        pattern, shape, _, first, layers, was_read = line.split("\t")
        if was_read == read:
            for i in range(int(layers or 1)):
                found[pattern.replace("{}", str(int(first or 0) + i))] = tuple(json.loads(shape))
    return found


def test_the_released_size_builds_from_shapes_alone() -> None:
    begin = time.perf_counter()
    shapes = {key: t.shape for key, t in released().weight_types().items()}
    assert time.perf_counter() - begin < 5
    assert shapes == stored_keys("yes")
    everything = stored_keys("yes") | stored_keys("no")
    assert len(everything) == 982 and sum(map(np.prod, everything.values())) == 7_541_237_184


def test_the_family_says_its_buffers() -> None:
    config = ModelConfig.released(VLAModelType.OPENVLA)
    model = create_model(config)
    shapes = model.get_buffer_shapes(1, 1)
    assert shapes["pixel_values"] == (1, 6, 224, 224) and shapes["image_tokens"] == (1, 256, 4096)
    assert shapes["k_31"] == (1, 320, 32, 128) and shapes["token_ids"] == (1, 7) and shapes["actions"] == (1, 1, 7)
    assert model.get_weight_shapes() == stored_keys("yes")


# ---- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "signature", "message"),
    [
        ({"decoder_dim": 8}, {}, r"one transformer: expected decoder_dim=4096, as encoder_dim, found 8"),
        ({"num_decoder_layers": 8}, {}, r"expected equal num_encoder_layers and num_decoder_layers, found 32 and 8"),
        ({"dino_num_layers": 1}, {}, "before their last block: each needs two layers"),
        ({"pad_token_id": 40000}, {}, "expected a vocabulary that holds pad_token_id=40000"),
        ({"vocab_padding": 32000}, {}, "action tokens"),
        ({}, {"views": 2}, "OpenVLA sees one picture: expected views=1, found 2"),
        ({}, {"chunk": 8}, "expected chunk=1, found 8; for a model that was fine-tuned on more"),
        ({}, {"steps": 10}, "OpenVLA has no flow: steps=10 does not apply"),
        ({}, {"prompt": 1}, "expected prompt=2 at least, found 1"),
    ],
)
def test_what_the_family_does_not_have_is_refused(changes: dict, signature: dict, message: str) -> None:
    config = ModelConfig.released(VLAModelType.OPENVLA).with_(**changes)
    with pytest.raises(ConfigError, match=message):
        create_model(config).build(Signature.of(config, **signature))


def test_heads_divide_each_tower() -> None:
    with pytest.raises(ConfigError, match=r"dino_dim=1024 must be a multiple of dino_num_heads=15"):
        ModelConfig(dino_num_heads=15)


def test_released_dimensions_of_an_unknown_family() -> None:
    with pytest.raises(ConfigError, match="no released dimensions are known"):
        ModelConfig.released(VLAModelType.RT1)
    assert ModelConfig.released(VLAModelType.PI05) == ModelConfig()


def test_a_mask_with_holes_is_refused(tiny: Path) -> None:
    """The network knows a prompt's length alone."""
    compiled, request = cortexflow.compile(tiny, prompt=SLOTS, progress=False), requests()[0]
    inputs = batch_of([request], SLOTS)
    for hole in (0, 5):
        mask = inputs["token_mask"].clone()
        mask[0, hole] = False
        with pytest.raises(InputError, match=r"true for the prompt and false for the padding behind it.*episode 0"):
            compiled(**{**inputs, "token_mask": mask})
    with pytest.raises(InputError, match=r"pixel_values: expected shape \(1, 6, 56, 56\), found \(1, 3, 56, 56\)"):
        compiled(**{**inputs, "pixel_values": inputs["pixel_values"][:, :3]})
