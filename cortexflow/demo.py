"""`make demo`: a checkpoint on disk, two camera images, a prompt and a robot's state become actions.

Without `--checkpoint` it first writes a small π0.5 with random weights in LeRobot's format, and then
takes the road that any checkpoint takes: open, preprocess, compile for each target, act, compare.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cortexflow
from cortexflow.checkpoints import Checkpoint, open_checkpoint, save_lerobot
from cortexflow.cli import guarded
from cortexflow.cli.arguments import PROMPT, add_frontend, frontend_of, numbers
from cortexflow.cli.run import observed
from cortexflow.cli.text import FAMILIES, FORMATS, action_table, heading, pairs, size_text, table
from cortexflow.ir import Module
from cortexflow.ir import run as run_func
from cortexflow.ir.interpreter import count_runs
from cortexflow.models import ModelConfig, Signature, VLAModelType, create_model
from cortexflow.observation import (
    model_inputs,
    network_actions,
    network_answer,
    robot_actions,
    typical_state,
)
from cortexflow.processing import save_stats
from cortexflow.processing.stats import make_stats

ASSETS = Path(__file__).parent / "demo_assets"
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")
IMAGES = {"base": ASSETS / "base.png", "wrist": ASSETS / "wrist.png"}
TARGETS = ("torch", "onnx")
KEPT = 2_000_000_000  # bytes of weights that the interpreter may keep in memory

# A π0.5 in everything but size.
CONFIG = ModelConfig(
    model_type=VLAModelType.PI05,
    vision_encoder_dim=96,
    vision_num_layers=3,
    vision_num_heads=4,
    vision_mlp_dim=224,
    patch_size=14,
    image_size=84,
    encoder_dim=160,
    encoder_mlp_dim=512,
    num_encoder_layers=3,
    decoder_dim=96,
    decoder_mlp_dim=256,
    num_decoder_layers=3,
    num_heads=8,
    num_kv_heads=1,
    head_dim=32,
    vocab_size=512,
    max_token_len=64,
    num_views=2,
    chunk_size=10,
    num_diffusion_steps=10,
)

# A robot as LIBERO has it: gripper position (m), axis-angle (rad), two finger joints; actions are
# three shifts, three turns and the gripper.
STATE = (-0.05, 0.03, 0.98, 3.08, 0.06, -0.10, 0.035, -0.035)
STATS = {
    "state": {
        "mean": [-0.05, 0.03, 0.76, 2.97, -0.22, -0.13, 0.027, -0.027],
        "std": [0.11, 0.15, 0.38, 0.34, 0.91, 0.33, 0.014, 0.014],
        "q01": [-0.42, -0.31, 0.01, 1.90, -2.53, -1.30, 0.001, -0.040],
        "q99": [0.18, 0.33, 1.27, 3.71, 2.01, 0.80, 0.040, -0.001],
    },
    "actions": {
        "mean": [0.063, 0.087, -0.090, 0.001, 0.006, -0.005, -0.049],
        "std": [0.336, 0.378, 0.445, 0.039, 0.063, 0.078, 0.999],
        "q01": [-0.75, -0.80, -0.94, -0.11, -0.17, -0.18, -1.00],
        "q99": [0.94, 0.86, 0.94, 0.13, 0.18, 0.27, 1.00],
    },
}
CORPUS = (
    PROMPT,
    "put the blue bowl in the drawer and close it",
    "open the top drawer of the cabinet",
    "move the green block to the left of the red block",
    "fold the towel with both arms, then wait",
    "Task: stack the cups, State: 0 1 2 3 4 5 6 7 8 9 10 64 127 128 200 255 -1;\nAction: ",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,:;!?-'\"()",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser("python -m cortexflow.demo", description="From a checkpoint to robot actions.")
    parser.add_argument("--checkpoint", metavar="DIR", help="a real one; without it a small random π0.5 is written")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="default demo-output")
    parser.add_argument("--prompt", metavar="TEXT", help=f"the instruction (default: {PROMPT})")
    parser.add_argument("--state", metavar="X,Y,...", help="the robot's state (default: a typical one)")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_frontend(parser)
    args = parser.parse_args(argv)
    return guarded(lambda: _demo(args))


def _demo(args: argparse.Namespace) -> int:
    progress = not args.quiet
    if args.checkpoint is None:
        home = write_checkpoint(args.output / "checkpoint")
        print("CortexFlow demo: a small π0.5 with random weights, from its checkpoint to robot actions")
    else:
        home = Path(args.checkpoint)
        print(f"CortexFlow demo: {home}, from its checkpoint to robot actions")
    checkpoint = open_checkpoint(home)
    signature = Signature.of(checkpoint.config)
    module = create_model(checkpoint.config).build(signature)
    _section("Checkpoint", _checkpoint(checkpoint, home))

    frontend = frontend_of(args, checkpoint, signature)
    given = numbers(args.state)
    state = np.asarray(given or (STATE if args.checkpoint is None else typical_state(frontend)))
    # Pictures for the cameras there are: a third one is absent, which the policy knows how to handle.
    images = dict(zip(frontend.cameras, IMAGES.values(), strict=False))
    prompt = args.prompt or (None if checkpoint.fixed_prompt else PROMPT)
    inputs = model_inputs(frontend, module.inputs, images=images, prompt=prompt, state=state, seed=args.seed)
    _section("Observation", observed(frontend, inputs, images, prompt, state))

    runs = {target: _run(target, checkpoint, inputs, args.output, progress) for target in TARGETS}
    reference = _interpret(module, checkpoint, inputs, progress)
    actions = robot_actions(frontend, network_answer(frontend, runs[TARGETS[0]].results), state)
    _section(f"Actions ({len(actions)} steps, in the robot's units)", action_table(actions))
    if args.checkpoint is None:
        print("\nThe weights are random, so this robot would not get far; the road is the real one.")
    _section("Largest difference of the actions, normalised, in float32", _differences(runs, reference))
    _section("Latency (median, on this CPU)", _latency(runs))
    _section("Memory", _memory(runs))
    _section("Left behind", _left(args, home, actions))
    return 0


def _section(title: str, text: str) -> None:
    print(f"{heading(title)}\n{text}", flush=True)


# ---- the checkpoint --------------------------------------------------------------------------------


def write_checkpoint(directory: Path, seed: int = 0) -> Path:
    """A small π0.5 as LeRobot saves one: weights, config.json, statistics; and a tokenizer beside them."""
    directory.mkdir(parents=True, exist_ok=True)
    shapes = create_model(CONFIG).get_weight_shapes()
    save_lerobot(directory, random_weights(shapes, seed), CONFIG, cameras=CAMERAS)
    save_stats(make_stats(STATS), directory, norm="quantile")
    (directory / "tokenizer.model").write_bytes(train_tokenizer(CONFIG.vocab_size))
    return directory


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Weights that leave nothing without effect: unit gain in products, norms and biases away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            x = torch.randn(shape, generator=generator) * 0.2
            layer_norm = "layer_norm" in name or "post_layernorm" in name
            x += 1.0 if layer_norm and name.endswith("weight") else 0.0  # Gemma's norms store w of 1 + w
        else:
            fan_in = 1 if "position_embedding" in name else prod(shape[1:])
            gain = 0.3 if ".dense." in name or "position_embedding" in name else 1.0
            x = torch.randn(shape, generator=generator) * gain * fan_in**-0.5
        weights[name] = x
    return weights


def train_tokenizer(vocabulary: int) -> bytes:
    """A small sentencepiece model with PaliGemma's special ids, of at most `vocabulary` pieces."""
    import io

    import sentencepiece

    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=target,
        model_type="bpe",
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["\n"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return target.getvalue()


def _checkpoint(checkpoint: Checkpoint, home: Path) -> str:
    c, size = checkpoint.config, checkpoint.sizes()["total"]
    family = VLAModelType(c.model_type).value
    what = f"{FAMILIES[family]} in {FORMATS[checkpoint.format]}'s format"
    towers = (
        f"image tower {c.vision_num_layers} x {c.vision_encoder_dim}, prefix {c.num_encoder_layers} x {c.encoder_dim}, "
        f"action expert {c.num_decoder_layers} x {c.decoder_dim}"
    )
    return pairs(
        {
            "where": str(home),
            "what": f"{what}, {size.params:,} parameters, {size_text(size.nbytes)}",
            "network": towers,
            "actions": f"{c.chunk_size} at a time, by {c.num_diffusion_steps} steps of the flow",
        }
    )


# ---- running ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What one target did: times in milliseconds, memory in bytes."""

    results: Tensor | dict[str, Tensor]
    seconds: float  # to compile
    stages: dict[str, float]
    whole: float
    weights: int
    arena: int
    lower_bound: int


def _run(target: str, checkpoint: Checkpoint, inputs: Mapping[str, Tensor], output: Path, progress: bool) -> Run:
    """Compile for a target, leave the IR of every pass, act, and measure; the policy is dropped afterwards."""
    start = time.perf_counter()
    with dumping(output / "ir" / target):
        compiled = cortexflow.compile(checkpoint, target, progress=progress)
    seconds = time.perf_counter() - start
    results = compiled(**inputs)  # warms up, too
    runs: list[float] = []
    with tqdm(desc=f"running {target}", unit="run", delay=1.0, leave=False, disable=not progress) as bar:
        while not runs or (sum(runs) < 1e3 and len(runs) < 25):
            start = time.perf_counter()
            compiled(**inputs)
            runs.append((time.perf_counter() - start) * 1e3)
            bar.update(1)
    stages = compiled.stage_times(len(runs), **inputs)
    plan, whole = compiled.plan, sorted(runs)[len(runs) // 2]
    return Run(results, seconds, stages, whole, compiled.weight_bytes, plan.peak, plan.lower_bound)


@contextmanager
def dumping(folder: Path) -> Iterator[None]:
    """Compilations inside write the IR after each pass to the folder, in place of what one left there before."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9]_*"):
        old.unlink()
    before = os.environ.get("CORTEXFLOW_DUMP")
    os.environ["CORTEXFLOW_DUMP"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CORTEXFLOW_DUMP"]
        else:
            os.environ["CORTEXFLOW_DUMP"] = before


def _interpret(module: Module, checkpoint: Checkpoint, inputs: Mapping[str, Tensor], progress: bool) -> Tensor:
    """The module as it came from the model, before any pass, op by op in float32."""
    weights: Mapping[str, Tensor] = cortexflow.load_model(checkpoint)[1]
    if checkpoint.sizes()["total"].nbytes < KEPT:  # else they are read again at every step of the flow
        weights = dict(weights)
    values: dict[str, Any] = dict(inputs)
    total = sum(count_runs(stage.block) for stage in module.stages)
    with tqdm(total=total, desc="interpreting", unit="op", delay=1.0, leave=False, disable=not progress) as bar:
        for stage in module.stages:
            given = {name: values[name] for name in stage.args}
            values |= run_func(stage, given, weights, torch.float32, lambda op, results: bar.update(1))
    result: Tensor = values[next(iter(module.outputs))]
    return result


# ---- results ---------------------------------------------------------------------------------------


def _differences(runs: Mapping[str, Run], reference: Tensor) -> str:
    chunks = {"interpreter": reference, **{name: network_actions(run.results) for name, run in runs.items()}}
    names = list(chunks)
    both = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return table(None, [(f"{a} - {b}", f"{(chunks[a] - chunks[b]).abs().max():.1e}") for a, b in both])


def _latency(runs: Mapping[str, Run]) -> str:
    first = next(iter(runs.values()))
    rows = [(stage, *(f"{run.stages[stage]:.2f} ms" for run in runs.values())) for stage in first.stages]
    rows += [("whole policy", *(f"{run.whole:.2f} ms" for run in runs.values()))]
    rows += [("to compile", *(f"{run.seconds:.2f} s" for run in runs.values()))]
    return table(("", *runs), rows)


def _memory(runs: Mapping[str, Run]) -> str:
    rows = [
        ("weights, prepared", *(size_text(run.weights) for run in runs.values())),
        ("temporaries, as planned in one arena", *(size_text(run.arena) for run in runs.values())),
        ("least that any plan needs", *(size_text(run.lower_bound) for run in runs.values())),
        ("arena / least", *(f"{run.arena / max(run.lower_bound, 1):.3f}" for run in runs.values())),
    ]
    return table(("", *runs), rows)


def _left(args: argparse.Namespace, home: Path, actions: np.ndarray) -> str:
    rows = {"checkpoint": f"{home}/"} if args.checkpoint is None else {}
    for target in TARGETS:
        folder = args.output / "ir" / target
        count = len(list(folder.glob("*.ir")))
        rows[f"IR for {target}"] = f"{folder}/  ({count} listings, one after each pass, and the source)"
    plot = args.output / "actions.png"
    if plot_actions(actions, plot):
        rows["plot"] = str(plot)
    return pairs(rows) + f"\n\nNext: cortexflow diff {home} hoist fuse --stage transformer_decoder"


def plot_actions(actions: np.ndarray, path: Path) -> bool:
    """A line for each value of the chunk, in a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps, values = actions.shape
    columns = min(4, values)
    rows = -(-values // columns)
    figure = Figure(figsize=(2.6 * columns, 1.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i in range(values):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.plot(range(steps), actions[:, i], marker=".", color="#c8322d")
        axes.axhline(0, color="#999999", linewidth=0.6)
        axes.set_title(f"a{i}", fontsize=9)
        axes.tick_params(labelsize=7)
    figure.supxlabel("step of the chunk", fontsize=9)
    figure.savefig(path, dpi=110)
    return True


if __name__ == "__main__":
    sys.exit(main())
