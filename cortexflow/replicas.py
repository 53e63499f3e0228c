"""Data parallel: one engine and one worker thread on each device, episodes shared out, results in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from cortexflow.configuration import InferenceConfig
from cortexflow.engine import Actions, VLAInferenceEngine
from cortexflow.episodes import batch_columns
from cortexflow.errors import CheckpointError, ConfigError, CortexFlowError, InputError, TargetError
from cortexflow.models import ModelConfig
from cortexflow.sources import Source, open_model


class ReplicaError(CortexFlowError, RuntimeError):
    """Some replicas failed while others finished; the replicas stay usable.

    Attributes:
        failures: device → what went wrong there.
        actions: one entry per episode: its actions, or None where its replica failed.
    """

    def __init__(self, message: str, failures: Mapping[str, BaseException], actions: Sequence[Actions | None]) -> None:
        super().__init__(message)
        self.failures = dict(failures)
        self.actions = list(actions)


class ReplicatedEngine:
    """`VLAInferenceEngine` on several devices, with the same `predict` and `predict_batch`.

    `predict` goes to the replica with the least to do, so that calls from several threads run at once;
    `predict_batch` gives each replica an equal share of the episodes. A device may be named twice: two replicas.

    Attributes:
        devices: one for each replica.
        engines: the replicas.
    """

    def __init__(
        self,
        checkpoint: Source,
        model_config: ModelConfig | None,
        inference_config: InferenceConfig,
        *,
        devices: Sequence[str | torch.device],
        allow_pickle: bool = False,
    ) -> None:
        """Build one replica after the other, each in its own worker. Raises as `VLAInferenceEngine`."""
        if isinstance(devices, (str, torch.device)) or not devices:
            raise ConfigError(f"devices: expected a list such as ['cuda:0', 'cuda:1'], found {devices!r}")
        self.devices = [str(device) for device in devices]
        many = len(set(self.devices)) < len(self.devices)
        self._names = [f"{d} (replica {i})" if many else d for i, d in enumerate(self.devices)]
        self.inference_config = inference_config
        model, opened = open_model(checkpoint, model_config, allow_pickle=allow_pickle)
        self._workers = [ThreadPoolExecutor(1, thread_name_prefix=name) for name in self._names]
        self._pending = [0] * len(devices)
        self._lock = threading.RLock()
        self.engines: list[VLAInferenceEngine] = []
        try:
            for i, device in enumerate(self.devices):
                config = replace(inference_config, device=device)
                made = self._submit(i, VLAInferenceEngine, opened or model, None, config)
                wait([made])
                self._raise({i: made}, [])
                self.engines.append(made.result())
        except BaseException:
            self.close()
            raise

    @property
    def model_config(self) -> ModelConfig:
        """The dimensions of the model."""
        return self.engines[0].model_config

    @property
    def action_shape(self) -> tuple[int, int]:
        """(chunk, action_dim) of one prediction."""
        return self.engines[0].action_shape

    @property
    def preprocessor(self) -> Callable[[Any], Any] | None:
        """As of the engine, for all replicas; it is called from several threads."""
        return self.engines[0].preprocessor

    @preprocessor.setter
    def preprocessor(self, value: Callable[[Any], Any] | None) -> None:
        for engine in self.engines:
            engine.preprocessor = value

    def predict(self, *args: Any, **kwargs: Any) -> Actions:
        """As `VLAInferenceEngine.predict`, on the replica with the least to do; may be called from any thread.

        Raises `InputError` and `ConfigError` as there, `ReplicaError` for anything else.
        """
        with self._lock:
            i = min(range(len(self.engines)), key=lambda i: self._pending[i])
            future = self._submit(i, self.engines[i].predict, *args, **kwargs)
        wait([future])
        self._raise({i: future}, [None])
        actions: Actions = future.result()
        return actions

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
        """As `VLAInferenceEngine.predict_batch`, the episodes shared out in equal runs; results in their order.

        Raises `InputError` and `ConfigError` as there. If a replica fails otherwise, the others finish and
        `ReplicaError` names its device and holds their results.
        """
        columns = batch_columns(batch_images, batch_prompts, batch_state_tokens, noise, batch_states, seed)
        count = len(batch_images)
        edges = np.linspace(0, count, len(self.engines) + 1).round().astype(int).tolist()
        parts = {i: slice(*ends) for i, ends in enumerate(pairwise(edges)) if ends[0] < ends[1]}
        futures: dict[int, Future[Any]] = {}
        for i, part in parts.items():  # one after the other: while a graph is captured, no other thread may allocate
            engine = self.engines[i]
            cold = engine.cold_batches(part.stop - part.start)
            if cold and torch.device(self.devices[i]).type == "cuda":
                ready = self._submit(i, engine.warm, *cold)
                if ready.exception():
                    futures[i] = ready
        for i, part in parts.items():
            if i not in futures:
                mine = {name: column[part] for name, column in columns.items()}
                futures[i] = self._submit(i, self.engines[i].predict_columns, mine, part.start)
        wait(futures.values())
        actions: list[Actions | None] = [None] * count
        for i, future in futures.items():
            if future.exception() is None:
                actions[parts[i]] = list(future.result())
        self._raise(futures, actions)
        return np.stack(actions) if count else np.zeros((0, *self.action_shape), np.float32)  # type: ignore[arg-type]

    def close(self) -> None:
        """End the workers; what they have begun is finished."""
        for worker in self._workers:
            worker.shutdown()

    def __enter__(self) -> ReplicatedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, i: int, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        def done(_: Future[Any]) -> None:
            with self._lock:
                self._pending[i] -= 1

        with self._lock:
            self._pending[i] += 1
            future = self._workers[i].submit(work, *args, **kwargs)
        future.add_done_callback(done)
        return future

    def _raise(self, futures: Mapping[int, Future[Any]], actions: Sequence[Actions | None]) -> None:
        """Report the replicas that failed, if any, by their devices."""
        errors = {self._names[i]: error for i, future in futures.items() if (error := future.exception())}
        for name, error in errors.items():
            if isinstance(error, (InputError, ConfigError, CheckpointError, TargetError)):
                raise type(error)(f"{error} (on {name})") from error
        if errors:
            what = "; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in errors.items())
            raise ReplicaError(
                f"{len(errors)} of {len(futures)} replicas at work failed: {what}. What others finished is in this "
                "error's `actions`; every replica takes further calls",
                errors,
                actions,
            ) from next(iter(errors.values()))
