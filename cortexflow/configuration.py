"""How a policy is run: `InferenceConfig` holds every choice that the model itself does not make."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum

import torch

from cortexflow.compiler import DTYPES
from cortexflow.errors import ConfigError
from cortexflow.models import ModelConfig, Signature

SHORT_PROMPT = 48  # tokens: most instructions; a bucket of its own, so that they do not pay for 200 slots


class BackendType(Enum):
    """The backends CortexFlow knows by name. A user's own registers under a string (`register_backend`)."""

    TRITON = "triton"
    PYTORCH = "pytorch"
    CUDA = "cuda"
    ONNX = "onnx"


@dataclass(frozen=True)
class InferenceConfig:
    """Every choice of one engine. Raises `ConfigError` for values of another kind than said here.

    Attributes:
        num_views: camera slots; an absent camera is given as None, not left out.
        chunk_size: actions of one prediction.
        backend: a `BackendType`, or the name of a registered backend or compiler target.
        device: `"cuda"`, `"cuda:1"`, `"cpu"`. Never exchanged for another one silently.
        dtype: precision of the large products: bfloat16, float16, float32 (or their names).
        use_cuda_graphs: record the launches once and replay them (Triton); off: Python launches each kernel.
        tokenizer_path: a sentencepiece `.model` file or its directory; None: look beside the checkpoint.
        max_tokenize_len: the longest prompt in tokens. Prompts of at most 48 have a shorter signature of their own.
        discrete_state_input: the prompt contains the discretised state (π0.5); False: it never does.
        num_steps: Euler steps of the flow; None: those of the checkpoint.
        max_batch: the most episodes that `predict_batch` runs at once; more of them are run in groups.
        prompt_format: a key of `cortexflow.processing.PROMPT_FORMATS`; None: that of the checkpoint's family.
        tune: measure kernels on this card where the package has no result.
        progress: show progress bars for work over a second.
    """

    num_views: int
    chunk_size: int
    backend: BackendType | str = BackendType.TRITON
    device: str | torch.device = "cuda"
    dtype: torch.dtype | str = torch.bfloat16
    use_cuda_graphs: bool = True
    tokenizer_path: str | os.PathLike[str] | None = None
    max_tokenize_len: int = 200
    discrete_state_input: bool = True
    num_steps: int | None = None
    max_batch: int = 8
    prompt_format: str | None = None
    tune: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("num_views", "chunk_size", "max_tokenize_len", "max_batch", "num_steps"):
            value = getattr(self, name)
            if name == "num_steps" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"InferenceConfig.{name}: expected a positive integer, found {value!r}")
        if not isinstance(self.backend, (BackendType, str)):
            known = ", ".join(f"BackendType.{b.name}" for b in BackendType)
            raise ConfigError(
                f"InferenceConfig.backend: expected {known} or the name of a registered backend, found {self.backend!r}"
            )
        if not isinstance(self.dtype, (str, torch.dtype)) or self.dtype not in DTYPES:
            raise ConfigError(
                f"InferenceConfig.dtype: expected torch.bfloat16, torch.float16 or torch.float32, found {self.dtype!r}"
            )

    @property
    def backend_name(self) -> str:
        """The name under which the backend is registered."""
        return self.backend.value if isinstance(self.backend, BackendType) else self.backend

    @property
    def precision(self) -> str:
        """The precision as the IR spells it: `bf16`, `f16`, `f32`."""
        return DTYPES[self.dtype]

    @property
    def prompt_buckets(self) -> tuple[int, ...]:
        """Slots of the prompt buckets, in rising order: 48, where that is less, and the longest prompt."""
        longest = self.max_tokenize_len
        return (SHORT_PROMPT, longest) if longest > SHORT_PROMPT else (longest,)

    def signature(self, model: ModelConfig, batch: int = 1, slots: int | None = None) -> Signature:
        """The static shape for a batch and a prompt bucket (None: the largest)."""
        return Signature.of(
            model,
            batch=batch,
            views=self.num_views,
            prompt=slots or self.max_tokenize_len,
            chunk=self.chunk_size,
            steps=self.num_steps,
        )
