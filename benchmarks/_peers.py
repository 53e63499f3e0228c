"""Eager PyTorch implementations to measure against, where a user has them installed.

openpi's `PI0Pytorch` (Python 3.11, transformers 4.53.2 with openpi's `transformers_replace` files) and
LeRobot's `PI05Pytorch` / `PI0Pytorch` (Python 3.12). Both are built at the dimensions of a
`ModelConfig`; each needs three of its library's attributes replaced while it is constructed, because
neither takes dimensions as arguments.
"""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cortexflow.models import ModelConfig, VLAModelType

Act = Callable[[Mapping[str, Tensor]], Tensor]
_EMBED = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"


def installed() -> dict[str, Callable[[ModelConfig, Mapping[str, Tensor]], Act]]:
    """The peers that can be imported here, by name."""
    known = {"openpi": openpi, "lerobot": lerobot}
    return {name: make for name, make in known.items() if importlib.util.find_spec(name) is not None}


@contextmanager
def _replaced(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    precision = torch.get_float32_matmul_precision()
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        torch.set_float32_matmul_precision(precision)  # openpi's constructor sets it for the whole process
        for owner, name, value in before:
            setattr(owner, name, value)


def _towers(c: ModelConfig, make: Callable[..., Any]) -> Callable[[str], Any]:
    shared = {"num_heads": c.num_heads, "num_kv_heads": c.num_kv_heads, "head_dim": c.head_dim}
    vlm = make(width=c.encoder_dim, depth=c.num_encoder_layers, mlp_dim=c.encoder_mlp_dim, **shared)
    expert = make(width=c.decoder_dim, depth=c.num_decoder_layers, mlp_dim=c.decoder_mlp_dim, **shared)
    return {"gemma_2b": vlm, "gemma_300m": expert}.__getitem__


def _sized(c: ModelConfig, vlm: Any, causal: Any) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
    """Constructors of the two language models that put this configuration's sizes into the library's."""

    def make_vlm(config: Any) -> nn.Module:
        vision = {
            "hidden_size": c.vision_encoder_dim,
            "intermediate_size": c.vision_mlp_dim,
            "num_hidden_layers": c.vision_num_layers,
            "num_attention_heads": c.vision_num_heads,
            "patch_size": c.patch_size,
            "image_size": c.image_size,
        }
        config.text_config.vocab_size = config._vocab_size = config.image_token_index = c.vocab_size
        config.projection_dim = config.vision_config.projection_dim = c.encoder_dim
        config.vision_config.update(vision)
        return vlm(config=config)

    def make_causal(config: Any) -> nn.Module:
        config.vocab_size = c.vocab_size
        return causal(config=config)

    return make_vlm, make_causal


def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    state = dict(weights)
    result = model.load_state_dict(state, strict=False)
    unused = {_HEAD, "paligemma_with_expert.gemma_expert.lm_head.weight"}
    if result.unexpected_keys or not set(result.missing_keys) <= unused:
        raise RuntimeError(f"weights do not fit the peer: {result}")


def _channels_first(inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    images = inputs["images"].movedim(-1, 2).contiguous()
    return list(images.unbind(1)), list(inputs["image_mask"].unbind(1))


def openpi(c: ModelConfig, weights: Mapping[str, Tensor]) -> Act:
    """openpi's PI0Pytorch in float32, eager."""
    from openpi.models import gemma
    from openpi.models.pi0_config import Pi0Config
    from openpi.models_pytorch import gemma_pytorch
    from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

    vlm, causal = _sized(c, gemma_pytorch.PaliGemmaForConditionalGeneration, gemma_pytorch.GemmaForCausalLM)
    changes = [
        (gemma_pytorch, "PaliGemmaForConditionalGeneration", vlm),
        (gemma_pytorch, "GemmaForCausalLM", causal),
        (gemma, "get_config", _towers(c, gemma.Config)),
    ]
    with _replaced(changes):
        config = Pi0Config(
            pi05=c.model_type == VLAModelType.PI05,
            action_dim=c.action_dim,
            action_horizon=c.chunk_size,
            max_token_len=c.max_token_len,
            dtype="float32",
            pytorch_compile_mode=None,
        )
        model = PI0Pytorch(config).eval()
    _load(model, weights)

    def act(inputs: Mapping[str, Tensor]) -> Tensor:
        images, masks = _channels_first(inputs)
        state = inputs.get("state", torch.zeros(inputs["noise"].shape[0], c.state_dim))
        prepared = (images, masks, inputs["tokens"].long(), inputs["token_mask"], state)
        model._preprocess_observation = lambda observation, *, train=True: prepared  # any number and size of cameras
        observation = types.SimpleNamespace(state=state)
        steps = c.num_diffusion_steps
        return PI0Pytorch.sample_actions(model, "cpu", observation, noise=inputs["noise"], num_steps=steps)

    return act


def lerobot(c: ModelConfig, weights: Mapping[str, Tensor]) -> Act:
    """LeRobot's PI05Pytorch or PI0Pytorch in float32, eager."""
    if c.model_type == VLAModelType.PI05:
        from lerobot.policies.pi05 import modeling_pi05 as modeling
        from lerobot.policies.pi05.configuration_pi05 import PI05Config as Config

        network = modeling.PI05Pytorch
    else:
        from lerobot.policies.pi0 import modeling_pi0 as modeling
        from lerobot.policies.pi0.configuration_pi0 import PI0Config as Config

        network = modeling.PI0Pytorch
    from lerobot.policies.pi05.modeling_pi05 import GemmaConfig

    vlm, causal = _sized(c, modeling.PaliGemmaForConditionalGenerationWithPiGemma, modeling.PiGemmaForCausalLM)
    changes = [
        (modeling, "PaliGemmaForConditionalGenerationWithPiGemma", vlm),
        (modeling, "PiGemmaForCausalLM", causal),
        (modeling, "get_gemma_config", _towers(c, GemmaConfig)),
    ]
    with _replaced(changes):
        config = Config(
            device="cpu",
            dtype="float32",
            chunk_size=c.chunk_size,
            n_action_steps=c.chunk_size,
            max_action_dim=c.action_dim,
            max_state_dim=c.state_dim,
            num_inference_steps=c.num_diffusion_steps,
            image_resolution=(c.image_size, c.image_size),
            compile_model=False,
        )
        model = network(config).eval()
    _load(model, weights)

    def act(inputs: Mapping[str, Tensor]) -> Tensor:
        images, masks = _channels_first(inputs)
        given = [images, masks, inputs["tokens"].long(), inputs["token_mask"]]
        given += [inputs["state"]] if "state" in inputs else []
        with torch.inference_mode():
            return model.sample_actions(*given, noise=inputs["noise"], num_steps=c.num_diffusion_steps)

    return act
