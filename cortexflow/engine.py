"""`VLAInferenceEngine`: a checkpoint and a configuration become `predict(images, prompt)`.

The engine owns the model, its weights, the backend and the tokenizer (`sources` finds them). What it takes it checks
(`episodes`), and it speaks the network's language: images of the network's size, a normalised state, normalised
actions. What stands between that and a robot's own units is `cortexflow.processing`'s.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexflow.backends import create_backend
from cortexflow.configuration import BackendType, InferenceConfig
from cortexflow.episodes import (
    batch_columns,
    join,
    network_state,
    read_bins,
    read_ids,
    read_images,
    read_noise,
    read_pixel_values,
    why_no_state,
)
from cortexflow.errors import ConfigError, InputError
from cortexflow.inputs import check_inputs
from cortexflow.ir import Type
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.models import MODELS, ModelConfig, VLAModelType
from cortexflow.observation import FixedPrompt
from cortexflow.processing.arrays import as_floats
from cortexflow.processing.prompts import Encoder, prompt_ids
from cortexflow.processing.tokenizer import PAD_ID
from cortexflow.processing.towers import RGB
from cortexflow.sources import (
    Source,
    family_name,
    find_prompt_format,
    find_tokenizer,
    find_towers,
    open_model,
    weights_for,
)

if TYPE_CHECKING:
    from cortexflow.replicas import ReplicatedEngine

Actions = NDArray[np.float32]


class VLAInferenceEngine:
    """A policy that acts: images and a prompt in, a chunk of actions out.

    Attributes:
        model, model_config: the family and its dimensions, as the checkpoint tells them.
        inference_config: the choices it runs by.
        backend: what runs the stages; `engine.backend.compiled()` shows IR, source, memory of a built-in one.
        weights: the checkpoint's tensors, for a backend that reads them; built-in ones keep their own.
        tokenizer: anything with `encode(text, *, bos)`; None where no file was named or found.
        preprocessor: None, or any callable that is given the images of one episode before they are checked.
    """

    def __init__(
        self,
        checkpoint: Source,
        model_config: ModelConfig | None = None,
        inference_config: InferenceConfig | None = None,
        *,
        allow_pickle: bool = False,
    ) -> None:
        """Open, check and compile.

        Args:
            checkpoint: a directory or file, realtime-vla's dictionary, an opened `Checkpoint`, a model with its
                weights; for a family of one's own whatever its `preprocess_checkpoint` takes.
            model_config: the family, and dimensions that the checkpoint does not tell; None: all of it from there.
            inference_config: None: `InferenceConfig` with the checkpoint's views and chunk.
            allow_pickle: read `.pkl` files, which can run any code that they contain.

        Raises:
            CheckpointError, ConfigError, TargetError: with what was expected, what was found, what to do.
        """
        self.model, opened = open_model(checkpoint, model_config, allow_pickle=allow_pickle)
        self.model_config = c = self.model.config
        config = inference_config or InferenceConfig(num_views=c.num_views, chunk_size=c.chunk_size)
        fixed = opened.fixed_prompt if opened else None
        if fixed:
            config = replace(config, max_tokenize_len=fixed)
        self.inference_config = config
        self.tokenizer: Encoder | None = FixedPrompt(fixed) if fixed else find_tokenizer(config, opened)
        self.preprocessor: Callable[[Any], Any] | None = None
        self._prompt_format = config.prompt_format or find_prompt_format(c, opened)
        self._towers = find_towers(c, opened)
        self._no_state = why_no_state(config, self._prompt_format)
        self._warned = False
        self._types: dict[tuple[int, int], dict[str, Type]] = {}
        self._warm: set[int] = set()
        self._lock = threading.Lock()  # a captured graph has one set of buffers
        self.backend = create_backend(self.model, config)
        self.weights = weights_for(self.model, config) if self.backend.reads_weights else {}
        self._steps = config.signature(c).steps
        if torch.device(config.device).type == "cuda":
            self.warm()

    @property
    def action_shape(self) -> tuple[int, int]:
        """(chunk, action_dim) of one prediction."""
        return self.inference_config.chunk_size, self.model_config.action_dim

    def predict(
        self,
        observation_images: Any,
        task_prompt: str | Sequence[int] | NDArray[Any] | Tensor | None = None,
        state_tokens: Any = None,
        noise: Any = None,
        state: Any = None,
        *,
        seed: int = 0,
    ) -> Actions:
        """The actions for one observation: float32 [chunk, action_dim], as the network makes them (normalised).

        Args:
            observation_images: RGB, numpy or torch on any device: [views, size, size, 3], uint8 in 0..255 or float
                in [-1, 1]; or a list with one such picture [size, size, 3] per view, None for an absent camera.
            task_prompt: the instruction; or token ids, used as they are; None where the file has a fixed prompt.
            state_tokens: bins of the normalised state, integers from -1 to 255 [n], written into π0.5's prompt.
            noise: what the flow starts from, [chunk, action_dim]; None: normal, drawn from `seed`.
            state: the normalised state [n]. A network that reads it (π0) gets it padded with zeros; else its bins
                go into the prompt in place of `state_tokens`.
            seed: of the noise. The same seed gives the same noise at every call, so vary it to vary the actions.

        Without a state, π0.5's prompt is written without one, as openpi's `discrete_state_input=False` does; a
        warning says so once, unless the configuration says the same.

        Raises:
            InputError: naming the argument, what was expected, what was found, what to do.
            ConfigError: the prompt is text and there is no tokenizer.
        """
        return self._act([self._episode(observation_images, task_prompt, state_tokens, noise, state, seed)])[0]

    def predict_batch(
        self,
        batch_images: Any,
        batch_prompts: Any = None,
        batch_state_tokens: Any = None,
        noise: Any = None,
        batch_states: Any = None,
        *,
        seed: int | Sequence[int] = 0,
    ) -> Actions:
        """The actions of several episodes: float32 [B, chunk, action_dim], each as `predict` gives it on its own.

        Every argument has one entry per episode, of the kind that `predict` takes; `batch_prompts` may be one
        string for all, `seed` one number for all. Equal to `predict` up to rounding: a batch runs other products.
        Up to `InferenceConfig.max_batch` episodes run at once, in a batch of the next power of two, which is
        compiled when it is first needed; more run in groups, of which, once all batches are warm, one is read while
        the one before runs. ONNX runs one episode at a time.

        Raises as `predict`, with the episode's number.
        """
        columns = batch_columns(batch_images, batch_prompts, batch_state_tokens, noise, batch_states, seed)
        return self.predict_columns(columns)

    def predict_columns(self, columns: Mapping[str, Sequence[Any]], first: int = 0) -> Actions:
        """`predict_batch` of checked columns (`batch_columns`); errors count the episodes from `first`."""
        rows = list(enumerate(zip(*columns.values(), strict=True), first))
        limit = self._limit()
        groups = [rows[i : i + limit] for i in range(0, len(rows), limit)]
        if not groups:
            return np.zeros((0, *self.action_shape), np.float32)
        if len(groups) == 1 or self.cold_batches(len(rows)):  # a graph that is yet to be captured wants the card alone
            episodes = [[self._numbered(*row) for row in group] for group in groups]
            return np.concatenate([self._act(group) for group in episodes])
        runner = ThreadPoolExecutor(1, thread_name_prefix="run")  # runs a group while the next one is read here
        try:
            acting = [runner.submit(self._act, [self._numbered(*row) for row in group]) for group in groups]
            return np.concatenate([future.result() for future in acting])
        finally:
            runner.shutdown(cancel_futures=True)

    def batch_sizes(self, count: int) -> set[int]:
        """The batches in which `predict_batch` runs so many episodes."""
        limit = self._limit()
        whole = {limit} if count >= limit else set()
        return whole | ({self._batch_of(count % limit)} if count % limit else set())

    def cold_batches(self, count: int) -> set[int]:
        """Of `batch_sizes`, those that `warm` has not run."""
        return self.batch_sizes(count) - self._warm

    def warm(self, *batches: int) -> None:
        """Compile and run once every prompt bucket, of batch 1 and of these batches, so that no later call waits.

        An engine on a GPU does so for batch 1 when it is made.
        """
        for batch in {1, *batches} - self._warm:
            for slots in self.inference_config.prompt_buckets:
                types = self._inputs(batch, slots)
                self._run({n: torch.ones(t.shape).to(TORCH_DTYPES[t.dtype]) for n, t in types.items()})
            self._warm.add(batch)

    def _limit(self) -> int:
        return self.inference_config.max_batch if self.backend.batches else 1

    def _batch_of(self, count: int) -> int:
        """The batch for so many episodes: the next power of two. Few batches need compiling."""
        return min(1 << (count - 1).bit_length(), self._limit())

    def _inputs(self, batch: int, slots: int) -> dict[str, Type]:
        if (batch, slots) not in self._types:
            self._types[batch, slots] = self.backend.inputs(batch, slots)
        return self._types[batch, slots]

    def _numbered(self, i: int, entries: Sequence[Any]) -> dict[str, Tensor]:
        """`_episode`; errors name its number."""
        try:
            return self._episode(*entries)
        except (InputError, ConfigError) as error:
            raise type(error)(f"episode {i}: {error}") from error

    def _episode(
        self, images: Any, prompt: Any, state_tokens: Any, noise: Any, state: Any, seed: Any
    ) -> dict[str, Tensor]:
        """One episode as checked inputs of batch 1, in the smallest bucket that holds its prompt."""
        if self.preprocessor is not None:
            images = self.preprocessor(images)
        *_, slots = buckets = self.inference_config.prompt_buckets
        types = self._inputs(1, slots)
        given: dict[str, Tensor] = {}
        if self._towers:
            size = self.model_config.image_size
            shape = (self.inference_config.num_views, size, size, RGB)
            given["pixel_values"] = read_pixel_values(images, shape, self._towers)
        else:
            given["images"], given["image_mask"] = read_images(images, types["images"].shape[1:])
        if "image_mask" in given and "image_mask" not in types and not given["image_mask"].all():
            raise InputError("observation_images: this policy cannot do without a camera, found None among the views")
        vector = None if state is None else as_floats(state, "state", ndim=1)
        if "state" in types:
            given["state"] = network_state(vector, self.model_config.state_dim)
            vector = None
        bins = read_bins(state_tokens, vector, self._no_state)
        if "tokens" in types:
            ids = self._ids(prompt, bins)
            if not 1 <= len(ids) <= slots:
                raise InputError(
                    f"task_prompt: expected 1 to {slots} tokens, found {len(ids)}; shorten the instruction, "
                    f"or make the engine with a larger max_tokenize_len"
                )
            given["tokens"] = torch.tensor([ids], dtype=torch.int64)
            slots = next(n for n in buckets if n >= len(ids))
        elif prompt is not None:
            raise InputError(f"task_prompt: this policy reads no prompt, found {prompt!r}; leave it out")
        if "noise" in types:
            given["noise"] = read_noise(noise, seed, self.action_shape)
        elif noise is not None:
            raise InputError("noise: this policy draws none; leave it out")
        types = self._inputs(1, slots)
        return check_inputs(types, {n: x for n, x in given.items() if n in types}, self.model_config.vocab_size)

    def _ids(self, prompt: Any, bins: NDArray[np.int64] | None) -> list[int]:
        """Token ids of a prompt."""
        if isinstance(self.tokenizer, FixedPrompt):
            if prompt is not None or bins is not None:
                raise InputError(
                    f"task_prompt: this file holds the embeddings of one prompt, of {self.tokenizer.length} tokens, "
                    f"and knows no other; found {prompt!r}. Leave it and the state out, or convert the original again"
                )
            return self.tokenizer.encode("")
        if isinstance(prompt, str):
            if self._prompt_format is None:
                raise ConfigError(
                    f"task_prompt: how {family_name(self.model_config)!r} writes a prompt is not known; set "
                    "InferenceConfig.prompt_format, or give token ids"
                )
            if bins is None and self._no_state is None and not self._warned:
                self._warned = True
                warnings.warn(
                    "no state given: the prompt is written without it. Pass state_tokens= or state=, or make the "
                    "engine with discrete_state_input=False where this is meant",
                    stacklevel=4,
                )
            return prompt_ids(self._tokenizer(), prompt, format=self._prompt_format, bins=bins)
        ids = read_ids(prompt)
        if bins is not None:
            raise InputError("state_tokens: token ids are a whole prompt, into which no state can be written")
        return ids

    def _tokenizer(self) -> Encoder:
        if self.tokenizer is None:
            raise ConfigError(
                "tokenizer: the prompt is text, and no tokenizer was named or found beside the checkpoint; pass "
                "tokenizer_path= (the sentencepiece model of the checkpoint's language model, or its directory; of "
                "π0 and π0.5 google/paligemma-3b-pt-224)"
            )
        return self.tokenizer

    def _act(self, episodes: Sequence[Mapping[str, Tensor]]) -> Actions:
        """Run episodes as one batch, filled up with the last one."""
        count = len(episodes)
        filled = [*episodes, *[episodes[-1]] * (self._batch_of(count) - count)]
        slots = max((e["tokens"].shape[1] for e in filled if "tokens" in e), default=0)
        inputs = {}
        for name, one in filled[0].items():
            rows = [e[name].to(one.device) for e in filled]
            rows = [_padded(x, slots) for x in rows] if name in ("tokens", "token_mask") else rows
            inputs[name] = join(rows)
        return self._run(inputs)[:count]

    def _run(self, inputs: Mapping[str, Tensor]) -> Actions:
        if self.backend.reads_weights:  # a backend written by hand finds its inputs where its weights are
            inputs = {n: x.to(self.inference_config.device) for n, x in inputs.items()}
        with self._lock, torch.no_grad():  # not inference mode: what is compiled in here may be called from outside
            actions = self.backend.run(inputs, self.weights, self._steps)
            expected = (inputs["noise"].shape[0], *self.action_shape) if "noise" in inputs else tuple(actions.shape)
            if tuple(actions.shape) != expected:
                raise InputError(
                    f"backend {self.inference_config.backend_name!r}: expected actions of shape {expected}, "
                    f"found {tuple(actions.shape)}"
                )
            return np.asarray(actions.float().cpu().numpy())


def _padded(x: Tensor, slots: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, slots - x.shape[1]), value=PAD_ID)


# ---- ways in ---------------------------------------------------------------------------------------


def create_inference(
    model_type: VLAModelType | str,
    checkpoint_path: Source,
    num_views: int | None = None,
    chunk_size: int | None = None,
    backend: BackendType | str = BackendType.TRITON,
    tokenizer_path: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cuda",
    devices: Sequence[str | torch.device] | None = None,
    model_config: ModelConfig | None = None,
    allow_pickle: bool = False,
    **options: Any,
) -> VLAInferenceEngine | ReplicatedEngine:
    """An engine for a checkpoint of a family; with `devices`, one replica on each, fed in parallel.

    Args:
        model_type: a `VLAModelType` or the name of a registered family.
        checkpoint_path: as of `VLAInferenceEngine`.
        num_views, chunk_size: None: those of the checkpoint.
        backend, tokenizer_path, device: as of `InferenceConfig`.
        devices: as `["cuda:0", "cuda:1"]`, in place of `device`.
        model_config: dimensions that the checkpoint does not tell; needed for a family of one's own.
        options: further fields of `InferenceConfig`: dtype, max_tokenize_len, discrete_state_input, ...

    Raises:
        ConfigError: an unregistered family, a checkpoint of another one, an unknown option or backend, no device.
        CheckpointError, TargetError: with what was expected, what was found, what to do.
    """
    name = model_type.value if isinstance(model_type, VLAModelType) else model_type
    if name not in MODELS:
        raise ConfigError(f"model family {name!r} is not registered; there are {', '.join(sorted(MODELS))}")
    known = {f.name for f in fields(InferenceConfig)}
    if unknown := sorted(set(options) - known):
        raise ConfigError(f"InferenceConfig has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    kind = next((t for t in VLAModelType if t.value == name), name)
    config = (model_config or ModelConfig()).with_(model_type=kind)
    model, opened = open_model(checkpoint_path, config, allow_pickle=allow_pickle)
    if name in (VLAModelType.PI0.value, VLAModelType.OPENVLA.value):
        options.setdefault("max_tokenize_len", model.config.max_token_len)  # 48, its training's; 64
    chosen = InferenceConfig(
        num_views=num_views or model.config.num_views,
        chunk_size=chunk_size or model.config.chunk_size,
        backend=backend,
        tokenizer_path=tokenizer_path,
        device=device,
        **options,
    )
    if devices is None:
        return VLAInferenceEngine(opened or model, model.config, chosen)
    from cortexflow.replicas import ReplicatedEngine

    return ReplicatedEngine(opened or model, model.config, chosen, devices=devices)


def create_pi05_inference(
    checkpoint_path: Source,
    num_views: int | None = None,
    chunk_size: int | None = None,
    backend: BackendType | str = BackendType.TRITON,
    tokenizer_path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> VLAInferenceEngine | ReplicatedEngine:
    """An engine for a π0.5 checkpoint; arguments and errors as of `create_inference`."""
    return create_inference(
        VLAModelType.PI05, checkpoint_path, num_views, chunk_size, backend, tokenizer_path, **options
    )


def create_pi0_inference(
    checkpoint_path: Source,
    num_views: int | None = None,
    chunk_size: int | None = None,
    backend: BackendType | str = BackendType.TRITON,
    tokenizer_path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> VLAInferenceEngine | ReplicatedEngine:
    """An engine for a π0 checkpoint; arguments and errors as of `create_inference`.

    `predict` then needs `state=`, the normalised state, which this network reads. Prompts have 48 slots unless
    `max_tokenize_len` says otherwise.
    """
    return create_inference(
        VLAModelType.PI0, checkpoint_path, num_views, chunk_size, backend, tokenizer_path, **options
    )


def create_openvla_inference(
    checkpoint_path: Source,
    num_views: int | None = None,
    chunk_size: int | None = None,
    backend: BackendType | str = BackendType.TRITON,
    tokenizer_path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> VLAInferenceEngine | ReplicatedEngine:
    """An engine for an OpenVLA checkpoint; arguments and errors as of `create_inference`.

    It sees one picture and answers with one action: `predict` returns [1, action_dim], normalised, the middles of the
    bins that the tokens name. Where the network ended its answer early, what stands behind the end is the lowest bin;
    `Policy` refuses such an answer. Prompts have 64 slots unless `max_tokenize_len` says otherwise. Token ids in place
    of text are a whole prompt, the 29871 that ends it included.
    """
    return create_inference(
        VLAModelType.OPENVLA, checkpoint_path, num_views, chunk_size, backend, tokenizer_path, **options
    )
