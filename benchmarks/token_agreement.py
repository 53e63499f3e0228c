"""How often OpenVLA's token ids in bfloat16 are those of its eager implementation, on the same random weights.

Full size, one card, random pictures and prompts. Where two answers differ, what counts is the first token that does
(all behind it follow from another text): how far apart eager's own logits of the two are, in units of bfloat16's
spacing at the larger. A gap of a few units is rounding: eager's sums round it away, or not, as they happen to fall.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks._gpu import build, drawn
from benchmarks._record import RESULTS, markdown, save
from benchmarks._tokens_peer import openvla
from cortexflow.models import ModelConfig, Signature, VLAModelType, create_model

LIMIT = 0.95  # of the observations


def compare(ours: torch.Tensor, peer: torch.Tensor, logits: torch.Tensor) -> float | None:
    """None where the ids are equal, else the gap at the first that differs, in spacings of bfloat16."""
    for mine, theirs, row in zip(ours.tolist(), peer.tolist(), logits, strict=True):
        if mine != theirs:
            top = float(row[theirs])
            return (top - float(row[mine])) / 2.0 ** (math.floor(math.log2(abs(top))) - 7)
    return None


def measure(observations: range, prompt: int) -> Iterator[dict[str, Any]]:
    """Both policies on these observations, each by its own seed: the result after every one."""
    config = ModelConfig.released(VLAModelType.OPENVLA)
    _, policy = build(config, Signature.of(config, prompt=prompt), "triton", "bf16")
    answer = openvla(config, drawn(create_model(config).get_weight_shapes()))
    gaps = []
    for seed in tqdm(observations, unit="observation"):
        generator = torch.Generator("cuda").manual_seed(seed)
        pixels = torch.randn(1, 6, config.image_size, config.image_size, generator=generator, device="cuda")
        tokens = torch.randint(3, 31000, (1, prompt), generator=generator, device="cuda", dtype=torch.int32)
        given = {"pixel_values": pixels, "tokens": tokens, "token_mask": torch.ones_like(tokens, dtype=torch.bool)}
        found = answer(given)
        gaps.append(compare(policy.run(given)["token_ids"][0], found.token_ids, found.logits))
        yield row_of(gaps)


def row_of(gaps: Sequence[float | None]) -> dict[str, Any]:
    """A line of the table for the observations so far."""
    apart = sorted(g for g in gaps if g is not None)
    equal = 1 - len(apart) / len(gaps)
    return {
        "observations": len(gaps),
        "equal": equal,
        "holds": equal >= LIMIT,
        "gaps where they differ": ", ".join(f"{g:.1f}" for g in apart),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, save as it goes, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observations", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first one; each has the next")
    parser.add_argument("--prompt", type=int, default=21, help="tokens of the prompt, the appended one included")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result is written")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("token_agreement: needs an NVIDIA GPU, and PyTorch finds none here")
        return
    for row in measure(range(arguments.first, arguments.first + arguments.observations), arguments.prompt):
        save("token_agreement", [row], arguments.out)
    print(markdown([row]))


if __name__ == "__main__":
    main()
