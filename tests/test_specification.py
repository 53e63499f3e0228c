"""The specification's own examples, as a user would write them, on every backend that runs here.

On a machine with a GPU Triton is among them (`-m gpu`). The checkpoint is small; sizes at the door are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cortexflow
from cortexflow import (
    BackendType,
    ComputeBackend,
    ConfigError,
    InferenceConfig,
    ModelConfig,
    VLAInferenceEngine,
    VLAModel,
    VLAModelType,
    create_inference,
    create_pi05_inference,
    register_backend,
    register_model,
)
from cortexflow.backends import BACKENDS
from cortexflow.checkpoints import save_lerobot
from cortexflow.demo import CONFIG, random_weights, train_tokenizer
from cortexflow.models import MODELS, create_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:no state given"),
]

# What stands in a user's own code instead of this table: backend=..., and for a CPU device= and dtype=.
ON: dict[str, dict[str, Any]] = {
    "pytorch": {"backend": BackendType.PYTORCH, "device": "cpu", "dtype": torch.float32},
    "onnx": {"backend": BackendType.ONNX, "device": "cpu", "dtype": torch.float32},
    "pytorch-cuda": {"backend": BackendType.PYTORCH},
    "triton": {"backend": BackendType.TRITON},
}
EVERYWHERE = [
    "pytorch",
    "onnx",
    pytest.param("pytorch-cuda", marks=pytest.mark.gpu),
    pytest.param("triton", marks=pytest.mark.gpu),
]
# How far from float32 on the CPU, by ‖difference‖ / ‖actions‖: what float32 and bfloat16 round.
NEAR = {"pytorch": 1e-6, "onnx": 1e-5, "pytorch-cuda": 0.1, "triton": 0.1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `checkpoints/pi05` and `tokenizer/`: π0.5 but small, reading 224 x 224 pixels."""
    folder = tmp_path_factory.mktemp("home")
    config = CONFIG.with_(image_size=224, patch_size=56, num_encoder_layers=2, num_decoder_layers=2)
    weights = random_weights(create_model(config).get_weight_shapes(), 0)
    save_lerobot(folder / "checkpoints/pi05", weights, config)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.model").write_bytes(train_tokenizer(config.vocab_size))
    return folder


@pytest.fixture(scope="module")
def made(home: Path) -> dict[str, VLAInferenceEngine]:
    """Engines by backend, made once."""

    class Engines(dict[str, VLAInferenceEngine]):
        def __missing__(self, name: str) -> VLAInferenceEngine:
            self[name] = engine = create_pi05_inference(
                checkpoint_path=home / "checkpoints/pi05",
                num_views=2,
                chunk_size=10,
                tokenizer_path=home / "tokenizer",
                progress=False,
                **ON[name],
            )
            return engine

    return Engines()


@pytest.fixture
def registries() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = [(table, dict(table)) for table in (BACKENDS, MODELS)]
    yield
    for table, kept in before:
        table.clear()
        table.update(kept)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


IMAGES = torch.rand((2, 224, 224, 3), generator=torch.Generator().manual_seed(0)) * 2 - 1
STATE = np.array([10, 20, 30, 40, 50])


@pytest.mark.parametrize("name", EVERYWHERE)
def test_quick_start(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    on = {k: v for k, v in ON[name].items() if k != "backend"}

    engine = create_pi05_inference(
        checkpoint_path="checkpoints/pi05",
        num_views=2,
        chunk_size=10,
        backend=ON[name]["backend"],
        tokenizer_path="tokenizer/",
        **on,
    )
    actions = engine.predict(
        observation_images=IMAGES,  # (2, 224, 224, 3)
        task_prompt="pick up the red cube",
        state_tokens=STATE,
    )
    assert isinstance(actions, np.ndarray) and actions.shape == (10, 32) and np.isfinite(actions).all()


@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_backend_gives_the_same_actions(made: dict[str, VLAInferenceEngine], name: str) -> None:
    noise = np.random.default_rng(0).standard_normal((10, 32)).astype(np.float32)
    expected = made["pytorch"].predict(IMAGES, "pick up the red cube", STATE, noise)
    found = made[name].predict(IMAGES, "pick up the red cube", STATE, noise)
    assert distance(found, expected) <= NEAR[name]
    assert made[name].predict(IMAGES, "pick up the red cube", STATE, noise).tobytes() == found.tobytes()


def test_switching_backends(home: Path) -> None:
    """One argument; what is not there is said, never replaced."""
    actions = {}
    for backend in (BackendType.PYTORCH, BackendType.ONNX):
        engine = create_pi05_inference(
            home / "checkpoints/pi05", 2, 10, backend, home / "tokenizer", device="cpu", dtype=torch.float32
        )
        actions[backend] = engine.predict(IMAGES, "open the drawer", STATE)
    np.testing.assert_allclose(actions[BackendType.PYTORCH], actions[BackendType.ONNX], atol=1e-4)
    with pytest.raises(ConfigError, match="'cuda' is not part of this version; there are triton, pytorch, onnx"):
        create_pi05_inference(home / "checkpoints/pi05", 2, 10, BackendType.CUDA, home / "tokenizer")


def test_the_engine_by_hand(home: Path) -> None:
    engine = VLAInferenceEngine(
        checkpoint=home / "checkpoints/pi05",
        model_config=ModelConfig(model_type=VLAModelType.PI05),
        inference_config=InferenceConfig(
            num_views=2,
            chunk_size=10,
            backend=BackendType.PYTORCH,
            device="cpu",
            dtype=torch.float32,
            tokenizer_path=home / "tokenizer",
        ),
    )
    assert engine.predict(IMAGES, "pick up the red cube", STATE).shape == (10, 32)
    assert engine.model_config.encoder_dim == CONFIG.encoder_dim  # the checkpoint tells


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_custom_preprocessor(made: dict[str, VLAInferenceEngine], name: str) -> None:
    class CustomPreprocessor:
        """Camera frames of any size, 8-bit BGR, to what the network reads."""

        def __call__(self, frames: np.ndarray) -> np.ndarray:
            rgb = frames[..., ::-1]
            return np.stack([cortexflow.processing.resize_with_pad(f, 224, 224, method="pil") for f in rgb])

    import cortexflow.processing

    frames = np.random.default_rng(0).integers(0, 256, (2, 120, 160, 3), dtype=np.uint8)
    engine = made[name]
    engine.preprocessor = CustomPreprocessor()
    try:
        actions = engine.predict(frames, "pick up the red cube", STATE)
    finally:
        engine.preprocessor = None
    assert actions.tobytes() == engine.predict(CustomPreprocessor()(frames), "pick up the red cube", STATE).tobytes()


@pytest.mark.parametrize("name", EVERYWHERE)
def test_eight_episodes(made: dict[str, VLAInferenceEngine], name: str) -> None:
    batch_images = torch.rand((8, 2, 224, 224, 3), generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch_prompts = [
        "pick up the red cube",
        "open the drawer",
        "close the door",
        "put the blue bowl in the drawer and close it",
        "fold the towel with both arms, then wait",
        "push the green block to the left of the red block",
        "wait",
        "move the green block to the left of the red block, then the red block to the left of the green block",
    ]
    engine = made[name]

    actions = engine.predict_batch(batch_images, batch_prompts)

    assert actions.shape == (8, 10, 32)
    alone = np.stack([engine.predict(x, p) for x, p in zip(batch_images, batch_prompts, strict=True)])
    assert distance(actions, alone) <= (1e-5 if ON[name].get("dtype") is torch.float32 else 0.05)
    assert distance(alone, made["pytorch"].predict_batch(batch_images, batch_prompts)) <= NEAR[name]


def test_devices(home: Path, made: dict[str, VLAInferenceEngine]) -> None:
    replicas = create_pi05_inference(
        home / "checkpoints/pi05", 2, 10, tokenizer_path=home / "tokenizer", devices=["cpu", "cpu"], **_but("device")
    )
    images = torch.stack([IMAGES, -IMAGES, IMAGES.flip(1)])
    with replicas:
        actions = replicas.predict_batch(images, "open the drawer")
    assert distance(actions, made["pytorch"].predict_batch(images, "open the drawer")) < 1e-5


def _but(left_out: str) -> dict[str, Any]:
    return {k: v for k, v in ON["pytorch"].items() if k != left_out}


def test_adding_a_model(registries: None) -> None:
    """A family written as a graph: it has its backends for nothing."""
    from cortexflow.ir import Module, Type, function, ops, returns

    @register_model
    class Reflex(VLAModel):
        """The mean picture of each view, projected, drives the noise."""

        family = "reflex"

        def build(self, signature: Any, dtype: str = "f32") -> Module:
            b, v, s = signature.batch, signature.views, self.config.image_size
            chunk, width = signature.chunk, self.config.action_dim
            w = ops.weight
            with function("vision_encoder", images=Type("f32", (b, v, s, s, 3))) as (vision, [images]):
                pixels = ops.reshape(images, shape=(b, v * s * s * 3))
                returns(seen=ops.matmul(pixels, w(key="eye", type=Type("f32", (v * s * s * 3, width)))))
            with function("transformer_encoder", seen=Type("f32", (b, width))) as (encoder, [seen]):
                returns(latent=ops.act(seen, kind="silu"))
            arguments = {"latent": Type("f32", (b, width)), "noise": Type("f32", (b, chunk, width))}
            with function("transformer_decoder", **arguments) as (decoder, [latent, noise]):
                pull = ops.reshape(
                    ops.matmul(latent, w(key="hand", type=Type("f32", (width, width)))), shape=(b, 1, width)
                )
                returns(actions=ops.add(noise, pull))
            return Module({f.name: f for f in (vision, encoder, decoder)}, {}, {"family": self.family})

        def preprocess_checkpoint(self, checkpoint: Any) -> dict[str, Tensor]:
            return {name.removeprefix("net."): tensor for name, tensor in checkpoint.items()}

    config = ModelConfig(model_type="reflex", image_size=14, action_dim=4)
    assert Reflex(config).get_weight_shapes() == {"eye": (1176, 4), "hand": (4, 4)}
    generator = torch.Generator().manual_seed(0)
    checkpoint = {"net.eye": torch.randn(1176, 4, generator=generator) / 34, "net.hand": torch.eye(4)}
    images, noise = torch.rand((2, 14, 14, 3), generator=generator), torch.zeros(3, 4)
    expected = torch.nn.functional.silu(images.flatten() @ checkpoint["net.eye"])
    for name in ("pytorch", "onnx"):
        engine = create_inference("reflex", checkpoint, 2, 3, model_config=config, **ON[name])
        actions = engine.predict(images, noise=noise)
        np.testing.assert_allclose(actions, expected.expand(3, 4), atol=1e-5)
        np.testing.assert_allclose(engine.predict_batch(images[None], noise=noise[None])[0], actions, atol=1e-5)
    with pytest.raises(cortexflow.InputError, match="reads no prompt"):
        engine.predict(images, "go")


def test_adding_a_model_and_its_backend(registries: None) -> None:
    """By the specification's interfaces alone: three methods of the model, three of the backend, no graph."""

    @register_model
    class Tiny(VLAModel):
        family = "tiny"

        def get_weight_shapes(self) -> dict[str, tuple[int, ...]]:
            return {"embed": (16, 4), "out": (4, self.config.action_dim)}

        def get_buffer_shapes(self, num_views: int, chunk_size: int) -> dict[str, tuple[int, ...]]:
            return {"latent": (1, 4), "actions": (1, chunk_size, self.config.action_dim)}

        def preprocess_checkpoint(self, checkpoint: Any) -> dict[str, Tensor]:
            return dict(checkpoint)

    @register_backend("tiny-numpy")
    class ByHand(ComputeBackend):
        def vision_encoder(self, inputs: Any, weights: Any) -> Tensor:
            return inputs["images"].mean((1, 2, 3, 4))

        def transformer_encoder(self, inputs: Any, weights: Any) -> Tensor:
            words = weights["embed"][inputs["tokens"]] * inputs["token_mask"][..., None]
            return words.sum(1) + inputs["vision_encoder"][:, None]

        def transformer_decoder(self, inputs: Any, weights: Any, num_steps: int) -> Tensor:
            x = inputs["noise"]
            for _ in range(num_steps):
                x = x - (x - (inputs["transformer_encoder"] @ weights["out"])[:, None]) / num_steps
            return x

    config = ModelConfig(model_type="tiny", image_size=14, action_dim=3, vocab_size=16, num_diffusion_steps=1)
    checkpoint = {"embed": torch.arange(64.0).reshape(16, 4) / 64, "out": torch.ones(4, 3)}
    on = {"device": "cpu", "dtype": torch.float32}
    engine = create_inference("tiny", checkpoint, 2, 5, "tiny-numpy", model_config=config, **on)
    images = np.full((2, 14, 14, 3), 0.5, np.float32)
    actions = engine.predict(images, [1, 3])
    expected = (checkpoint["embed"][[1, 3]].sum(0) + 0.5).sum().item()
    np.testing.assert_allclose(actions, np.full((5, 3), expected), rtol=1e-6)
    both = engine.predict_batch(np.stack([images, images]), [[1, 3], [2, 5, 7]])
    np.testing.assert_allclose(both[0], actions, rtol=1e-6)
    np.testing.assert_allclose(both[1], engine.predict(images, [2, 5, 7]), rtol=1e-6)


def test_adding_a_backend(home: Path, made: dict[str, VLAInferenceEngine], registries: None) -> None:
    """One's own way to run a known family: here stage by stage on the interpreter, the meaning of every op."""
    from cortexflow.ir import run

    @register_backend("reference")
    class Reference(ComputeBackend):
        def _run(self, stage: str, inputs: Any, weights: Any) -> dict[str, Tensor]:
            batch, slots = inputs["tokens"].shape
            func = self.model.build(self.config.signature(self.model.config, batch, slots)).funcs[stage]
            return run(func, {name: inputs[name] for name in func.args}, weights)

        def vision_encoder(self, inputs: Any, weights: Any) -> dict[str, Tensor]:
            return self._run("vision_encoder", inputs, weights)

        def transformer_encoder(self, inputs: Any, weights: Any) -> dict[str, Tensor]:
            return self._run("transformer_encoder", inputs, weights)

        def transformer_decoder(self, inputs: Any, weights: Any, num_steps: int) -> Tensor:
            return self._run("transformer_decoder", inputs, weights)["actions"]

    engine = create_pi05_inference(
        home / "checkpoints/pi05", 2, 10, "reference", home / "tokenizer", device="cpu", dtype=torch.float32
    )
    expected = made["pytorch"].predict(IMAGES, "pick up the red cube", STATE)
    assert distance(engine.predict(IMAGES, "pick up the red cube", STATE), expected) < 1e-5


# ---- migration -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def migrant(home: Path) -> Path:
    """What a user brings: realtime-vla's converted file, a directory of openpi's, of LeRobot's and of OpenVLA's."""
    from tests.checkpoints.test_realtime_vla import to_realtime_vla
    from tests.models.openvla_cases import write_checkpoint
    from tests.processing.directories import random_stats, write_lerobot, write_openpi
    from tests.processing.llama import vocabulary_bytes

    config = CONFIG.with_(**MIGRANT)
    weights = random_weights(create_model(config).get_weight_shapes(), 0)
    towers = {
        "vision": {"depth": config.vision_num_layers},
        "vlm": {"depth": config.num_encoder_layers, "head_dim": config.head_dim, "width": config.encoder_dim},
        "expert": {"depth": config.num_decoder_layers, "head_dim": config.head_dim, "width": config.decoder_dim},
    }
    torch.save(to_realtime_vla(weights, {"model": "pi05"} | towers), home / "converted.pt")
    write_openpi(home / "checkpoints/pi05_libero", "pi05", random_stats(8, 7), "physical-intelligence/libero")
    write_lerobot(home / "checkpoints/lerobot_pi05", "pi05", random_stats(8, 7))
    (write_checkpoint(home / "checkpoints/openvla") / "tokenizer.model").write_bytes(vocabulary_bytes())
    return home


# A converted file tells every dimension but the heads of an image tower that is not the released one.
HEADS = 2
MIGRANT: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 56,
    "vision_num_heads": HEADS,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
}


@pytest.mark.parametrize("where", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_the_migration_guide(migrant: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block of docs/migration.md, in order, in one namespace; on a GPU with its defaults."""
    import re

    guide = (Path(__file__).parents[1] / "docs/migration.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", guide, re.S)
    assert len(blocks) == 7
    monkeypatch.chdir(migrant)
    namespace: dict[str, Any] = {}
    for block in blocks:
        if where == "gpu":
            block = re.sub(r"^on = .*$", "on = {}", block, flags=re.M).replace("atol=1e-4", "atol=0.2")
        exec(compile(block, "docs/migration.md", "exec"), namespace)
        namespace["on"].setdefault("model_config", ModelConfig(vision_num_heads=HEADS))
    assert namespace["chunk"].shape == (10, 32) and namespace["chunks"].shape == (4, 10, 32)
    assert namespace["result"]["actions"].shape == (10, 7) and namespace["actions"].shape[1] == 7
