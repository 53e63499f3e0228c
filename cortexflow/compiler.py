"""`compile`: a model, a checkpoint or a module becomes something that acts, and that can be looked into."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
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
from cortexflow.passes.pipeline import SWITCHES, Pass, pipeline, switched
from cortexflow.passes.plan_buffers import Plan, plan_buffers
from cortexflow.weights import Weights, check_weights, fingerprints, prepare, stages_of

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

    Compiled for several prompt buckets, it is the largest, and a call goes to the smallest that holds its prompt.

    Attributes:
        executable: what the target built.
        module: the stages as the target runs them, without `prepare`.
        steps: what each pass did, with the module after it.
        plan: where each temporary lives in one arena, and the least that any plan needs.
        weight_bytes: size of the weights as prepared, those of all buckets together.
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
        self._smaller: tuple[Compiled, ...] = ()
        self._inputs, self._vocabulary = module.inputs, vocabulary

    @property
    def inputs(self) -> dict[str, Type]:
        """What a call takes, by name."""
        return dict(self._inputs)

    @property
    def buckets(self) -> dict[int, Compiled]:
        """Slots of each prompt bucket → the policy compiled for it, in rising order; empty for a single signature."""
        return {b.inputs["tokens"].shape[1]: b for b in (*self._smaller, self)} if self._smaller else {}

    @property
    def outputs(self) -> dict[str, Type]:
        """What a call returns, by name."""
        return self.module.outputs

    def __call__(self, **inputs: Any) -> Tensor | dict[str, Tensor]:
        """Run the policy: tensors (or arrays) in by name, the result out; a dictionary where there are several.

        Masks may be left out, prompts may be shorter than their bucket. Raises `InputError`.
        """
        bucket = self.bucket(inputs)
        results = bucket.executable.run(bucket.check(inputs))
        return next(iter(results.values())) if len(results) == 1 else results

    def bucket(self, inputs: Mapping[str, Any]) -> Compiled:
        """The policy of the smallest bucket with a slot for every token given; the largest where none is, or too many.

        What counts is the extent of `tokens`, not of its mask: a prompt that comes padded to 200 slots takes 200.
        """
        tokens = inputs.get("tokens")
        if not self._smaller or tokens is None:
            return self
        given = np.shape(tokens)[-1:] or (0,)
        return next((b for b in self._smaller if b._inputs["tokens"].shape[1] >= given[0]), self)

    def check(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inputs as tensors of their declared types; raises `InputError`."""
        return check_inputs(self._inputs, inputs, self._vocabulary)

    def stage_times(self, repeats: int = 5, **inputs: Any) -> dict[str, float]:
        """Milliseconds of each stage, the median of some runs after one to warm up."""
        bucket = self.bucket(inputs)
        values: dict[str, Tensor] = bucket.check(inputs)
        times: dict[str, float] = {}
        for stage in bucket.module.stages:
            runs = []
            for _ in range(repeats + 1):
                start = time.perf_counter()
                results = bucket.executable.run_stage(stage.name, values)
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

        Returns the files written; several buckets are written each into a folder `prompt_SLOTS`, weights included.
        Raises `TargetError` where the target has no form on disk.
        """
        if self._smaller:
            parts = {f"prompt_{slots}": b.executable for slots, b in self.buckets.items()}
        else:
            parts = {"": self.executable}
        written: list[Path] = []
        for name, executable in parts.items():
            save = getattr(executable, "save", None)  # a target of one's own may do without
            if save is None:
                raise TargetError(
                    f"target {self.target!r} cannot be saved: what it builds has no form on disk; source() is its text"
                )
            written += save(Path(folder) / name)
        return written

    def pass_report(self) -> str:
        """A table of what each pass did."""
        return report(self.steps)

    def memory_report(self) -> str:
        """Bytes of the weights, and of the temporaries of each bucket as planned, beside their lower bound."""
        plans = [f"prompts of {n}: {b.plan.report()}" for n, b in self.buckets.items()] or [self.plan.report()]
        own = getattr(self.executable, "memory_report", None)  # where a target has more to tell
        return "\n".join([f"weights: {self.weight_bytes:,} bytes", *plans, *([own()] if own else [])])

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
    prompt: int | Sequence[int] | None = None,
    chunk: int | None = None,
    steps: int | None = None,
    weights: Mapping[str, Tensor] | None = None,
    expose: tuple[str, ...] = (),
    passes: Sequence[tuple[str, Pass]] | None = None,
    without: Iterable[str] = (),
    tune: bool = False,
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
            Several values of `prompt` are buckets over one set of weights: see `Compiled.bucket`.
        weights: tensors by checkpoint name, for a `VLAModel` or an `ir.Module` that has none.
        expose: names of inner values (`prefix_layer_*`) to return beside the actions.
        passes: (name, pass) pairs in place of the target's own list (`cortexflow.passes.PIPELINE`).
        without: names of optimisations to leave out; `switches(target)` lists them.
        tune: measure kernels on the card where no result is known, and keep what was found in the user's cache.
        allow_pickle: read `.pkl` checkpoints, which can run any code that they contain.
        progress: show progress bars for work over a second.

    Raises:
        CheckpointError, ConfigError, TargetError: with what was expected, what was found, what to do.
    """
    found, place = find_target(target), _device(device)
    off = _switched_off(without, found)
    if tune and "tune" not in found.options:
        raise ConfigError(f"tune=True: target {found.name!r} has no kernels of its own to measure; leave it out")
    graph: VLAModel | Module
    signatures: list[Signature | None]
    if isinstance(model, Module):
        if any(v is not None for v in (views, prompt, chunk, steps)) or batch != 1:
            raise ConfigError("an ir.Module has its shapes already: views, prompt, chunk, steps and batch do not apply")
        graph, source, signatures, vocabulary = model, model.weights if weights is None else weights, [None], None
    else:
        graph, source = _model_and_weights(model, weights, allow_pickle)
        slots = _slots(prompt)
        shape = {"batch": batch, "views": views, "chunk": chunk, "steps": steps}
        signatures = [Signature.of(graph.config, prompt=n, **shape) for n in slots]
        vocabulary = graph.config.vocab_size
    known: dict[str, Tensor] = {}  # prepared weights by fingerprint: buckets share them, and their forms on the device
    forms: dict[str, dict[Any, Tensor]] = {}
    sizes: dict[tuple[str, str], int] = {}
    made: list[Compiled] = []
    for signature in signatures:
        lowered, done = lower(graph, signature, dtype, found, passes, expose=expose, weights=source, without=off)
        check_weights(lowered, source)
        stages, marks = stages_of(lowered), fingerprints(lowered)
        ready = _when_read(lowered, source, progress, known)  # a target may compile kernels first, and meanwhile
        given = {
            "forms": {key: forms.setdefault(mark, {}) for key, mark in marks.items()},
            "tune": tune,
            "progress": progress,
        }
        options: dict[str, Any] = {name: given[name] for name in found.options}
        if found.switches:
            options["without"] = off & found.switches.keys()
        executable = found.build(stages, ready, place, **options)
        _dump_source(executable, found, len(done))
        sizes |= {(key, marks[key]): t.nbytes for key, t in stages.weight_types().items()}
        size = sum(sizes.values())
        made.append(Compiled(executable, stages, done, plan_buffers(stages), size, vocabulary, found.name))
    *smaller, policy = made
    policy._smaller = tuple(smaller)
    return policy


def _slots(prompt: Any) -> list[Any]:
    """The prompt buckets asked for, in rising order; Signature checks each."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        return [prompt]
    if not prompt or not all(isinstance(n, int) for n in prompt):
        raise ConfigError(f"prompt: expected slots of a bucket or of several, as 48 or (48, 200), found {prompt!r}")
    return sorted(set(prompt))


def _when_read(
    module: Module, source: Mapping[str, Tensor], progress: bool, known: dict[str, Tensor]
) -> Mapping[str, Tensor]:
    """The weights of a module's stages, all prepared when the first is asked for."""
    made = cache(lambda: prepare(module, source, progress, known)[1])
    return Weights(list(stages_of(module).weight_types()), lambda key: made()[key])


def switches(target: Target | str | None = None) -> dict[str, str]:
    """What `without` can name for a target: optimisation → what it does. Without a target, those of the passes."""
    found = find_target(target) if isinstance(target, str) else target
    if found is None:
        return dict(SWITCHES)
    return {name: line for name, line in {**SWITCHES, **found.switches}.items() if name not in found.needs}


def _switched_off(without: Iterable[str], target: Target | None) -> frozenset[str]:
    names = frozenset([without] if isinstance(without, str) else without)
    known = switches(target)
    if unknown := sorted(names - known.keys()):
        whose = f"target {target.name!r}" if target else "the passes"
        raise ConfigError(f"without: unknown switch {', '.join(unknown)}; {whose}: {', '.join(known)}")
    return names


def lower(
    model: VLAModel | Module,
    signature: Signature | None = None,
    dtype: torch.dtype | str = "float32",
    target: Target | str | None = None,
    passes: Sequence[tuple[str, Pass]] | None = None,
    *,
    expose: tuple[str, ...] = (),
    weights: Mapping[str, Tensor] | None = None,
    without: Iterable[str] = (),
) -> tuple[Module, list[Step]]:
    """Build a model's graph and rewrite it for a target: (the module, what each pass did). Reads no weights.

    An `ir.Module` is left as it is and has its signature already; a model without one takes its
    configuration's. Without a target, fused ops stay fused. `passes`, `expose` and `without` as in `compile`;
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
    off = _switched_off(without, target)
    if passes is None:
        passes = pipeline(target.layouts if target else ())
    runs = (lambda op: target.runs(op, off)) if target else None
    lowered, steps = run_passes(module, runs, switched(passes, off))
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


__all__ = ["Compiled", "ModelConfig", "compile", "load_model", "lower", "switches"]
