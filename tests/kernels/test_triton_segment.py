"""Attention of few tokens to a cache and to themselves: its meaning, what it leaves alone, and what it costs to hold.

As in `test_triton_prefill.py`: tiny sizes under Triton's interpreter in float32, realistic and odd ones on a GPU, and
the launches' own arguments compiled for several architectures without one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cortexflow.kernels.gluon import split_attention
from cortexflow.kernels.triton import segment_attention as module
from tests.kernels import builds
from tests.kernels.builds import SHARED, Recorder, around_wait, check_fits
from tests.kernels.numerics import BF16, F16, F32, NAN, TOLERANCE, Draw, check, distance, identity, interpret, meaning

# ---- cases -------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """`mask`: keys [b, 1, n + m], prompts (the same where samples have prefixes of several lengths), pairs
    [b, m, n + m], causal (the prefix and tokens up to oneself) or blind (one sees none).

    `peak` multiplies the queries, so that the softmax is sharp. `shared`: one mask and one table of angles for all
    samples.
    """

    m: int
    n: int
    heads: int = 8
    d: int = 256
    mask: str = "pairs"
    peak: float = 1.0
    b: int = 1
    shared: bool = False


class Inputs(NamedTuple):
    """The tensors of one call; whatever lies between or behind them is NaN."""

    q: Tensor
    own_k: Tensor
    own_v: Tensor
    cached_k: Tensor
    cached_v: Tensor
    cosine: Tensor
    sine: Tensor
    mask: Tensor
    out: Tensor
    drawn: Draw


def draw(case: Case, device: str, dtype: torch.dtype, seed: int) -> Inputs:
    m, n, heads, d, mask, peak, b, shared = case
    drawn, tables = Draw(device, dtype, seed, pad=8), 1 if shared else b
    whole = torch.full((b, m + 2, (heads + 2) * d), NAN, device=device, dtype=dtype)
    cache = torch.full((2, b, n + 3, 2 * d), NAN, device=device, dtype=dtype)  # rows that are not there are not read
    whole[:, :m], cache[:, :, :n, :d] = drawn.normal(b, m, (heads + 2) * d), drawn.normal(2, b, n, d)
    q, k, v = whole[:, :m].split([heads * d, d, d], dim=-1)
    q.mul_(peak)
    angle = torch.rand((tables, m, d // 2), generator=drawn.generator).to(device) * 700
    seen = torch.rand((tables, 1 if mask == "keys" else m, n + m), generator=drawn.generator) < 0.6
    if mask == "prompts":
        longest = torch.linspace(1, n, b).round().int()[:tables, None, None]
        seen = (torch.arange(n + m) < longest) | (torch.arange(n + m) >= n)
    if mask == "causal":
        seen = torch.ones(m, n + m).tril(n).bool().expand(tables, m, n + m).contiguous()
    if mask == "blind":
        seen[:, m // 2] = False
    return Inputs(
        q.unflatten(-1, (heads, d)), k.unsqueeze(2), v.unsqueeze(2),
        cache[0, :, :n, None, :d], cache[1, :, :n, None, :d], angle.cos(), angle.sin(), seen.to(device),
        drawn.poisoned(b, m, heads * d).unflatten(-1, (heads, d)), drawn,
    )  # fmt: skip


def expected(x: Inputs, scale: float) -> Tensor:
    """The ops' evaluation rules in float64; a rotation's result is rounded to its operand's dtype, as everywhere."""
    q, k = (meaning("rope", t, x.cosine, x.sine).to(t.dtype).double() for t in (x.q, x.own_k))
    keys, values = torch.cat([x.cached_k.double(), k], 1), torch.cat([x.cached_v.double(), x.own_v.double()], 1)
    return meaning("attention", q, keys, values, x.mask, scale=scale, causal=False)


def run(x: Inputs, config: Any, rotated: bool = False) -> None:
    b, m, heads, d = x.q.shape
    size = module.scratch_size(b, m, heads, x.cached_k.shape[1], config)
    scratch = torch.full((max(size, 1),), NAN, device=x.q.device), torch.empty(0)
    module.segment_attention(*x[:9], d**-0.5, scratch, config, rotated)


def measure(case: Case, config: Any, device: str, dtype: torch.dtype, seed: int) -> tuple[float, bool]:
    """‖found - expected‖ / ‖expected‖, and whether nothing was written outside of the output."""
    x = draw(case, device, dtype, seed)
    run(x, config)
    return distance(x.out, expected(x, case.d**-0.5)), x.drawn.contained()


def rotate(x: Inputs) -> None:
    """Queries and own keys, where they stand."""
    for t in (x.q, x.own_k):
        t.copy_(meaning("rope", t, x.cosine, x.sine).to(t.dtype))


SMALL: dict[str, tuple[Case, tuple[int, ...]]] = {
    "one token": (Case(1, 1, 1, 32, "keys"), (16, 16, 1, 16, 16, 1)),
    "keys": (Case(3, 21, 3, 32, "keys"), (16, 16, 1, 16, 32, 1)),
    "pairs": (Case(5, 37, 8, 32, "pairs"), (16, 32, 1, 16, 16, 1)),
    "causal": (Case(18, 16, 2, 64, "causal"), (32, 16, 1, 16, 32, 1)),
    "blind": (Case(4, 19, 6, 32, "blind"), (32, 16, 1, 16, 32, 1)),
    "one blind token": (Case(1, 19, 2, 32, "blind"), (16, 32, 1, 32, 32, 1)),
    "sharp": (Case(3, 50, 8, 64, "pairs", 40.0), (16, 16, 1, 32, 64, 1)),
    "batch": (Case(3, 21, 3, 32, "pairs", b=3), (16, 16, 1, 16, 32, 1)),
    "batch of prompts": (Case(5, 37, 8, 32, "prompts", b=4), (16, 32, 1, 32, 16, 1)),
    "batch of keys": (Case(2, 19, 6, 32, "keys", b=2), (32, 16, 1, 16, 32, 1)),
    "batch that shares": (Case(18, 16, 2, 64, "causal", b=2, shared=True), (32, 16, 1, 16, 32, 1)),
    "batch with blind tokens": (Case(4, 19, 6, 32, "blind", b=2), (32, 16, 1, 16, 32, 1)),
}
LARGE = {
    "chunk 10": Case(10, 560, mask="keys"),
    "chunk 16": Case(16, 713),
    "chunk 15 causal": Case(15, 561, mask="causal"),
    "chunk 50": Case(50, 968, mask="keys"),
    "chunk 51": Case(51, 532),
    "one token": Case(1, 33),
    "short prefix": Case(7, 5),
    "blind": Case(10, 600, mask="blind"),
    "sharp": Case(10, 777, peak=20.0),
    "d 32": Case(7, 90, 4, 32),
    "d 64": Case(10, 333, 12, 64),
    "d 128, one head": Case(13, 450, 1, 128),
    "d 128, four heads": Case(9, 401, 4, 128, "blind"),
    "d 128": Case(9, 401, 5, 128, "blind"),
    "batch of 8": Case(10, 560, mask="prompts", b=8),
    "batch of 8, chunk 50": Case(50, 968, mask="prompts", b=8),
    "batch of 3": Case(15, 561, b=3),
    "batch of 5, odd": Case(51, 533, mask="blind", b=5),
    "batch of 4 that shares": Case(7, 45, mask="causal", b=4, shared=True),
    "batch of 4, d 128": Case(13, 450, 4, 128, "prompts", b=4),
    "batch of 6, d 32": Case(7, 90, 4, 32, "prompts", b=6),
    "batch of 2, sharp": Case(10, 777, peak=20.0, b=2),
}


# ---- under Triton's interpreter ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_small_cases_mean_what_the_ops_mean(name: str, interpreted: dict[str, tuple[float, bool]]) -> None:
    check(interpreted[name], 1e-5)


def test_scratch_that_is_too_small_is_refused() -> None:
    x, config = draw(Case(3, 21, 3, 32), "cpu", F32, 0), module.FEW[0]
    size = module.scratch_size(1, 3, 3, 21, config)
    with pytest.raises(ValueError, match=str(size)):
        module.segment_attention(*x[:9], 1.0, (torch.empty(size - 1), torch.empty(0)), config)


def test_only_a_split_takes_what_is_rotated_already() -> None:
    with pytest.raises(ValueError, match="rotates what it reads"):
        run(draw(Case(3, 21, 3, 32), "cpu", F32, 0), module.FEW[0], rotated=True)


@pytest.mark.parametrize("case", LARGE.values(), ids=list(LARGE))
def test_candidates_are_few_and_the_first_is_the_default(case: Case) -> None:
    shape = case.b, case.m, case.heads, case.d, case.n
    found = module.candidates(*shape)
    assert 1 <= len(set(found)) == len(found) <= 5
    assert found[0] == module.default(*shape)


def test_a_hopper_card_is_offered_what_only_it_can_do(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_has_warpgroups", lambda: True)
    assert isinstance(module.default(1, 10, 8, 256, 560), module.Config)
    assert isinstance(module.default(8, 10, 8, 256, 560), module.Split)
    assert module.default(1, 50, 8, 256, 968) == module.Split(128)
    assert module.default(1, 51, 8, 256, 532) == module.Split(64)
    assert isinstance(module.default(1, 10, 12, 64, 333), module.Config)
    for case in LARGE.values():
        found = module.candidates(case.b, case.m, case.heads, case.d, case.n)
        assert any(isinstance(c, module.Config) for c in found)
        assert 1 <= len(set(found)) == len(found) <= 5


def test_the_default_is_one_whose_scratch_there_is_room_for(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_has_warpgroups", lambda: True)
    shape = 16, 50, 8, 256, 532
    first, *others = module.candidates(*shape)
    size = module.scratch_size(16, 50, 8, 532, first)
    assert module.default(*shape, room=size) == first
    assert module.default(*shape, room=size - 1) in others
    with pytest.raises(ValueError, match=r"16 x 50 queries to 532 keys needs a scratch of \d+ numbers, not 1000"):
        module.default(*shape, room=1000)


# ---- on a GPU ----------------------------------------------------------------------------------------


ON_CARDS = [(name, BF16) for name in LARGE]
ON_CARDS += [(name, F16) for name in ("chunk 10", "chunk 51", "blind", "d 64", "batch of 8", "batch of 5, odd")]
THOROUGH = (
    "chunk 10",
    "chunk 50",
    "batch of 8",
)  # every candidate; compiling them all for every case would take minutes


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), ON_CARDS, ids=str)
def test_large_cases_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """The first configuration of either kind, or every one; each gives the same bits again and again."""
    case = LARGE[name]
    seed = int.from_bytes(os.urandom(4), "little")
    configs = module.candidates(case.b, case.m, case.heads, case.d, case.n)
    if name not in THOROUGH or dtype != BF16:
        configs = list({type(c): c for c in reversed(configs)}.values())
    for config in configs:
        error, contained = measure(case, config, "cuda", dtype, seed)
        assert error < TOLERANCE[dtype], f"{config}, seed {seed}"
        assert contained, f"{config} wrote outside of its output, or left some of it"
        x = draw(case, "cuda", dtype, seed)
        run(x, config)
        first = x.out.clone()
        for _ in range(20):
            x.out.fill_(NAN)
            run(x, config)
            assert torch.equal(x.out, first), config


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(
    "name", ["chunk 50", "chunk 51", "d 128, four heads", "batch of 8", "batch of 8, chunk 50", "batch of 5, odd"]
)
def test_what_is_rotated_already_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """A split that finds its queries and keys rotated, against one that rotates them."""
    case, seed = LARGE[name], int.from_bytes(os.urandom(4), "little")
    if not module._has_warpgroups():
        pytest.skip("warpgroup instructions are Hopper's")
    for config in [c for c in module.SPLITS if split_attention.fits(case.m, case.heads, case.d, case.n, c)]:
        x = draw(case, "cuda", dtype, seed)
        wanted = expected(x, case.d**-0.5)
        rotate(x)
        run(x, config, rotated=True)
        assert distance(x.out, wanted) < TOLERANCE[dtype], f"{config}, seed {seed}"
        assert x.drawn.contained()
        first = x.out.clone()
        for _ in range(20):
            x.out.fill_(NAN)
            run(x, config, rotated=True)
            assert torch.equal(x.out, first), config


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_small_cases_on_a_gpu(name: str) -> None:
    case, tiles = SMALL[name]
    error, contained = measure(case, module.Config(*tiles), "cuda", F32, 0)
    assert error < TOLERANCE[F32]
    assert contained


# ---- compiled without a GPU --------------------------------------------------------------------------

BUILDS = [(b, 10, 560, 256, arch) for b in (1, 8) for arch in SHARED]
BUILDS += [(b, 50, 968, 256, arch) for b in (1, 8) for arch in (89, 90)] + [(3, 7, 90, 32, arch) for arch in SHARED]


def record(
    case: Case, config: Any, arch: int, monkeypatch: pytest.MonkeyPatch, room: Any, *kernels: str, rotated: bool = False
) -> list[Recorder]:
    """What a call would launch on an architecture."""
    recorders = [builds.record(room, kernel, arch, monkeypatch) for kernel in kernels]
    run(draw(case, "cpu", BF16, 0), config, rotated)
    return recorders


@pytest.mark.parametrize(("b", "m", "n", "d", "arch"), BUILDS)
def test_two_kernels_fit_every_card(
    b: int, m: int, n: int, d: int, arch: int, cache: None, tmp_path: Path, monkeypatch: Any
) -> None:
    """The first choice of the two kernels: no spills, and shared memory that the card has."""
    monkeypatch.setattr(module, "_has_warpgroups", lambda: arch == 90)
    monkeypatch.setattr(module, "shared_memory", lambda: SHARED[arch])
    config = next(c for c in module.candidates(b, m, 8, d, n) if isinstance(c, module.Config))
    for launch in record(Case(m, n, 8, d, b=b), config, arch, monkeypatch, module, "weights_kernel", "values_kernel"):
        built = launch.compile()
        check_fits(built, arch, tmp_path)
        around_wait(built, arch)


SPLIT = [(Case(50, 968), 0), (Case(50, 968), 1), (Case(10, 560), 2), (Case(9, 401, 4, 128), 0)]
SPLIT += [(case._replace(b=8), place) for case, place in SPLIT]


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("case", "place"), SPLIT)
def test_a_split_fits_a_hopper_card(
    case: Case, place: int, rotated: bool, cache: None, tmp_path: Path, monkeypatch: Any
) -> None:
    config = module.SPLITS[place]
    assert split_attention.fits(case.m, case.heads, case.d, case.n, config)
    for launch in record(case, config, 90, monkeypatch, split_attention, "part_kernel", "add_kernel", rotated=rotated):
        built = launch.compile()
        check_fits(built, 90, tmp_path)
        around_wait(built, 90)
        assert built.metadata.shared <= (116 if config.keys < 128 else 180) << 10


def test_what_has_no_layout_does_not_fit() -> None:
    split = split_attention.Split()
    assert split_attention.fits(50, 8, 256, 968, split)
    assert not split_attention.fits(50, 12, 256, 968, split), "heads"
    assert not split_attention.fits(50, 8, 64, 968, split), "columns"
    assert split_attention.fits(50, 8, 256, 1984, split)
    assert not split_attention.fits(50, 8, 256, 1985, split), "parts"


if __name__ == "__main__":
    module.settle = identity
    interpret(lambda: {n: measure(c, module.Config(*t), "cpu", F32, 0) for n, (c, t) in SMALL.items()}, module)
