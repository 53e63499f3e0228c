"""The engine at its door and behind it: what goes in, what is refused, batches, backends, replicas."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cortexflow
from cortexflow import (
    BackendType,
    CheckpointError,
    ComputeBackend,
    ConfigError,
    InferenceConfig,
    InputError,
    ReplicaError,
    ReplicatedEngine,
    VLAInferenceEngine,
    VLAModelType,
    create_inference,
    create_openvla_inference,
    create_pi0_inference,
    create_pi05_inference,
    register_backend,
)
from cortexflow.backends import BACKENDS, CompiledBackend, Stage
from cortexflow.demo import random_weights, train_tokenizer, write_checkpoint
from cortexflow.episodes import read_images
from cortexflow.models import ModelConfig, VLAModel, create_model
from tests.models.cases import DATA, batches, distance

PI05, PI0 = DATA / "pi05_tiny", DATA / "pi0_tiny"
VIEWS, SIZE, CHUNK = 3, 28, 10
PROMPTS = ("open the top drawer", "pick up the red cube and put it into the blue bowl", "fold the towel")
CPU = {"backend": BackendType.PYTORCH, "device": "cpu", "dtype": torch.float32, "progress": False}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:no state given"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(train_tokenizer(512))
    return file


@pytest.fixture(scope="module")
def engine(tokenizer: Path) -> VLAInferenceEngine:
    """π0.5; buckets of 48 and 80 tokens."""
    return create_pi05_inference(PI05, VIEWS, CHUNK, tokenizer_path=tokenizer, max_tokenize_len=80, **CPU)


@pytest.fixture(autouse=True)
def as_made(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").preprocessor = None


def images(count: int | None = None, seed: int = 0) -> np.ndarray:
    shape = (VIEWS, SIZE, SIZE, 3) if count is None else (count, VIEWS, SIZE, SIZE, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [PI05, PI0], ids=lambda p: p.name)
def test_the_reference_cases(case: Path) -> None:
    """predict and predict_batch give the actions of the models' own implementations, masked cameras and all."""
    family = VLAModelType(case.name.split("_")[0])
    engine = create_inference(family, case, **CPU)
    for batch in batches(case):
        x = batch.inputs
        pictures = [[v if there else None for v, there in zip(*e, strict=True)] for e in zip(*_masked(x), strict=True)]
        prompts = [t[m] for t, m in zip(x["tokens"], x["token_mask"], strict=True)]
        states = x.get("state")
        actions = engine.predict_batch(pictures, prompts, noise=x["noise"], batch_states=states)
        assert distance(torch.from_numpy(actions), batch.outputs["actions"]) <= 1e-4
        for i in range(batch.size):
            state = None if states is None else states[i]
            alone = engine.predict(pictures[i], prompts[i], noise=x["noise"][i], state=state)
            assert alone.shape == (CHUNK, 32) and alone.dtype == np.float32
            np.testing.assert_allclose(alone, actions[i], atol=2e-5)


def _masked(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return x["images"], x["image_mask"]


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_a_batch_is_its_episodes(engine: VLAInferenceEngine, count: int) -> None:
    """Prompts of both buckets in one batch; 3 and 5 fill up to a power of two."""
    pictures, prompts = images(count), [PROMPTS[i % 3] * (1 + i % 2) for i in range(count)]
    tokens = [np.arange(2 + i) for i in range(count)]
    actions = engine.predict_batch(pictures, prompts, tokens, seed=list(range(count)))
    assert actions.shape == (count, CHUNK, 32) and actions.dtype == np.float32
    for i in range(count):
        alone = engine.predict(pictures[i], prompts[i], tokens[i], seed=i)
        np.testing.assert_allclose(alone, actions[i], atol=2e-5)
    assert len({a.tobytes() for a in actions}) == count


def test_more_episodes_than_a_batch(tokenizer: Path) -> None:
    options = {"tokenizer_path": tokenizer, "max_tokenize_len": 20, "max_batch": 2}
    engine = create_pi05_inference(PI05, VIEWS, CHUNK, **CPU, **options)
    assert (engine.batch_sizes(5), engine.batch_sizes(2), engine.batch_sizes(1)) == ({1, 2}, {2}, {1})
    actions = engine.predict_batch(images(5), "go")
    np.testing.assert_allclose(actions[4], engine.predict(images(5)[4], "go"), atol=2e-5)
    assert {batch for batch, _ in engine.backend._made} == {1, 2}
    assert engine.predict_batch(images(0), []).shape == (0, CHUNK, 32)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_levels_have_the_bits_of_their_formula(kind: Callable[[Any], Any]) -> None:
    levels = np.arange(3 * 16 * 16, dtype=np.int64).astype(np.uint8).reshape(1, 16, 16, 3)
    unit, _ = read_images(kind(levels), (1, 16, 16, 3))
    expected = torch.from_numpy(levels).to(torch.float32) / 255 * 2 - 1
    assert unit.dtype == torch.float32 and torch.equal(unit[0], expected)


def test_a_group_is_read_while_the_one_before_runs(tokenizer: Path) -> None:
    """Of an engine that is warm: the card does not wait for the host's part of the next episodes."""
    engine = create_pi05_inference(
        PI05, VIEWS, CHUNK, tokenizer_path=tokenizer, max_tokenize_len=48, max_batch=2, **CPU
    )
    prompts = [PROMPTS[i % 3] for i in range(5)]
    expected = engine.predict_batch(images(5), prompts, seed=list(range(5)))
    engine.warm(2)
    running, read, run = threading.Event(), threading.Event(), engine._run
    seen: list[int] = []

    def after_three_are_read(inputs: Any) -> Any:
        running.set()
        assert read.wait(20), "the next group is not read"
        return run(inputs)

    def count(pictures: Any) -> Any:
        seen.append(threading.get_ident())
        if len(seen) == 3:
            assert running.wait(20), "the first group does not run"
            read.set()
        return pictures

    engine._run, engine.preprocessor = after_three_are_read, count  # type: ignore[method-assign]
    actions = engine.predict_batch(images(5), prompts, seed=list(range(5)))
    np.testing.assert_array_equal(actions, expected)
    assert seen == [threading.get_ident()] * 5, "a user's function is called by the caller's thread"
    with pytest.raises(InputError, match="episode 4: task_prompt"):
        engine.predict_batch(images(5), [*prompts[:4], "x" * 300])
    np.testing.assert_array_equal(engine.predict_batch(images(5), prompts, seed=list(range(5))), expected)


def test_batches_and_buckets_share_their_weights(engine: VLAInferenceEngine) -> None:
    engine.predict_batch(images(2), PROMPTS[:2])
    made = list(engine.backend._made.values())
    places = [{p.data_ptr() for p in m.executable.policy.state_dict().values() if p.numel() > 64} for m in made]
    shared = set.intersection(*places)
    largest = max(made[0].executable.policy.state_dict().values(), key=Tensor.numel)
    assert len(made) > 2 and largest.data_ptr() in shared
    assert len(shared) > 0.9 * len(places[0])


def test_pixels_come_in_many_forms(engine: VLAInferenceEngine) -> None:
    pixels = images()
    unit = pixels.astype(np.float32) / 255 * 2 - 1
    readonly = pixels.copy()
    readonly.flags.writeable = False
    forms = [unit, unit.astype(np.float64), torch.from_numpy(pixels), torch.from_numpy(unit), list(pixels), readonly]
    forms += [
        unit.astype(">f4"),
        unit.astype(np.longdouble),
        pixels[:, ::-1].copy()[:, ::-1],
        [torch.from_numpy(p) for p in unit],
        torch.from_numpy(unit).movedim(-1, 1).contiguous().movedim(1, -1),  # channels first in memory
    ]
    expected = engine.predict(pixels, PROMPTS[0], np.arange(5))
    for form in forms:
        np.testing.assert_allclose(engine.predict(form, PROMPTS[0], np.arange(5)), expected, atol=1e-5)
    half = engine.predict(torch.from_numpy(unit).bfloat16(), PROMPTS[0], np.arange(5))
    np.testing.assert_allclose(half, expected, atol=0.2)


def test_noise_and_seed(engine: VLAInferenceEngine) -> None:
    first, again, other = (engine.predict(images(), PROMPTS[0], [1, 2], seed=s) for s in (3, 3, 4))
    assert first.tobytes() == again.tobytes() and not np.allclose(first, other, atol=0.1)
    noise = torch.randn((CHUNK, 32), generator=torch.Generator().manual_seed(3))
    given = engine.predict(images(), PROMPTS[0], [1, 2], noise=noise)
    assert given.tobytes() == engine.predict(images(), PROMPTS[0], [1, 2], noise=noise.numpy()).tobytes()
    assert given.tobytes() == first.tobytes()


def test_the_state_goes_into_the_prompt(engine: VLAInferenceEngine) -> None:
    state = np.array([-1.5, -1.0, 0.0, 0.999, 1.0])
    bins = [-1, 0, 128, 255, 255]
    by_state, by_bins = engine.predict(images(), "go", state=state), engine.predict(images(), "go", bins)
    assert by_state.tobytes() == by_bins.tobytes()
    text = "Task: go, State: -1 0 128 255 255;\nAction: "
    assert engine.predict(images(), engine.tokenizer.encode(text)).tobytes() == by_bins.tobytes()
    plain = engine.tokenizer.encode("go") + engine.tokenizer.encode("\n", bos=False)
    assert engine.predict(images(), "go").tobytes() == engine.predict(images(), plain).tobytes()


@pytest.mark.filterwarnings("always:no state given")
def test_a_prompt_without_state_is_said_once(tokenizer: Path) -> None:
    options = {"tokenizer_path": tokenizer, "max_tokenize_len": 48}
    engine = create_pi05_inference(PI05, VIEWS, CHUNK, **CPU, **options)
    with pytest.warns(UserWarning, match="no state given"):
        engine.predict(images(), "go")
    meant = create_pi05_inference(PI05, VIEWS, CHUNK, **CPU, **options, discrete_state_input=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine.predict(images(), "go").tobytes() == meant.predict(images(), "go").tobytes()
    with pytest.raises(InputError, match="discrete_state_input=False"):
        meant.predict(images(), "go", [1, 2])


def test_bfloat16(engine: VLAInferenceEngine, tokenizer: Path) -> None:
    options = CPU | {"dtype": torch.bfloat16, "tokenizer_path": tokenizer, "max_tokenize_len": 80}
    rounded = create_pi05_inference(PI05, VIEWS, CHUNK, **options)
    exact = engine.predict(images(), PROMPTS[0], [1, 2])
    error = np.linalg.norm(rounded.predict(images(), PROMPTS[0], [1, 2]) - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.1


# ---- the door --------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[VLAInferenceEngine], Any], str]] = {
    "size": (lambda e: e.predict(np.zeros((3, 32, 32, 3), np.uint8), "go"), r"\(3, 28, 28, 3\).*resize"),
    "views": (lambda e: e.predict(images()[:2], "go"), "num_views=2"),
    "channels first": (lambda e: e.predict(images().transpose(0, 3, 1, 2), "go"), "channels first"),
    "alpha": (lambda e: e.predict(np.zeros((3, 28, 28, 4), np.uint8), "go"), "alpha"),
    "one picture": (lambda e: e.predict(images()[0], "go"), r"images\[None\]"),
    "a batch": (lambda e: e.predict(images(2), "go"), "predict_batch"),
    "a dictionary": (lambda e: e.predict({"base": images()[0]}, "go"), "list of 3 pictures, found dict"),
    "a string": (lambda e: e.predict("cat.png", "go"), "found str"),
    "int64": (lambda e: e.predict(images().astype(np.int64), "go"), "uint8 in 0..255.*found int64"),
    "int64 torch": (lambda e: e.predict(torch.from_numpy(images()).long(), "go"), "found torch.int64"),
    "unscaled": (lambda e: e.predict(images().astype(np.float32), "go"), r"\[-1, 1\]"),
    "nan": (lambda e: e.predict(np.full((3, 28, 28, 3), np.nan), "go"), "finite"),
    "no camera": (lambda e: e.predict([None] * 3, "go"), "at least one camera"),
    "short list": (lambda e: e.predict(list(images()[:2]), "go"), "None for an absent"),
    "odd picture": (lambda e: e.predict([images()[0], None, [[1]]], "go"), r"observation_images\[2\].*found list"),
    "no prompt": (lambda e: e.predict(images()), "expected the instruction"),
    "a number": (lambda e: e.predict(images(), 3.5), "expected text or token ids"),
    "no tokens": (lambda e: e.predict(images(), []), "text or token ids"),
    "long prompt": (lambda e: e.predict(images(), "x" * 300), "1 to 80 tokens.*max_tokenize_len"),
    "foreign token": (lambda e: e.predict(images(), [512]), "ids from 0 to 511"),
    "ids and state": (lambda e: e.predict(images(), [2, 3], [1]), "token ids are a whole prompt"),
    "bins": (lambda e: e.predict(images(), "go", [300]), "bins from -1 to 255"),
    "both states": (lambda e: e.predict(images(), "go", [3], state=[0.1]), "found both"),
    "noise": (lambda e: e.predict(images(), "go", noise=np.zeros((1, 10, 32))), r"\(10, 32\), found \(1, 10, 32\)"),
    "integer noise": (lambda e: e.predict(images(), "go", noise=np.zeros((10, 32), int)), "noise"),
    "ragged noise": (lambda e: e.predict(images(), "go", noise=[[1.0], [1.0, 2.0]]), "noise: expected shape"),
    "huge seed": (lambda e: e.predict(images(), "go", seed=1 << 70), "64 bits"),
    "seed": (lambda e: e.predict(images(), "go", seed="a"), "seed: expected an integer"),
    "batch prompts": (lambda e: e.predict_batch(images(2), ["go"]), "batch_prompts: expected 2 entries"),
    "batch noise": (lambda e: e.predict_batch(images(2), "go", noise=np.zeros((1, 10, 32))), "noise: expected 2"),
    "batch of nothing": (lambda e: e.predict_batch(3, "go"), "batch_images"),
    "episode": (lambda e: e.predict_batch(images(2), ["go", "x" * 300]), "episode 1: task_prompt"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_at_the_door(engine: VLAInferenceEngine, what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(InputError, match=message):
        call(engine)


def test_pi0_reads_the_state(tokenizer: Path) -> None:
    engine = create_pi0_inference(PI0, VIEWS, CHUNK, tokenizer_path=tokenizer, **CPU)
    short = engine.predict(images(), "go", state=np.array([0.5, -0.25]))
    padded = engine.predict(images(), "go", state=np.array([0.5, -0.25] + [0.0] * 30))
    assert short.tobytes() == padded.tobytes()
    assert not np.allclose(short, engine.predict(images(), "go", state=np.array([0.5, 0.9])), atol=1e-3)
    for arguments, message in (
        ({}, "state: expected the normalised state"),
        ({"state": np.zeros(33)}, "state"),
        ({"state": np.zeros((2, 2))}, "state"),
        ({"state": np.zeros(3), "state_tokens": [3]}, "no place"),
    ):
        with pytest.raises(InputError, match=message):
            engine.predict(images(), "go", **arguments)


def test_the_preprocessor_comes_first(engine: VLAInferenceEngine) -> None:
    seen: list[tuple[int, ...]] = []

    def halve(pixels: np.ndarray) -> np.ndarray:
        seen.append(pixels.shape)
        return pixels[:, ::2, ::2]

    large = images().repeat(2, axis=1).repeat(2, axis=2)
    expected = engine.predict(images(), "go")
    engine.preprocessor = halve
    assert engine.predict(large, "go").tobytes() == expected.tobytes()
    np.testing.assert_allclose(engine.predict_batch(large[None], "go")[0], expected, atol=2e-5)
    assert seen == [large.shape] * 2


def test_tokenizers(tokenizer: Path, tmp_path: Path) -> None:
    engine = create_pi05_inference(PI05, VIEWS, CHUNK, **CPU)
    assert engine.tokenizer is None and np.isfinite(engine.predict(images(), [2, 5, 7])).all()
    with pytest.raises(ConfigError, match="tokenizer_path="):
        engine.predict(images(), "go")
    with pytest.raises(CheckpointError, match="does not exist"):
        create_pi05_inference(PI05, VIEWS, CHUNK, tokenizer_path=tmp_path / "none", **CPU)
    for file in PI05.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.model").symlink_to(tokenizer)  # found beside the checkpoint
    beside = create_pi05_inference(tmp_path, VIEWS, CHUNK, **CPU)
    assert beside.predict(images(), "go").shape == (CHUNK, 32)


# ---- configuration ---------------------------------------------------------------------------------


def test_the_specified_defaults() -> None:
    config = InferenceConfig(num_views=2, chunk_size=10)
    assert (config.backend, config.device, config.dtype) == (BackendType.TRITON, "cuda", torch.bfloat16)
    assert config.use_cuda_graphs and config.discrete_state_input and config.tokenizer_path is None
    assert config.max_tokenize_len == 200 and config.prompt_buckets == (48, 200)
    assert replace(config, max_tokenize_len=20).prompt_buckets == (20,)
    assert [b.name for b in BackendType] == ["TRITON", "PYTORCH", "CUDA", "ONNX"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_views", 0), ("chunk_size", 2.0), ("max_batch", True), ("backend", 3), ("dtype", "int8"), ("num_steps", 0)],
)
def test_wrong_configurations(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"InferenceConfig.{field}"):
        InferenceConfig(**({"num_views": 2, "chunk_size": 10} | {field: value}))


def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


NEVER_INSTEAD = {
    "triton, the default": ({}, "no CUDA GPU.*PYTORCH.*ONNX.*device='cpu'"),
    "triton on the cpu": ({"device": "cpu"}, "NVIDIA GPU.*PYTORCH.*ONNX"),
    "cuda kernels": ({"backend": BackendType.CUDA}, "not part of this version; there are triton, pytorch, onnx"),
    "unknown": ({"backend": "tpu"}, "'tpu' is unknown; there are triton, pytorch, onnx"),
    "pytorch on a gpu": ({"backend": BackendType.PYTORCH}, "no CUDA GPU"),
    "onnx in bfloat16": ({"backend": BackendType.ONNX, "device": "cpu"}, "bfloat16.*float32"),
    "no device": ({"backend": BackendType.PYTORCH, "device": "gpu"}, "'cpu', 'cuda' or 'cuda:N'"),
    "no values": ({"backend": BackendType.PYTORCH, "device": "meta"}, "meta"),
}


@pytest.mark.parametrize("what", NEVER_INSTEAD)
def test_nothing_is_taken_instead(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    options, message = NEVER_INSTEAD[what]
    with pytest.raises(ConfigError, match=message):
        create_pi05_inference(PI05, VIEWS, CHUNK, **options)


def test_families() -> None:
    for family in (VLAModelType.RT1, "my_vla"):
        with pytest.raises(ConfigError, match="is not registered; there are openvla, pi0, pi05"):
            create_inference(family, PI05)
    with pytest.raises(
        ConfigError, match=r"expected a checkpoint of openvla, found one of pi05.*create_pi05_inference"
    ):
        create_openvla_inference(PI05, **CPU)
    with pytest.raises(ConfigError, match=r"expected a checkpoint of pi05, found one of pi0.*create_pi0_inference"):
        create_pi05_inference(PI0, **CPU)
    with pytest.raises(ConfigError, match="no field speed"):
        create_pi05_inference(PI05, speed="fast", **CPU)


def test_dimensions_come_from_the_checkpoint() -> None:
    engine = VLAInferenceEngine(PI05, None, InferenceConfig(VIEWS, 4, num_steps=3, max_tokenize_len=8, **CPU))
    assert engine.model_config.vision_encoder_dim == 64 and engine.action_shape == (4, 32)
    assert engine.predict(images(), [2, 3]).shape == (4, 32)
    assert "trips=3" in engine.backend.compiled().dump_ir()
    with pytest.raises(CheckpointError, match="encoder_dim"):
        VLAInferenceEngine(PI05, ModelConfig(encoder_dim=64), InferenceConfig(VIEWS, 4, **CPU))
    model = create_model(engine.model_config)
    with pytest.raises(ConfigError, match="no weights"):
        VLAInferenceEngine(model, None, InferenceConfig(VIEWS, 4, **CPU))


# ---- backends --------------------------------------------------------------------------------------


@pytest.fixture
def registry() -> Iterator[dict[str, Any]]:
    before = dict(BACKENDS)
    yield BACKENDS
    BACKENDS.clear()
    BACKENDS.update(before)


def test_stage_by_stage(engine: VLAInferenceEngine) -> None:
    """The three methods of a built-in backend, called by hand, give what the whole gives."""
    backend = engine.backend
    inputs = engine._episode(images(), "go", None, None, None, 0)
    values: dict[str, Any] = dict(inputs)
    values["vision_encoder"] = backend.vision_encoder(values, {})  # one tensor: by its stage's name
    assert values["vision_encoder"].shape == (VIEWS, 4, 128) or values["vision_encoder"].ndim >= 3
    values |= backend.transformer_encoder(values, {})
    actions = backend.transformer_decoder(values, {}, 10)
    np.testing.assert_array_equal(actions[0], engine.predict(images(), "go"))
    with pytest.raises(ConfigError, match=r"num_steps: expected 10.*found 5"):
        backend.transformer_decoder(values, {}, 5)
    with pytest.raises(InputError, match="transformer_decoder: missing k_0"):
        backend.transformer_decoder(inputs, {}, 10)
    with pytest.raises(InputError, match="shapes of one signature"):
        backend.run({"images": inputs["images"][:, :1], "tokens": inputs["tokens"]}, {}, 10)


def test_a_stage_of_ones_own(engine: VLAInferenceEngine, registry: dict[str, Any], tokenizer: Path) -> None:
    class Blind(CompiledBackend):
        def vision_encoder(self, inputs: Any, weights: Any) -> Stage:
            made = super().vision_encoder(inputs, weights)
            assert isinstance(made, Tensor)
            return made * 0

    register_backend("blind", lambda model, config: Blind("torch", model, config))
    options = CPU | {"backend": "blind", "tokenizer_path": tokenizer}
    blind = create_pi05_inference(PI05, VIEWS, CHUNK, **options)
    one, two = blind.predict(images(seed=1), "go"), blind.predict(images(seed=2), "go")
    assert one.tobytes() == two.tobytes() and not np.allclose(one, engine.predict(images(seed=1), "go"), atol=1e-2)


def test_what_a_backend_must_have(registry: dict[str, Any]) -> None:
    register_backend("empty", ComputeBackend)
    engine = create_pi05_inference(PI05, VIEWS, CHUNK, **(CPU | {"backend": "empty"}))
    with pytest.raises(NotImplementedError, match="must implement vision_encoder"):
        engine.predict(images(), [2, 3])
    assert engine.weights["action_in_proj.weight"].dtype == torch.float32
    with pytest.raises(ConfigError, match="expected a name"):
        register_backend(ComputeBackend)  # type: ignore[arg-type]


def test_a_target_is_a_backend(engine: VLAInferenceEngine) -> None:
    """The name of a compiler target, one's own too, is a backend's."""
    by_target = create_pi05_inference(PI05, VIEWS, CHUNK, **(CPU | {"backend": "torch", "max_tokenize_len": 48}))
    np.testing.assert_array_equal(by_target.predict(images(), [2, 3]), engine.predict(images(), [2, 3]))


def test_weights_of_a_family_of_ones_own_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from cortexflow.models import MODELS

    config = create_model(cortexflow.load_model(PI05)[0].config).config

    class Mine(MODELS["pi05"]):  # type: ignore[misc]
        family = "mine"

        def preprocess_checkpoint(self, checkpoint: Any) -> dict[str, Tensor]:
            return dict(checkpoint)

    monkeypatch.setitem(MODELS, "mine", Mine)
    weights = random_weights(Mine(config).get_weight_shapes(), 0)
    options: dict[str, Any] = CPU | {"model_config": config, "max_tokenize_len": 8}
    engine = create_inference("mine", weights, VIEWS, CHUNK, **options)
    assert isinstance(engine.model, Mine) and isinstance(engine.model, VLAModel)
    assert np.isfinite(engine.predict(images(), [2, 3])).all()
    with pytest.raises(ConfigError, match="prompt_format"):
        engine.predict(images(), "go")
    name = "action_in_proj.weight"
    for broken, message in (
        ({n: w for n, w in weights.items() if n != name}, f"missing: {name}"),
        (weights | {name: weights[name][:3]}, "expected shape"),
        (weights | {name: weights[name] * float("nan")}, "NaN"),
    ):
        with pytest.raises(CheckpointError, match=message):
            create_inference("mine", broken, VIEWS, CHUNK, **options)


# ---- replicas --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tokenizer: Path) -> Iterator[ReplicatedEngine]:
    options = CPU | {"tokenizer_path": tokenizer, "max_tokenize_len": 48}
    with create_pi05_inference(PI05, VIEWS, CHUNK, devices=["cpu", "cpu"], **options) as replicas:
        yield replicas


def test_replicas_keep_the_order(pair: ReplicatedEngine, engine: VLAInferenceEngine) -> None:
    prompts = [PROMPTS[i % 3] for i in range(7)]
    actions = pair.predict_batch(images(7), prompts, seed=list(range(7)))
    np.testing.assert_allclose(actions, engine.predict_batch(images(7), prompts, seed=list(range(7))), atol=2e-5)
    np.testing.assert_array_equal(pair.predict(images(), "go"), engine.predict(images(), "go"))
    assert pair.predict_batch(images(1), "go").shape == (1, CHUNK, 32) and pair.action_shape == (CHUNK, 32)
    assert pair.predict_batch(images(0), []).shape == (0, CHUNK, 32)


def test_replicas_work_at_the_same_time(pair: ReplicatedEngine) -> None:
    """Each waits in its preprocessor until the other has come there too."""
    meeting, names = threading.Barrier(2, timeout=20), set()

    def meet(pixels: np.ndarray) -> np.ndarray:
        names.add(threading.current_thread().name)
        meeting.wait()
        return pixels

    pair.preprocessor = meet
    try:
        assert pair.predict_batch(images(4), "go").shape == (4, CHUNK, 32)
        callers = [threading.Thread(target=pair.predict, args=(images(), "go")) for _ in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        pair.preprocessor = None
    assert len(names) == 2 and all("cpu (replica" in name for name in names)


def test_one_replica_fails(pair: ReplicatedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pair.predict_batch(images(4), "go")

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("the card fell off")

    with monkeypatch.context() as patch:
        patch.setattr(pair.engines[1].backend, "run", broken)
        with pytest.raises(ReplicaError, match=r"1 of 2 replicas.*cpu \(replica 1\).*the card fell off") as caught:
            pair.predict_batch(images(4), "go")
        assert list(caught.value.failures) == ["cpu (replica 1)"] and caught.value.actions[2:] == [None, None]
        np.testing.assert_array_equal(np.stack(caught.value.actions[:2]), expected[:2])
    np.testing.assert_array_equal(pair.predict_batch(images(4), "go"), expected)


def test_replicas_refuse_as_one_does(pair: ReplicatedEngine) -> None:
    with pytest.raises(InputError, match=r"episode 3: .*tokens.*on cpu \(replica 1\)"):
        pair.predict_batch(images(4), ["go", "go", "go", "x" * 300])
    with pytest.raises(InputError, match="batch_prompts: expected 4"):
        pair.predict_batch(images(4), ["go"])
    with pytest.raises(InputError, match="on cpu"):
        pair.predict(images()[:1], "go")
    for devices in ([], "cuda:0"):
        with pytest.raises(ConfigError, match="devices: expected a list"):
            create_pi05_inference(PI05, VIEWS, CHUNK, devices=devices, **CPU)
    with pytest.raises(ConfigError, match="device"):
        create_pi05_inference(PI05, VIEWS, CHUNK, devices=["cpu", "gpu"], **CPU)


# ---- for hours -------------------------------------------------------------------------------------


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def soak(engine: VLAInferenceEngine, rounds: int, memory: Callable[[], int]) -> int:
    """Growth in bytes over `rounds` predictions, which all give the same bits for the same noise."""
    pixels, noise = images(), np.random.default_rng(1).standard_normal((CHUNK, 32)).astype(np.float32)
    expected = engine.predict(pixels, "go", [1, 2], noise).tobytes()
    for i in range(rounds // 5):
        engine.predict(images(seed=i), PROMPTS[i % 3], [i % 256], seed=i)
    gc.collect()
    before = memory()
    for i in range(rounds):
        engine.predict(images(seed=i), PROMPTS[i % 3], [i % 256], seed=i)
        if i % 10 == 0:
            assert engine.predict(pixels, "go", [1, 2], noise).tobytes() == expected
    gc.collect()
    return memory() - before


def test_a_short_soak(engine: VLAInferenceEngine) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is read from /proc")
    tensors = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
    growth = soak(engine, 300, resident)
    assert growth < 4 << 20, f"{growth:,} bytes in 300 predictions"
    assert sum(issubclass(type(x), Tensor) for x in gc.get_objects()) <= tensors


@pytest.mark.gpu
def test_a_short_soak_on_a_gpu(tokenizer: Path) -> None:
    engine = create_pi05_inference(PI05, VIEWS, CHUNK, tokenizer_path=tokenizer, max_tokenize_len=80, progress=False)
    assert soak(engine, 500, torch.cuda.memory_allocated) == 0


@pytest.mark.gpu
def test_batches_on_a_gpu(engine: VLAInferenceEngine, tokenizer: Path) -> None:
    """Triton in bfloat16 beside float32 on the CPU, alone and in batches, both buckets."""
    gpu = create_pi05_inference(PI05, VIEWS, CHUNK, tokenizer_path=tokenizer, max_tokenize_len=80, progress=False)
    prompts = [PROMPTS[i % 3] * (1 + i % 2) for i in range(5)]
    exact = engine.predict_batch(images(5), prompts)
    actions = gpu.predict_batch(images(5), prompts)
    alone = np.stack([gpu.predict(x, p) for x, p in zip(images(5), prompts, strict=True)])
    for found in (actions, alone):
        assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.1
    on_card = torch.from_numpy(images()).cuda()
    np.testing.assert_array_equal(gpu.predict(on_card, prompts[0]), gpu.predict(images(), prompts[0]))


@pytest.mark.gpu
def test_replicas_on_every_gpu(tokenizer: Path) -> None:
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    options: dict[str, Any] = {"tokenizer_path": tokenizer, "max_tokenize_len": 48, "progress": False}
    alone = create_pi05_inference(PI05, VIEWS, CHUNK, **options)
    with create_pi05_inference(PI05, VIEWS, CHUNK, devices=devices, **options) as many:
        actions = many.predict_batch(images(9), "go", seed=list(range(9)))
    expected = alone.predict_batch(images(9), "go", seed=list(range(9)))
    assert np.linalg.norm(actions - expected) / np.linalg.norm(expected) < 0.05


def test_a_damaged_tokenizer_beside_the_checkpoint_is_named(tmp_path: Path) -> None:
    """A missing one is refused when a prompt is text; a broken one must not pass for a missing one."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: expected a sentencepiece model"):
        create_pi05_inference(checkpoint, 2, 10, **CPU)
