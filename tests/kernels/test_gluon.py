"""The Gluon kernels: what they compute, where they write, and what they cost to hold.

On a GPU, every shape of rows and dtype against float64, over poisoned outputs, margins and scratch; without one,
the launches' own arguments are compiled for the cards that have the instructions. No interpreter runs Gluon.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from cortexflow.codegen.triton.executable import SCRATCH
from cortexflow.codegen.triton.placement import fill
from cortexflow.kernels.gluon import streaming, warpgroup
from cortexflow.kernels.triton import common
from tests.kernels import numerics
from tests.kernels.builds import SHARED, Recorder, around_wait, check_fits, record
from tests.kernels.numerics import ACTS, BF16, EPS, F16, ROUNDED_ONCE, Draw, Launch, measure, rms

DTYPES = BF16, F16


# ---- cases -------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One product: extents (n: outputs), and what stands around it."""

    n: int
    k: int
    norm: str = "none"  # before a streaming product, behind a combined one: rms, scaled, or modulated
    glu: bool = False
    act: str = "none"
    residual: bool = False
    gate: bool = False
    in_place: bool = False
    combined: bool = False  # sums to a scratch, which `combine` adds up
    pad: int = 16  # columns behind every row, which nothing may touch
    config: Any = None


def expected(case: Case, x: Tensor, w: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
    """In float64; w [n, k]."""
    y = x @ w.double().T
    y = ACTS[case.act](y[:, : case.n]) * y[:, case.n :] if case.glu else ACTS[case.act](y)
    y = y * gate.double() if case.gate else y
    return y + residual.double() if case.residual else y


def stream(case: Case, m: int, draw: Draw) -> Launch:
    """A launch that gives (found, wanted): `streaming`."""
    x, w = draw.rows(m, case.k), draw.weight(case.n * (2 if case.glu else 1), case.k, k=case.k)
    scale, shift = 1 + draw.normal(case.k) / 4, draw.normal(case.k)
    residual, gate = draw.rows(m, case.n), draw.normal(case.n)
    ahead = x.double() if case.norm == "none" else rms(x)
    ahead = ahead * scale.double() + shift.double() if case.norm == "modulated" else ahead
    wanted = expected(case, ahead, w, residual, gate)
    given: dict[str, Any] = {"act": case.act, "glu": case.glu, "gate": gate if case.gate else None}
    given |= {} if case.norm == "none" else {"eps": EPS}
    given |= {"scale": scale, "shift": shift} if case.norm == "modulated" else {}
    config = case.config or streaming.default(case.n, case.k, case.glu, case.norm != "none")

    def launch() -> list[tuple[Tensor, Tensor]]:
        out = draw.poisoned(m, case.n)
        if case.in_place:
            out.copy_(residual)
        before = {"residual": out if case.in_place else residual} if case.residual else {}
        streaming.streaming(x, w, out, config=config, **before, **given)
        return [(out, wanted)]

    return launch


def group(case: Case, m: int, draw: Draw) -> Launch:
    """The same for `warpgroup`, with `combine` where the case asks for it."""
    x, w = draw.rows(m, case.k), draw.weight(case.n * (2 if case.glu else 1), case.k, k=case.k)
    scale, shift = 1 + draw.normal(case.n) / 4, draw.normal(case.n)
    residual, gate = draw.rows(m, case.n), draw.normal(case.n)
    wanted = expected(case, x.double(), w, residual, gate)
    behind = rms(wanted)
    behind = behind * scale.double() if case.norm in ("scaled", "modulated") else behind
    behind = behind + shift.double() if case.norm == "modulated" else behind
    given: dict[str, Any] = {"gate": gate if case.gate else None}
    given |= {} if case.norm == "none" else {"eps": EPS}
    given |= {"scale": scale} if case.norm in ("scaled", "modulated") else {}
    given |= {"shift": shift} if case.norm == "modulated" else {}
    config = case.config or warpgroup.default(case.n, case.k, case.glu)
    stored = torch.full_like(w, float("nan"))
    fill(stored, "interleaved", w.t().contiguous())

    def launch() -> list[tuple[Tensor, Tensor]]:
        out, normed = draw.poisoned(m, case.n), draw.poisoned(m, case.n)
        if not case.combined:
            warpgroup.warpgroup(x, stored, out, act=case.act, glu=case.glu, config=config)
            return [(out, wanted)]
        size = config.split * warpgroup.padded(m) * case.n
        scratch = torch.full((size + 64,), float("nan"), device=draw.device)
        draw.margins.append(scratch[size:])
        warpgroup.warpgroup(x, stored, scratch[:-64].view(-1, case.n), config=config)
        if case.in_place:
            out.copy_(residual)
        before = {"residual": out if case.in_place else residual} if case.residual else {}
        after = {} if case.norm == "none" else {"normed": normed}
        warpgroup.combine(scratch, out, config.split, **before, **after, **given)
        return [(out, wanted), (normed, behind)] if after else [(out, wanted)]

    return launch


STREAMING = {
    "norm, wide": Case(2560, 1024, "modulated"),
    "plain norm": Case(2560, 1024, "rms"),
    "residual and gate": Case(1024, 2048, residual=True, gate=True),
    "gated unit": Case(4096, 1024, "modulated", glu=True, act="gelu_tanh"),
    "long rows": Case(1024, 4096, residual=True, gate=True),
    "in place": Case(1024, 4096, residual=True, in_place=True),
    "longest rows": Case(192, 8192, gate=True),
    "norm of longer rows": Case(128, 2048, "modulated"),
    "gated unit of longer rows": Case(128, 2048, "modulated", glu=True, act="silu"),
    "bare": Case(64, 512),
    "rows that are not aligned": Case(64, 512, "modulated", residual=True, pad=3),
    **{f"unit {act}": Case(64, 512, "rms", glu=True, act=act) for act in ACTS},
    **{f"act {act}": Case(64, 512, act=act, residual=True, gate=True) for act in ACTS},
}
WARPGROUP = {
    "wide": Case(2560, 1024),
    "gated unit": Case(4096, 1024, glu=True, act="gelu_tanh"),
    "wide, long rows": Case(2048, 8192),
    "gated unit of long rows": Case(128, 4096, glu=True, act="silu"),
    "not split": Case(64, 512, config=warpgroup.Config(64, 1, 128)),
    "rows that are not aligned": Case(2048, 512, pad=3),
    **{f"unit {act}": Case(128, 512, glu=True, act=act) for act in ACTS},
    **{f"act {act}": Case(2048, 512, act=act) for act in ACTS},
    "sums": Case(1024, 2048, combined=True),
    "sums, residual": Case(1024, 2048, combined=True, residual=True),
    "sums, gate": Case(1024, 2048, combined=True, gate=True),
    "sums, norm": Case(1024, 4096, "rms", combined=True),
    "sums, residual, norm": Case(1024, 4096, "rms", combined=True, residual=True),
    "sums, residual, scaled norm": Case(1024, 4096, "scaled", combined=True, residual=True),
    "sums and everything": Case(1024, 4096, "modulated", combined=True, residual=True, gate=True),
    "sums in place": Case(1024, 2048, "modulated", combined=True, residual=True, gate=True, in_place=True),
    "sums, not split": Case(2048, 1024, "rms", combined=True, residual=True),
    "sums of few columns": Case(128, 1024, "modulated", combined=True, residual=True, gate=True, pad=3),
}


# ---- on a GPU ----------------------------------------------------------------------------------------


@pytest.fixture
def hopper_or_later() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch begins with Hopper")


def rows_of(name: str, *rows: int) -> tuple[int, ...]:
    """The numbers of rows to try a case with: activations with the first alone."""
    return rows[:1] if name.startswith(("act ", "unit ")) else rows


def check(make: Callable[..., Any], case: Case, m: int, dtype: torch.dtype) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    draw = Draw("cuda", dtype, seed, case.pad)
    numerics.check(measure(make(case, m, draw), draw), ROUNDED_ONCE[dtype], f"seed {seed}")


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper_or_later")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "m"), [(n, m) for n in STREAMING for m in rows_of(n, 10, 1, 7, 15, 16)])
def test_streaming(name: str, m: int, dtype: torch.dtype) -> None:
    case = STREAMING[name]
    if m == 16 and case.norm == "modulated":
        case = case._replace(norm="rms")  # `shift` takes a row
    config = streaming.default(case.n, case.k, case.glu, case.norm != "none")
    room = torch.cuda.get_device_properties().shared_memory_per_block_optin
    if config.shared and (1 + case.glu) * config.columns * case.k * 2 > room:
        pytest.skip("more than this card's shared memory")
    check(stream, case, m, dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "m"), [(n, m) for n in WARPGROUP for m in rows_of(n, 37, 1, 17, 50, 64, 65, 80, 128)])
def test_warpgroup(name: str, m: int, dtype: torch.dtype) -> None:
    check(group, WARPGROUP[name], m, dtype)


ROTATED = [(2560, 1024, 128, 2304), (2048, 512, 32, 1024), (3072, 256, 64, 3072)]  # n, k, half a head, columns


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "tokens"), [(37, 37), (51, 51), (64, 16), (100, 50), (128, 128)])
@pytest.mark.parametrize("case", ROTATED, ids=str)
def test_a_product_that_rotates_its_columns(
    case: tuple[int, int, int, int], m: int, tokens: int, dtype: torch.dtype
) -> None:
    """The rotation of what it gives without; the other columns to the bit."""
    n, k, half, rotated = case
    draw = Draw("cuda", dtype, int.from_bytes(os.urandom(4), "little"), 8)
    x, w, config = draw.rows(m, k), draw.weight(n, k, k=k), warpgroup.default(n, k, False)
    assert warpgroup.rotates(n, half, config)
    stored = torch.full_like(w, float("nan"))
    fill(stored, "interleaved", w.t().contiguous())
    angle = torch.rand(1, tokens, half, generator=draw.generator).cuda() * 700
    plain, found = draw.poisoned(m, n), draw.poisoned(m, n)
    warpgroup.warpgroup(x, stored, plain, config=config)
    warpgroup.warpgroup(x, stored, found, angles=(angle.cos(), angle.sin()), rotated=rotated, config=config)
    heads = plain[:, :rotated].view(m // tokens, tokens, -1, 2 * half)
    wanted = numerics.meaning("rope", heads, angle.cos(), angle.sin()).to(dtype).reshape(m, rotated)
    assert numerics.distance(found[:, :rotated], wanted) < ROUNDED_ONCE[dtype]
    assert torch.equal(found[:, rotated:], plain[:, rotated:]) and draw.contained()
    first = found.clone()
    for _ in range(20):
        warpgroup.warpgroup(x, stored, found, angles=(angle.cos(), angle.sin()), rotated=rotated, config=config)
        assert torch.equal(found, first)


# ---- compiled without a GPU --------------------------------------------------------------------------

HELD = ["norm, wide", "plain norm", "residual and gate", "gated unit", "long rows", "longest rows"]
HELD += ["norm of longer rows", "gated unit of longer rows", "bare"]
TOO_LONG = {"longest rows", "norm of longer rows", "gated unit of longer rows"}  # for a card with 99 KB


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("name", "arch"), [(n, a) for n in HELD for a in (90, 120) if a == 90 or n not in TOO_LONG])
def test_streaming_fits_its_card(name: str, arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder, case = record(streaming, "streaming_kernel", arch, monkeypatch), STREAMING[name]
    stream(case, 10, Draw("cpu", BF16, 0, case.pad))()
    check_fits(recorder.compile(), arch, tmp_path)
    columns = recorder.options["COLUMNS"]
    assert case.n % columns == 0 and recorder.grid == (case.n // columns,)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    "name", [n for n, c in WARPGROUP.items() if c.pad == 16 and not n.startswith(("act ", "unit "))]
)
@pytest.mark.parametrize("m", [50, 100])
def test_warpgroup_fits_its_card(name: str, m: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = record(warpgroup, "warpgroup_kernel", 90, monkeypatch)
    combine, case = record(warpgroup, "combine_kernel", 90, monkeypatch), WARPGROUP[name]
    group(case, m, Draw("cpu", BF16, 0, case.pad))()
    built = recorder.compile()
    check_fits(built, 90, tmp_path)
    assert "wgmma.mma_async" in built.asm["ptx"]
    if case.combined:
        check_fits(combine.compile(), 90, tmp_path)
        assert combine.grid == (m,)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("m", [50, 100])
def test_a_product_that_rotates_fits_its_card(m: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = record(warpgroup, "warpgroup_kernel", 90, monkeypatch)
    draw, angles = Draw("cpu", BF16, 0, 16), (torch.zeros(1, m, 128), torch.zeros(1, m, 128))
    config = warpgroup.default(2560, 1024, False)
    assert config is not None
    x, w, out = draw.rows(m, 1024), draw.weight(2560, 1024, k=1024), draw.poisoned(m, 2560)
    warpgroup.warpgroup(x, w, out, angles=angles, rotated=2304, config=config)
    built = recorder.compile()
    check_fits(built, 90, tmp_path)
    assert not re.search(r"st\.global\S*\.b16", built.asm["ptx"]), "neighbouring columns are stored together"
    check_order(recorder, "w", {"x", "cosine", "sine"}, True)
    with pytest.raises(ValueError, match="heads of 12 entries"):
        warpgroup.warpgroup(x, w, out, angles=(torch.zeros(1, m, 6),) * 2, rotated=2304, config=config)


def test_a_launch_fills_every_multiprocessor_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """160 programs of 16 columns on 132 multiprocessors: two on each, of which 104 have nothing to do but wait."""
    recorder, draw = record(warpgroup, "warpgroup_kernel", 90, monkeypatch), Draw("cpu", BF16, 0, 16)
    monkeypatch.setattr(common, "processors", lambda: 132)
    for n, k, glu, programs in ((2560, 1024, False, 264), (4096, 1024, True, 132), (1024, 4096, False, 132)):
        config = warpgroup.default(n, k, glu)
        assert config is not None
        out = torch.empty(8, 64, n) if config.split > 1 else draw.poisoned(50, n)
        warpgroup.warpgroup(
            draw.rows(50, k), draw.weight(n * (1 + glu), k, k=k), out[0] if config.split > 1 else out,
            glu=glu, config=config,
        )  # fmt: skip
        assert recorder.grid == (programs,)


@pytest.mark.parametrize("glu", [False, True])
def test_default_configs_divide_and_fit(glu: bool) -> None:
    """Whatever the extents, k in chunks; or there is none."""
    made = 0
    for n in range(64, 20000, 64):
        for k in (256, 512, 1024, 1536, 2048, 3072, 4096, 7680, 8192, 11008, 16384, 28672):
            config = warpgroup.default(n, k, glu)
            if config is None:
                continue
            columns, split, chunk, _ = config
            assert n % columns == 0 and columns % 8 == 0 and k % (split * chunk) == 0 and (split == 1 or not glu)
            assert (1 + glu) * columns * k // split * 2 <= SHARED[90] and split * 128 * n <= SCRATCH
            made += 1
    assert made > 1000


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["norm, wide", "residual and gate", "gated unit", "long rows"])
def test_streaming_fetches_its_weights_and_nothing_else_before_it_waits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, case = record(streaming, "streaming_kernel", 90, monkeypatch), STREAMING[name]
    stream(case, 10, Draw("cpu", BF16, 0, case.pad))()
    check_order(recorder, "w", {"x", *(["residual"] if case.residual else [])}, recorder.options["SHARED"])


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["wide", "gated unit", "sums and everything"])
def test_warpgroup_fetches_its_weights_and_nothing_else_before_it_waits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = record(warpgroup, "warpgroup_kernel", 90, monkeypatch)
    combine, case = record(warpgroup, "combine_kernel", 90, monkeypatch), WARPGROUP[name]
    group(case, 50, Draw("cpu", BF16, 0, case.pad))()
    check_order(recorder, "w", {"x"}, True)
    if case.combined:
        check_order(combine, "gate", {"parts", "residual"}, False)


def check_order(recorder: Recorder, fetched: str, made_before: set[str], copied: bool) -> None:
    """The next kernel may start first of all; until the wait no store, and no load of what earlier kernels made."""
    assert recorder.options["launch_pdl"] is True
    built = recorder.compile()
    (ahead, behind), code = around_wait(built, 90), built.asm["ptx"]
    assert not re.search(r"\bst\.global", ahead) and re.search(r"\bst\.global", behind)
    assert ("cp.async.c" in ahead) is copied and "cp.async.c" not in behind
    parameters = {name: i for i, name in enumerate(recorder.kernel.arg_names) if name not in recorder.options}
    assert parameters[fetched] in origins(ahead)
    for name in made_before:
        assert parameters[name] not in origins(ahead) and parameters[name] in origins(code), name


def origins(code: str) -> set[int]:
    """The parameters that the addresses of global loads come from."""
    came: dict[str, set[int]] = {}
    found: set[int] = set()
    for line in code.splitlines():
        registers = re.findall(r"%r[ds]?\d+", line)
        if parameter := re.search(r"ld\.param\.b64\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
            came[parameter[1]] = {int(parameter[2])}
        elif re.search(r"\bld\.global|cp\.async\.c", line):
            found |= set().union(*(came.get(r, set()) for r in registers))
        elif len(registers) > 1:
            came[registers[0]] = set().union(*(came.get(r, set()) for r in registers[1:]))
    return found
