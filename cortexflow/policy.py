"""`Policy`: what a robot sees, feels and is told becomes its next actions, as openpi's `Policy.infer` does it.

    policy = Policy.load("checkpoints/pi05_libero", robot="libero")
    actions = policy.infer(observation)["actions"]

An observation is openpi's dictionary, LeRobot's batch, or OpenVLA's image and instruction
(`cortexflow.processing.observations` has the keys).
What a robot is stands in `cortexflow.processing.ROBOTS`, or in a small file (`cortexflow.processing.robot_file`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from cortexflow.checkpoints import Checkpoint, open_checkpoint
from cortexflow.compiled import Compiled
from cortexflow.compiler import compile
from cortexflow.errors import ConfigError, InputError, TargetError
from cortexflow.models import Signature
from cortexflow.observation import (
    FixedPrompt,
    Frontend,
    camera_names,
    directory,
    family_of,
    find_processing,
    find_stats,
    needs_no_robot,
    network_answer,
    network_inputs,
    robot_actions,
    statistics_read,
)
from cortexflow.processing import (
    FAMILIES,
    HORIZONS,
    ONE_CAMERA,
    PROCESSINGS,
    ROBOTS,
    Processing,
    Robot,
    Sample,
    asset_ids,
    find_robot,
    load_tokenizer,
    of_one_view,
    read_observation,
)
from cortexflow.processing.arrays import Floats, as_floats, shape_of

# Extents beyond these are mistakes, and would fill the memory before anything notices.
MOST = {"batch": 4096, "views": 64, "prompt": 4096, "chunk": 4096, "steps": 4096}


class Inferred(TypedDict):
    """What `Policy.infer` returns; `infer_ms` is the time of the network alone, as openpi measures it."""

    actions: Floats
    policy_timing: dict[str, float]


class Policy:
    """A compiled checkpoint with everything that stands around it; made by `Policy.load`.

    Attributes:
        compiled: the network.
        frontend: images, normalisation, prompt.
        robot: which keys an observation has, and how many values an action.
        default_prompt: the instruction of observations that have none.
    """

    def __init__(
        self, compiled: Compiled, frontend: Frontend, robot: Robot, *, default_prompt: str | None = None, seed: int = 0
    ) -> None:
        self.compiled = compiled
        self.frontend = frontend
        self.robot = robot
        self.default_prompt = robot.default_prompt if default_prompt is None else default_prompt
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint | str | os.PathLike[str] | Mapping[str, Any],
        robot: str | Path | Robot | None = None,
        *,
        target: str = "torch",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str = "float32",
        batch: int = 1,
        prompt: int | Sequence[int] | None = None,
        chunk: int | None = None,
        steps: int | None = None,
        default_prompt: str | None = None,
        truncate_prompt: bool = False,
        processing: str | Processing | None = None,
        tokenizer: str | Path | None = None,
        stats: str | Path | None = None,
        asset_id: str | None = None,
        seed: int = 0,
        without: Iterable[str] = (),
        tune: bool = False,
        allow_pickle: bool = False,
        progress: bool = True,
    ) -> Policy:
        """Compile a checkpoint and read its statistics and its tokenizer.

        Args:
            checkpoint: a directory or file, or what `open_checkpoint` returned.
            robot: `libero`, `droid`, `aloha`, or a .toml or .json file that describes one's own. LeRobot's
                checkpoints say it themselves; OpenVLA acts without one, from the camera `image`; others must be told.
            target, device, dtype, without, tune, progress: as in `cortexflow.compile`.
            batch: samples that the network takes at once. `infer` takes any number, in portions of this.
            prompt: tokens of the prompt bucket, or of several buckets.
            chunk: actions per prediction. Left out: what config.json says, else openpi's for this robot.
            steps: steps of the flow.
            default_prompt: the instruction of observations without one; else the robot file's; else that is an error.
            truncate_prompt: cut long prompts off, as openpi does, where otherwise they are an error.
            processing: a key of `cortexflow.processing.PROCESSINGS`, or a `Processing`, in place of the robot's own.
            tokenizer, stats: files or directories; left out, they are looked for in the checkpoint's directory.
            asset_id: whose statistics, where there are those of several robots, or of several data sets (OpenVLA's
                `unnorm_key`); left out, the robot's own.
            seed: of the noise that each inference draws.
            allow_pickle: read `.pkl` checkpoints, which can run any code that they contain.

        Raises:
            CheckpointError: also for statistics that are missing, under other keys, or of other lengths.
            ConfigError, TargetError: as `cortexflow.compile` does, and for robots and their files.
        """
        _check_types(default_prompt=(default_prompt, str), asset_id=(asset_id, str), seed=(seed, int))
        _check_types(tokenizer=(tokenizer, (str, os.PathLike)), stats=(stats, (str, os.PathLike)))
        row = None if robot is None else find_robot(robot)
        if isinstance(checkpoint, Checkpoint):
            opened = checkpoint
        elif isinstance(checkpoint, (str, os.PathLike, Mapping)):
            source = checkpoint if isinstance(checkpoint, Mapping) else Path(checkpoint)
            opened = open_checkpoint(source, allow_pickle=allow_pickle)
        else:
            raise InputError(f"checkpoint: expected a directory or a file, found {type(checkpoint).__name__}")
        chosen = _chosen(opened, row, processing)
        if row is not None:
            row = of_one_view(row) if family_of(opened) in ONE_CAMERA else row
            _check_robot(row, opened)
        several = isinstance(prompt, (list, tuple)) and all(isinstance(n, int) for n in prompt)
        largest: Any = max(prompt) if several and prompt else prompt  # type: ignore[arg-type]
        signature = Signature.of(
            opened.config,
            batch=batch,
            views=row.views if row else None,
            prompt=largest,
            chunk=_chunk(opened, row, processing) if chunk is None else chunk,
            steps=steps,
        )
        _check_extents(signature)
        rules = find_processing(opened, signature, chosen)
        if row is not None:
            rules = _for_robot(rules, row)
        rules = replace(rules, truncate_prompt=truncate_prompt or rules.truncate_prompt)
        fixed = opened.fixed_prompt
        frontend = Frontend(
            rules,
            camera_names(opened, signature.views),
            FixedPrompt(fixed) if fixed else load_tokenizer(tokenizer or directory(opened)),
            _stats(opened, rules, row, stats, asset_id) if any(statistics_read(rules).values()) else None,
        )
        compiled = compile(
            opened,
            target,
            dtype=dtype,
            device=device,
            batch=batch,
            views=signature.views,
            prompt=prompt,
            chunk=signature.chunk,
            steps=steps,
            without=without,
            tune=tune,
            progress=progress,
        )
        own = row or _told_by_checkpoint(frontend)
        return cls(compiled, frontend, own, default_prompt=default_prompt, seed=seed)

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client may want to know: the robot, the length of a chunk, the values of an action."""
        chunk = self.compiled.outputs["actions"].shape[1]
        return {"robot": self.robot.name, "action_horizon": chunk, "action_dim": self.robot.actions}

    def reset(self) -> None:
        """Begin a new episode: the noise starts from its seed again."""
        self._generator.manual_seed(self._seed)

    def infer(self, observation: Mapping[str, Any], *, noise: Any = None) -> Inferred:
        """The next actions of an observation, float64 [chunk, values] in the robot's units.

        Observations with a leading batch axis give [samples, chunk, values]. `noise` is standard normal,
        [chunk, action_dim] of the network, or one for each sample; left out, it is drawn.
        Raises InputError, which names the key, for an observation that does not fit.
        """
        samples, batched = read_observation(self.robot, observation)
        return self._act(samples, noise, batched)

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], *, noise: Any = None) -> Inferred:
        """The next actions of several observations, each without a batch axis: float64 [samples, chunk, values].

        Pictures may differ in size. `noise` is [samples, chunk, action_dim]. Otherwise as `infer`.
        """
        if (
            isinstance(observations, (Mapping, str, bytes))
            or not isinstance(observations, Sequence)
            or not observations
        ):
            raise InputError(
                f"observations: expected a list of at least one observation, found {type(observations).__name__}; "
                "infer takes one, and batches of tensors"
            )
        samples = []
        for i, observation in enumerate(observations):
            try:
                found, batched = read_observation(self.robot, observation)
                if batched:
                    raise InputError("observation: expected one sample without a batch axis; infer takes batches")
            except InputError as reason:
                raise InputError(f"observations[{i}]: {reason}") from reason
            samples += found
        return self._act(samples, noise, batched=True)

    def _act(self, samples: list[Sample], noise: Any, batched: bool) -> Inferred:
        prepared = [self._prepare(sample) for sample in samples]
        start_noise = self._noise(noise, len(samples), batched)
        seconds, chunks = 0.0, []
        size = self.compiled.outputs["actions"].shape[0]
        for first in range(0, len(samples), size):
            inputs = self._stack(prepared[first : first + size], start_noise[first : first + size], size)
            start = time.perf_counter()
            result = network_answer(self.frontend, self.compiled(**inputs))
            chunks.append(result.cpu()[: len(samples) - first])
            seconds += time.perf_counter() - start
        actions = [self._finish(chunk, s) for chunk, s in zip(torch.cat(chunks), samples, strict=True)]
        timing = {"infer_ms": seconds * 1e3} | ({"batch_size": len(samples)} if batched else {})
        return {"actions": np.stack(actions) if batched else actions[0], "policy_timing": timing}

    def _prepare(self, sample: Sample) -> Mapping[str, Any]:
        text = sample.prompt
        if text is None and not isinstance(self.frontend.tokenizer, FixedPrompt):
            text = self.default_prompt
            if text is None:
                raise InputError(
                    "observation: expected the instruction under prompt (or LeRobot's task), found none; "
                    "add it, or load the policy with default_prompt"
                )
        return network_inputs(self.frontend, sample.images, text, sample.state, pixel_low=0.0)

    def _noise(self, given: Any, samples: int, batched: bool) -> Tensor:
        """What the flow of each sample starts from; nothing [samples, 0] for a network that has none."""
        if "noise" not in self.compiled.inputs:
            if given is not None:
                raise InputError("noise: this policy draws none; leave it out")
            return torch.zeros(samples, 0)
        shape = (samples, *self.compiled.inputs["noise"].shape[1:])
        if given is None:
            return torch.randn(shape, generator=self._generator)
        allowed = (shape,) if batched else (shape, shape[1:])
        if (found := shape_of(given, "noise")) not in allowed:  # before anything is converted: it may be huge
            raise InputError(f"noise: expected shape {allowed[-1]}, found {found}")
        return torch.from_numpy(as_floats(given, "noise")).reshape(shape).float()

    def _stack(self, prepared: Sequence[Mapping[str, Any]], noise: Tensor, size: int) -> dict[str, Tensor]:
        """The inputs of one call: of fewer samples than it takes, the last is repeated."""
        rows = [min(i, len(prepared) - 1) for i in range(size)]
        longest = max(int(one["token_mask"].sum()) for one in prepared)  # so that a call finds its bucket
        inputs = {}
        for name in self.compiled.inputs:
            if name == "noise":
                inputs[name] = noise[rows]
                continue
            value = torch.from_numpy(np.stack([prepared[i][name] for i in rows]))
            inputs[name] = value[:, : max(longest, 1)] if name in ("tokens", "token_mask") else value
        return inputs

    def _finish(self, chunk: Tensor, sample: Sample) -> Floats:
        if not bool(torch.isfinite(chunk).all()):
            raise TargetError(
                f"actions: expected finite numbers from the network, found {int((~torch.isfinite(chunk)).sum())} NaN "
                "or infinite; its numbers may be too large for float16: load the policy in bfloat16 or float32"
            )
        return robot_actions(self.frontend, chunk[None], sample.state)


def _chosen(checkpoint: Checkpoint, robot: Robot | None, given: str | Processing | None) -> str | Processing | None:
    """The processing that the caller or the robot means; None where the checkpoint's files say it."""
    if given is not None:
        if not isinstance(given, (str, Processing)):
            raise ConfigError(f"processing: expected a name or a Processing, found {type(given).__name__}")
        return given
    if checkpoint.format == "lerobot":
        return None
    if robot is None and not needs_no_robot(checkpoint):
        raise ConfigError(
            f"robot: {checkpoint.path or 'the dictionary'} ({checkpoint.format}) does not say for which robot it was "
            f"trained; expected robot= one of {', '.join(ROBOTS)}, or a .toml or .json file that describes one's own"
        )
    family = family_of(checkpoint)
    if robot is not None and ROBOTS.get(robot.name) is robot and f"{family}_{robot.name}" in PROCESSINGS:
        return f"{family}_{robot.name}"
    return None if needs_no_robot(checkpoint) else FAMILIES[family]


def _check_robot(robot: Robot, checkpoint: Checkpoint) -> None:
    """The network must have room for the robot's state and actions."""
    config = checkpoint.config
    if robot.actions > config.action_dim or robot.state_dim > config.state_dim:
        raise ConfigError(
            f"robot {robot.name}: expected at most {config.action_dim} values of an action and {config.state_dim} of a "
            f"state, which is what this checkpoint has, found {robot.actions} and {robot.state_dim}; choose another "
            "robot or another checkpoint"
        )


def _for_robot(rules: Processing, robot: Robot) -> Processing:
    """What the robot's own file states, over what the checkpoint or its family says."""
    options = dict(robot.options)
    if "norm" in options:
        options["action_norm"] = None
    return replace(rules, output_dim=robot.actions, **options)


def _chunk(checkpoint: Checkpoint, robot: Robot | None, processing: str | Processing | None) -> int | None:
    """openpi's horizon where no config.json can have told it."""
    if checkpoint.path is None or (directory(checkpoint) / "config.json").is_file() or robot is None:
        return None
    family = family_of(checkpoint)
    return HORIZONS.get(processing if isinstance(processing, str) else f"{family}_{robot.name}")


def _check_types(**given: tuple[Any, Any]) -> None:
    for name, (value, kind) in given.items():
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            words = {str: "a text", int: "a whole number"}.get(kind, "a path")
            raise InputError(f"{name}: expected {words}, found {value!r}")


def _check_extents(signature: Signature) -> None:
    for name, most in MOST.items():
        if (value := getattr(signature, name)) > most:
            raise ConfigError(f"{name}: expected at most {most}, found {value}; correct config.json or the call")


def _stats(
    checkpoint: Checkpoint, rules: Processing, robot: Robot | None, given: str | Path | None, asset_id: str | None
) -> Any:
    place = given or directory(checkpoint)
    if asset_id is None and robot is not None and checkpoint.format != "lerobot":
        several = asset_ids(place)
        # An asset of openpi's robots is no data set of OpenVLA's, whose error lists those that there are.
        asset_id = (
            robot.asset if len(several) > 1 and (robot.asset in several or not needs_no_robot(checkpoint)) else None
        )
    sizes = None
    if robot is not None:  # the robot's own length, or padded to the network's
        sizes = {
            "state": (robot.state_dim, rules.state_dim) if robot.state_dim else (),
            "actions": (robot.actions, rules.action_dim),
        }
    return find_stats(rules, place, asset_id, sizes)


def _told_by_checkpoint(frontend: Frontend) -> Robot:
    """The robot that LeRobot's files tell: its cameras, none of them needed as long as there is one."""
    rules = frontend.processing
    return Robot(
        name="this checkpoint",
        cameras=frontend.cameras,
        state=(),
        actions=rules.output_dim or rules.action_dim,
        executed=None,
        required=(),
    )


__all__ = ["Inferred", "Policy"]
