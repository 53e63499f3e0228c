"""Other implementations to measure against, where a user has them.

Eager PyTorch: openpi's `PI0Pytorch` (Python 3.11, transformers 4.53.2 with openpi's `transformers_replace`
files) and LeRobot's `PI05Pytorch` / `PI0Pytorch` (Python 3.12), where they are installed. Both are built at
the dimensions of a `ModelConfig`; each needs three of its library's attributes replaced while it is
constructed, because neither takes dimensions as arguments.

Triton by hand: realtime-vla (github.com/Dexmal/realtime-vla), from a folder that holds its `pi05_infer.py`
and `pi0_infer.py` and, where somebody has it, the autotuned `pi05_infer_autotune.py` of a fork.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cortexflow.models import ModelConfig, Signature, VLAModelType

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


# ---- realtime-vla ---------------------------------------------------------------------------------

# (file, class) by variant and family. The fork's variant tunes its kernels when it is constructed: a minute or two.
REALTIME_VLA: dict[str, dict[VLAModelType, tuple[str, str]]] = {
    "realtime-vla": {
        VLAModelType.PI05: ("pi05_infer", "Pi05Inference"),
        VLAModelType.PI0: ("pi0_infer", "Pi0Inference"),
    },
    "realtime-vla, autotuned": {VLAModelType.PI05: ("pi05_infer_autotune", "Pi05AutotuneInference")},
}


class Captured(NamedTuple):
    """A peer that captured itself as one CUDA graph."""

    act: Act  # one prediction, as its caller gets it: inputs by our names, actions [chunk, width]
    replay: Callable[[], None]  # its graph alone
    write: Callable[[Mapping[str, Tensor]], None]  # the noise, which a replay overwrites with the actions


def realtime_vla_variants(path: Path, kind: VLAModelType | str) -> list[str]:
    """The variants in a folder that run a family."""
    found = ((name, files.get(VLAModelType(kind))) for name, files in REALTIME_VLA.items())
    return [name for name, entry in found if entry and (path / f"{entry[0]}.py").is_file()]


def realtime_vla(path: Path, c: ModelConfig, s: Signature, variant: str = "realtime-vla") -> Captured:
    """realtime-vla at its own (full) dimensions, with random weights drawn on the card.

    The prompt is given as embeddings, as its converted checkpoints hold it: it does not look tokens up,
    which is work that our policy does.
    """
    file, name = REALTIME_VLA[variant][VLAModelType(c.model_type)]
    torch.compiler.reset()  # it compiles attention for the shapes it meets first, and must not inherit others
    with _importable(path), redirect_stdout(sys.stderr):
        network = getattr(importlib.import_module(file), name)
        model = network.__new__(network)
        prompt = {"discrete_state_input": False} if c.model_type == VLAModelType.PI05 else {}
        network.__init__(model, _Drawn(model, s.prompt, c.encoder_dim), s.views, s.chunk, **prompt)

    def act(inputs: Mapping[str, Tensor]) -> Tensor:
        given = [inputs["images"][0], inputs["noise"][0]]
        if c.model_type == VLAModelType.PI0:
            given.insert(1, inputs["state"][0])
        actions: Tensor = model.forward(*given)
        return actions

    def write(inputs: Mapping[str, Tensor]) -> None:
        model.buffers["diffusion_noise"].copy_(inputs["noise"][0])

    return Captured(act, model.infer_graph.replay, write)


class _Drawn:
    """A checkpoint for a realtime-vla model under construction: fills the tensors that the model allocated.

    So it costs no memory beside the model's own, and needs no list of names and shapes.
    """

    def __init__(self, model: Any, prompt: int, width: int) -> None:
        self._model = model
        self._generator = torch.Generator(device="cuda").manual_seed(0)
        self._prompt = torch.randn(prompt, width, generator=self._generator, device="cuda")

    def __getitem__(self, name: str) -> Tensor:
        return {"language_embeds": self._prompt}[name]  # its length says how long the prompt is

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, values), as a dictionary gives them."""
        for name, tensor in self._model.weights.items():
            if name != "language_embeds":
                matrix = name.endswith(("_w", "position_embedding")) and tensor.ndim > 1 and "norm_w" not in name
                fan = math.prod(tensor.shape[:-1]) if "patch" in name else tensor.shape[-2] if matrix else 100
                tensor.normal_(0.0, max(fan, 100) ** -0.5, generator=self._generator)
            yield name, self._prompt if name == "language_embeds" else tensor


@contextmanager
def _importable(path: Path) -> Iterator[None]:
    """A folder in front of the import path, and `transformers` as a name alone: only a tokenizer comes from it."""
    stub = importlib.util.module_from_spec(ModuleSpec("transformers", None))
    stub.AutoTokenizer = object  # type: ignore[attr-defined]
    real = sys.modules.get("transformers")
    sys.path.insert(0, str(path.resolve()))
    sys.modules["transformers"] = stub
    try:
        yield
    finally:
        sys.path.remove(str(path.resolve()))
        del sys.modules["transformers"]
        if real is not None:
            sys.modules["transformers"] = real
