"""Backends by name: what runs the three stages of a policy. The built-in ones are the compiler's targets.

A backend of one's own implements the three methods of `ComputeBackend` and registers under a name:

    @register_backend("mine")
    class Mine(ComputeBackend):
        def vision_encoder(self, inputs, weights): ...

A target of one's own (`cortexflow.codegen.register_target`) needs no class here: its name is a backend's too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from cortexflow.codegen import Target, find_target
from cortexflow.codegen.target import TARGETS
from cortexflow.compiled import Compiled, with_index
from cortexflow.compiler import Shared, build_one
from cortexflow.configuration import BackendType, InferenceConfig
from cortexflow.errors import ConfigError, InputError
from cortexflow.ir import Type
from cortexflow.models import VLAModel

Stage = Tensor | Mapping[str, Tensor]

STAGES = ("vision_encoder", "transformer_encoder", "transformer_decoder")


class ComputeBackend:
    """Runs a policy in three stages: images → visual tokens; with the prompt → a latent; with noise → actions.

    Each method takes `inputs`, by name everything known so far: the inputs of the policy (`inputs()`), and what
    earlier stages returned. A stage that returns a mapping hands on its tensors under their names, one that
    returns a bare tensor hands it on under the stage's name. `weights` are the checkpoint's tensors by the names
    of `VLAModel.get_weight_shapes`, on the engine's device, in its dtype.

    Attributes:
        reads_weights: False for a backend that keeps its own; it is given none.
        batches: False for one that runs a single episode at a time; `predict_batch` then calls it for each.
    """

    reads_weights: ClassVar[bool] = True
    batches: bool = True

    def __init__(self, model: VLAModel, config: InferenceConfig) -> None:
        self.model = model
        self.config = config

    def vision_encoder(self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Stage:
        """Visual tokens [batch, tokens, width] of `inputs["images"]`, float32 [batch, views, size, size, 3]."""
        raise NotImplementedError(f"{type(self).__name__} must implement vision_encoder(inputs, weights)")

    def transformer_encoder(self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Stage:
        """The latent (where a decoder reads keys and values of each layer: those) of visual tokens and prompt."""
        raise NotImplementedError(f"{type(self).__name__} must implement transformer_encoder(inputs, weights)")

    def transformer_decoder(self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor], num_steps: int) -> Stage:
        """Actions [batch, chunk, action_dim] from `inputs["noise"]` of that shape in `num_steps` steps."""
        raise NotImplementedError(
            f"{type(self).__name__} must implement transformer_decoder(inputs, weights, num_steps)"
        )

    def inputs(self, batch: int, slots: int) -> dict[str, Type]:
        """What `run` takes, by name, for a batch and a prompt bucket."""
        c, signature = self.model.config, self.config.signature(self.model.config, batch, slots)
        views, size, chunk = signature.views, c.image_size, signature.chunk
        types = {
            "images": Type("f32", (batch, views, size, size, 3)),
            "image_mask": Type("bool", (batch, views)),
            "tokens": Type("i32", (batch, slots)),
            "token_mask": Type("bool", (batch, slots)),
            "state": Type("f32", (batch, c.state_dim)),
            "noise": Type("f32", (batch, chunk, c.action_dim)),
        }
        if "state" not in self.model.get_buffer_shapes(views, chunk):
            del types["state"]
        return types

    def run(self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor], num_steps: int) -> Tensor:
        """Actions [batch, chunk, action_dim] of checked inputs: the three stages, one after the other."""
        values = dict(inputs)
        values |= _named("vision_encoder", self.vision_encoder(values, weights))
        values |= _named("transformer_encoder", self.transformer_encoder(values, weights))
        result = self.transformer_decoder(values, weights, num_steps)
        return result["actions"] if isinstance(result, Mapping) else result


def _named(stage: str, result: Stage) -> dict[str, Tensor]:
    return dict(result) if isinstance(result, Mapping) else {stage: result}


class CompiledBackend(ComputeBackend):
    """A compiler target as a backend. Weights are prepared when it is built, so the methods take and ignore `weights`.

    Batch 1 is compiled for every prompt bucket at once, a larger batch when it is first asked for. A target that
    shares weights between builds (Triton, PyTorch) compiles it over the weights that are there; one that does not
    (ONNX) runs episodes one at a time.
    """

    reads_weights = False

    def __init__(self, target: str, model: VLAModel, config: InferenceConfig) -> None:
        super().__init__(model, config)
        self.device = check_device(config)
        self._target: Target = find_target(target)
        self.batches = "forms" in self._target.options
        self._made: dict[tuple[int, int], Compiled] = {}
        self._forms: dict[str, dict[Any, Tensor]] = {}  # by fingerprint: what a build made of a weight, for the next
        self._lock = threading.RLock()
        if model.weights is None:
            raise ConfigError(f"{type(model).__name__} has no weights: give the engine a checkpoint")
        known: dict[str, Tensor] = {}
        for slots in config.prompt_buckets:
            self._made[1, slots] = self._build(1, slots, known)

    def compiled(self, batch: int = 1, slots: int | None = None) -> Compiled:
        """The policy compiled for a batch and a prompt bucket (None: the largest); compiles it if need be."""
        key = (batch, slots or self.config.prompt_buckets[-1])
        with self._lock:
            if key not in self._made:
                self._made[key] = self._build(*key, {})
            return self._made[key]

    def inputs(self, batch: int, slots: int) -> dict[str, Type]:
        """What `run` takes, by name, for a batch and a prompt bucket."""
        return self.compiled(batch, slots).inputs

    def run(self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor], num_steps: int) -> Tensor:
        """Actions [batch, chunk, action_dim], all stages at once; one by one where a subclass has its own of them."""
        self._same_steps(num_steps)
        if any(getattr(type(self), name) is not getattr(CompiledBackend, name) for name in STAGES):
            return super().run(inputs, weights, num_steps)
        results = self._find(inputs).run(inputs)
        return results["actions"] if "actions" in results else next(iter(results.values()))

    def vision_encoder(self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Stage:
        """The stage of this name on its own; its tensors by name where it has several."""
        return self._stage("vision_encoder", inputs)

    def transformer_encoder(self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Stage:
        """The stage of this name on its own; its tensors by name where it has several."""
        return self._stage("transformer_encoder", inputs)

    def transformer_decoder(self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor], num_steps: int) -> Stage:
        """The stage of this name on its own; `num_steps` must be those compiled."""
        self._same_steps(num_steps)
        return self._stage("transformer_decoder", inputs)

    def _stage(self, name: str, inputs: Mapping[str, Tensor]) -> Stage:
        compiled = self._find(inputs)
        values = dict(inputs)
        for earlier in STAGES[: STAGES.index(name)]:  # a bare tensor goes by its stage's name
            (first, *others) = compiled.module.funcs[earlier].results
            if earlier in inputs and not others:
                values.setdefault(first, inputs[earlier])
        if missing := [n for n in compiled.module.funcs[name].args if n not in values]:
            raise InputError(f"{name}: missing {', '.join(missing)}; run the stages before it first")
        results = compiled.run_stage(name, values)
        return next(iter(results.values())) if len(results) == 1 else results

    def _find(self, inputs: Mapping[str, Tensor]) -> Compiled:
        """The compiled policy of the inputs' shapes; a batch is compiled if it is new."""
        made = next((c for c in self._made.values() if _fits(c, inputs)), None)
        (first, *_) = next(iter(self._made.values())).module.stages
        if made is None and {*first.args, "tokens"} <= inputs.keys():
            made = self.compiled(*inputs["tokens"].shape)
        if made is None or not _fits(made, inputs):
            known = "; ".join(f"batch {b}, prompt {n}" for b, n in self._made)
            shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in inputs.items())
            raise InputError(f"inputs: expected the shapes of one signature ({known}), found {shapes}")
        return made

    def _same_steps(self, num_steps: int) -> None:
        compiled = self.config.signature(self.model.config).steps
        if num_steps != compiled:
            raise ConfigError(
                f"num_steps: expected {compiled}, for which this backend is compiled, found {num_steps}; "
                "set InferenceConfig.num_steps"
            )

    def _build(self, batch: int, slots: int, known: dict[str, Tensor]) -> Compiled:
        """One signature, over the weights that earlier ones left in `_forms` (and, prepared, in `known`)."""
        c, target = self.config, self._target
        off = frozenset() if c.use_cuda_graphs else frozenset({"cuda_graph"} & target.switches.keys())
        return build_one(
            self.model,
            c.signature(self.model.config, batch, slots),
            target,
            self.model.weights or {},
            self.device,
            dtype=c.dtype,
            without=off,
            tune=c.tune,
            progress=c.progress,
            shared=Shared(known, self._forms),
        )


def _fits(compiled: Compiled, inputs: Mapping[str, Tensor]) -> bool:
    return all(tuple(inputs[n].shape) == t.shape for n, t in compiled.inputs.items() if n in inputs)


# ---- the registry ----------------------------------------------------------------------------------

Factory = Callable[[VLAModel, InferenceConfig], ComputeBackend]

# The target that each built-in backend is; one that nobody registered is an error that names the others.
BUILT_IN = {
    BackendType.TRITON.value: "triton",
    BackendType.PYTORCH.value: "torch",
    BackendType.CUDA.value: "cuda",
    BackendType.ONNX.value: "onnx",
}
BACKENDS: dict[str, Factory] = {}


def register_backend(name: str, factory: Factory | None = None) -> Any:
    """Make a backend known by its name, in place of one of that name; a class decorator without `factory`.

    `factory(model, inference_config)` returns a `ComputeBackend`; a subclass is one. Raises `ConfigError`.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"register_backend: expected a name, as in register_backend('mine'), found {name!r}")
    if factory is None:
        return partial(register_backend, name)
    BACKENDS[name] = factory
    return factory


def backend_names() -> list[str]:
    """Every name that `InferenceConfig.backend` can have here."""
    built_in = [name for name, target in BUILT_IN.items() if target in TARGETS]
    return list(dict.fromkeys([*built_in, *(t for t in TARGETS if t not in BUILT_IN.values()), *BACKENDS]))


def create_backend(model: VLAModel, config: InferenceConfig) -> ComputeBackend:
    """The backend that the configuration names, built for the model.

    Raises `ConfigError` for an unknown backend, one that is not there in this version, a device that is not
    there or that the backend cannot use, naming the alternatives; never takes another one instead.
    """
    name = config.backend_name
    if name in BACKENDS:
        check_device(config)
        return BACKENDS[name](model, config)
    target = BUILT_IN.get(name, name)
    if target not in TARGETS:
        what = "is not part of this version" if name in BUILT_IN else "is unknown"
        raise ConfigError(f"backend {name!r} {what}; there are {', '.join(backend_names())}")
    return CompiledBackend(target, model, config)


ALTERNATIVES = "use backend=BackendType.PYTORCH or BackendType.ONNX with device='cpu' (ONNX there: dtype=torch.float32)"


def check_device(config: InferenceConfig) -> torch.device:
    """The device of a configuration, if it is there and its backend runs on it. Raises `ConfigError`."""
    name = config.backend_name
    try:
        device = torch.device(config.device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device: expected 'cpu', 'cuda' or 'cuda:N', found {config.device!r}") from None
    if device.type == "meta":
        raise ConfigError("device 'meta' holds no values: a policy cannot run there; use device='cpu'")
    if name in (BackendType.TRITON.value, BackendType.CUDA.value) and device.type != "cuda":
        raise ConfigError(
            f"backend {name!r} runs on an NVIDIA GPU, found device={str(config.device)!r}; "
            f"use device='cuda', or {ALTERNATIVES}"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"backend {name!r} on device {str(config.device)!r}: PyTorch finds no CUDA GPU on this machine; "
            f"{ALTERNATIVES}"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {str(config.device)!r}: this machine has {torch.cuda.device_count()} CUDA GPUs, "
            "counted from cuda:0"
        )
    if (name, device.type, config.precision) == (BackendType.ONNX.value, "cpu", "bf16"):
        raise ConfigError(
            "backend 'onnx' on device 'cpu': onnxruntime's CPU provider has no bfloat16; use dtype=torch.float32 "
            "(or backend=BackendType.PYTORCH, which has it)"
        )
    return with_index(device)
