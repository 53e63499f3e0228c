"""Products and attention of few rows in CUDA C++: on a Hopper card what they compute, without one what they take."""

from __future__ import annotations

import ctypes
import os
import re
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cortexflow.kernels.cuda import nvrtc, streaming
from cortexflow.kernels.cuda import segment_attention as attention
from cortexflow.kernels.cuda.streaming import ROWS, Stream, default
from tests.kernels import test_triton_segment as segments
from tests.kernels.numerics import (  # fmt: skip
    ACTS,
    BF16,
    EPS,
    F16,
    NAN,
    ROUNDED_ONCE,
    TOLERANCE,
    Draw,
    check,
    meaning,
    measure,
    rms,
)
from tests.kernels.test_cuda import compiles, on_hopper, prepared

DTYPES = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
COUNTS = pytest.mark.parametrize("m", [10, 1, 7, 15])

# n, k, norm, gated unit: the released action experts', and other sizes that fit.
NORMED = [(2560, 1024, False), (4096, 1024, True), (1024, 1024, False), (256, 2048, False), (512, 1024, True)]
ACTIVATIONS = "gelu_tanh", "silu", "none", "gelu_tanh"
ADDED = [(1024, 2048), (1024, 4096), (1024, 1024), (128, 8192)]
D, HEADS = 256, 8


def sums_of(x: Tensor, count: int) -> Tensor:
    """Sums of rows' squares as a kernel ahead hands them on; NaN for rows that are not there."""
    made = torch.full((ROWS, count), NAN, device=x.device)
    made[: len(x)] = x.float().square().view(len(x), count, -1).sum(-1)
    return made


def configs(n: int, k: int, glu: bool, norm: bool) -> list[Stream]:
    found = default(n, k, glu, norm, norm)
    assert found is not None, "no config for this size"
    others = [found._replace(window=1), found._replace(held=not found.held), found._replace(ahead=1)]
    return list(dict.fromkeys([found, *others]))


@DTYPES
@COUNTS
@pytest.mark.parametrize(("n", "k", "glu"), NORMED)
@pytest.mark.parametrize("norm", ["modulated", "plain"])
@pytest.mark.gpu
@on_hopper
def test_products_behind_a_norm(n: int, k: int, glu: bool, norm: str, m: int, dtype: torch.dtype) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    for config, act, count in zip(configs(n, k, glu, True), ACTIVATIONS, (128, 64, 8, 256), strict=False):
        draw = Draw("cuda", dtype, seed)
        x, w = draw.rows(m, k), draw.weight(n * (1 + glu), k, k=k)
        given = {"scale": 1 + draw.normal(k) / 4, "shift": draw.normal(k)} if norm == "modulated" else {}
        ahead = rms(x) * given["scale"].double() + given["shift"].double() if given else rms(x)
        y = ahead @ w.double().T
        wanted = ACTS[act](y[:, :n]) * y[:, n:] if glu else ACTS[act](y)
        ends = dict(given, squares=sums_of(x, count), eps=EPS, act=act, glu=glu)

        def run(c: Stream = config, d: Draw = draw, x: Any = x, w: Any = w, e: Any = ends, y: Any = wanted) -> Any:
            out = d.poisoned(len(x), y.shape[1])
            streaming.streaming(x, w, out, config=c, **e)
            return [(out, y)]

        check(measure(run, draw), ROUNDED_ONCE[dtype], f"{config} {act} seed {seed}")


@DTYPES
@COUNTS
@pytest.mark.parametrize(("n", "k"), ADDED)
@pytest.mark.parametrize("gated", [False, True], ids=["added", "gated"])
@pytest.mark.gpu
@on_hopper
def test_products_are_added_and_hand_on_their_squares(n: int, k: int, gated: bool, m: int, dtype: torch.dtype) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    for config in configs(n, k, False, False):
        draw = Draw("cuda", dtype, seed)
        x, w, before, gate = draw.rows(m, k), draw.weight(n, k, k=k), draw.rows(m, n), draw.normal(n)
        y = x.double() @ w.double().T
        wanted = before.double() + (y * gate.double() if gated else y)
        count = n // config.mine

        def run(c: Stream = config, d: Draw = draw, x: Any = x, w: Any = w, r: Any = before, count: int = count,
                g: Any = gate if gated else None, y: Any = wanted) -> Any:  # fmt: skip
            out, sums = d.poisoned(len(x), y.shape[1]), torch.full((ROWS + 1, count), NAN, device="cuda")
            out.copy_(r)
            streaming.streaming(x, w, out, residual=out, gate=g, new_squares=sums[:ROWS], config=c)
            d.margins = [*d.margins[:2], sums[len(x) :]]
            return [(out, y), (sums[: len(x)], sums_of(out, count)[: len(x)].double())]

        check(measure(run, draw), ROUNDED_ONCE[dtype], f"{config} seed {seed}")


@DTYPES
@pytest.mark.parametrize(("n", "d", "rotated"), [(2560, 256, 2304), (1024, 64, 960), (1280, 128, 1280)])
@pytest.mark.gpu
@on_hopper
def test_queries_and_keys_are_rotated(n: int, d: int, rotated: int, dtype: torch.dtype) -> None:
    m, k, draw = 10, 1024, Draw("cuda", dtype, 3)
    (config, *_), x, w = configs(n, k, False, True), draw.rows(m, k), draw.weight(n, k, k=k)
    angle = torch.rand(1, m, d // 2, device="cuda") * 700
    given = {"squares": sums_of(x, 64), "eps": EPS, "config": config}
    plain = torch.empty(m, n, device="cuda", dtype=dtype)
    streaming.streaming(x, w, plain, **given)
    heads = plain[:, :rotated].unflatten(-1, (-1, d))[None]
    turned = meaning("rope", heads, angle.cos(), angle.sin())[0].flatten(1)

    def run() -> Any:
        out = draw.poisoned(m, n)
        streaming.streaming(x, w, out, angles=(angle.cos(), angle.sin()), rotated=rotated, **given)
        return [(out, torch.cat([turned, plain[:, rotated:].double()], 1))]

    check(measure(run, draw), ROUNDED_ONCE[dtype])


CASES = [
    segments.Case(10, 560), segments.Case(15, 33), segments.Case(3, 968, mask="keys"), segments.Case(1, 1),
    segments.Case(10, 561, mask="causal"), segments.Case(10, 200, mask="blind"), segments.Case(16, 592, heads=5, d=128),
    segments.Case(7, 100, heads=3, d=64, peak=20.0), segments.Case(32, 1900, peak=8.0),
]  # fmt: skip


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.gpu
@on_hopper
def test_attention_of_rotated_tokens(case: segments.Case, dtype: torch.dtype) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    x = segments.draw(case, "cuda", dtype, seed)
    for t in (x.q, x.own_k):  # no angle turns them further
        t.copy_(meaning("rope", t, x.cosine, x.sine).to(dtype))
    x = x._replace(cosine=torch.ones_like(x.cosine), sine=torch.zeros_like(x.sine))
    scale, size = case.d**-0.5, attention.scratch_size(case.m, case.heads, case.n)
    wanted = segments.expected(x, scale)

    def run() -> Any:
        scratch = torch.full((size + 64,), NAN, device="cuda")
        x.out.fill_(NAN)
        attention.segment_attention(*x[:5], x.mask, x.out, scale, scratch[:size])
        assert scratch[size:].isnan().all()
        return [(x.out.clone(), wanted)]

    check(measure(run, x.drawn), TOLERANCE[dtype], f"seed {seed}")


# ---- without a card ----------------------------------------------------------------------------------


def resources(text: str) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills."""
    library, program = nvrtc.library(), ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    options = [f"--gpu-architecture={nvrtc.ARCHITECTURE}".encode(), b"--std=c++17", b"--ptxas-options=-v"]
    assert not library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    log = nvrtc._bytes(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).decode()
    library.nvrtcDestroyProgram(ctypes.byref(program))
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill)", log))
    return int(re.findall(r"Used (\d+) registers", log)[0]), spilled


def launches(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> list[tuple[str, str]]:
    """Names and sources of the kernels of an action expert's layer; nothing is launched."""

    def rows(k: int) -> Tensor:
        return torch.empty(10, k, dtype=dtype)

    with prepared(monkeypatch) as texts:
        for n, k, glu in NORMED[:2]:
            config, w = default(n, k, glu, True, True), torch.empty(n * (1 + glu), k, dtype=dtype)
            assert config is not None
            angles = None if glu else (torch.empty(1, 10, D // 2),) * 2
            streaming.streaming(
                rows(k), w, rows(n), scale=w[0], shift=w[0], eps=EPS, squares=torch.empty(ROWS, 128), angles=angles,
                rotated=0 if glu else 2304, act="gelu_tanh" if glu else "none", glu=glu, config=config,
            )  # fmt: skip
        for n, k in ADDED[:2]:
            config, w = default(n, k, False, False), torch.empty(n, k, dtype=dtype)
            assert config is not None
            sums = torch.empty(ROWS, n // config.mine)
            streaming.streaming(rows(k), w, rows(n), residual=rows(n), gate=w[0, :n], new_squares=sums, config=config)
        q, kv, cache = (torch.empty(1, r, h, D, dtype=dtype) for r, h in ((10, HEADS), (10, 1), (560, 1)))
        mask, scratch = torch.empty(1, 1, 570, dtype=torch.bool), torch.empty(1 << 20)
        attention.segment_attention(q, kv, kv, cache, cache, mask, q, 1.0, scratch)
    return texts


@compiles
@DTYPES
def test_what_a_layer_takes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """So few registers that gate and up are resident beside the output product and `down`; none is spilled."""
    texts = launches(monkeypatch, dtype)
    assert [name for name, _ in texts] == ["streaming"] * 4 + ["segment_weights", "segment_values"]
    taken = []
    for name, text in texts:
        registers, spilled = resources(text)
        assert spilled == 0, name
        taken.append(registers)
    qkv, unit, output, down, weights, values = taken
    assert 256 * (unit + output) <= 1 << 16 and 256 * (unit + down) <= 1 << 16, taken
    assert 256 * (qkv + down) <= 1 << 16 and 128 * weights + 256 * (values + output) <= 1 << 16, taken


def test_shared_memory_of_neighbours_fits_a_multiprocessor() -> None:
    def taken(n: int, k: int, glu: bool, norm: bool) -> int:
        config = default(n, k, glu, norm, norm)
        assert config is not None
        assert n // config.mine <= 132, "more programs than multiprocessors"
        return streaming.shared_bytes(config, k, glu, norm) + 1024

    unit = taken(4096, 1024, True, True)
    assert unit + taken(1024, 2048, False, False) <= 228 << 10
    assert unit + taken(1024, 4096, False, False) <= 228 << 10


@pytest.mark.parametrize(
    ("n", "k", "glu", "norm"),
    [(2560, 512, False, True), (1024, 1536, False, False), (101, 1024, False, True), (16384, 1024, True, True),
     (1024, 16384, False, False), (1024, 65536, False, False), (264, 2048, False, False)],
)  # fmt: skip
def test_sizes_that_no_config_suits(n: int, k: int, glu: bool, norm: bool) -> None:
    assert default(n, k, glu, norm, norm) is None


def test_what_the_kernels_cannot_do_is_refused() -> None:
    x, w, out = (
        torch.empty(10, 1024, dtype=BF16),
        torch.empty(1024, 1024, dtype=BF16),
        torch.empty(10, 1024, dtype=BF16),
    )
    config, sums = Stream(8), torch.empty(ROWS, 64)
    with pytest.raises(ValueError, match="activation 'relu'"):
        streaming.streaming(x, w, out, act="relu", config=config)
    with pytest.raises(ValueError, match="at most 15 rows, found 16"):
        tall = torch.empty(16, 1024, dtype=BF16)
        streaming.streaming(tall, w, tall, eps=EPS, squares=sums, scale=w[0], shift=w[0], config=config)
    with pytest.raises(ValueError, match="one dtype"):
        streaming.streaming(x, w.half(), out, config=config)
    with pytest.raises(ValueError, match="float32 and no other"):
        streaming.streaming(x.float(), w.float(), out.float(), config=config)
    with pytest.raises(ValueError, match="`squares`"):
        streaming.streaming(x, w, out, eps=EPS, config=config)
    with pytest.raises(ValueError, match="16 bytes"):
        streaming.streaming(torch.empty(10, 1026, dtype=BF16)[:, :1024], w, out, config=config)
    with pytest.raises(ValueError, match="new_squares"):
        streaming.streaming(x, w, out, residual=out, new_squares=sums, config=config)
    heads, cache, mask = (torch.empty(s, dtype=BF16) for s in ((1, 10, 8, 256), (1, 2100, 1, 256), (1, 1, 2110)))
    with pytest.raises(ValueError, match="2016 keys"):
        attention.segment_attention(
            heads, cache[:, :10], cache[:, :10], cache, cache, mask.bool(), heads, 1.0, torch.empty(1 << 22)
        )
