"""Arguments that several commands share: adding them, and what they say of checkpoint, signature and observation."""

from __future__ import annotations

import argparse
import dataclasses
import sys

import cortexflow
from cortexflow.checkpoints import Checkpoint, open_checkpoint
from cortexflow.codegen import TARGETS
from cortexflow.compiled import Compiled
from cortexflow.errors import InputError
from cortexflow.models import Signature
from cortexflow.observation import Frontend, load_frontend

PROMPT = "pick up the red cube and put it on the plate"


def add_target(sub: argparse.ArgumentParser) -> None:
    """What to compile for, and where it runs."""
    _add_lowered(sub)
    sub.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N")


def _add_lowered(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--target", default="torch", metavar="NAME", help=f"{', '.join(TARGETS)} (default torch)")
    sub.add_argument("--dtype", default="float32", help="of the large products: float32, bfloat16, float16")


def add_signature(sub: argparse.ArgumentParser, *names: str) -> None:
    """The extents of a policy; `names` are further ones of `--prompt-length`."""
    sub.add_argument("--views", type=int, metavar="N", help="camera views (default: the checkpoint's)")
    sub.add_argument(
        *names, "--prompt-length", dest="bucket", type=int, metavar="N", help="tokens of the prompt bucket"
    )
    sub.add_argument("--chunk", type=int, metavar="N", help="actions per prediction")
    sub.add_argument("--steps", type=int, metavar="N", help="steps of the flow")


def add_lowering(sub: argparse.ArgumentParser) -> None:
    """What to show the IR of."""
    sub.add_argument("--stage", metavar="NAME", help="one function only (vision_encoder, ...)")
    _add_lowered(sub)
    add_signature(sub, "--prompt")
    sub.add_argument("--batch", type=int, default=1, metavar="N", help="observations per call (default 1)")


def add_observation(sub: argparse.ArgumentParser) -> None:
    """What the robot sees, feels and is told."""
    sub.add_argument("--image", action="append", default=[], metavar="CAMERA=FILE", help="a picture; once per camera")
    sub.add_argument("--prompt", metavar="TEXT", help="the instruction; none where the file holds a fixed one")
    sub.add_argument("--state", metavar="X,Y,...", help="the robot's state, in its units")
    add_frontend(sub)


def add_frontend(sub: argparse.ArgumentParser) -> None:
    """Arguments for what a checkpoint's directory may not tell."""
    sub.add_argument("--processing", metavar="NAME", help="the robot's preset (LeRobot checkpoints tell their own)")
    sub.add_argument("--tokenizer", metavar="PATH", help="sentencepiece model (default: in the checkpoint's directory)")
    sub.add_argument(
        "--stats", metavar="PATH", help="normalisation statistics (default: in the checkpoint's directory)"
    )
    sub.add_argument("--asset", metavar="ID", help="whose statistics, where there are several (OpenVLA's unnorm_key)")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default 0)")


def numbers(text: str | None, name: str = "--state") -> list[float] | None:
    """Numbers between commas or blanks."""
    if text is None:
        return None
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"{name}: expected numbers between commas, found {text!r}") from None


def images(given: list[str]) -> dict[str, str]:
    """Files by camera, from CAMERA=FILE."""
    found: dict[str, str] = {}
    for text in given:
        name, separator, file = text.partition("=")
        if not (separator and name and file):
            raise InputError(f"--image: expected CAMERA=FILE (base=base.png), found {text!r}")
        if name in found:
            raise InputError(f"--image: {name!r} is given twice")
        found[name] = file
    return found


def signature_of(args: argparse.Namespace, checkpoint: Checkpoint) -> Signature:
    """The checkpoint's own, where the arguments say nothing else."""
    return Signature.of(
        checkpoint.config,
        batch=getattr(args, "batch", 1),
        views=args.views,
        prompt=args.bucket,
        chunk=args.chunk,
        steps=args.steps,
    )


def opened(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint named."""
    return open_checkpoint(args.checkpoint, allow_pickle=args.allow_pickle)


def frontend_of(args: argparse.Namespace, checkpoint: Checkpoint, signature: Signature) -> Frontend:
    """The robot's side of the checkpoint, with what the arguments put in place of its own."""
    return load_frontend(
        checkpoint,
        signature,
        processing=args.processing,
        tokenizer=args.tokenizer,
        stats=args.stats,
        asset_id=args.asset,
    )


def compiled(args: argparse.Namespace, checkpoint: Checkpoint, signature: Signature) -> Compiled:
    """The checkpoint compiled as the arguments say."""
    say(args, f"compiling {args.checkpoint} for {args.target}")
    return cortexflow.compile(
        checkpoint,
        args.target,
        dtype=args.dtype,
        device=args.device,
        progress=not args.quiet,
        **dataclasses.asdict(signature),
    )


def say(args: argparse.Namespace, text: str) -> None:
    """Progress on stderr, unless it has to be quiet."""
    if not args.quiet:
        print(f"cortexflow: {text}", file=sys.stderr)
