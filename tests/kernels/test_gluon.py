"""The Gluon kernels: what they compute, where they write, and what they cost to hold.

On a GPU, every shape of rows and dtype against float64, over poisoned outputs, margins and scratch; without one,
the launches' own arguments are compiled for the cards that have the instructions. No interpreter runs Gluon.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from cortexflow.codegen.triton.executable import SCRATCH  # noqa: E402
from cortexflow.codegen.triton.placement import fill  # noqa: E402
from cortexflow.kernels.gluon import streaming, warpgroup  # noqa: E402

BF16, F16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 6e-3, F16: 1e-3}
EPS = 1e-6
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


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


class Draw:
    """Random inputs of one dtype; outputs full of NaN in a margin that must stay so; rows beyond the last are NaN."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int, pad: int) -> None:
        self.device, self.dtype, self.pad = device, dtype, pad
        self.generator = torch.Generator().manual_seed(seed)
        self.margins: list[Tensor] = []

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def weight(self, n: int, k: int) -> Tensor:
        return (torch.randn(n, k, generator=self.generator) * k**-0.5).to(self.device, self.dtype)

    def rows(self, m: int, k: int) -> Tensor:
        whole = torch.full((m + 3, k + self.pad), float("nan"), device=self.device, dtype=self.dtype)
        whole[:m, :k] = self.normal(m, k)
        return whole[:m, :k]

    def poisoned(self, m: int, n: int) -> Tensor:
        whole = torch.full((m + 3, n + self.pad), float("nan"), device=self.device, dtype=self.dtype)
        self.margins += [whole[m:], whole[:, n:]]
        return whole[:m, :n]


def rms(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())  # NaN left over from the poison stays NaN


def expected(case: Case, x: Tensor, w: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
    """In float64; w [n, k]."""
    y = x @ w.double().T
    y = ACTS[case.act](y[:, : case.n]) * y[:, case.n :] if case.glu else ACTS[case.act](y)
    y = y * gate.double() if case.gate else y
    return y + residual.double() if case.residual else y


def stream(case: Case, m: int, draw: Draw) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    """A launch that gives (found, wanted): `streaming`."""
    x, w = draw.rows(m, case.k), draw.weight(case.n * (2 if case.glu else 1), case.k)
    scale, shift = 1 + draw.normal(case.k) / 4, draw.normal(case.k)
    residual, gate = draw.rows(m, case.n), draw.normal(case.n)
    ahead = x.double() if case.norm == "none" else rms(x.double())
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


def group(case: Case, m: int, draw: Draw) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    """The same for `warpgroup`, with `combine` where the case asks for it."""
    x, w = draw.rows(m, case.k), draw.weight(case.n * (2 if case.glu else 1), case.k)
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
        scratch = torch.full((config.split * 64 * case.n + 64,), float("nan"), device=draw.device)
        draw.margins.append(scratch[config.split * 64 * case.n :])
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


def measure(launch: Callable[[], list[tuple[Tensor, Tensor]]], draw: Draw, runs: int) -> tuple[float, bool, bool]:
    """The largest distance; whether nothing was written outside of the outputs; whether every run gave the same."""
    first = launch()
    same = all(torch.equal(a, b) for _ in range(runs) for (a, _), (b, _) in zip(first, launch(), strict=True))
    error = torch.tensor([distance(*pair) for pair in first]).max().item()
    return error, all(bool(margin.isnan().all()) for margin in draw.margins), same


# ---- on a GPU ----------------------------------------------------------------------------------------


@pytest.fixture
def hopper_or_later() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch begins with Hopper")


@pytest.fixture
def hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("warpgroup instructions are Hopper's")


def rows_of(name: str, *rows: int) -> tuple[int, ...]:
    """The numbers of rows to try a case with: activations with the first alone."""
    return rows[:1] if name.startswith(("act ", "unit ")) else rows


def check(make: Callable[..., Any], case: Case, m: int, dtype: torch.dtype) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    draw = Draw("cuda", dtype, seed, case.pad)
    error, contained, same = measure(make(case, m, draw), draw, 20)
    assert error < TOLERANCE[dtype], f"seed {seed}"
    assert contained, "wrote outside of its output"
    assert same, "runs differ"


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper_or_later")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
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
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "m"), [(n, m) for n in WARPGROUP for m in rows_of(n, 37, 1, 17, 50, 64)])
def test_warpgroup(name: str, m: int, dtype: torch.dtype) -> None:
    check(group, WARPGROUP[name], m, dtype)


# ---- compiled without a GPU --------------------------------------------------------------------------

SHARED = {90: 232448, 120: 101376}  # bytes of shared memory that a block may ask for
REGISTERS = 1 << 16  # of a multiprocessor
POINTERS = {BF16: "*bf16", F16: "*fp16", torch.float32: "*fp32"}
HOST_OPTIONS = ("num_warps", "maxnreg", "launch_pdl")


class Recorder:
    """Stands in for a kernel and keeps what its host function would launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.grid, self.args, self.options = grid, args, options

        return launch

    def compile(self, arch: int) -> Any:
        """The launch as compiled for an architecture: arguments as the runtime would specialise them."""
        names = self.kernel.arg_names
        given = dict(zip(names, self.args, strict=False)) | self.options
        options = {k: given.pop(k) for k in HOST_OPTIONS if given.get(k) is not None}
        signature, constants, attributes = {}, {}, {}
        for place, name in enumerate(names):
            value = given[name]
            if name in self.options:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
                if isinstance(value, Tensor) or value % 16 == 0:
                    attributes[place,] = [["tt.divisibility", 16]]
        source = GluonASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def record(room: Any, kernel: str, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(getattr(room, kernel))
    monkeypatch.setattr(room, kernel, recorder)
    monkeypatch.setattr(room, "overlaps", lambda: True)
    return recorder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A compiler cache of this module's own: every kernel is really compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def usage(cubin: bytes, folder: Path) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread; zeros where the disassembler is not at hand."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.exists():
        return 0, 0
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    report = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])


def check_size(recorder: Recorder, arch: int, folder: Path) -> Any:
    """The compiled launch; fails where it cannot run on the card, or keeps numbers in memory that registers hold."""
    made = recorder.compile(arch)
    registers, stack = usage(made.asm["cubin"], folder)
    assert made.metadata.shared <= SHARED[arch]
    assert registers * 32 * recorder.options["num_warps"] <= REGISTERS
    assert stack == 0
    return made


HELD = ["norm, wide", "plain norm", "residual and gate", "gated unit", "long rows", "longest rows"]
HELD += ["norm of longer rows", "gated unit of longer rows", "bare"]
TOO_LONG = {"longest rows", "norm of longer rows", "gated unit of longer rows"}  # for a card with 99 KB


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("name", "arch"), [(n, a) for n in HELD for a in SHARED if a == 90 or n not in TOO_LONG])
def test_streaming_fits_its_card(name: str, arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder, case = record(streaming, "streaming_kernel", monkeypatch), STREAMING[name]
    stream(case, 10, Draw("cpu", BF16, 0, case.pad))()
    check_size(recorder, arch, tmp_path)
    columns = recorder.options["COLUMNS"]
    assert case.n % columns == 0 and recorder.grid == (case.n // columns,)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    "name", [n for n, c in WARPGROUP.items() if c.pad == 16 and not n.startswith(("act ", "unit "))]
)
def test_warpgroup_fits_its_card(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = record(warpgroup, "warpgroup_kernel", monkeypatch)
    combine, case = record(warpgroup, "combine_kernel", monkeypatch), WARPGROUP[name]
    group(case, 50, Draw("cpu", BF16, 0, case.pad))()
    code = check_size(recorder, 90, tmp_path).asm["ptx"]
    assert "wgmma.mma_async" in code
    if case.combined:
        check_size(combine, 90, tmp_path)
        assert combine.grid == (50,)


@pytest.mark.parametrize("glu", [False, True])
def test_default_configs_divide_and_fit(glu: bool) -> None:
    """Whatever the extents, k in chunks; or there is none."""
    made = 0
    for n in range(64, 20000, 64):
        for k in (256, 512, 1024, 1536, 2048, 3072, 4096, 7680, 8192, 11008, 16384, 28672):
            config = warpgroup.default(n, k, glu)
            if config is None:
                continue
            columns, split, chunk = config
            assert n % columns == 0 and columns % 8 == 0 and k % (split * chunk) == 0 and (split == 1 or not glu)
            assert (1 + glu) * columns * k // split * 2 <= SHARED[90] and split * 64 * n <= SCRATCH
            made += 1
    assert made > 1000


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["norm, wide", "residual and gate", "gated unit", "long rows"])
def test_streaming_fetches_its_weights_and_nothing_else_before_it_waits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, case = record(streaming, "streaming_kernel", monkeypatch), STREAMING[name]
    stream(case, 10, Draw("cpu", BF16, 0, case.pad))()
    check_order(recorder, "w", {"x", *(["residual"] if case.residual else [])}, recorder.options["SHARED"])


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["wide", "gated unit", "sums and everything"])
def test_warpgroup_fetches_its_weights_and_nothing_else_before_it_waits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = record(warpgroup, "warpgroup_kernel", monkeypatch)
    combine, case = record(warpgroup, "combine_kernel", monkeypatch), WARPGROUP[name]
    group(case, 50, Draw("cpu", BF16, 0, case.pad))()
    check_order(recorder, "w", {"x"}, True)
    if case.combined:
        check_order(combine, "gate", {"parts", "residual"}, False)


def check_order(recorder: Recorder, fetched: str, made_before: set[str], copied: bool) -> None:
    """The next kernel may start first of all; until the wait no store, and no load of what earlier kernels made."""
    assert recorder.options["launch_pdl"] is True
    code = recorder.compile(90).asm["ptx"]
    start, wait = code.index("griddepcontrol.launch_dependents"), code.index("griddepcontrol.wait")
    ahead, behind = code[:wait], code[wait:]
    assert start < wait and not re.search(r"\bst\.global|cp\.async|\bld\.global", code[:start])
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
