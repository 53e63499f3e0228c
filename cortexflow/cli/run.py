"""`cortexflow run`: one observation through the whole policy, from pictures to the robot's actions."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cortexflow.cli.arguments import compiled, frontend_of, images, numbers, opened, say, signature_of
from cortexflow.cli.text import action_table, heading, pairs, table
from cortexflow.models import create_model
from cortexflow.observation import Frontend, find_camera, model_inputs, network_answer, robot_actions
from cortexflow.processing.arrays import to_numpy
from cortexflow.processing.images import METHODS


def execute(args: argparse.Namespace) -> int:
    """One observation in, actions and times out."""
    from cortexflow.demo import plot_actions  # which uses this module

    pictures, state = images(args.image), numbers(args.state)
    checkpoint = opened(args)
    signature = signature_of(args, checkpoint)
    frontend = frontend_of(args, checkpoint, signature)
    types = create_model(checkpoint.config).build(signature).inputs
    inputs = model_inputs(frontend, types, images=pictures, prompt=args.prompt, state=state, seed=args.seed)
    policy = compiled(args, checkpoint, signature)
    answer = network_answer(frontend, policy(**inputs)).cpu()
    actions = robot_actions(frontend, answer, state)
    print(heading("Observation"))
    print(observed(frontend, inputs, pictures, args.prompt, state))
    print(heading("Actions"))
    print(action_table(actions))
    print(heading(f"Latency ({args.target}, {args.device}, median of 5)"))
    times = policy.stage_times(5, **inputs)
    rows = [(name, f"{ms:.2f} ms") for name, ms in (*times.items(), ("sum", sum(times.values())))]
    print(table(None, rows))
    if args.save:
        path = args.save if args.save.suffix == ".npz" else args.save.with_name(args.save.name + ".npz")
        saved = {"actions": actions, "network": to_numpy(answer[0])}
        kind = "token ids" if frontend.processing.action_bins else "normalised"
        words = f"actions (the robot's units), network ({kind})"
        if "noise" in inputs:
            saved["noise"], words = inputs["noise"][0].numpy(), words + ", noise"
        np.savez(path, **saved)  # type: ignore[arg-type]
        print(f"\nwrote {path}: {words}")
        plot = path.with_suffix(".png")
        if plot_actions(actions, plot):
            print(f"wrote {plot}: the chunk, a picture for each value")
        else:
            say(args, "no plot: matplotlib is not installed")
    return 0


def observed(
    frontend: Frontend,
    inputs: Mapping[str, torch.Tensor],
    pictures: Mapping[str, str | Path],
    prompt: str | None,
    state: Any,
) -> str:
    """Which file went to which camera, how much of the bucket the prompt fills, and the state."""
    from PIL import Image

    rows = dict.fromkeys(frontend.cameras, "absent")
    for name, file in pictures.items():
        with Image.open(file) as picture:
            size = f"{picture.width} x {picture.height}"
        to = f"{frontend.processing.image_size} x {frontend.processing.image_size}"
        how = "with padding" if frontend.processing.resize in METHODS else "stretched"
        rows[find_camera(name, frontend.cameras)] = f"{Path(file).name}, {size} to {to} {how}"
    tokens, slots = int(inputs["token_mask"].sum()), inputs["token_mask"].shape[1]
    rows["prompt"] = f"{'fixed' if prompt is None else repr(prompt)}, {tokens} of {slots} tokens"
    if state is not None:
        rows["state"] = ", ".join(f"{x:.4g}" for x in state)
    return pairs(rows)
