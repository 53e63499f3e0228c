"""`cortexflow doctor`: what it finds, what it says, and how it ends for checkpoints that are no good."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cortexflow import cli, demo
from cortexflow.checkpoints import tensors
from cortexflow.cli import doctor
from cortexflow.errors import CheckpointError, TargetError

DATA = Path(__file__).parent / "data" / "pi"
TINY = DATA / "pi05_tiny"
KEYS = {
    *("path", "ok", "problems", "needs", "format", "family", "config", "signature", "dtypes", "cameras"),
    *("parameters", "values", "tensors", "statistics", "tokenizer", "processing", "presets", "backends"),
    *("notes", "command"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


PLANS: dict[Any, Any] = {}  # most tests look at the same small model: it is planned once for all


@pytest.fixture(autouse=True)
def planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = doctor._planned

    def planned(model: Any, *key: Any) -> Any:
        if (model.config, key) not in PLANS:
            PLANS[model.config, key] = plan(model, *key)
        return PLANS[model.config, key]

    monkeypatch.setattr(doctor, "_planned", planned)


@pytest.fixture
def facts(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What --json says; the exit code goes with it."""

    def run(path: Path, *more: str) -> dict[str, Any]:
        capsys.readouterr()
        code = cli.main(["doctor", str(path), "--json", "--quiet", *more])
        out, err = capsys.readouterr()
        found = json.loads(out)
        assert code == (0 if found["ok"] else 2) and err == ""
        return found

    return run


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint with some tensors replaced, or left out where they are None."""

    def make(changes: dict[str, torch.Tensor | None]) -> Path:
        shutil.copytree(TINY, tmp_path / "c", dirs_exist_ok=True)
        weights = load_file(TINY / "model.safetensors") | changes
        save_file({n: t for n, t in weights.items() if t is not None}, tmp_path / "c" / "model.safetensors")
        return tmp_path / "c"

    return make


@pytest.mark.parametrize("case", ["pi05_tiny", "pi0_tiny"])
def test_a_good_checkpoint(case: str, facts: Callable[..., dict]) -> None:
    found = facts(DATA / case)
    assert found.keys() == KEYS
    assert found["ok"] and found["problems"] == []
    assert found["family"] == case.removesuffix("_tiny")
    parts = found["parameters"]
    total = parts.pop("total")
    assert list(parts) == ["vision", "prefix tower", "action expert", "heads"]
    assert sum(p["parameters"] for p in parts.values()) == total["parameters"]
    assert sum(p["bytes"] for p in parts.values()) == total["bytes"] == 4 * total["parameters"]
    assert found["values"]["checked"] and not found["values"]["nan"] and not found["values"]["inf"]
    assert found["tensors"]["fits"]
    assert any("layers.1.mlp.down_proj" in name for name in found["tensors"]["without_effect"])
    assert found["needs"] == ["statistics", "tokenizer", "processing"]
    other = "pi0_" if case.startswith("pi05") else "pi05_"
    assert found["presets"] and not any(other in name for name in found["presets"])


def test_what_stands_around_the_network(checkpoint: Path, facts: Callable[..., dict]) -> None:
    found = facts(checkpoint)
    assert found["needs"] == []
    assert found["statistics"]["file"] == str(checkpoint / "policy_preprocessor.json")
    lengths = found["statistics"]["lengths"]
    assert lengths["state"]["q01"] == 8 and lengths["actions"]["q99"] == 7
    assert found["tokenizer"]["file"] == str(checkpoint / "tokenizer.model")
    assert "pi05_libero" in found["presets"] and "pi05_droid" not in found["presets"], "7 actions, not 8"


def test_openpis_statistics_are_found_in_assets(tmp_path: Path, facts: Callable[..., dict]) -> None:
    shutil.copytree(DATA / "pi0_tiny", tmp_path / "c")
    file = tmp_path / "c" / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"norm_stats": demo.STATS}))
    found = facts(tmp_path / "c", "--quick")
    assert found["statistics"]["file"] == str(file) and found["presets"] == ["pi0_libero"]


def test_memory_is_what_compile_takes(facts: Callable[..., dict]) -> None:
    import cortexflow

    memory = facts(TINY, "--quick")["backends"]
    for target, dtype in (("torch", "float32"), ("torch", "bfloat16"), ("onnx", "float32")):
        compiled = cortexflow.compile(TINY, target, dtype=dtype, progress=False)
        planned = memory[target]["memory"][dtype]
        assert planned["weights"] == compiled.weight_bytes and planned["arena"] == compiled.plan.peak
        assert planned["total"] == planned["weights"] + planned["arena"]
    assert list(memory["triton"]["memory"]) == ["bfloat16", "float16"]


def test_quick_reads_no_weights(facts: Callable[..., dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_load", lambda *args: pytest.fail("read"))
    assert not facts(TINY, "--quick")["values"]["checked"]


def test_the_command_runs(
    checkpoint: Path, facts: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *argv = shlex.split(facts(checkpoint, "--quick")["command"])
    for camera, file in zip(demo.CAMERAS, demo.IMAGES.values(), strict=True):
        shutil.copy(file, tmp_path / f"{camera}.png")
    monkeypatch.chdir(tmp_path)
    assert program == "cortexflow" and cli.main([*argv, "--steps", "1", "--quiet"]) == 0


def test_nan_and_infinity_are_counted(damaged: Callable[..., Path], facts: Callable[..., dict]) -> None:
    weights = load_file(TINY / "model.safetensors")
    bias, kernel = weights["model.action_out_proj.bias"], weights["model.action_in_proj.weight"]
    bias[3], kernel[0, :2] = torch.nan, torch.inf
    path = damaged({"model.action_out_proj.bias": bias, "model.action_in_proj.weight": kernel})
    found = facts(path)
    assert found["values"]["nan"] == {"action_out_proj.bias": 1}
    assert found["values"]["inf"] == {"action_in_proj.weight": 2}
    assert "2 tensors hold NaN or infinity" in found["problems"][0]
    assert facts(path, "--quick")["ok"], "not looked at"


def test_tensors_that_do_not_fit(damaged: Callable[..., Path], facts: Callable[..., dict]) -> None:
    changes = {
        "model.time_mlp_out.bias": None,
        "model.more.weight": torch.ones(3),
        "model.action_out_proj.bias": torch.ones(5),
    }
    found = facts(damaged(changes))
    fits = found["tensors"]
    assert not fits["fits"] and fits["missing"] == ["time_mlp_out.bias"]
    assert fits["unknown"] == ["more.weight"] and fits["misshapen"] == ["action_out_proj.bias"]
    assert "time_mlp_out.bias" in found["problems"][0]


def test_a_file_that_cannot_be_read(tmp_path: Path, facts: Callable[..., dict]) -> None:
    shutil.copytree(TINY, tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    for path in (tmp_path / "c", tmp_path / "nowhere"):
        found = facts(path)
        assert found.keys() == {"path", "ok", "problems"} and str(path) in found["problems"][0]


def test_values_that_cannot_be_read(facts: Callable[..., dict], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path, stored: str) -> torch.Tensor:
        raise CheckpointError(f"{path}: cut short")

    monkeypatch.setattr(tensors, "_load", load)
    found = facts(TINY)
    assert len(found["problems"]) == doctor.SHOWN and "cut short" in found["problems"][0]


def test_a_jax_checkpoint(facts: Callable[..., dict]) -> None:
    pytest.importorskip("tensorstore")
    found = facts(DATA / "orbax")
    assert found["ok"] and found["format"] == "openpi-jax" and found["tensors"]["fits"]
    assert found["presets"] == [], "its network has one action value"
    assert found["values"]["checked"] and "action horizon" in found["notes"][-1]


def no_target(name: str) -> None:
    raise TargetError(f"target {name!r} needs a package")


def test_a_machine_without_any_backend(facts: Callable[..., dict], monkeypatch: pytest.MonkeyPatch) -> None:
    absent = [{"what": "a thing", "there": False, "detail": "not here"}]
    monkeypatch.setattr(doctor, "BACKENDS", dict.fromkeys(doctor.BACKENDS, lambda: (absent, ("float32",))))
    monkeypatch.setattr(doctor, "find_target", no_target)
    PLANS.clear()
    found = facts(TINY, "--quick")
    assert "no backend can run" in found["problems"][0]
    assert found["backends"]["onnx"] == {"available": False, "needs": absent, "memory": {}}
    PLANS.clear()


def test_a_package_that_is_not_installed() -> None:
    need = doctor._package("no-such-package")
    assert not need["there"] and need["detail"] == "pip install no-such-package"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_wanted(facts: Callable[..., dict]) -> None:
    backends = facts(TINY, "--quick")["backends"]
    assert backends["torch"]["available"] and not backends["triton"]["available"]
    assert any("NVIDIA GPU" in need["what"] and not need["there"] for need in backends["triton"]["needs"])


def test_a_card_is_judged_by_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=16_000_000_000))
    for capability, there in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        need = doctor._gpu()
        assert need["there"] is there and "16.00 GB" in need["detail"]


def test_in_words(
    checkpoint: Path,
    damaged: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = {"torch": doctor.BACKENDS["torch"], "triton": doctor.BACKENDS["triton"]}
    monkeypatch.setattr(doctor, "BACKENDS", small)
    assert cli.main(["doctor", str(checkpoint), "--quiet"]) == 0
    text = capsys.readouterr().out
    for word in ("π0.5", "action expert", "every value finite", "policy_preprocessor.json", "presets that fit"):
        assert word in text
    for word in ("torch: can run", "Expected memory", "It can run", "cortexflow run"):
        assert word in text
    bad = load_file(TINY / "model.safetensors")["model.action_out_proj.bias"] * torch.nan
    path = damaged({"model.action_out_proj.bias": bad, "model.time_mlp_out.bias": None})
    assert cli.main(["doctor", str(path), "--quiet"]) == 2
    text = capsys.readouterr().out
    assert "It cannot run" in text and "32 nan in action_out_proj.bias" in text and "1 missing" in text
    assert cli.main(["doctor", str(tmp_path / "nowhere"), "--quiet"]) == 2
    assert "It cannot be read" in capsys.readouterr().out
    assert cli.main(["doctor", str(checkpoint), "--quick", "--quiet"]) == 0
    assert "--quick" in capsys.readouterr().out
