"""realtime-vla's classes, by their names and signatures, over this package's engine.

    from cortexflow.compat import Pi05Inference  # was: from pi05_infer import Pi05Inference

They take the dictionaries that realtime-vla's converters write, and compute what the models' own
implementations compute; where realtime-vla departs from those, `docs/migration.md` says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexflow.configuration import BackendType, InferenceConfig
from cortexflow.engine import VLAInferenceEngine
from cortexflow.errors import CheckpointError, ConfigError, InputError
from cortexflow.models import ModelConfig, VLAModelType
from cortexflow.processing.prompts import Encoder, prompt_ids
from cortexflow.processing.tokenizer import PromptTokenizer, load_tokenizer

FORMAT = "pi05_realtime"  # how realtime-vla cleans an instruction: newlines inside it stay


class Pi05Inference:
    """realtime-vla's `Pi05Inference`: π0.5 from its converted dictionary.

    Attributes:
        engine: the engine behind it.
        tokenizer: None with `discrete_state_input=False`.
        max_prompt_len: the longest prompt in tokens.
        num_views, chunk_size, max_tokenize_len, discrete_state_input, tokenizer_path: as given.
    """

    def __init__(
        self,
        checkpoint: Mapping[str, Any],
        num_views: int,
        chunk_size: int,
        tokenizer_path: str | None = None,
        max_tokenize_len: int = 200,
        discrete_state_input: bool = True,
        max_prompt_text: str | None = None,
        state_dim_for_max_prompt: int | None = None,
        max_prompt_len: int | None = None,
        *,
        backend: BackendType | str = BackendType.TRITON,
        device: str | torch.device = "cuda",
        dtype: torch.dtype | str = torch.bfloat16,
        model_config: ModelConfig | None = None,
    ) -> None:
        """Compile for this dictionary.

        Args:
            checkpoint: tensors by realtime-vla's names.
            num_views, chunk_size: cameras and actions of one call.
            tokenizer_path: PaliGemma's sentencepiece model or its directory; needed with `discrete_state_input`.
            max_tokenize_len: the longest prompt in tokens, unless one of the next says less.
            discrete_state_input: False: the prompt is the file's own `language_embeds`, and calls take none.
            max_prompt_text, state_dim_for_max_prompt: the longest instruction and the length of the state, from
                which `max_prompt_len` is estimated.
            max_prompt_len: the longest prompt in tokens.
            backend, device, dtype: as of `InferenceConfig`; realtime-vla knows no others than the defaults.
            model_config: dimensions that the dictionary does not tell, where they are not the released ones.

        Raises:
            CheckpointError, ConfigError, TargetError: with what was expected, what was found, what to do.
        """
        self.num_views, self.chunk_size = num_views, chunk_size
        self.tokenizer_path, self.max_tokenize_len = tokenizer_path, int(max_tokenize_len)
        self.discrete_state_input = discrete_state_input
        self.tokenizer: PromptTokenizer | None = None
        if not discrete_state_input:
            checkpoint = _of_one_prompt(checkpoint)
            self.max_prompt_len = len(checkpoint["embedding_weight"])
        else:
            if tokenizer_path is None:
                raise ConfigError(
                    "tokenizer_path: expected PaliGemma's sentencepiece model or its directory, found None; "
                    "or pass discrete_state_input=False to act on the file's own prompt"
                )
            self.tokenizer = load_tokenizer(tokenizer_path)
            if max_prompt_len is not None:
                self.max_prompt_len = int(max_prompt_len)
            elif max_prompt_text is not None and state_dim_for_max_prompt is not None:
                self.max_prompt_len = self.estimate_max_prompt_len(
                    self.tokenizer, max_prompt_text, state_dim_for_max_prompt, self.max_tokenize_len
                )
            else:
                self.max_prompt_len = self.max_tokenize_len
        config = InferenceConfig(
            num_views,
            chunk_size,
            backend,
            device,
            dtype,
            max_tokenize_len=self.max_prompt_len,
            discrete_state_input=discrete_state_input,
            prompt_format=FORMAT,
        )
        self.engine = _engine(checkpoint, VLAModelType.PI05, model_config, config)
        self.engine.tokenizer = self.tokenizer

    def estimate_max_prompt_len(
        self,
        tokenizer: Encoder,
        task_prompt: str,
        state_dim: int,
        max_tokenize_len: int = 200,
        state_token_value: int = 255,
    ) -> int:
        """Tokens of the prompt of an instruction with a state of `state_dim` bins, at most `max_tokenize_len`."""
        bins = [int(state_token_value)] * int(state_dim)
        return min(len(prompt_ids(tokenizer, task_prompt, format=FORMAT, bins=bins)), int(max_tokenize_len))

    def forward(
        self,
        observation_images_normalized: Tensor,
        diffusion_noise: Tensor,
        task_prompt: str | None = None,
        state_tokens: NDArray[Any] | None = None,
    ) -> Tensor:
        """The actions of one observation: float32 [chunk, action_dim] on the device, a tensor of the caller's own.

        Args:
            observation_images_normalized: [views, size, size, 3], RGB, float in [-1, 1].
            diffusion_noise: normal, [chunk, action_dim]; left as it is (realtime-vla writes the actions over it).
            task_prompt: the instruction; state_tokens: bins of the normalised state, integers [n]. Both are
                needed with `discrete_state_input`, and refused without it.

        Raises `InputError`, also for a prompt longer than `max_prompt_len`; it is never cut.
        """
        if not self.discrete_state_input:
            if task_prompt is not None or state_tokens is not None:
                raise InputError(
                    "task_prompt, state_tokens: expected None with discrete_state_input=False, whose prompt is the "
                    f"file's own, found {task_prompt!r} and {state_tokens!r}; leave them out"
                )
            prompt: Any = np.arange(self.max_prompt_len)
        else:
            if task_prompt is None or state_tokens is None:
                raise InputError("task_prompt, state_tokens: expected both with discrete_state_input=True, found None")
            prompt = task_prompt
        actions = self.engine.predict(observation_images_normalized, prompt, state_tokens, diffusion_noise)
        return torch.from_numpy(actions).to(self.engine.inference_config.device)


class Pi0Inference:
    """realtime-vla's `Pi0Inference`: π0 from its converted dictionary, with the one prompt and the flow steps in it.

    Attributes:
        engine: the engine behind it.
        prompt_len: tokens of the file's prompt.
        num_views, chunk_size: as given.
    """

    def __init__(
        self,
        checkpoint: Mapping[str, Any],
        num_views: int,
        chunk_size: int,
        *,
        backend: BackendType | str = BackendType.TRITON,
        device: str | torch.device = "cuda",
        dtype: torch.dtype | str = torch.bfloat16,
        model_config: ModelConfig | None = None,
    ) -> None:
        """Compile for this dictionary; arguments and errors as of `Pi05Inference`."""
        self.num_views, self.chunk_size = num_views, chunk_size
        config = InferenceConfig(num_views, chunk_size, backend, device, dtype)
        self.engine = _engine(checkpoint, VLAModelType.PI0, model_config, config)
        self.prompt_len = self.engine.inference_config.max_tokenize_len

    def forward(
        self, observation_images_normalized: Tensor, observation_state_normalized: Tensor, diffusion_noise: Tensor
    ) -> Tensor:
        """The actions of one observation: float32 [chunk, action_dim] on the device, a tensor of the caller's own.

        Args:
            observation_images_normalized: [views, size, size, 3], RGB, float in [-1, 1].
            observation_state_normalized: [n] of at most 32 values; padded with zeros.
            diffusion_noise: normal, [chunk, action_dim]; left as it is (realtime-vla writes the actions over it).

        Raises `InputError`.
        """
        actions = self.engine.predict(
            observation_images_normalized, noise=diffusion_noise, state=observation_state_normalized
        )
        return torch.from_numpy(actions).to(self.engine.inference_config.device)


def _engine(
    checkpoint: Mapping[str, Any], family: VLAModelType, config: ModelConfig | None, inference: InferenceConfig
) -> VLAInferenceEngine:
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(
            f"checkpoint: expected realtime-vla's dictionary of tensors, found {type(checkpoint).__name__}; load it "
            "with torch.load or pickle.load, or give its path to cortexflow.create_inference"
        )
    return VLAInferenceEngine(checkpoint, (config or ModelConfig()).with_(model_type=family), inference)


def _of_one_prompt(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary with the file's prompt, already embedded, as its table of tokens: they are 0, 1, 2, ..."""
    embeds = checkpoint.get("language_embeds")
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 2:
        found = "none" if embeds is None else f"{type(embeds).__name__} {list(np.shape(embeds))}"
        raise CheckpointError(
            f"language_embeds: expected the prompt's embeddings [tokens, width], found {found}; convert the original "
            "with a prompt, or use discrete_state_input=True"
        )
    unscaled = cast(Tensor, embeds.float() / embeds.shape[1] ** 0.5)  # stored times sqrt(width)
    return {**checkpoint, "embedding_weight": unscaled}
