"""`VLAInferenceEngine`: a checkpoint and a configuration become `predict(images, prompt)`.

The engine owns the model, its weights, the backend and the tokenizer, and checks everything at its door. It
speaks the network's language: images of the network's size, a normalised state, normalised actions. What
stands between that and a robot's own units is `cortexflow.processing`'s.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexflow.backends import create_backend
from cortexflow.checkpoints import Checkpoint, count_nonfinite, open_checkpoint
from cortexflow.compiler import load_model
from cortexflow.configuration import BackendType, InferenceConfig
from cortexflow.errors import CheckpointError, ConfigError, InputError
from cortexflow.inputs import check_inputs
from cortexflow.ir import Type
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.models import MODELS, ModelConfig, VLAModel, VLAModelType, create_model
from cortexflow.observation import FixedPrompt, directory
from cortexflow.processing import load_tokenizer, pad_to, state_bins
from cortexflow.processing.arrays import as_floats, to_numpy
from cortexflow.processing.prompts import Encoder, as_bins, prompt_format, prompt_pieces
from cortexflow.processing.tokenizer import FILE_NAMES, PAD_ID

if TYPE_CHECKING:
    from cortexflow.replicas import ReplicatedEngine

Actions = NDArray[np.float32]
Source = str | os.PathLike[str] | Mapping[str, Any] | Checkpoint | VLAModel

# How a family writes its prompt; a checkpoint that LeRobot saved may differ. Others say it in `prompt_format`.
PROMPTS = {"pi0": "pi0", "pi05": "pi05"}
LEROBOT_PROMPTS = {"pi0": "pi0_lerobot", "pi05": "pi05"}


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
        self.tokenizer: Encoder | None = FixedPrompt(fixed) if fixed else _find_tokenizer(config, opened)
        self.preprocessor: Callable[[Any], Any] | None = None
        formats = LEROBOT_PROMPTS if opened and opened.format == "lerobot" else PROMPTS
        self._prompt_format = config.prompt_format or formats.get(family_name(c))
        self._state_in_prompt = bool(
            config.discrete_state_input and self._prompt_format and prompt_format(self._prompt_format).with_state
        )
        self._warned = False
        self._types: dict[tuple[int, int], dict[str, Type]] = {}
        self._warm: set[int] = set()
        self._lock = threading.Lock()  # a captured graph has one set of buffers
        self.backend = create_backend(self.model, config)
        self.weights = _weights_for(self.model, config) if self.backend.reads_weights else {}
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
        compiled when it is first needed; more run in groups. ONNX runs one episode at a time.

        Raises as `predict`, with the episode's number.
        """
        columns = batch_columns(batch_images, batch_prompts, batch_state_tokens, noise, batch_states, seed)
        return self.predict_columns(columns)

    def predict_columns(self, columns: Mapping[str, Sequence[Any]], first: int = 0) -> Actions:
        """`predict_batch` of checked columns (`batch_columns`); errors count the episodes from `first`."""
        episodes = []
        for i, entries in enumerate(zip(*columns.values(), strict=True), first):
            try:
                episodes.append(self._episode(*entries))
            except (InputError, ConfigError) as error:
                raise type(error)(f"episode {i}: {error}") from error
        if not episodes:
            return np.zeros((0, *self.action_shape), np.float32)
        limit = self._limit()
        return np.concatenate([self._act(episodes[i : i + limit]) for i in range(0, len(episodes), limit)])

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

    # ---- one episode at the door -------------------------------------------------------------------

    def _episode(
        self, images: Any, prompt: Any, state_tokens: Any, noise: Any, state: Any, seed: Any
    ) -> dict[str, Tensor]:
        """One episode as checked inputs of batch 1, in the smallest bucket that holds its prompt."""
        if self.preprocessor is not None:
            images = self.preprocessor(images)
        *_, slots = buckets = self.inference_config.prompt_buckets
        types = self._inputs(1, slots)
        given: dict[str, Tensor] = {}
        given["images"], given["image_mask"] = _images(images, types["images"].shape[1:])
        if "image_mask" not in types and not given["image_mask"].all():
            raise InputError("observation_images: this policy cannot do without a camera, found None among the views")
        vector = None if state is None else as_floats(state, "state", ndim=1)
        if "state" in types:
            given["state"] = _network_state(vector, self.model_config.state_dim)
            vector = None
        bins = self._bins(state_tokens, vector)
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
            given["noise"] = self._noise(noise, seed)
        elif noise is not None:
            raise InputError("noise: this policy draws none; leave it out")
        types = self._inputs(1, slots)
        return check_inputs(types, {n: x for n, x in given.items() if n in types}, self.model_config.vocab_size)

    def _bins(self, state_tokens: Any, vector: NDArray[np.float64] | None) -> NDArray[np.int64] | None:
        """The discretised state that goes into the prompt."""
        if vector is None and state_tokens is None:
            return None
        which = "state_tokens" if state_tokens is not None else "state"
        if state_tokens is not None and vector is not None:
            raise InputError("state_tokens: expected these or state, found both; they say the same")
        if not self._state_in_prompt:
            off = self.inference_config.discrete_state_input
            why = (
                f"the prompt format {self._prompt_format!r} has no place for it"
                if off
                else "discrete_state_input=False"
            )
            raise InputError(f"{which}: expected None ({why}), found a state; leave it out")
        return as_bins(state_tokens) if vector is None else state_bins(vector)

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
            if bins is None and self._state_in_prompt and not self._warned:
                self._warned = True
                warnings.warn(
                    "no state given: the prompt is written without it. Pass state_tokens= or state=, or make the "
                    "engine with discrete_state_input=False where this is meant",
                    stacklevel=4,
                )
            pieces = prompt_pieces(prompt, format=self._prompt_format, bins=bins)
            tokenizer = self._tokenizer()
            return [i for n, piece in enumerate(pieces) for i in tokenizer.encode(piece, bos=n == 0)]
        if prompt is None:
            raise InputError("task_prompt: expected the instruction, found None")
        try:
            ids = to_numpy(prompt)
        except (TypeError, ValueError) as error:
            raise InputError(f"task_prompt: expected text or token ids, found {type(prompt).__name__}") from error
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(
                f"task_prompt: expected text or token ids [n], found {type(prompt).__name__} of dtype {ids.dtype} and "
                f"shape {ids.shape}"
            )
        if bins is not None:
            raise InputError("state_tokens: token ids are a whole prompt, into which no state can be written")
        return [int(i) for i in ids]

    def _tokenizer(self) -> Encoder:
        if self.tokenizer is None:
            raise ConfigError(
                "tokenizer: the prompt is text, and no tokenizer was named or found beside the checkpoint; pass "
                "tokenizer_path= (the sentencepiece model of google/paligemma-3b-pt-224, or its directory)"
            )
        return self.tokenizer

    def _noise(self, noise: Any, seed: Any) -> Tensor:
        """Noise [1, chunk, action_dim], given or drawn."""
        if noise is None:
            if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not -(1 << 63) <= seed < 1 << 63:
                raise InputError(f"seed: expected an integer of 64 bits, found {seed!r}")
            generator = torch.Generator().manual_seed(int(seed))
            return torch.randn((1, *self.action_shape), generator=generator)
        if isinstance(noise, Tensor):
            x = noise.detach()
        else:
            try:
                array = to_numpy(noise)
            except (TypeError, ValueError) as error:
                raise InputError(f"noise: expected shape {self.action_shape}, found {type(noise).__name__}") from error
            if array.dtype.kind != "f":
                raise InputError(f"noise: expected float numbers, found {array.dtype}")
            x = torch.from_numpy(np.array(array, np.float32))
        if tuple(x.shape) != self.action_shape:
            raise InputError(f"noise: expected shape {self.action_shape}, found {tuple(x.shape)}")
        return x[None]

    # ---- a group of episodes on the backend ----------------------------------------------------------

    def _act(self, episodes: Sequence[Mapping[str, Tensor]]) -> Actions:
        """Run episodes as one batch, filled up with the last one."""
        count = len(episodes)
        filled = [*episodes, *[episodes[-1]] * (self._batch_of(count) - count)]
        slots = max((e["tokens"].shape[1] for e in filled if "tokens" in e), default=0)
        inputs = {}
        for name, one in filled[0].items():
            rows = [e[name].to(one.device) for e in filled]
            inputs[name] = torch.cat([_padded(x, slots) for x in rows] if name in ("tokens", "token_mask") else rows)
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


def batch_columns(
    images: Any, prompts: Any, state_tokens: Any, noise: Any, states: Any, seed: Any
) -> dict[str, Sequence[Any]]:
    """The arguments of `predict_batch` with one entry per episode each, in the order of `predict`'s.

    Raises `InputError` for one that has another number of entries than `images`.
    """
    count = _length(images, "batch_images", "[B, views, size, size, 3]")
    columns = {
        "batch_images": images,
        "batch_prompts": [prompts] * count if prompts is None or isinstance(prompts, str) else prompts,
        "batch_state_tokens": [None] * count if state_tokens is None else state_tokens,
        "noise": [None] * count if noise is None else noise,
        "batch_states": [None] * count if states is None else states,
        "seed": [seed] * count if isinstance(seed, (int, np.integer)) else seed,
    }
    for name, column in columns.items():
        if (found := _length(column, name, "one entry per episode")) != count:
            raise InputError(f"{name}: expected {count} entries, one for each episode, found {found}")
    return columns


def _length(column: Any, name: str, what: str) -> int:
    is_array = isinstance(column, (Tensor, np.ndarray)) and column.ndim > 0
    if not is_array and (not isinstance(column, Sequence) or isinstance(column, (str, bytes))):
        raise InputError(f"{name}: expected {what}, found {type(column).__name__}")
    return len(column)


def _network_state(vector: NDArray[np.float64] | None, size: int) -> Tensor:
    """A normalised state [1, size], padded with zeros."""
    if vector is None:
        raise InputError(
            f"state: expected the normalised state of up to {size} values, found None; this network reads it"
        )
    return torch.from_numpy(pad_to(vector, size, "state").astype(np.float32))[None]


def _images(images: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Images of one episode as (float32 [1, views, size, size, 3] in [-1, 1], bool [1, views])."""
    views, size = shape[0], shape[1]
    expected = f"observation_images: expected {views} views of {size} x {size} RGB pixels, shape {shape}"
    if isinstance(images, (Tensor, np.ndarray)):
        if tuple(images.shape) != shape:
            raise InputError(f"{expected}, found shape {tuple(images.shape)}{_hint(tuple(images.shape), shape)}")
        return _unit(images, "observation_images")[None], torch.ones((1, views), dtype=torch.bool)
    if not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
        raise InputError(f"{expected}, or a list of {views} pictures, found {type(images).__name__}")
    if len(images) != views:
        raise InputError(f"{expected}, found a list of {len(images)}; write None for an absent camera")
    if all(picture is None for picture in images):
        raise InputError(f"observation_images: all {views} views are None; give the picture of at least one camera")
    pictures = []
    for i, picture in enumerate(images):
        if picture is None:
            pictures.append(torch.full(shape[1:], -1.0))
            continue
        if not isinstance(picture, (Tensor, np.ndarray)) or tuple(picture.shape) != shape[1:]:
            found = tuple(picture.shape) if hasattr(picture, "shape") else type(picture).__name__
            hint = _hint((views, *found), shape) if isinstance(found, tuple) else ""
            raise InputError(f"observation_images[{i}]: expected a picture {shape[1:]}, found {found}{hint}")
        pictures.append(_unit(picture, f"observation_images[{i}]"))
    mask = torch.tensor([[picture is not None for picture in images]])
    place = next(x.device for x, there in zip(pictures, mask[0].tolist(), strict=True) if there)
    return torch.stack([x.to(place) for x in pictures])[None], mask


def _unit(picture: Tensor | NDArray[Any], name: str) -> Tensor:
    """8-bit pixels as `x / 255 * 2 - 1`; float pixels as float32 (their range is checked with the other inputs)."""
    if isinstance(picture, np.ndarray):
        if picture.dtype.kind not in "fu" or (picture.dtype.kind == "u" and picture.dtype != np.uint8):
            raise _wrong_dtype(name, picture.dtype)
        # A copy: torch reads neither negative strides nor what is read-only.
        picture = torch.from_numpy(np.array(picture, np.uint8 if picture.dtype == np.uint8 else np.float32))
    if picture.dtype == torch.uint8:
        return picture.to(torch.float32) / 255 * 2 - 1
    if not picture.is_floating_point():
        raise _wrong_dtype(name, picture.dtype)
    return picture.detach().to(torch.float32)


def _wrong_dtype(name: str, dtype: Any) -> InputError:
    return InputError(
        f"{name}: expected uint8 in 0..255 or float in [-1, 1], found {dtype}; 8-bit pixels in another type: "
        "images.astype(np.uint8) (torch: images.to(torch.uint8))"
    )


def _hint(found: tuple[int, ...], shape: tuple[int, ...]) -> str:
    if len(found) == 5:
        return "; several episodes go to predict_batch"
    if len(found) == 3:
        return "; one picture is images[None]"
    if len(found) == 4 and found[1] == 3 != found[3]:
        return "; this is channels first: images.transpose(0, 2, 3, 1) (torch: images.permute(0, 2, 3, 1))"
    if len(found) == 4 and found[3] == 4:
        return "; drop the alpha channel with images[..., :3]"
    if len(found) == 4 and found[1:] == shape[1:]:
        return f"; make the engine with num_views={found[0]}, or write None for an absent camera"
    if len(found) == 4 and found[3] == 3:
        return "; resize them (cortexflow.processing.resize_with_pad, for example in engine.preprocessor)"
    return ""


# ---- from a checkpoint to a model ------------------------------------------------------------------


def family_name(config: ModelConfig) -> str:
    """The name of a configuration's family."""
    kind = config.model_type
    return kind.value if isinstance(kind, VLAModelType) else kind


def open_model(
    source: Source, config: ModelConfig | None = None, *, allow_pickle: bool = False
) -> tuple[VLAModel, Checkpoint | None]:
    """The model of a checkpoint with its weights, read when asked for: (the model, the opened checkpoint).

    `config` says the family, and by fields that are not the defaults what the checkpoint does not tell. A family
    that no checkpoint format tells is read by its own `preprocess_checkpoint`: then there is no `Checkpoint`.
    Raises CheckpointError, ConfigError.
    """
    if isinstance(source, VLAModel):
        if source.weights is None:
            raise ConfigError(f"{type(source).__name__} has no weights: give the engine its checkpoint")
        return source, None
    told = {kind.value for kind in (VLAModelType.PI0, VLAModelType.PI05)}  # by the checkpoint's tensors
    if config is not None and family_name(config) not in told and not isinstance(source, Checkpoint):
        model = create_model(config)
        tensors = model.preprocess_checkpoint(source)
        _check_tensors(tensors, model.get_weight_shapes())
        model.weights = tensors
        return model, None
    if isinstance(source, Checkpoint):
        opened = source
    else:
        said = {} if config is None else _said(config)
        place = source if isinstance(source, Mapping) else Path(source)
        opened = open_checkpoint(place, config_overrides=said, allow_pickle=allow_pickle)
    if config is not None and opened.family.value != family_name(config):
        found = opened.family.value
        raise ConfigError(
            f"expected a checkpoint of {family_name(config)}, found one of {found} "
            f"({opened.path or 'the dictionary'}); use create_{found}_inference"
        )
    model, _ = load_model(opened)
    return model, opened


def _said(config: ModelConfig) -> dict[str, Any]:
    """The fields in which a configuration differs from the defaults, but for the family."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    return {name: value for name, value in values.items() if name != "model_type"}


def _check_tensors(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `CheckpointError` for tensors that are missing, misshapen or not finite."""
    if missing := [n for n in shapes if n not in tensors]:
        raise CheckpointError(f"{len(missing)} of {len(shapes)} tensors are missing: {', '.join(missing[:5])}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise CheckpointError(f"{name}: expected shape {tuple(shape)}, found {tuple(tensors[name].shape)}")
        nan, inf = count_nonfinite(tensors[name])
        if nan or inf:
            raise CheckpointError(f"{name}: expected finite weights, found {nan} NaN and {inf} infinite")


def _weights_for(model: VLAModel, config: InferenceConfig) -> dict[str, Tensor]:
    """Every tensor of the model on the device; floats in the configuration's dtype."""
    found = {}
    for name in model.get_weight_shapes():
        x = (model.weights or {})[name].to(config.device)
        found[name] = x.to(TORCH_DTYPES[config.precision]) if x.is_floating_point() else x
    return found


def _find_tokenizer(config: InferenceConfig, opened: Checkpoint | None) -> Encoder | None:
    """The tokenizer that was named, or the one beside the checkpoint, or none: text is then refused."""
    if config.tokenizer_path is not None:
        return load_tokenizer(os.fspath(config.tokenizer_path))
    if opened is None or opened.path is None:
        return None
    beside = directory(opened)
    there = any((beside / name).is_file() for name in FILE_NAMES)  # one that is there and damaged is an error
    return load_tokenizer(beside) if there else None


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
    if name == VLAModelType.PI0.value:
        options.setdefault("max_tokenize_len", model.config.max_token_len)  # 48: its training's
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
