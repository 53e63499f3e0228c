"""realtime-vla's classes: its signatures and dictionaries, the models' own arithmetic."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cortexflow import (
    BackendType,
    CheckpointError,
    ConfigError,
    InputError,
    ModelConfig,
    create_inference,
    create_pi05_inference,
)
from cortexflow.checkpoints import open_checkpoint
from cortexflow.compat import Pi0Inference, Pi05Inference
from cortexflow.demo import train_tokenizer
from cortexflow.processing import load_tokenizer
from tests.checkpoints.test_realtime_vla import PROMPT, to_realtime_vla
from tests.models.cases import DATA

VIEWS, SIZE, CHUNK = 3, 28, 10
CPU: dict[str, Any] = {"backend": BackendType.PYTORCH, "device": "cpu", "dtype": torch.float32}
SIZES = ModelConfig(vision_num_heads=4)  # a dictionary does not tell the heads of an image tower of unusual width

pytestmark = pytest.mark.usefixtures("one_thread")


def dictionary(case: str) -> dict[str, Tensor]:
    """A reference case as realtime-vla's converter writes it, in float32."""
    opened = open_checkpoint(DATA / case)
    weights = {name: opened.load_checked(name) for name in opened.tensors}
    return to_realtime_vla(weights, json.loads((DATA / case / "config.json").read_text()))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(train_tokenizer(512))
    return folder


@pytest.fixture(scope="module")
def pi05(tokenizer: Path) -> Pi05Inference:
    return Pi05Inference(dictionary("pi05_tiny"), VIEWS, CHUNK, str(tokenizer), 60, model_config=SIZES, **CPU)


@pytest.fixture(scope="module")
def pi0() -> Pi0Inference:
    return Pi0Inference(dictionary("pi0_tiny"), VIEWS, CHUNK, model_config=SIZES, **CPU)


@pytest.fixture(scope="module")
def observation() -> tuple[Tensor, Tensor, Tensor]:
    """Images, a state and noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((VIEWS, SIZE, SIZE, 3), generator=generator) * 2 - 1
    return images, torch.rand(32, generator=generator) * 2 - 1, torch.randn((CHUNK, 32), generator=generator)


def test_signatures() -> None:
    """Names, order and defaults of realtime-vla's (pi05_infer.py, pi0_infer.py); what is ours is keyword-only."""

    def positional(function: Any) -> dict[str, Any]:
        parameters = list(inspect.signature(function).parameters.values())[1:]
        return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}

    need = inspect.Parameter.empty
    assert positional(Pi05Inference.__init__) == {
        "checkpoint": need,
        "num_views": need,
        "chunk_size": need,
        "tokenizer_path": None,
        "max_tokenize_len": 200,
        "discrete_state_input": True,
        "max_prompt_text": None,
        "state_dim_for_max_prompt": None,
        "max_prompt_len": None,
    }
    names = ("observation_images_normalized", "diffusion_noise", "task_prompt", "state_tokens")
    assert positional(Pi05Inference.forward) == dict(zip(names, (need, need, None, None), strict=True))
    assert list(positional(Pi0Inference.__init__)) == ["checkpoint", "num_views", "chunk_size"]
    names = ("observation_images_normalized", "observation_state_normalized", "diffusion_noise")
    assert list(positional(Pi0Inference.forward)) == list(names)


def test_pi05(pi05: Pi05Inference, tokenizer: Path, observation: tuple[Tensor, ...]) -> None:
    """The actions of the original checkpoint; the noise is left alone, and the result is the caller's own."""
    images, _, noise = observation
    kept = noise.clone()
    actions = pi05.forward(images, noise, "pick_up the red cube", np.array([10, 20, 255]))
    assert actions.shape == (CHUNK, 32) and actions.dtype == torch.float32 and torch.equal(noise, kept)
    original = create_pi05_inference(
        DATA / "pi05_tiny", VIEWS, CHUNK, tokenizer_path=tokenizer, max_tokenize_len=60, **CPU
    )
    expected = original.predict(images, "pick up the red cube", [10, 20, 255], noise)
    np.testing.assert_allclose(actions.numpy(), expected, atol=1e-4)
    before = actions.clone()
    other = pi05.forward(images, noise, "pick up\nthe red cube", np.array([10, 20, 255]))
    assert torch.equal(actions, before) and not torch.allclose(other, actions, atol=1e-3)  # newlines stay


def test_pi05_in_bfloat16_inputs(pi05: Pi05Inference, observation: tuple[Tensor, ...]) -> None:
    """realtime-vla's callers hold bfloat16 tensors."""
    images, _, noise = observation
    rounded = pi05.forward(images.bfloat16(), noise.bfloat16(), "go", np.array([3]))
    exact = pi05.forward(images, noise, "go", np.array([3]))
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.05


def test_pi05_on_its_own_prompt(observation: tuple[Tensor, ...]) -> None:
    """`language_embeds` as they are stored, without a tokenizer: the prompt that the converter was given."""
    images, _, noise = observation
    stored = dictionary("pi05_tiny")
    fixed = Pi05Inference(stored, VIEWS, CHUNK, discrete_state_input=False, model_config=SIZES, **CPU)
    assert fixed.max_prompt_len == len(PROMPT) and fixed.tokenizer is None
    original = create_pi05_inference(DATA / "pi05_tiny", VIEWS, CHUNK, max_tokenize_len=60, **CPU)
    np.testing.assert_allclose(fixed.forward(images, noise), original.predict(images, PROMPT, noise=noise), atol=1e-4)
    with pytest.raises(InputError, match="the file's own"):
        fixed.forward(images, noise, "go")
    zero = stored | {"language_embeds": torch.zeros(1, 128)}  # what its converter writes without a prompt
    blank = Pi05Inference(zero, VIEWS, CHUNK, discrete_state_input=False, model_config=SIZES, **CPU)
    assert bool(torch.isfinite(blank.forward(images, noise)).all())
    for embeds in (None, torch.zeros(4)):
        broken = stored | {"language_embeds": embeds}
        with pytest.raises(CheckpointError, match="language_embeds"):
            Pi05Inference(broken, VIEWS, CHUNK, discrete_state_input=False, **CPU)


def test_pi0(pi0: Pi0Inference, observation: tuple[Tensor, ...]) -> None:
    images, state, noise = observation
    actions = pi0.forward(images, state, noise)
    original = create_inference("pi0", DATA / "pi0_tiny", VIEWS, CHUNK, **CPU)
    expected = original.predict(images, PROMPT, noise=noise, state=state)
    np.testing.assert_allclose(actions.numpy(), expected, atol=1e-4)
    assert pi0.prompt_len == len(PROMPT)
    with pytest.raises(InputError, match="one prompt"):
        pi0.engine.predict(images, "go", state=state)


def test_how_long_a_prompt_may_be(pi05: Pi05Inference, tokenizer: Path, observation: tuple[Tensor, ...]) -> None:
    images, _, noise = observation
    assert pi05.max_prompt_len == 60
    with pytest.raises(ValueError, match="1 to 60 tokens"):  # a ValueError, as theirs
        pi05.forward(images, noise, "word " * 60, np.array([1]))
    reader = load_tokenizer(tokenizer)
    text = "Task: open the drawer, State: " + " ".join(["255"] * 4) + ";\nAction: "
    length = len(reader.encode(text))
    assert pi05.estimate_max_prompt_len(reader, " open_the drawer", 4) == length
    assert pi05.estimate_max_prompt_len(reader, "open the drawer", 4, 7) == 7
    short: dict[str, Any] = {"max_prompt_text": "open the drawer", "state_dim_for_max_prompt": 4}
    estimated = Pi05Inference(dictionary("pi05_tiny"), VIEWS, CHUNK, str(tokenizer), model_config=SIZES, **short, **CPU)
    assert estimated.max_prompt_len == length
    assert estimated.forward(images, noise, "open the drawer", np.array([255] * 4)).shape == (CHUNK, 32)


def test_what_is_refused(pi05: Pi05Inference, observation: tuple[Tensor, ...]) -> None:
    images, _, noise = observation
    with pytest.raises(InputError, match="expected both"):
        pi05.forward(images, noise, "go")
    with pytest.raises(ConfigError, match="tokenizer_path"):
        Pi05Inference({}, VIEWS, CHUNK)
    with pytest.raises(CheckpointError, match="dictionary of tensors, found PosixPath"):
        Pi0Inference(DATA / "pi0_tiny", VIEWS, CHUNK)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected a checkpoint of pi0, found one of pi05"):
        Pi0Inference(dictionary("pi05_tiny"), VIEWS, CHUNK, model_config=SIZES, **CPU)


@pytest.mark.gpu
def test_the_defaults_on_a_gpu(
    pi05: Pi05Inference, pi0: Pi0Inference, tokenizer: Path, observation: tuple[Tensor, ...]
) -> None:
    """As realtime-vla's users call them: Triton, bfloat16, tensors on the card."""
    images, state, noise = observation
    on_card = [x.cuda().bfloat16() for x in observation]
    theirs = Pi05Inference(dictionary("pi05_tiny"), VIEWS, CHUNK, str(tokenizer), 60, model_config=SIZES)
    found, exact = (
        theirs.forward(on_card[0], on_card[2], "go", np.array([3])),
        pi05.forward(images, noise, "go", np.array([3])),
    )
    assert found.is_cuda and (found.cpu() - exact).norm() / exact.norm() < 0.1
    found = Pi0Inference(dictionary("pi0_tiny"), VIEWS, CHUNK, model_config=SIZES).forward(*on_card)
    exact = pi0.forward(images, state, noise)
    assert found.is_cuda and (found.cpu() - exact).norm() / exact.norm() < 0.1
