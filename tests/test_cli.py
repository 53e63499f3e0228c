"""The command line, from its arguments to what it prints, writes and returns."""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import cortexflow
from cortexflow import cli, demo
from cortexflow.checkpoints import open_checkpoint, tensors
from cortexflow.cli import arguments
from cortexflow.cli import inspect as inspect_command
from cortexflow.cli import run as run_command
from cortexflow.cli.diff import defined, renamed
from cortexflow.cli.dump import lowered
from cortexflow.codegen import TARGETS, Target
from cortexflow.codegen.torch import TARGET as TORCH
from cortexflow.codegen.torch.save import separate
from cortexflow.errors import ConfigError, InputError
from cortexflow.ir import Func, dump, parse
from cortexflow.observation import find_camera, load_frontend
from tests.checkpoints.test_realtime_vla import PROMPT, to_realtime_vla

DATA = Path(__file__).parent / "data" / "pi"
TINY = str(DATA / "pi05_tiny")
CASES = ("pi05_tiny", "pi05_tiny2", "pi0_tiny", "pi0_tiny2")
IMAGES = ["--image", f"base={demo.IMAGES['base']}", "--image", f"wrist={demo.IMAGES['wrist']}"]
STATE = ",".join(map(str, demo.STATE))  # begins with a minus


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete LeRobot directory: weights, statistics, tokenizer."""
    return demo.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that has to succeed; returns what it printed."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        code = cli.main(argv)
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that has to end in one explained error; returns the message."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        code = cli.main([*argv, "--quiet"])
        err = capsys.readouterr().err
        assert code == 2
        assert err.startswith("cortexflow: ")
        assert err.count("cortexflow: ") == 1
        assert "Traceback" not in err
        return err

    return run


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the values of a tensor is a failure."""

    def load(path: Path, stored: str) -> torch.Tensor:
        raise AssertionError(f"{stored} was read")

    monkeypatch.setattr(tensors, "_load", load)


# ---- inspect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("no_weights")
def test_inspect_says_what_a_checkpoint_is(case: str, output: Callable[..., str]) -> None:
    text = output("inspect", str(DATA / case))
    assert ("π0.5" if case.startswith("pi05") else "π0\n") in text
    for word in ("vision_encoder", "transformer_encoder", "transformer_decoder", "never read", "not found"):
        assert word in text
    assert "every tensor that the model needs is there" in text
    assert f"cortexflow run {DATA / case}" in text


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("no_weights")
def test_inspect_as_json_adds_up(case: str, output: Callable[..., str]) -> None:
    facts = json.loads(output("inspect", str(DATA / case), "--json"))
    stored = json.loads((DATA / case / "config.json").read_text())
    groups = facts["groups"]
    total = groups.pop("total")
    assert sum(g["parameters"] for g in groups.values()) == total["parameters"]
    assert sum(stage["parameters"] for stage in facts["stages"]) == total["parameters"]
    assert sum(stage["bytes"] for stage in facts["stages"]) == total["bytes"] == 4 * total["parameters"]
    assert all(stage["flops"] > 0 and stage["ops"] > 0 for stage in facts["stages"])
    assert facts["family"] == stored["model"]
    assert facts["dtypes"] == {"float32": total["parameters"]}
    assert facts["signature"]["views"] == stored["num_views"] == len(facts["cameras"])
    assert facts["config"]["num_encoder_layers"] == stored["vlm"]["depth"]
    assert facts["fits"] and not (facts["missing"] or facts["unknown"] or facts["misshapen"])
    assert facts["never_read"]
    assert not facts["statistics"]["found"] and not facts["tokenizer"]["found"]
    assert facts["command"].endswith(" --processing NAME --stats PATH --tokenizer PATH")


def test_inspect_finds_statistics_and_tokenizer(checkpoint: Path, output: Callable[..., str]) -> None:
    facts = json.loads(output("inspect", str(checkpoint), "--json"))
    assert facts["statistics"]["found"] and "8 state and 7 action" in facts["statistics"]["detail"]
    assert facts["tokenizer"]["found"] and facts["processing"]["found"]
    assert facts["cameras"] == list(demo.CAMERAS)


def test_the_command_that_inspect_prints_runs(
    checkpoint: Path, output: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = json.loads(output("inspect", str(checkpoint), "--json"))["command"]
    for camera, file in zip(demo.CAMERAS, demo.IMAGES.values(), strict=True):
        shutil.copy(file, tmp_path / f"{camera}.png")
    monkeypatch.chdir(tmp_path)
    program, *argv = shlex.split(command)
    assert program == "cortexflow"
    assert "Actions" in output(*argv)


def test_inspect_reports_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(TINY, tmp_path / "c")
    weights = load_file(Path(TINY) / "model.safetensors")
    del weights["model.time_mlp_out.bias"]
    weights["model.more.weight"] = torch.ones(3)
    weights["model.action_out_proj.bias"] = torch.ones(5)
    save_file(weights, tmp_path / "c" / "model.safetensors")
    assert cli.main(["inspect", str(tmp_path / "c"), "--json"]) == 2
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert not facts["fits"]
    assert facts["missing"] == ["time_mlp_out.bias"]
    assert facts["unknown"] == ["more.weight"]
    assert facts["misshapen"] == ["action_out_proj.bias"]
    assert "time_mlp_out.bias" in err and "more.weight" in err and "Traceback" not in err
    assert cli.main(["inspect", str(tmp_path / "c")]) == 2
    assert "1 missing" in capsys.readouterr().out


# ---- compile ---------------------------------------------------------------------------------------


class Plain:
    """The least that a target's executable may be."""

    def __init__(self, *built: object) -> None:
        pass

    def source(self) -> str:
        return ""


ALONE = """
import sys
sys.modules["cortexflow"] = None  # importing it is an error
folder = sys.argv[1]
import runpy
sys.argv = ["policy.py"]
runpy.run_path(folder + "/policy.py", run_name="__main__")
sys.path.insert(0, folder)
import torch
from policy import Policy
from safetensors.torch import load_file, save_file
policy = Policy(load_file(folder + "/weights.safetensors")).eval()
with torch.inference_mode():
    save_file(policy(**load_file(folder + "/inputs.safetensors")), folder + "/results.safetensors")
"""


def inputs_of(compiled: cortexflow.Compiled) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, t in compiled.inputs.items():
        if t.dtype == "f32":
            found[name] = torch.rand(t.shape, generator=generator) * 2 - 1
        elif t.dtype == "bool":
            found[name] = torch.rand(t.shape, generator=generator) < 0.8
        else:
            found[name] = torch.randint(0, 100, t.shape, generator=generator, dtype=torch.int32)
    return found


def test_the_torch_artefact_runs_without_this_package(output: Callable[..., str], tmp_path: Path) -> None:
    signature = ["--views", "2", "--steps", "3", "--chunk", "4", "--prompt", "9", "--batch", "2"]
    text = output("compile", TINY, *signature, "-o", str(tmp_path))
    for title in ("Passes", "Memory", "Cost", "Written", "policy.py", "weights.safetensors", "lower bound"):
        assert title in text
    compiled = cortexflow.compile(TINY, views=2, steps=3, chunk=4, prompt=9, batch=2, progress=False)
    inputs = inputs_of(compiled)
    assert inputs["images"].shape == (2, 2, 28, 28, 3) and inputs["tokens"].shape == (2, 9)
    save_file(inputs, tmp_path / "inputs.safetensors")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "actions (2, 4, 32) torch.float32" in done.stdout
    results = load_file(tmp_path / "results.safetensors")
    assert torch.equal(results["actions"], compiled(**inputs))


def test_the_onnx_artefact_runs_in_plain_onnxruntime(output: Callable[..., str], tmp_path: Path) -> None:
    import onnxruntime

    text = output("compile", TINY, "--target", "onnx", "-o", str(tmp_path / "deep" / "er"))
    file = tmp_path / "deep" / "er" / "policy.onnx"
    assert str(file) in text and "Inputs:" in text
    compiled = cortexflow.compile(TINY, progress=False)
    inputs = inputs_of(compiled)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (actions,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    assert np.abs(actions - compiled(**inputs).numpy()).max() < 1e-4


def test_a_target_without_files_is_an_error(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "plain", Target("plain", TORCH.claims, Plain))
    assert "target 'plain' cannot be saved" in refused("compile", TINY, "--target", "plain", "-o", "never")
    assert not Path("never").exists()


def test_what_compile_writes_can_be_written_by_hand(output: Callable[..., str], tmp_path: Path) -> None:
    output("compile", TINY, "-o", str(tmp_path / "by_command"))
    written = cortexflow.compile(TINY, progress=False).save(tmp_path / "new" / "by_hand")
    assert [file.name for file in written] == ["policy.py", "weights.safetensors"]
    for file in written:
        assert file.read_bytes() == (tmp_path / "by_command" / file.name).read_bytes()


def test_weights_that_share_memory_are_written_apart() -> None:
    x = torch.arange(6.0)
    apart = separate({"a": x, "b": x[:3], "c": torch.ones(2)})
    assert len({t.untyped_storage().data_ptr() for t in apart.values()}) == 3
    assert torch.equal(apart["b"], x[:3])


# ---- run -------------------------------------------------------------------------------------------


def test_run_prints_and_saves_the_actions(checkpoint: Path, output: Callable[..., str], tmp_path: Path) -> None:
    argv = ["run", str(checkpoint), *IMAGES, "--prompt", "pick up the cube", "--state", STATE, "--seed", "4"]
    text = output(*argv, "--save", str(tmp_path / "a.npz"))
    saved = np.load(tmp_path / "a.npz")
    assert saved["actions"].shape == (10, 7) and saved["network"].shape == (10, 32)
    assert f"{saved['actions'][9, 6]:+8.4f}".strip() in text
    for word in ("base.png, 320 x 240 to 84 x 84", "vision_encoder", "transformer_decoder", "a6", "Latency"):
        assert word in text
    # The statistics of the demo scale the actions: value = (x + 1) * (q99 - q01) / 2 + q01.
    q01, q99 = (np.asarray(demo.STATS["actions"][k], np.float32).astype(np.float64) for k in ("q01", "q99"))
    expected = (saved["network"][:, :7].astype(np.float64) + 1) * (q99 - q01) / 2 + q01
    assert np.abs(saved["actions"] - expected).max() < 1e-9
    from PIL import Image

    if importlib.util.find_spec("matplotlib"):
        assert f"wrote {tmp_path / 'a.png'}" in text
        with Image.open(tmp_path / "a.png") as plot:
            assert plot.width > 500 and len(plot.convert("RGB").getcolors(1 << 20) or []) > 10
    output(*argv, "--target", "onnx", "--save", str(tmp_path / "b"))
    other = np.load(tmp_path / "b.npz")
    assert np.array_equal(other["noise"], saved["noise"])
    assert np.abs(other["network"] - saved["network"]).max() < 1e-4


def test_run_saves_without_matplotlib(
    checkpoint: Path, output: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "plot_actions", lambda actions, path: False)
    argv = ["run", str(checkpoint), *IMAGES, "--prompt", "pick", "--state", STATE, "--steps", "1"]
    text = output(*argv, "--save", str(tmp_path / "a.npz"))
    assert "a.npz" in text and ".png" not in text.split("Latency")[1]
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_every_input_of_run_reaches_the_policy(checkpoint: Path, output: Callable[..., str], tmp_path: Path) -> None:
    def act(*more: str, images: list[str] = IMAGES, prompt: str = "pick up", state: str = STATE) -> np.ndarray:
        argv = [str(checkpoint), *images, "--prompt", prompt, f"--state={state}", "--steps", "2"]
        output("run", *argv, "--save", str(tmp_path / "a.npz"), "--quiet", *more)
        return np.load(tmp_path / "a.npz")["network"]

    base = act()
    assert np.array_equal(base, act())
    swapped = [IMAGES[0], f"wrist={demo.IMAGES['base']}", IMAGES[2], f"base={demo.IMAGES['wrist']}"]
    others = [act("--seed", "1"), act(images=swapped), act(images=IMAGES[:2]), act(prompt="put down")]
    others += [act(state=STATE.replace("0.98", "0.1"))]
    assert all(np.abs(base - other).max() > 1e-3 for other in others)


def test_run_with_openpis_files(checkpoint: Path, output: Callable[..., str], tmp_path: Path) -> None:
    """π0 from openpi: the preset is named, the statistics lie in assets/, the network reads the state."""
    home = tmp_path / "c"
    shutil.copytree(DATA / "pi0_tiny", home)
    (home / "assets" / "mine").mkdir(parents=True)
    (home / "assets" / "mine" / "norm_stats.json").write_text(json.dumps({"norm_stats": demo.STATS}))
    argv = ["run", str(home), *IMAGES, "--prompt", "pick", "--processing", "pi0_libero", "--tokenizer", str(checkpoint)]

    def act(state: str) -> dict[str, np.ndarray]:
        assert "right_wrist_0_rgb  absent" in output(*argv, "--state", state, "--save", str(tmp_path / "a.npz"))
        return dict(np.load(tmp_path / "a.npz"))

    found = act(STATE)
    mean, std = (np.asarray(demo.STATS["actions"][k]) for k in ("mean", "std"))
    expected = found["network"][:, :7] * (std + 1e-6) + mean
    expected[:, :6] += demo.STATE[:6]  # the preset's actions are relative to the state
    assert np.abs(found["actions"] - expected).max() < 1e-6
    assert np.abs(act(STATE.replace("0.98", "0.1"))["network"] - found["network"]).max() > 1e-3


@pytest.fixture
def fixed_prompt(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A π0 file of realtime-vla with one prompt, and the arguments that it needs."""
    original, config = open_checkpoint(DATA / "pi0_tiny"), json.loads((DATA / "pi0_tiny" / "config.json").read_text())
    stored = to_realtime_vla({name: original.load_checked(name) for name in original.tensors}, config)
    torch.save(stored, tmp_path / "converted.pt")
    told = {"vision_num_heads": config["vision"]["num_heads"], "num_views": config["num_views"]}
    told |= {"chunk_size": config["action_horizon"]}
    monkeypatch.setattr(arguments, "open_checkpoint", partial(open_checkpoint, config_overrides=told))
    robot = ["--processing", "pi0_libero", "--stats", str(tmp_path / "norm_stats.json"), "--state", STATE]
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": demo.STATS}))
    return [str(tmp_path / "converted.pt"), *IMAGES, *robot]


def test_a_fixed_prompt_needs_no_tokenizer(
    fixed_prompt: list[str], output: Callable[..., str], refused: Callable[..., str], tmp_path: Path
) -> None:
    argv = ["run", *fixed_prompt, "--save", str(tmp_path / "a.npz")]
    assert f"fixed, {len(PROMPT)} of {len(PROMPT)} tokens" in output(*argv)
    small = np.load(tmp_path / "a.npz")["network"]
    assert f"fixed, {len(PROMPT)} of 9 tokens" in output(*argv, "--prompt-length", "9")
    assert np.abs(np.load(tmp_path / "a.npz")["network"] - small).max() < 1e-4
    facts = json.loads(output("inspect", fixed_prompt[0], "--json"))
    assert facts["tokenizer"]["found"] and "--prompt" not in facts["command"]
    message = refused("run", *fixed_prompt, "--prompt", "pick up the cube")
    assert f"one prompt, of {len(PROMPT)} tokens" in message and "'pick up the cube'" in message


@pytest.mark.parametrize(
    ("name", "cameras", "found"),
    [
        ("base", ("base_0_rgb", "left_wrist_0_rgb"), "base_0_rgb"),
        ("wrist", ("base_0_rgb", "left_wrist_0_rgb"), "left_wrist_0_rgb"),
        ("wrist", ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"), "left_wrist_0_rgb"),
        ("right_wrist", ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"), "right_wrist_0_rgb"),
        ("1", ("top", "side"), "side"),
        ("image", ("image", "image2"), "image"),
    ],
)
def test_cameras_are_found_by_part_of_their_name(name: str, cameras: tuple[str, ...], found: str) -> None:
    assert find_camera(name, cameras) == found


@pytest.mark.parametrize("name", ["rgb", "nose", "", "2"])
def test_a_camera_that_is_not_one_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"base_0_rgb, left_wrist_0_rgb"):
        find_camera(name, ("base_0_rgb", "left_wrist_0_rgb"))


def test_lerobots_own_files_decide_the_processing(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "c"
    shutil.copytree(checkpoint, copy)
    for file in copy.glob("policy_*processor.json"):
        file.write_text(file.read_text().replace("QUANTILES", "MEAN_STD"))
    opened = open_checkpoint(copy)
    signature = cortexflow.Signature.of(opened.config)
    rules = load_frontend(opened, signature).processing
    assert (rules.norm, rules.eps, rules.resize, rules.output_dim) == ("mean_std", "lerobot", "lerobot", 7)
    assert (rules.views, rules.image_size, rules.prompt_length, rules.action_dim) == (2, 84, 64, 32)
    named = load_frontend(opened, signature, processing="pi05_libero").processing
    assert (named.eps, named.resize, named.state_in_prompt) == ("openpi", "pil", False)
    with pytest.raises(ConfigError, match="pi05_libero"):
        load_frontend(opened, signature, processing="pi0_libero")


# ---- dump and diff ---------------------------------------------------------------------------------


def unnumbered(func: Func) -> str:
    """A listing without labels: equal for functions that differ in names alone."""
    for block in func.block.blocks():
        for value in (*block.args, *(v for op in block.ops for v in op.outputs)):
            value.name = ""
    return dump(func)


@pytest.mark.usefixtures("no_weights")
def test_dump_prints_what_compile_has(output: Callable[..., str], tmp_path: Path) -> None:
    text = output("dump", TINY)
    assert "fused.linear" in text
    assert text == dump(parse(text))
    assert "fused." not in output("dump", TINY, "--after", "input")
    assert output("dump", TINY, "--after", "0") == output("dump", TINY, "--after", "input")
    assert output("dump", TINY, "--after", "dce#1") != output("dump", TINY, "--after", "dce")
    part = output("dump", TINY, "--after", "fuse", "--stage", "vision_encoder")
    assert part.startswith("func @vision_encoder(") and part.count("func @") == 1
    assert "bf16[" in output("dump", TINY, "--dtype", "bfloat16", "--after", "input")
    assert "f32[3,2,28,28,3]" in output("dump", TINY, "--batch", "3", "--views", "2", "--after", "input")
    output("dump", TINY, "--after", "fuse", "-o", str(tmp_path / "f.ir"))
    assert (tmp_path / "f.ir").read_text() == output("dump", TINY, "--after", "fuse")


@pytest.mark.usefixtures("no_weights")
def test_dump_writes_every_pass_into_a_folder(output: Callable[..., str], tmp_path: Path) -> None:
    output("dump", TINY, "-o", str(tmp_path / "all"))
    files = sorted(p.name for p in (tmp_path / "all").iterdir())
    assert files[0] == "00_input.ir" and any(name.endswith("_fuse.ir") for name in files)
    assert (tmp_path / "all" / files[-1]).read_text() == output("dump", TINY)
    output("dump", TINY, "--stage", "prepare", "-o", str(tmp_path / "one"))
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert 0 < len(names) < len(files), "prepare is there only after hoist"
    assert all((tmp_path / "one" / name).read_text().startswith("func @prepare(") for name in names)


@pytest.mark.usefixtures("no_weights")
def test_diff_shows_what_a_pass_did_and_no_renumbering(output: Callable[..., str]) -> None:
    argv = ["diff", TINY, "canonicalize", "fuse", "--stage", "vision_encoder"]
    lines = output(*argv).splitlines()
    assert lines[0] == "--- @vision_encoder after canonicalize" and lines[1] == "+++ @vision_encoder after fuse"
    added = [line for line in lines if line.startswith("+ ")]
    removed = [line for line in lines if line.startswith("- ")]
    assert added and all("fused." in line for line in added), "only fusions are new"
    assert len(removed) > len(added)
    assert not any("weight(" in line for line in added + removed)
    assert "\033[" not in "".join(lines)


@pytest.mark.usefixtures("no_weights")
def test_diff_of_a_pass_with_itself(output: Callable[..., str]) -> None:
    assert output("diff", TINY, "fuse", "fuse") == "no difference between fuse and fuse\n"
    text = output("diff", TINY, "merge", "hoist")
    assert "+func @prepare(" in text, "a function that is new"
    assert "@vision_encoder" in text and "@transformer_decoder" in text


def test_diff_is_coloured_on_a_terminal(output: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    argv = ("diff", TINY, "canonicalize", "fuse", "--stage", "vision_encoder")
    assert "\033[32m+" in output(*argv)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033[" not in output(*argv)


@pytest.mark.parametrize("case", ["pi05_tiny", "pi0_tiny2"])
def test_names_of_a_diff_are_the_same_program(case: str) -> None:
    """The second listing is renamed, and nothing else: every value still has one name of its own."""
    args = cli.parser().parse_args(["dump", str(DATA / case), "--quiet"])
    steps = lowered(args)
    for before, after in itertools.pairwise(steps):
        for name, func in after.module.funcs.items():
            old = dump(before.module.funcs[name]).splitlines() if name in before.module.funcs else []
            new = dump(func).splitlines()
            shown = renamed(old, new)
            names = [v for line in shown for v in defined(line)]
            assert len(names) == len(set(names))
            again, plain = parse("\n".join(shown)).funcs[name], parse("\n".join(new)).funcs[name]
            assert unnumbered(again) == unnumbered(plain)
            if after.count == 0:
                assert shown == old, f"{after.name} did nothing, and a difference is shown"


def test_an_inserted_value_shifts_no_other_line() -> None:
    old = ["  %1 = exp(%x) : f32[2]", "  %2 = sin(%1) : f32[2]", "  %gate_1 = cos(%2) : f32[2]", "  return(%gate_1)"]
    new = [
        "  %1 = abs(%x) : f32[3]",
        "  %2 = exp(%x) : f32[2]",
        "  %3 = sin(%2) : f32[2]",
        "  %gate_2 = cos(%3) : f32[2]",
        "  return(%gate_2)",
    ]
    changes = [line for line in difflib.ndiff(old, renamed(old, new)) if line[0] in "+-"]
    assert changes == ["+   %new1 = abs(%x) : f32[3]"]


# ---- errors ----------------------------------------------------------------------------------------


def test_arguments_that_argparse_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["fly"], ["inspect"], ["compile", TINY], ["run", TINY, "--view", "2"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 2
    assert "usage: cortexflow" in capsys.readouterr().err
    for argv in (
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in ("inspect", "compile", "run", "bench", "doctor", "diff")),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0
    assert "example" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["inspect", "/nowhere/at/all"], ["/nowhere/at/all", "nothing at this path"]),
        (["dump", TINY, "--after", "fuze"], ["'fuze'", "canonicalize#1 to", "fuse"]),
        (["dump", TINY, "--after", "dce#9"], ["'dce#9'", "dce#1 to"]),
        (["dump", TINY, "--stage", "middle"], ["'middle'", "vision_encoder"]),
        (["dump", TINY, "--stage", "middle", "-o", "never"], ["'middle'", "vision_encoder"]),
        (["dump", TINY, "--target", "abacus"], ["abacus", "torch"]),
        (["dump", TINY, "--dtype", "int4"], ["int4", "bfloat16"]),
        (["dump", TINY, "--views", "0"], ["views", "positive", "0"]),
        (["diff", TINY, "fuse", "99"], ["'99'", "numbers from 0"]),
        (["diff", TINY, "fuse", "cse", "--stage", "middle"], ["'middle'", "vision_encoder"]),
        (["compile", TINY, "--target", "abacus", "-o", "never"], ["abacus", "torch"]),
        (["compile", TINY, "--device", "moon", "-o", "never"], ["moon", "cpu"]),
        (["compile", TINY, "--dtype", "int4", "-o", "never"], ["int4", "bfloat16"]),
        (["run", TINY, "--prompt", "x", "--image", "base"], ["CAMERA=FILE", "'base'"]),
        (["run", TINY, "--prompt", "x", "--image", "a=b", "--image", "a=c"], ["'a'", "twice"]),
        (["run", TINY, "--prompt", "x", "--state", "1,two"], ["--state", "1,two"]),
        (["run", TINY, "--prompt", "x"], ["policy_preprocessor.json"]),
        (["run", TINY, "--prompt", "x", "--processing", "mine"], ["'mine'", "pi05_droid"]),
        (["run", TINY, "--prompt", "x", "--processing", "pi0_droid"], ["pi0_droid", "pi05_droid"]),
        (["run", TINY, "--prompt", "x", "--processing", "pi05_droid"], ["tokenizer.model", "no tokenizer file"]),
        (["run", str(DATA / "pi0_tiny"), "--prompt", "x"], ["openpi", "--processing", "pi0_libero"]),
    ],
)
def test_errors_name_what_was_expected_and_found(
    argv: list[str], words: list[str], refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(*argv)
    for word in words:
        assert word in message
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--state", STATE], ["None"]),
        ([*IMAGES], ["state", "neither"]),
        ([*IMAGES, "--state", "1,2"], ["state", "8", "2"]),
        (["--image", "nose=x.png", "--state", STATE], ["'nose'", "base_0_rgb, left_wrist_0_rgb"]),
        (["--image", "base=x.png", "--state", STATE], ["x.png"]),
        (["--image", f"base={DATA / 'pi05_tiny' / 'config.json'}", "--state", STATE], ["picture"]),
        ([*IMAGES, "--image", f"0={demo.IMAGES['base']}", "--state", STATE], ["base_0_rgb", "two"]),
        ([*IMAGES, "--state", STATE, "--prompt-length", "5"], ["prompt", "at most 5"]),
        ([*IMAGES, "--state", STATE, "--tokenizer", "/no/tokenizer"], ["/no/tokenizer", "does not exist"]),
        ([*IMAGES, "--state", STATE, "--stats", "/no/stats"], ["/no/stats", "does not exist"]),
    ],
)
def test_bad_observations_are_refused_before_compiling(
    checkpoint: Path,
    argv: list[str],
    words: list[str],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        run_command, "compiled", lambda *args: pytest.fail("compiled for an observation that is no good")
    )
    message = refused("run", str(checkpoint), "--prompt", "pick up the cube", *argv)
    for word in words:
        assert word in message


def test_a_corrupt_file_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    copy = tmp_path / "c"
    shutil.copytree(TINY, copy)
    whole = (copy / "model.safetensors").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\xff" * 100):
        (copy / "model.safetensors").write_bytes(damaged)
        for command in (["inspect"], ["dump"], ["compile", "-o", str(tmp_path / "out")]):
            message = refused(command[0], str(copy), *command[1:])
            assert "model.safetensors" in message and "safetensors file" in message
    assert not (tmp_path / "out").exists()


def test_nan_in_the_weights_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    shutil.copytree(TINY, tmp_path / "c")
    weights = load_file(Path(TINY) / "model.safetensors")
    weights["model.action_out_proj.bias"][3] = torch.nan
    save_file(weights, tmp_path / "c" / "model.safetensors")
    message = refused("compile", str(tmp_path / "c"), "-o", str(tmp_path / "out"))
    assert "action_out_proj.bias" in message and "1 NaN" in message


def test_a_pickle_needs_consent(tmp_path: Path, refused: Callable[..., str]) -> None:
    import pickle

    (tmp_path / "c.pkl").write_bytes(pickle.dumps({"vision_x": [1.0]}))
    assert "allow_pickle" in refused("inspect", str(tmp_path / "c.pkl"))
    assert "allow_pickle=True" not in refused("inspect", str(tmp_path / "c.pkl"), "--allow-pickle")


def test_a_folder_that_cannot_be_written(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in refused("dump", TINY, "-o", str(tmp_path / "file"))


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_command, "opened", stop)
    assert cli.main(["inspect", TINY]) == 130
    assert capsys.readouterr().err == "cortexflow: interrupted\n"


def test_errors_that_nobody_explained_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(inspect_command, "opened", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["inspect", TINY])


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dump", TINY, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main(["dump", TINY]) == 0
    assert capsys.readouterr().err.startswith("cortexflow: ")


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m cortexflow dump {shlex.quote(TINY)} | head -1"
    root = Path(__file__).parent.parent
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, cwd=root)
    assert done.stdout.startswith("module {") and "Traceback" not in done.stderr and "Error" not in done.stderr
