"""`compile`: a model, a checkpoint or a module becomes something that acts, and that can be looked into."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cortexflow.checkpoints import Checkpoint, count_nonfinite, match, open_checkpoint
from cortexflow.codegen import Executable, Target, find_target
from cortexflow.errors import CheckpointError, ConfigError, InputError, TargetError
from cortexflow.inputs import check_inputs
from cortexflow.ir import Module, Type, clone, dump, verify
from cortexflow.ir.cost import cost_report
from cortexflow.models import ModelConfig, Signature, VLAModel, create_model
from cortexflow.passes import Step, report, run_passes
from cortexflow.passes.expose import expose as expose_named
from cortexflow.passes.pipeline import Pass, pipeline
from cortexflow.passes.plan_buffers import Plan, plan_buffers
from cortexflow.weights import Weights, prepare

DTYPES = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "f32": "f32",
    "bf16": "bf16",
    "f16": "f16",
}


class Compiled:
    """A policy for one signature on one target: call it, save it, or look at how it came about.

    Attributes:
        executable: what the target built.
        module: the stages as the target runs them, without `prepare`.
        steps: what each pass did, with the module after it.
        plan: where each temporary lives in one arena, and the least that any plan needs.
        weight_bytes: size of the weights as prepared.
        target: the target's name.
    """

    def __init__(
        self,
        executable: Executable,
        module: Module,
        steps: list[Step],
        plan: Plan,
        weight_bytes: int,
        vocabulary: int | None,
        target: str,
    ) -> None:
        self.executable = executable
        self.module = module
        self.steps = steps
        self.plan = plan
        self.weight_bytes = weight_bytes
        self.target = target
        self._vocabulary = vocabulary

    @property
    def inputs(self) -> dict[str, Type]:
        """What a call takes, by name."""
        return self.module.inputs

    @property
    def outputs(self) -> dict[str, Type]:
        """What a call returns, by name."""
        return self.module.outputs

    def __call__(self, **inputs: Any) -> Tensor | dict[str, Tensor]:
        """Run the policy: tensors (or arrays) in by name, the result out; a dictionary where there are several.

        Masks may be left out, prompts may be shorter than their bucket. Raises `InputError`.
        """
        results = self.executable.run(self.check(inputs))
        return next(iter(results.values())) if len(results) == 1 else results

    def check(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inputs as tensors of their declared types; raises `InputError`."""
        return check_inputs(self.inputs, inputs, self._vocabulary)

    def stage_times(self, repeats: int = 5, **inputs: Any) -> dict[str, float]:
        """Milliseconds of each stage, the median of some runs after one to warm up."""
        values: dict[str, Tensor] = self.check(inputs)
        times: dict[str, float] = {}
        for stage in self.module.stages:
            runs = []
            for _ in range(repeats + 1):
                start = time.perf_counter()
                results = self.executable.run_stage(stage.name, values)
                _wait(results)
                runs.append((time.perf_counter() - start) * 1e3)
            times[stage.name] = sorted(runs[1:])[repeats // 2]
            values |= results
        return times

    def dump_ir(self, after: str | None = None) -> str:
        """The listing of the module as it runs; as it came in (`"input"`); or after the last pass of a name."""
        if after is None:
            return dump(self.module)
        named = [s for s in self.steps if s.name == after]
        if not named:
            known = ", ".join(dict.fromkeys(s.name for s in self.steps))
            raise ConfigError(f"no pass is named {after!r}; there are {known}")
        return dump(named[-1].module)

    def source(self) -> str:
        """The target's artefact as text."""
        return self.executable.source()

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the artefact into a folder, made if absent, so that it runs without this package.

        Returns the files written. Raises `TargetError` where the target has no form on disk.
        """
        save = getattr(self.executable, "save", None)  # a target of one's own may do without
        if save is None:
            raise TargetError(
                f"target {self.target!r} cannot be saved: what it builds has no form on disk; source() is its text"
            )
        written: list[Path] = save(Path(folder))
        return written

    def pass_report(self) -> str:
        """A table of what each pass did."""
        return report(self.steps)

    def memory_report(self) -> str:
        """Bytes of the weights, and of the temporaries as planned, beside their lower bound."""
        return f"weights: {self.weight_bytes:,} bytes\n{self.plan.report()}"

    def cost_report(self) -> str:
        """Operations and bytes of each stage."""
        return cost_report(self.module)


def compile(
    model: VLAModel | Module | Checkpoint | Mapping[str, Any] | str | os.PathLike[str],
    target: str = "torch",
    *,
    dtype: torch.dtype | str = "float32",
    device: str | torch.device = "cpu",
    batch: int = 1,
    views: int | None = None,
    prompt: int | None = None,
    chunk: int | None = None,
    steps: int | None = None,
    weights: Mapping[str, Tensor] | None = None,
    expose: tuple[str, ...] = (),
    passes: Sequence[tuple[str, Pass]] | None = None,
    allow_pickle: bool = False,
    progress: bool = True,
) -> Compiled:
    """Compile a policy for one signature and one target.

    Args:
        model: a checkpoint (a directory, a file, or realtime-vla's dictionary), a `VLAModel` (with
            `weights`, or one made from a checkpoint), or an `ir.Module` with its weights.
        target: `torch` or `onnx`, or the name of a registered target.
        dtype: precision of the large products: float32, bfloat16 or float16. Norm statistics, softmax,
            rotary angles and the flow state are float32 in each.
        device: where the target runs.
        batch, views, prompt, chunk, steps: the signature; what is left out comes from the checkpoint.
        weights: tensors by checkpoint name, for a `VLAModel` or an `ir.Module` that has none.
        expose: names of inner values (`prefix_layer_*`) to return beside the actions.
        passes: (name, pass) pairs in place of the target's own list (`cortexflow.passes.PIPELINE`).
        allow_pickle: read `.pkl` checkpoints, which can run any code that they contain.
        progress: show progress bars for work over a second.

    Raises:
        CheckpointError, ConfigError, TargetError: with what was expected, what was found, what to do.
    """
    found, place = find_target(target), _device(device)
    graph: VLAModel | Module
    if isinstance(model, Module):
        if any(v is not None for v in (views, prompt, chunk, steps)) or batch != 1:
            raise ConfigError("an ir.Module has its shapes already: views, prompt, chunk, steps and batch do not apply")
        graph, source, signature, vocabulary = model, model.weights if weights is None else weights, None, None
    else:
        graph, source = _model_and_weights(model, weights, allow_pickle)
        signature = Signature.of(graph.config, batch=batch, views=views, prompt=prompt, chunk=chunk, steps=steps)
        vocabulary = graph.config.vocab_size
    lowered, done = lower(graph, signature, dtype, found, passes, expose=expose, weights=source)
    stages, ready = prepare(lowered, source, progress)
    plan = plan_buffers(stages)
    executable = found.build(stages, ready, place)
    _dump_source(executable, found, len(done))
    size = sum(t.numel() * t.element_size() for t in ready.values())
    return Compiled(executable, stages, done, plan, size, vocabulary, found.name)


def lower(
    model: VLAModel | Module,
    signature: Signature | None = None,
    dtype: torch.dtype | str = "float32",
    target: Target | str | None = None,
    passes: Sequence[tuple[str, Pass]] | None = None,
    *,
    expose: tuple[str, ...] = (),
    weights: Mapping[str, Tensor] | None = None,
) -> tuple[Module, list[Step]]:
    """Build a model's graph and rewrite it for a target: (the module, what each pass did). Reads no weights.

    An `ir.Module` is left as it is and has its signature already; a model without one takes its
    configuration's. Without a target, fused ops stay fused. `passes` and `expose` as in `compile`;
    `weights` are for CORTEXFLOW_CHECK, which else runs on random ones.
    """
    precision = _dtype(dtype)
    if isinstance(model, Module):
        module = clone(model)
        if precision != "f32" and module.meta.get("dtype") != precision:
            raise ConfigError(
                f"an ir.Module has its types already: dtype={dtype!r} does not apply; build it in {precision}"
            )
    else:
        module = model.build(signature or Signature.of(model.config), precision)
    if weights is not None:
        module.weights = weights
    if expose:
        expose_named(module, *expose)
    verify(module)
    target = find_target(target) if isinstance(target, str) else target
    if passes is None:
        passes = pipeline(target.layouts if target else ())
    lowered, steps = run_passes(module, target.runs if target else None, passes)
    verify(lowered)
    return lowered, steps


def load_model(path: Any, *, allow_pickle: bool = False, **config: Any) -> tuple[VLAModel, Weights]:
    """The model that a checkpoint holds and its weights, matched strictly, read when asked for.

    `config` overrides fields of `ModelConfig` that the checkpoint does not tell.
    """
    opened = (
        path
        if isinstance(path, Checkpoint)
        else open_checkpoint(path, config_overrides=config, allow_pickle=allow_pickle)
    )
    model = create_model(opened.config)
    names = match(opened, model.get_weight_shapes())
    weights = model.weights = Weights(list(names), opened.load_checked)
    return model, weights


def _model_and_weights(
    model: Any, weights: Mapping[str, Tensor] | None, allow_pickle: bool
) -> tuple[VLAModel, Mapping[str, Tensor]]:
    if isinstance(model, VLAModel):
        if weights is None and model.weights is None:
            raise ConfigError(f"{type(model).__name__} has no weights: give weights=, or compile a checkpoint path")
        return model, _checked(weights) if weights is not None else model.weights or {}
    if isinstance(model, (str, os.PathLike, Mapping, Checkpoint)):
        graph, loaded = load_model(Path(model) if isinstance(model, str) else model, allow_pickle=allow_pickle)
        return graph, loaded if weights is None else _checked(weights)
    raise InputError(
        f"model: expected a checkpoint path or dictionary, a VLAModel or an ir.Module, found {type(model).__name__}"
    )


def _checked(weights: Mapping[str, Any]) -> Weights:
    """A user's own tensors, checked as those of a checkpoint are: finite numbers, when they are read."""

    def load(name: str) -> Tensor:
        found = torch.as_tensor(weights[name])
        nan, inf = count_nonfinite(found)
        if nan or inf:
            raise CheckpointError(
                f"weights[{name!r}]: expected finite numbers, found {nan} NaN and {inf} infinite among {found.numel()}"
            )
        return found

    return Weights(list(weights), load)


def _dtype(dtype: torch.dtype | str) -> str:
    if not isinstance(dtype, (str, torch.dtype)) or dtype not in DTYPES:
        raise ConfigError(f"dtype: expected float32, bfloat16 or float16, found {dtype!r}")
    return DTYPES[dtype]


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device: expected 'cpu', 'cuda' or 'cuda:N', found {device!r}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {str(device)!r}: PyTorch finds no CUDA GPU on this machine; use device='cpu'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {str(device)!r}: this machine has {torch.cuda.device_count()} CUDA GPUs, counted from cuda:0"
        )
    if found.type == "meta":
        raise ConfigError("device 'meta' holds no values: a policy cannot run there; use device='cpu'")
    return found


def _dump_source(executable: Executable, target: Target, number: int) -> None:
    if folder := os.environ.get("CORTEXFLOW_DUMP"):
        suffix = {"torch": "py", "onnx": "txt"}.get(target.name, "txt")
        (Path(folder) / f"{number:02d}_{target.name}_source.{suffix}").write_text(executable.source())


def _wait(results: Mapping[str, Tensor]) -> None:
    if any(t.is_cuda for t in results.values()):
        torch.cuda.synchronize()


__all__ = ["Compiled", "ModelConfig", "compile", "load_model", "lower"]
