"""The demo, end to end, and the checkpoint that it writes."""

from __future__ import annotations

import builtins
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cortexflow import demo
from cortexflow.checkpoints import match, open_checkpoint
from cortexflow.ir import parse
from cortexflow.models import create_model
from cortexflow.processing import lerobot_options, load_stats, load_tokenizer

EXACT = 1e-4  # of normalised actions in float32


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run of the demo: the folder that it left, and what it printed."""
    import contextlib
    import io

    folder, text = tmp_path_factory.mktemp("demo") / "out", io.StringIO()
    with contextlib.redirect_stdout(text):
        assert demo.main(["--output", str(folder), "--quiet"]) == 0
    return folder, text.getvalue()


def differences(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^(\w+ - \w+) +([\d.e+-]+)$", text, re.MULTILINE)}


def test_the_targets_agree_with_the_interpreter(ran: tuple[Path, str]) -> None:
    found = differences(ran[1])
    assert set(found) == {"interpreter - torch", "interpreter - onnx", "torch - onnx"}
    assert max(found.values()) < EXACT


def test_the_demo_prints_actions_latency_and_memory(ran: tuple[Path, str]) -> None:
    text = ran[1]
    rows = re.findall(r"^(\d+) ((?: +[+-]\d+\.\d{4}){7})$", text, re.MULTILINE)
    assert [int(step) for step, _ in rows] == list(range(10))
    actions = np.array([[float(x) for x in values.split()] for _, values in rows])
    assert np.isfinite(actions).all() and actions.std(0).min() > 0
    for stage in ("vision_encoder", "transformer_encoder", "transformer_decoder", "whole policy"):
        times = re.search(rf"^{stage} +([\d.]+) ms +([\d.]+) ms$", text, re.MULTILINE)
        assert times and float(times[1]) > 0 and float(times[2]) > 0
    for word in ("weights, prepared", "one arena", "least that any plan needs", "84 x 84 with padding", demo.PROMPT):
        assert word in text


def test_the_demo_leaves_the_ir_of_every_pass(ran: tuple[Path, str]) -> None:
    for target in ("torch", "onnx"):
        files = sorted((ran[0] / "ir" / target).glob("*.ir"))
        names = [file.name[3:-3] for file in files]
        assert names[0] == "input" and {"canonicalize", "hoist", "fuse", "legalize"} <= set(names)
        assert [int(file.name[:2]) for file in files] == list(range(len(files)))
        assert parse(files[-1].read_text()).stages
        assert list((ran[0] / "ir" / target).glob("*_source.*"))
    assert "CORTEXFLOW_DUMP" not in os.environ


def test_the_demo_takes_a_checkpoint_of_ones_own(
    ran: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--checkpoint", str(ran[0] / "checkpoint"), "--output", str(tmp_path), "--prompt", "open it", "--quiet"]
    assert demo.main(argv) == 0
    text = capsys.readouterr().out
    assert max(differences(text).values()) < EXACT
    assert "'open it'" in text and "-0.05, 0.03, 0.76" in text, "the state is the mean of the statistics"
    assert not (tmp_path / "checkpoint").exists()


def test_a_checkpoint_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--checkpoint", str(tmp_path / "no"), "--output", str(tmp_path)]) == 2
    assert "nothing at this path" in capsys.readouterr().err


def test_the_checkpoint_is_lerobots(tmp_path: Path) -> None:
    home = demo.write_checkpoint(tmp_path)
    opened = open_checkpoint(home)
    assert (opened.format, opened.config) == ("lerobot", demo.CONFIG)
    assert list(match(opened, create_model(opened.config).get_weight_shapes()))
    assert lerobot_options(home)["norm"] == "quantile"
    assert np.allclose(load_stats(home)["actions"]["q99"], demo.STATS["actions"]["q99"])
    tokenizer = load_tokenizer(home)
    assert 100 < tokenizer.vocab_size <= demo.CONFIG.vocab_size
    ids = tokenizer.encode(f"Task: {demo.PROMPT}, State: 3 -1 255;\nAction: ")
    assert 3 not in ids, "3 stands for an unknown piece"


def test_no_weight_is_degenerate() -> None:
    weights = demo.random_weights(create_model(demo.CONFIG).get_weight_shapes(), seed=0)
    assert all(bool((x != 0).all()) and float(x.std()) > 0.01 for x in weights.values())
    again = demo.random_weights(create_model(demo.CONFIG).get_weight_shapes(), seed=0)
    assert all(torch.equal(x, again[name]) for name, x in weights.items())
    norms = {n: x for n, x in weights.items() if n.endswith("layernorm.weight") and "language_model" in n}
    assert norms and all(abs(float(x.mean())) < 0.1 for x in norms.values()), "Gemma stores w of 1 + w"


def test_the_pictures_are_small_and_need_resizing() -> None:
    for file in demo.IMAGES.values():
        assert file.stat().st_size < 100_000
        with Image.open(file) as picture:
            assert picture.format == "PNG" and picture.mode == "RGB"
            assert picture.size != (224, 224) and picture.width != picture.height


def test_the_plot_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., object] = builtins.__import__

    def without(name: str, *args: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name=name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    assert not demo.plot_actions(np.ones((4, 3)), tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert demo.plot_actions(np.random.default_rng(0).normal(size=(10, 7)), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 300


def test_dumping_keeps_the_users_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEXFLOW_DUMP", "elsewhere")
    (tmp_path / "07_old.ir").write_text("stale")
    (tmp_path / "notes.ir").write_text("the user's")
    with demo.dumping(tmp_path):
        assert os.environ["CORTEXFLOW_DUMP"] == str(tmp_path)
    assert os.environ["CORTEXFLOW_DUMP"] == "elsewhere"
    assert [p.name for p in tmp_path.iterdir()] == ["notes.ir"]
