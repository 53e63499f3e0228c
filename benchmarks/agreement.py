"""How far bfloat16 actions are from the float32 interpreter's, on full-size random weights on a GPU.

The reference is the graph as the model builds it, before any pass, run op by op in float32 on the card (TF32
off). Beside the triton target stand the torch target in bfloat16, eager, whose distance is the yardstick, and
the torch target in float32, which shows what the passes alone move. Two draws of inputs: everything valid;
half of the prompt and the last camera absent.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._gpu import CASES, Case, build, case_of, drawn, inputs_for, label, shapes_of
from benchmarks._record import RESULTS, markdown, save
from cortexflow.ir import Module
from cortexflow.ir.interpreter import run_module
from cortexflow.models import ModelConfig, create_model

RATIO_LIMIT, COSINE_LIMIT = 1.5, 0.999
EAGER = "torch target, bf16"
POLICIES = {  # name: target and precision
    EAGER: ("torch", "bf16"),
    "triton target, bf16": ("triton", "bf16"),
    "torch target, f32": ("torch", "f32"),
}


def draws(module: Module, device: str) -> list[dict[str, Tensor]]:
    """Two sets of inputs."""
    whole, part = (inputs_for(module, seed, device) for seed in (1, 2))
    part["token_mask"][:, part["token_mask"].shape[1] // 2 :] = False
    part["image_mask"][:, -1] = False
    return [whole, part]


@contextmanager
def full_precision() -> Iterator[None]:
    """Products and convolutions of float32 in float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def measure(
    case: Case, policies: Mapping[str, tuple[str, str]] = POLICIES, device: str = "cuda", **sizes: Any
) -> list[dict[str, Any]]:
    """A row for each policy; `sizes` replace dimensions of the full-size model."""
    config = ModelConfig(model_type=case[0]).with_(**sizes)
    graph = create_model(config).build(case[1], "f32")
    given, weights = draws(graph, device), drawn(shapes_of(graph), device)
    with full_precision():
        with torch.device(device):
            exact = [run_module(graph, inputs, weights)["actions"].double().cpu() for inputs in given]
        found = {}
        for name, (target, dtype) in policies.items():
            _, policy = build(config, case[1], target, dtype, device=device)
            found[name] = [policy.run(inputs)["actions"].double().cpu() for inputs in given]
            del policy
            gc.collect()
            torch.cuda.empty_cache()
    rows = []
    for name, actions in found.items():
        far, base = distance(actions, exact), distance(found[EAGER], exact)
        cosine = min(
            float(torch.cosine_similarity(a.flatten(), e.flatten(), 0)) for a, e in zip(actions, exact, strict=True)
        )
        rows.append(
            {
                "case": label(case),
                "policy": name,
                "relative distance": far,
                f"ratio to eager (at most {RATIO_LIMIT})": far / base,
                f"least cosine (at least {COSINE_LIMIT})": f"{cosine:.6f}",
                "holds": "yes" if far <= RATIO_LIMIT * base and cosine >= COSINE_LIMIT else "NO",
            }
        )
    return rows


def distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The norm of the difference over the norm, all draws together."""
    a, b = (torch.cat([x.flatten() for x in xs]) for xs in (found, exact))
    return float((a - b).norm() / b.norm())


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", type=case_of, default=CASES[:3], metavar="FAMILY:VIEWS:CHUNK:PROMPT")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are written")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("agreement: needs an NVIDIA GPU, and PyTorch finds none here")
        return
    rows: list[dict[str, Any]] = []
    for case in arguments.cases:
        start = time.perf_counter()
        rows += measure(case)
        save("agreement", rows, arguments.out)
        print(f"{label(case)}: measured in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(markdown(rows))


if __name__ == "__main__":
    main()
