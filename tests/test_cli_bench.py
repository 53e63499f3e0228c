"""`cortexflow bench`: a row for each backend, numbers where it ran, the reason where it did not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cortexflow
from cortexflow import cli
from cortexflow.cli import bench
from cortexflow.codegen import TARGETS, Target

DATA = Path(__file__).parent / "data" / "pi"
TINY = str(DATA / "pi05_tiny")
COLUMNS = {
    *("backend", "dtype", "device", "ran", "reason", "runs", "median_ms", "p99_ms", "compile_s"),
    *("weights_bytes", "arena_bytes", "difference", "cosine"),
}


@pytest.fixture
def rows(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, Any]]]:
    """The rows of --json on a CPU with a few runs; `code` is the exit code expected."""

    def run(*argv: str, code: int = 0, path: str = TINY) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert cli.main(["bench", path, "--json", "--quiet", "--device", "cpu", "--runs", "3", *argv]) == code
        found = json.loads(capsys.readouterr().out)
        assert found["device"] == "cpu" and found["runs"] == 3
        assert all(row.keys() == COLUMNS for row in found["rows"])
        return found["rows"]

    return run


@pytest.mark.parametrize("case", ["pi05_tiny", "pi0_tiny"])
def test_all_backends(case: str, rows: Callable[..., list[dict]]) -> None:
    torch_row, onnx_row, triton_row = rows("--backend", "all", path=str(DATA / case))
    assert (torch_row["backend"], onnx_row["backend"], triton_row["backend"]) == tuple(TARGETS)
    for row in (torch_row, onnx_row):
        assert row["ran"] and row["dtype"] == "float32" and row["reason"] is None
        assert 0 < row["median_ms"] <= row["p99_ms"] and row["compile_s"] > 0
    assert torch_row["difference"] == 0 and onnx_row["difference"] < 1e-4
    assert abs(onnx_row["cosine"] - 1) < 1e-6
    compiled = cortexflow.compile(DATA / case, progress=False)
    assert torch_row["weights_bytes"] == compiled.weight_bytes and torch_row["arena_bytes"] == compiled.plan.peak
    assert not triton_row["ran"] and "NVIDIA GPU" in triton_row["reason"] and triton_row["median_ms"] is None


def test_half_precision_is_compared_with_float32(rows: Callable[..., list[dict]]) -> None:
    reference, half = rows("--backend", "torch", "--dtype", "bfloat16", "--steps", "2")
    assert (reference["dtype"], half["dtype"]) == ("float32", "bfloat16") and reference["runs"] == 1
    assert 1e-4 < half["difference"] < 0.5 and 0.99 < half["cosine"] < 1
    assert half["weights_bytes"] < reference["weights_bytes"]


def test_a_backend_that_cannot_run_is_a_row(rows: Callable[..., list[dict]]) -> None:
    reference, half = rows("--backend", "onnx", "--dtype", "bfloat16", code=2)
    assert reference["ran"] and not half["ran"]
    assert "bf16" in half["reason"] and half["difference"] is None
    reference, triton = rows("--backend", "triton", code=2)
    assert reference["backend"] == "torch" and reference["ran"] and not triton["ran"]


def test_a_card_out_of_memory_is_a_row(rows: Callable[..., list[dict]], monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(TARGETS, "onnx", Target("onnx", frozenset(), build))
    torch_row, onnx_row, _ = rows()
    assert torch_row["ran"] and onnx_row["reason"] == "CUDA out of memory"


def test_the_signature_and_the_seed_reach_the_policy(rows: Callable[..., list[dict]]) -> None:
    small = rows("--backend", "torch", "--views", "1", "--steps", "1", "--prompt", "5", "--chunk", "3")[0]
    large = rows("--backend", "torch", "--batch", "2")[0]
    assert small["arena_bytes"] < large["arena_bytes"]
    checkpoint = cortexflow.checkpoints.open_checkpoint(TINY)
    types = cortexflow.compile(checkpoint, progress=False).inputs
    a, b, c = (bench.observation(types, checkpoint, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in types) and not torch.equal(a["noise"], c["noise"])
    assert a["tokens"].max() < checkpoint.config.vocab_size


def test_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", TINY, "--runs", "2", "--quiet", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for word in ("torch float32", "onnx float32", "median", "p99", "arena", "cosine", "triton bfloat16: cannot run"):
        assert word in text


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--backend", "abacus"], "abacus"),
        (["--runs", "0"], "--runs"),
        (["--dtype", "int4"], "int4"),
        (["--views", "0"], "views"),
    ],
)
def test_bad_arguments(argv: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", TINY, *argv]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.gpu
def test_triton_on_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", TINY, "--json", "--quiet", "--backend", "triton", "--runs", "3"]) == 0
    reference, triton = json.loads(capsys.readouterr().out)["rows"]
    assert triton["ran"] and triton["device"] == "cuda" and reference["dtype"] == "float32"
    assert triton["cosine"] > 0.99
