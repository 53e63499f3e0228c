"""The prefill's Triton kernels: what they compute, where they write, and what they cost to hold.

Three looks at the same launches. Under Triton's interpreter, in a process of its own, tiny odd sizes are
compared in float32 with the meaning of the ops; on a GPU, realistic and odd sizes in every dtype with
float64; and without a GPU, the launches' own arguments are compiled for several architectures.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cortexflow.ir import ops
from cortexflow.kernels.triton import prefill_attention, product, rows
from tests.kernels import builds
from tests.kernels.builds import ACCESS, OVERLAP, SHARED, Recorder, around_wait, check_fits
from tests.kernels.numerics import BF16, EPS, F16, F32, NAN, TOLERANCE, Draw, check, distance, interpret, meaning

# ---- cases: a kernel's result, and what the ops mean by it -------------------------------------------


def scratch(draw: Draw) -> tuple[Tensor, Tensor]:
    """Room for parts, full of NaN, and counters at zero."""
    floats = torch.full((1 << (24 if draw.device == "cuda" else 19),), NAN, device=draw.device)
    return floats, torch.zeros(4096, dtype=torch.int32, device=draw.device)


Case = Callable[[Draw], tuple[Tensor, Tensor]]


def rms_norm(m: int, k: int, scaled: bool) -> Case:
    def case(draw: Draw) -> tuple[Tensor, Tensor]:
        x, scale, out = draw.rows(m, k), draw.normal(k), draw.poisoned(m, k)
        rows.rms_norm(x, out, EPS, scale if scaled else None)
        return out, meaning("rms_norm", x, *([scale] if scaled else []), eps=EPS)

    return case


def layer_norm(m: int, k: int, affine: bool) -> Case:
    def case(draw: Draw) -> tuple[Tensor, Tensor]:
        x, out = draw.rows(m, k) + 3, draw.poisoned(m, k)  # a mean that matters
        given = [draw.normal(k), draw.normal(k)] if affine else []
        rows.layer_norm(x, out, EPS, *given)
        return out, meaning("layer_norm", x, *given, eps=EPS)

    return case


def modulated_norm(m: int, k: int) -> Case:
    def case(draw: Draw) -> tuple[Tensor, Tensor]:
        x, scale, shift, out = draw.rows(m, k), draw.normal(k), draw.normal(k), draw.poisoned(m, k)
        rows.modulated_norm(x, out, scale, shift, EPS)
        return out, meaning("add", meaning("mul", meaning("rms_norm", x, eps=EPS), scale), shift)

    return case


def norm_behind_a_bias(m: int, k: int, centred: bool, scaled: bool = False) -> Case:
    """The sums with the bias, rounded and stored in place of x, and above them the norm of what was stored."""

    def case(draw: Draw) -> tuple[Tensor, Tensor]:
        whole, bias, scale = draw.poisoned(2 * m, k), draw.normal(k), draw.normal(k)
        out, x = whole[:m], whole[m:]
        x.copy_(draw.normal(m, k) + (3 if centred else 0))
        sums = (x.double() + bias.double()).to(x.dtype).double()
        given = [scale] if scaled else []
        (rows.layer_norm if centred else rows.rms_norm)(x, out, EPS, *given, bias=bias)
        return whole, torch.cat([meaning("layer_norm" if centred else "rms_norm", sums, *given, eps=EPS), sums])

    return case


def summed_norm(
    m: int,
    k: int,
    gate: bool = True,
    scale: bool = True,
    shift: bool = True,
    onto: str = "the residual",
    parts: int = 1,
    centred: bool = False,
) -> Case:
    """A sum, rounded and stored, and above it the norm of what was stored; `onto`: where the sum goes.

    `centred`: of the layer norm, with a bias to x. x may come in parts, in float32.
    """

    def case(draw: Draw) -> tuple[Tensor, Tensor]:
        whole, r = draw.poisoned(2 * m, k), draw.normal(m, k)
        x = draw.normal(parts * m, k, dtype=F32) if parts > 1 else draw.rows(m, k)
        out, summed = whole[:m], whole[m:]
        g, s, t, b = draw.normal(k), draw.normal(k), draw.normal(k), draw.normal(k)
        y = x.double().view(parts, m, k).sum(0) + (b.double() if centred else 0)
        sums = (r.double() + y * (g.double() if gate else 1)).to(r.dtype).double()
        normed = meaning("layer_norm" if centred else "rms_norm", sums, eps=EPS)
        normed = normed * (s.double() if scale else 1) + (t.double() if shift else 0)
        if onto == "the residual":
            r = summed.copy_(r)
        if onto == "x":
            x = summed.copy_(x)
        given = {"gate": g if gate else None, "scale": s if scale else None, "shift": t if shift else None}
        given |= {"bias": b if centred else None}
        rows.summed_norm(x, summed, out, EPS, residual=r, **given, centred=centred, parts=parts)
        return whole, torch.cat([normed, sums])

    return case


def glu(m: int, w: int, act: str, pairs: bool = False) -> Case:
    def case(draw: Draw) -> tuple[Tensor, Tensor]:
        h, out = draw.rows(m, 2 * w), draw.poisoned(m, w)
        rows.glu(h, out, act, pairs=pairs)
        gate, up = (h[:, ::2], h[:, 1::2]) if pairs else (h[:, :w], h[:, w:])
        return out, meaning("act", gate, kind=act) * up.double()

    return case


def rope(b: int, t: int, heads: int, d: int, angles: str = "each") -> Case:
    """`angles`: each sample has its own, or one table is for all."""

    def case(draw: Draw) -> tuple[Tensor, Tensor]:
        x = draw.normal(b, t + 2, heads + 3, d)[:, 1 : t + 1, 1 : heads + 1]  # the middle of a wider buffer
        table = draw.normal(b if angles == "each" else 1, t, d // 2, dtype=F32)
        out = draw.poisoned(b, t, heads * d).unflatten(-1, (heads, d))
        rows.rope(x, table.cos(), table.sin(), out)
        return out, meaning("rope", x, table.cos(), table.sin())

    return case


def rope_and_cache(
    b: int, t: int, heads: int, groups: int, d: int, queries: str = "apart", angles: str = "each"
) -> Case:
    """Rotated queries, keys and the values side by side; `queries`: apart, in place, or left; `angles`: as above."""

    def case(draw: Draw) -> tuple[Tensor, Tensor]:
        qkv = draw.rows(b, t + 2, (heads + 2 * groups) * d)[:, 1 : t + 1]
        table = draw.normal(b if angles == "each" else 1, t, d // 2, dtype=F32)
        given = qkv.clone().unflatten(-1, (-1, d))
        out = draw.poisoned(b, t, (heads + 2 * groups) * d).unflatten(-1, (-1, d))
        q, k, v = out.split([heads, groups, groups], 2)
        ahead = qkv[..., : heads * d].unflatten(-1, (heads, d))
        place = {"apart": q, "in place": ahead, "left": None}[queries]
        rows.rope_and_cache(qkv, table.cos(), table.sin(), place, k, v)
        if queries != "apart":
            q.copy_(ahead)
        turned = meaning("rope", given[:, :, : heads + groups], table.cos(), table.sin())
        if queries == "left":
            turned[:, :, :heads] = given[:, :, :heads]
        return out, torch.cat([turned, given[:, :, heads + groups :]], 2)

    return case


def epilogue(m: int, n: int, act: str, bias: bool, residual: bool, gate: bool, in_place: bool = False) -> Case:
    def case(draw: Draw) -> tuple[Tensor, Tensor]:
        x, b, r, g = draw.rows(m, n), draw.normal(n), draw.rows(m, n), draw.normal(n)
        y = x.double() + b.double() if bias else x.double()
        y = y if act == "none" else meaning("act", y, kind=act)
        y = y * g.double() if gate else y
        y = y + r.double() if residual else y
        out = x if in_place else draw.poisoned(m, n)
        rows.epilogue(x, out, b if bias else None, act, r if residual else None, g if gate else None)
        return out, y

    return case


def epilogue_of_a_batch(b: int, m: int, n: int, residual: bool) -> Case:
    """To rows of every sample that stand between others."""

    def case(draw: Draw) -> tuple[Tensor, Tensor]:
        x, r, whole = draw.rows(b, m + 2, n)[:, 1:-1], draw.rows(b, m, n), draw.poisoned(b, m + 3, n)
        out, wanted = whole[:, 2:-1], torch.zeros(b, m + 3, n, dtype=torch.float64, device=draw.device)
        wanted[:, 2:-1] = x.double() + r.double() if residual else x.double()
        rows.epilogue(x, out, residual=r if residual else None)
        beside = torch.cat([whole[:, :2], whole[:, -1:]], 1)
        whole[:, :2], whole[:, -1] = 0 if beside.isnan().all() else 1, 0  # nothing was written there
        return whole, wanted

    return case


def argmax(m: int, n: int, ties: bool = False) -> Case:
    """Places as float64: what is equal is equal, and a wrong place is far off."""

    def case(draw: Draw) -> tuple[Tensor, Tensor]:
        x, out = draw.rows(m, n), torch.full((m,), -1, dtype=torch.int32, device=draw.device)
        if ties:
            x.copy_(x.round().clamp(-2, 2))
        rows.argmax(x, out)
        return out, meaning("argmax", x.cpu(), axis=-1, keepdims=False).to(out.device).double() + 0.0

    return case


def attention(
    b: int, m: int, n: int, heads: int, groups: int, d: int, mask: str = "none", peak: float = 1.0,
    config: tuple[Any, ...] | None = None,
) -> Case:  # fmt: skip
    """`mask`: none, keys [b, 1, n], pairs [1, m, n], all [b, m, n], last (only the last key), blind (some see none),
    blind keys (the first sample's queries see none), or causal.

    `peak` multiplies the queries, so that the softmax is sharp and its running maximum moves.
    """

    def case(draw: Draw) -> tuple[Tensor, Tensor]:
        whole = draw.normal(b, max(m, n), (heads + 2 * groups) * d)  # one buffer: queries, keys, values
        q, k, v = whole.split([heads * d, groups * d, groups * d], dim=-1)
        q = q[:, :m].mul_(peak).unflatten(-1, (heads, d))
        k, v = (x[:, :n].unflatten(-1, (groups, d)) for x in (k, v))
        seen = {
            "keys": (b, 1, n), "pairs": (1, m, n), "all": (b, m, n), "last": (1, m, n), "blind": (b, m, n),
            "blind keys": (b, 1, n),
        }.get(mask)  # fmt: skip
        given = None if seen is None else draw.visible(*seen)
        if given is not None and mask == "last":
            given[:], given[..., -1] = False, True
        if given is not None and mask.startswith("blind"):
            given[0, ::2] = False
        out = draw.poisoned(b, m, heads * d).unflatten(-1, (heads, d))
        causal = mask == "causal"
        prefill_attention.attention(q, k, v, out, d**-0.5, given, config, scratch(draw), causal)
        extra = [] if given is None else [given]
        return out, meaning("attention", q, k, v, *extra, scale=d**-0.5, causal=causal)

    return case


def candidates(d: int) -> list[tuple[Any, ...]]:
    """The tiles that are measured for Hopper."""
    n = 256 if d == 72 else 561
    return [tuple(c) for c in prefill_attention.candidates(n, n, 8, d, prefill_attention.Card(90, SHARED[90]))]


ACTS = [*ops.ACTIVATIONS]
TINY = (16, 16, 4, 2)
SMALL: dict[str, Case] = {
    "rms_norm": rms_norm(3, 37, False),
    "rms_norm scaled": rms_norm(2, 129, True),
    "rms_norm of one column": rms_norm(2, 1, True),
    "layer_norm": layer_norm(3, 37, False),
    "layer_norm affine": layer_norm(2, 130, True),
    "modulated_norm": modulated_norm(5, 67),
    "rms_norm behind a bias": norm_behind_a_bias(5, 37, False),
    "rms_norm behind a bias, scaled": norm_behind_a_bias(3, 1400, False, scaled=True),
    "layer_norm behind a bias": norm_behind_a_bias(5, 37, True),
    "layer_norm behind a bias, two rows at once": norm_behind_a_bias(5, 1201, True),
    "summed_norm": summed_norm(5, 37),
    "summed_norm apart": summed_norm(3, 64, onto="apart"),
    "summed_norm in place of x": summed_norm(3, 130, onto="x"),
    "summed_norm plain": summed_norm(5, 1400, gate=False, scale=False, shift=False),
    "summed_norm scaled": summed_norm(2, 19, shift=False),
    "summed_norm of parts": summed_norm(5, 37, gate=False, parts=3),
    "summed layer norm of parts": summed_norm(3, 130, gate=False, parts=2, centred=True),
    "summed layer norm": summed_norm(3, 37, onto="apart", centred=True),
    **{f"glu {a}": glu(2, 21, a) for a in ACTS},
    "glu in pieces": glu(2, 2051, "gelu_tanh"),
    "glu of pairs": glu(2, 2051, "silu", True),
    "rope": rope(1, 5, 3, 10),
    "rope of one head": rope(1, 3, 1, 16),
    "rope and cache": rope_and_cache(1, 5, 6, 2, 24),
    "rope and cache of one group": rope_and_cache(1, 3, 8, 1, 16),
    "rope and cache in place": rope_and_cache(1, 3, 5, 3, 10, "in place"),
    "rope and cache of keys": rope_and_cache(1, 3, 5, 3, 10, "left"),
    "rope and cache of keys alone": rope_and_cache(2, 3, 0, 1, 16, "left"),
    "rope and cache of many heads": rope_and_cache(2, 3, 16, 8, 12),
    "rope and cache of many heads in place": rope_and_cache(1, 3, 4, 4, 16, "in place"),
    "argmax": argmax(3, 37),
    "argmax of equals": argmax(5, 50, ties=True),
    "argmax in blocks": argmax(2, 33000, ties=True),
    "rope of a batch": rope(3, 5, 3, 10),
    "rope of a batch that shares angles": rope(2, 5, 1, 16, "one"),
    "rope and cache of a batch": rope_and_cache(3, 5, 6, 2, 24),
    "rope and cache of a batch in place": rope_and_cache(2, 3, 5, 3, 10, "in place", "one"),
    "rope and cache of a batch of keys": rope_and_cache(2, 3, 5, 3, 10, "left"),
    "epilogue bare": epilogue(2, 19, "none", False, False, False),
    **{f"epilogue {a}": epilogue(2, 19, a, True, True, True) for a in ACTS},
    "epilogue residual": epilogue(3, 33, "none", False, True, False),
    "epilogue gate": epilogue(3, 33, "none", False, False, True),
    "epilogue in pieces": epilogue(2, 2053, "gelu", True, False, False),
    "epilogue in place": epilogue(2, 2053, "silu", True, True, True, in_place=True),
    "epilogue of a batch": epilogue_of_a_batch(3, 2, 19, False),
    "epilogue of a batch with a residual": epilogue_of_a_batch(2, 3, 2053, True),
    "attention": attention(2, 5, 21, 3, 3, 24),
    "attention of one token": attention(1, 1, 1, 2, 2, 8),
    "attention grouped": attention(2, 7, 37, 6, 2, 24, "all", config=TINY),
    "attention one group": attention(1, 13, 19, 8, 1, 16, "pairs", config=TINY),
    "attention keys": attention(3, 5, 33, 4, 2, 72, "keys", config=TINY),
    "attention d 256": attention(1, 3, 35, 8, 1, 256, "keys"),
    "attention last key": attention(1, 5, 49, 2, 1, 16, "last", config=TINY),
    "attention blind": attention(2, 5, 37, 4, 2, 16, "blind", config=TINY),
    "attention sharp": attention(1, 9, 50, 4, 2, 40, "all", peak=40, config=TINY),
    "attention blind keys": attention(2, 3, 21, 2, 1, 24, "blind keys", config=TINY),
    "attention blind keys in parts": attention(2, 3, 50, 2, 1, 24, "blind keys", config=(*TINY, 2, True, True)),
    "attention late": attention(2, 5, 37, 4, 2, 24, "keys", config=(*TINY, 1, True)),
    "attention late in whole blocks": attention(1, 5, 48, 4, 2, 72, config=(*TINY, 1, True)),
    "attention split": attention(2, 5, 37, 4, 2, 24, "blind", config=(*TINY, 2)),
    "attention split in more parts than blocks": attention(2, 5, 21, 4, 2, 72, "keys", config=(*TINY, 3)),
    "attention late and split": attention(1, 7, 70, 4, 1, 40, "last", peak=40, config=(*TINY, 3, True)),
    "attention causal": attention(2, 37, 37, 4, 2, 24, "causal", config=TINY),
    "attention causal behind a cache": attention(1, 5, 50, 6, 3, 40, "causal", config=TINY),
    "attention causal, late": attention(1, 33, 64, 2, 2, 16, "causal", peak=40, config=(*TINY, 1, True)),
    "attention causal, described": attention(2, 21, 53, 4, 1, 24, "causal", config=(*TINY, 1, False, True)),
    "attention described": attention(2, 5, 37, 4, 2, 72, "all", config=(*TINY, 1, False, True)),
    "attention described, late and split": attention(2, 9, 50, 6, 2, 40, "keys", config=(*TINY, 2, True, True)),
}
LARGE: dict[str, Case] = {
    "rms_norm": rms_norm(561, 2048, True),
    "rms_norm odd": rms_norm(37, 1153, False),
    "rms_norm wide": rms_norm(5, 16384, True),
    "layer_norm": layer_norm(512, 1152, True),
    "layer_norm odd": layer_norm(33, 999, False),
    "modulated_norm": modulated_norm(50, 1024),
    "rms_norm behind a bias": norm_behind_a_bias(50, 1024, False),
    "rms_norm behind a bias, two rows at once": norm_behind_a_bias(37, 2048, False, scaled=True),
    "layer_norm behind a bias": norm_behind_a_bias(512, 1152, True),
    "layer_norm behind a bias, odd": norm_behind_a_bias(33, 999, True),
    "summed_norm": summed_norm(80, 1024),
    "summed_norm odd": summed_norm(33, 1153, shift=False, onto="apart"),
    "summed_norm wide": summed_norm(37, 2048, gate=False, onto="x"),
    "summed_norm of parts": summed_norm(33, 2048, gate=False, shift=False, parts=2),
    "summed layer norm of parts": summed_norm(37, 1152, gate=False, parts=3, centred=True),
    **{f"glu {a}": glu(13, 999, a) for a in ACTS},
    "glu": glu(561, 16384, "gelu_tanh"),
    "glu of pairs": glu(277, 11008, "silu", True),
    "rope": rope(1, 561, 8, 256),
    "rope odd": rope(1, 21, 5, 18),
    "rope and cache": rope_and_cache(1, 561, 8, 1, 256),
    "rope and cache in place": rope_and_cache(1, 21, 5, 3, 18, "in place"),
    "rope and cache of keys": rope_and_cache(1, 21, 5, 3, 18, "left"),
    "rope and cache of keys alone": rope_and_cache(1, 561, 0, 1, 256, "left"),
    "rope and cache of many heads": rope_and_cache(1, 277, 32, 32, 128),
    "rope and cache of a batch of tokens": rope_and_cache(3, 1, 32, 8, 128),
    "argmax": argmax(7, 32064),
    "argmax of equals": argmax(3, 50001, ties=True),
    "rope of a batch": rope(8, 51, 8, 256),
    "rope of a batch that shares angles": rope(3, 21, 5, 18, "one"),
    "rope and cache of a batch": rope_and_cache(8, 561, 8, 1, 256),
    "rope and cache of a batch in place": rope_and_cache(3, 21, 5, 3, 18, "in place", "one"),
    "epilogue": epilogue(512, 4304, "gelu_tanh", True, False, False),
    "epilogue all": epilogue(37, 1153, "silu", True, True, True),
    "epilogue in place": epilogue(512, 1152, "none", True, True, False, in_place=True),
    "epilogue of a batch": epilogue_of_a_batch(8, 48, 2048, False),
    "epilogue of a batch with a residual": epilogue_of_a_batch(3, 5, 2053, True),
    "attention d 72": attention(2, 256, 256, 16, 16, 72),
    "attention d 256": attention(1, 561, 561, 8, 1, 256, "keys"),
    "attention d 256 pairs": attention(1, 561, 561, 8, 1, 256, "pairs"),
    "attention odd": attention(3, 37, 53, 6, 2, 16, "keys"),
    "attention blind": attention(2, 70, 131, 4, 1, 40, "blind"),
    "attention last key": attention(1, 65, 200, 4, 2, 64, "last"),
    "attention sharp": attention(2, 129, 257, 8, 2, 128, "all", peak=8),
    "attention of one token": attention(1, 1, 1, 2, 2, 8),
    "attention late": attention(2, 70, 131, 4, 1, 40, "blind", config=(64, 32, 4, 2, 1, True)),
    "attention causal": attention(1, 277, 277, 32, 32, 128, "causal"),
    "attention causal behind a cache": attention(2, 70, 301, 8, 2, 128, "causal"),
    "attention causal d 256": attention(1, 133, 133, 8, 1, 256, "causal"),
    "attention split": attention(1, 561, 561, 8, 1, 128, "keys", config=(64, 32, 4, 2, 3)),
    "attention late and split": attention(2, 129, 257, 8, 2, 64, "keys", peak=8, config=(64, 32, 4, 2, 3, True)),
}
TUNED = {
    **{f"d 72 {c}": attention(2, 256, 256, 16, 16, 72, config=c) for c in candidates(72)},
    **{f"d 256 {c}": attention(1, 561, 561, 8, 1, 256, "keys", config=c) for c in candidates(256)},
    **{f"d 256 blind {c}": attention(2, 70, 131, 8, 1, 256, "blind keys", config=c) for c in candidates(256)},
}


def measure(case: Case, device: str, dtype: torch.dtype, seed: int) -> tuple[float, bool]:
    """‖found - expected‖ / ‖expected‖, and whether nothing was written outside of the output."""
    draw = Draw(device, dtype, seed)
    return distance(*case(draw)), draw.contained()


# ---- under Triton's interpreter ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_small_cases_mean_what_the_ops_mean(name: str, interpreted: dict[str, tuple[float, bool]]) -> None:
    check(interpreted[name], 1e-5)


# ---- on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large_cases_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    check(measure(LARGE[name], "cuda", dtype, seed), TOLERANCE[dtype], f"seed {seed}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_small_cases_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    check(measure(SMALL[name], "cuda", dtype, seed), TOLERANCE[dtype], f"seed {seed}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("k", [1024, 1153, 2048])
def test_a_norm_with_its_sum_has_the_bits_of_two_launches(k: int, dtype: torch.dtype) -> None:
    draw = Draw("cuda", dtype, int.from_bytes(os.urandom(4), "little"))
    x, r, gate, scale, shift = (draw.normal(*s) for s in ((80, k), (80, k), (k,), (k,), (k,)))
    summed, normed, sums, norms = (draw.poisoned(80, k) for _ in range(4))
    rows.summed_norm(x, summed, normed, EPS, residual=r, gate=gate, scale=scale, shift=shift)
    rows.epilogue(x, sums, residual=r, gate=gate)
    rows.modulated_norm(sums, norms, scale, shift, EPS)
    assert torch.equal(summed, sums) and torch.equal(normed, norms)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("n", [1152, 2048])
def test_a_norm_that_adds_parts_has_the_bits_of_two_launches(n: int, dtype: torch.dtype) -> None:
    """As many parts of a product of ours; the library's parts add up to its product."""
    draw = Draw("cuda", dtype, int.from_bytes(os.urandom(4), "little"))
    x, w, r, scale, shift, bias = (draw.normal(*s) for s in ((80, 4096), (4096, n), (80, n), (n,), (n,), (n,)))
    scratch, config = (
        torch.full((4 * 80 * n,), float("nan"), device="cuda"),
        product.Config(64, columns=64, split=3, warps=4),
    )
    summed, normed, sums, norms = (draw.poisoned(80, n) for _ in range(4))
    parts = product.product(x, w, summed, scratch=scratch, config=config, finish=False)
    ends = {"residual": r, "bias": bias}
    rows.summed_norm(parts, summed, normed, EPS, **ends, scale=scale, shift=shift, centred=True, parts=3)
    product.product(x, w, sums, **ends, scratch=scratch, config=config)
    rows.layer_norm(sums, norms, EPS, scale, shift)
    assert torch.equal(summed, sums) and torch.equal(normed, norms)
    whole = product.parted(x, w, scratch, 2).view(2, 80, n).sum(0)
    wanted = x.double() @ w.double()
    assert ((whole - wanted).abs().max() / wanted.abs().max()).item() < 1e-5


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("name", TUNED)
def test_tiles_for_hopper(name: str, dtype: torch.dtype) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    check(measure(TUNED[name], "cuda", dtype, seed), TOLERANCE[dtype], f"seed {seed}")


@pytest.mark.gpu
@pytest.mark.parametrize("config", [(64, 32, 4, 2, 3), (64, 32, 4, 2, 2, True)], ids=str)
def test_parts_are_added_in_one_order(config: tuple[Any, ...]) -> None:
    """Identical runs give identical bits, whichever part ends last; counters are left at zero."""
    draw = Draw("cuda", BF16, int.from_bytes(os.urandom(4), "little"))
    q, k, v = draw.normal(2, 301, 8, 128), draw.normal(2, 301, 2, 128), draw.normal(2, 301, 2, 128)
    first, again, room = torch.empty_like(q), torch.empty_like(q), scratch(draw)
    prefill_attention.attention(q, k, v, first, 0.1, None, config, room)
    for _ in range(50):
        prefill_attention.attention(q, k, v, again, 0.1, None, config, room)
        assert torch.equal(first, again)
    assert not room[1].any()


def test_a_split_without_room_is_refused() -> None:
    q, k = torch.empty(1, 16, 4, 32), torch.empty(1, 40, 1, 32)
    with pytest.raises(ValueError, match="scratch of 8704 float32 and 4 int32"):
        prefill_attention.attention(q, k, k, torch.empty_like(q), 1.0, None, (16, 16, 4, 2, 4))


# ---- compiled without a GPU --------------------------------------------------------------------------

LAUNCHES: dict[str, tuple[str, str, torch.dtype, Case]] = {  # odd extents: nothing that divides is known of them
    "norm": ("rows", "norm_kernel", BF16, rms_norm(16, 2048, True)),
    "layer norm": ("rows", "norm_kernel", BF16, layer_norm(16, 1152, True)),
    "layer norm behind a bias": ("rows", "norm_kernel", BF16, norm_behind_a_bias(16, 1152, True)),
    "glu": ("rows", "glu_kernel", BF16, glu(16, 16384, "gelu_tanh")),
    "summed norm": ("rows", "norm_kernel", BF16, summed_norm(16, 1024)),
    "rope": ("rows", "rope_kernel", BF16, rope(1, 16, 8, 256)),
    "rope of a batch": ("rows", "rope_kernel", BF16, rope(8, 16, 8, 256)),
    "rope and cache of a batch": ("rows", "rope_and_cache_kernel", BF16, rope_and_cache(8, 16, 8, 1, 256)),
    "epilogue of a batch": ("rows", "epilogue_kernel", BF16, epilogue_of_a_batch(8, 16, 2048, False)),
    "rope and cache": ("rows", "rope_and_cache_kernel", BF16, rope_and_cache(1, 16, 8, 1, 256)),
    "epilogue": ("rows", "epilogue_kernel", BF16, epilogue(16, 4304, "gelu_tanh", True, True, False)),
    "attention d 72": ("prefill_attention", "attention_kernel", BF16, attention(1, 65, 65, 16, 16, 72)),
    "attention d 72 masked": ("prefill_attention", "attention_kernel", BF16, attention(1, 65, 65, 16, 16, 72, "pairs")),
    "attention causal": ("prefill_attention", "attention_kernel", BF16, attention(1, 65, 65, 16, 16, 128, "causal")),
    "attention d 256": ("prefill_attention", "attention_kernel", BF16, attention(1, 65, 65, 8, 1, 256)),
    "attention d 256 keys": ("prefill_attention", "attention_kernel", BF16, attention(1, 65, 65, 8, 1, 256, "keys")),
    "attention d 256 masked": ("prefill_attention", "attention_kernel", BF16, attention(1, 65, 65, 8, 1, 256, "pairs")),
    "attention f32": ("prefill_attention", "attention_kernel", F32, attention(1, 65, 65, 16, 16, 72)),
}
CANDIDATES = {f"72 {c}": attention(1, 65, 256, 8, 8, 72, config=c) for c in candidates(72)}
CANDIDATES |= {f"256 {c}": attention(1, 65, 65, 8, 1, 256, "keys", config=c) for c in candidates(256)}
LAUNCHES |= {f"attention {n}": ("prefill_attention", "attention_kernel", BF16, c) for n, c in CANDIDATES.items()}
HOPPER = {"attention f32", *(f"attention {n}" for n in CANDIDATES)}
BUILDS = [
    pytest.param(n, a, marks=[pytest.mark.slow] if n == "attention f32" else [])
    for n in LAUNCHES
    for a in SHARED
    if n not in HOPPER or a == 90
]


def record(launch: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """What a launch's host function would launch on an architecture."""
    room, kernel, dtype, case = LAUNCHES[launch]
    module = importlib.import_module(f"cortexflow.kernels.triton.{room}")
    recorder = builds.record(module, kernel, arch, monkeypatch)
    if room == "prefill_attention":
        monkeypatch.setattr(module, "card", lambda: module.Card(arch, SHARED[arch]))
    case(Draw("cpu", dtype, 0))
    return recorder


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("launch", "arch"), BUILDS)
def test_launches_fit_their_card(launch: str, arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_fits(record(launch, arch, monkeypatch).compile(), arch, tmp_path)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize(
    "launch", ["norm", "summed norm", "glu", "rope", "rope and cache of a batch", "epilogue", "attention d 72"]
)
def test_kernels_let_the_next_start_before_they_wait(launch: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = record(launch, arch, monkeypatch)
    assert recorder.options["launch_pdl"] is (arch >= OVERLAP)
    ahead, _ = around_wait(recorder.compile(), arch, late=launch.startswith("attention"))
    assert not re.search(ACCESS, ahead), "reads or writes before it waits"


if __name__ == "__main__":
    interpret(lambda: {n: measure(c, "cpu", F32, 0) for n, c in SMALL.items()}, rows, prefill_attention)
