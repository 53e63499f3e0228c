"""Attention of one token to a prefix and to what was generated since: its meaning, and what it costs to hold.

As in `test_triton_prefill.py`: tiny sizes under Triton's interpreter in float32, realistic and odd ones on a GPU, and
the launches' own arguments compiled for several architectures without one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from cortexflow.kernels.triton import token_attention as module
from tests.kernels import builds
from tests.kernels.builds import SHARED, around_wait, check_fits
from tests.kernels.numerics import BF16, F16, F32, NAN, TOLERANCE, Draw, Measured, check, interpret, meaning
from tests.kernels.numerics import measure as repeated


class Case(NamedTuple):
    """`peak` multiplies the queries, so that the softmax is sharp and its running maximum moves."""

    b: int
    n: int
    own: int
    heads: int
    groups: int
    d: int
    mask: str = "own"  # own: a mask for each sample; shared; blind: the first sample sees nothing
    peak: float = 1.0


def run(case: Case, device: str, dtype: torch.dtype, seed: int) -> Measured:
    b, n, own, heads, groups, d, mask, peak = case
    draw = Draw(device, dtype, seed, pad=8)
    qkv = draw.normal(b, 1, (heads + 2 * groups) * d)  # queries as columns of a wider buffer
    q = qkv[..., : heads * d].mul_(peak).unflatten(-1, (heads, d))

    def cache(tokens: int, wider: int) -> Any:
        whole = torch.full((b, tokens + 2, wider * groups * d), NAN, device=device, dtype=dtype)
        inside = whole[:, :tokens, : groups * d]  # tokens and columns that are not there are not read
        return inside.copy_(draw.normal(b, tokens, groups * d)).unflatten(-1, (groups, d))

    k0, v0, k1, v1 = cache(n, 3), cache(n, 2), cache(own, 1), cache(own, 1)
    seen = draw.visible(1 if mask == "shared" else b, 1, n + own)
    seen[..., -1] = True
    if mask == "blind":
        seen[0] = False
    out = draw.poisoned(b, 1, heads * d).unflatten(-1, (heads, d))
    keys, values = torch.cat([k0, k1], 1), torch.cat([v0, v1], 1)
    y = meaning("attention", q, keys, values, seen, scale=d**-0.5, causal=False)

    def launch() -> list[tuple[torch.Tensor, torch.Tensor]]:
        out.fill_(NAN)
        module.token_attention(q, k0, v0, k1, v1, seen, out, d**-0.5)
        return [(out.clone(), y)]

    return repeated(launch, draw)


SMALL = {
    "one key each": Case(1, 1, 1, 1, 1, 16),
    "every head its own keys": Case(2, 21, 3, 3, 3, 16),
    "grouped": Case(3, 70, 6, 6, 2, 32),
    "one group": Case(1, 66, 17, 8, 1, 16, "shared"),
    "blind": Case(2, 37, 2, 2, 2, 16, "blind"),
    "sharp": Case(1, 90, 5, 4, 4, 16, peak=40.0),
    "more keys than are fetched ahead": Case(1, 200, 3, 2, 1, 256),
    "more keys of one head than are fetched ahead": Case(1, 200, 3, 2, 2, 256, peak=9.0),
}
LARGE = {
    "seven billion": Case(1, 277, 6, 32, 32, 128),
    "batch": Case(3, 301, 6, 32, 32, 128),
    "grouped": Case(2, 555, 20, 32, 8, 128, "shared"),
    "one group": Case(1, 968, 33, 8, 1, 256),
    "d 64": Case(1, 129, 7, 12, 12, 64),
    "blind": Case(2, 100, 5, 4, 2, 128, "blind"),
    "sharp": Case(1, 333, 6, 8, 8, 128, peak=4.0),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_cases_mean_what_the_op_means(name: str, interpreted: dict[str, Measured]) -> None:
    check(interpreted[name], 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large_cases_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    check(run(LARGE[name], "cuda", dtype, seed), TOLERANCE[dtype], f"seed {seed}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_small_cases_on_a_gpu(name: str) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    check(run(SMALL[name], "cuda", F32, seed), TOLERANCE[F32], f"seed {seed}")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("name", ["seven billion", "grouped", "one group"])
def test_it_fits_every_card(name: str, arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = LARGE[name]._replace(b=1)
    recorder = builds.record(module, "token_attention_kernel", arch, monkeypatch)
    run(case, "cpu", BF16, 0)
    built = recorder.compile()
    check_fits(built, arch, tmp_path)
    ahead, behind = around_wait(built, arch)
    if arch >= 90 and name == "seven billion":
        assert "ld.global" in ahead and "st.global" not in ahead, "the prefix is fetched ahead, nothing is written"
        assert "st.global" in behind


if __name__ == "__main__":
    interpret(lambda: {name: run(case, "cpu", F32, 0) for name, case in SMALL.items()}, module)
