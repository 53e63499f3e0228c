"""`compile`: a model, a checkpoint or a module becomes something that acts, and that can be looked into."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cortexflow.checkpoints import Checkpoint, count_nonfinite, match, open_checkpoint
from cortexflow.codegen import Executable, Target, find_target
from cortexflow.compiled import Compiled, on_device, with_index
from cortexflow.errors import CheckpointError, ConfigError, InputError
from cortexflow.ir import Module, clone, verify
from cortexflow.models import ModelConfig, Signature, VLAModel, create_model
from cortexflow.passes import Step, run_passes
from cortexflow.passes.expose import expose as expose_named
from cortexflow.passes.pipeline import SWITCHES, Pass, pipeline, switched
from cortexflow.weights import Weights, fingerprints, prepared, stages_of

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
        graph, source, signatures = model, model.weights if weights is None else weights, [None]
    else:
        graph, source = _model_and_weights(model, weights, allow_pickle)
        slots = _slots(prompt)
        shape = {"batch": batch, "views": views, "chunk": chunk, "steps": steps}
        signatures = [Signature.of(graph.config, prompt=n, **shape) for n in slots]
    shared = Shared()
    made = [
        build_one(
            graph,
            signature,
            found,
            source,
            place,
            dtype=dtype,
            passes=passes,
            expose=expose,
            without=off,
            tune=tune,
            progress=progress,
            shared=shared,
        )
        for signature in signatures
    ]
    *smaller, policy = made
    policy._smaller = tuple(smaller)
    return policy


@dataclass
class Shared:
    """What the builds of one policy, for several signatures, have in common.

    Attributes:
        known: prepared weights by fingerprint, for a target that does not take `forms`.
        forms: by fingerprint what a target made of a weight on the device, for its next build.
        sizes: bytes of the prepared weights by key and fingerprint.
    """

    known: dict[str, Tensor] = field(default_factory=dict)
    forms: dict[str, dict[Any, Tensor]] = field(default_factory=dict)
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)


def build_one(
    graph: VLAModel | Module,
    signature: Signature | None,
    target: Target,
    source: Mapping[str, Tensor],
    device: torch.device,
    *,
    dtype: torch.dtype | str,
    passes: Sequence[tuple[str, Pass]] | None = None,
    expose: tuple[str, ...] = (),
    without: frozenset[str] = frozenset(),
    tune: bool,
    progress: bool,
    shared: Shared,
) -> Compiled:
    """Lower and build one signature, over the weights that earlier builds left in `shared`; arguments as of `compile`.

    `weight_bytes` of the result counts the weights of all builds that `shared.sizes` has seen.
    """
    lowered, steps = lower(graph, signature, dtype, target, passes, expose=expose, weights=source, without=without)
    stages, marks = stages_of(lowered), fingerprints(lowered)
    forms = {key: shared.forms.setdefault(mark, {}) for key, mark in marks.items()}
    there = {mark for mark, placed in shared.forms.items() if placed}
    known = None if "forms" in target.options else shared.known  # who keeps them on the device needs no second copy
    made_on = device if known is None and device.type != "cpu" else None
    given = {"forms": forms, "tune": tune, "progress": progress}
    options: dict[str, Any] = {name: given[name] for name in target.options}
    if target.switches:
        options["without"] = without & target.switches.keys()
    missing = len(set(marks.values()) - there - shared.known.keys())
    bar = tqdm(total=missing, desc="preparing weights", unit="weight", delay=1.0, leave=False, disable=not progress)
    with bar, on_device(device):  # prepared when the target asks for them: it may compile kernels first, and meanwhile
        ready = prepared(lowered, source, there=there, known=known, device=made_on, done=bar.update)
        executable = target.build(stages, ready, device, **options)
    _dump_source(executable, target, len(steps))
    shared.sizes |= {(key, marks[key]): t.nbytes for key, t in stages.weight_types().items()}
    vocabulary = None if isinstance(graph, Module) else graph.config.vocab_size
    size = sum(shared.sizes.values())
    plan = target.plan(stages, without)
    return Compiled(executable, stages, steps, plan, size, vocabulary, target.name, device)


def _slots(prompt: Any) -> list[Any]:
    """The prompt buckets asked for, in rising order; Signature checks each."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        return [prompt]
    if not prompt or not all(isinstance(n, int) for n in prompt):
        raise ConfigError(f"prompt: expected slots of a bucket or of several, as 48 or (48, 200), found {prompt!r}")
    return sorted(set(prompt))


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
        passes = pipeline(target.wants if target else ())
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
    return with_index(found)


def _dump_source(executable: Executable, target: Target, number: int) -> None:
    if folder := os.environ.get("CORTEXFLOW_DUMP"):
        suffix = {"torch": "py", "onnx": "txt"}.get(target.name, "txt")
        (Path(folder) / f"{number:02d}_{target.name}_source.{suffix}").write_text(executable.source())


__all__ = ["Compiled", "ModelConfig", "compile", "load_model", "lower", "switches"]
