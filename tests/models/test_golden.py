"""Compiled policies against the models' own implementations: interpreter, torch and ONNX, in float32.

`pytest tests/models/test_golden.py --cases DIR` runs the same comparison over any folder of cases.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cortexflow
import cortexflow.ir
import cortexflow.weights
from cortexflow.compiler import load_model
from cortexflow.ir import run_module
from cortexflow.models import Signature
from cortexflow.passes import expose
from tests.models.cases import DATA, EXPOSED, Batch, batches, case_folders, compared, distance

ACTIONS, INTERMEDIATES = 1e-4, 3e-5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = Path(metafunc.config.getoption("--cases") or DATA)
    found = [(b, f"{b.case.name}-{b.name}") for folder in case_folders(root) for b in batches(folder)]
    assert found, f"no cases in {root}"
    metafunc.parametrize("batch", [b for b, _ in found], ids=[i for _, i in found])


def _module(batch: Batch) -> tuple[cortexflow.ir.Module, cortexflow.weights.Weights]:
    """The graph with everything that the reference stored among its results."""
    model, weights = load_model(batch.case)
    module = model.build(Signature.of(model.config, batch=batch.size))
    expose(module, *EXPOSED)
    module.meta["keep"] += tuple(f"{side}_{i}" for side in "kv" for i in range(batch.layers))
    return module, weights


def _check(batch: Batch, results: dict[str, torch.Tensor]) -> None:
    """Intermediates within 3e-5 of the reference, actions within 1e-4.

    The reference is float32 itself (the last prefix layer over small activations stands 3.5e-5 from the float64
    interpreter): what stands nearer to float64 than the reference does, and within 3e-5, counts too.
    """
    pairs = compared(batch, results)
    far = [n for n, p in pairs.items() if distance(*p) > INTERMEDIATES]
    if far:
        module, weights = _module(batch)
        exact = compared(batch, run_module(module, batch.inputs, weights, torch.float64))
        far = [n for n in far if distance(pairs[n][0], exact[n][0]) > min(INTERMEDIATES, distance(*exact[n]))]
    assert not far, {n: f"{distance(*pairs[n]):.1e}" for n in far}
    assert distance(results["actions"], batch.outputs["actions"]) < ACTIONS


def test_interpreter(batch: Batch) -> None:
    module, weights = _module(batch)
    _check(batch, run_module(module, batch.inputs, weights))


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_target(batch: Batch, target: str) -> None:
    module, weights = _module(batch)
    results = cortexflow.compile(module, target, weights=weights)(**batch.inputs)
    assert isinstance(results, dict)
    _check(batch, results)


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_checkpoint_path_to_actions(batch: Batch, target: str) -> None:
    """The road a user takes: nothing exposed, so dead code is really gone."""
    compiled = cortexflow.compile(batch.case, target, batch=batch.size)
    actions = compiled(**batch.inputs)
    assert isinstance(actions, torch.Tensor)
    assert distance(actions, batch.outputs["actions"]) < ACTIONS
