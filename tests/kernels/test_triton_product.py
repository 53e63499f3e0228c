"""Products with many rows: what they compute, where they write, and what they cost to hold.

Under Triton's interpreter, in a process of its own, tiny odd sizes are compared in float32 with float64; on a GPU,
realistic and odd sizes in every dtype; and without a GPU the launches' own arguments are compiled for several cards.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")  # the interpreter looks for this name beside a kernel

from cortexflow.kernels.triton import product as room  # noqa: E402
from cortexflow.kernels.triton.product import Config  # noqa: E402

BF16, F32 = torch.bfloat16, torch.float32
TOLERANCE = {F32: 1e-4, torch.float16: 2e-3, BF16: 1e-2}
EPS = 1e-6
PAD = 16  # columns behind every row, which nothing may touch
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@triton.jit
def nothing():
    """Stands in for the instructions that overlap launches: the interpreter has none."""
    pass


class Case(NamedTuple):
    """One product: extents, what stands around it, and its tiles."""

    m: int
    k: int
    n: int
    config: Config | None = None
    act: str = "none"
    bias: bool = False
    residual: bool = False
    gate: bool = False
    glu: str = "none"  # halves or pairs
    norm: str = "none"  # rms or layer
    in_place: bool = False
    then: str = "none"  # the norm of the result: rms or layer


def run(case: Case, device: str, dtype: torch.dtype, seed: int) -> tuple[float, bool, bool]:
    """‖found - expected‖ / ‖expected‖ in float64, nothing written outside of the output, and identical bits twice."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def strided(*shape: int) -> Tensor:
        return normal(shape[0], shape[1] + PAD)[:, : shape[1]]

    m, k, n = case.m, case.k, case.n
    wide = n if case.glu == "none" else 2 * n
    x, w, bias = strided(m, k), (normal(k, wide) * k**-0.5).to(dtype), normal(wide)
    if case.norm == "layer":
        x += 1  # a mean that matters
    residual, gate = strided(m, n), normal(n)
    scales, means = torch.full((2, m), float("nan"), device=device)
    if case.norm != "none":
        room.row_scales(x, scales, EPS, means if case.norm == "layer" else None)

    y = x.double()
    if case.norm == "rms":
        y = y * (y.square().mean(-1, keepdim=True) + EPS).rsqrt()
    elif case.norm == "layer":
        y = F.layer_norm(y, (k,), eps=EPS)
    y = y @ w.double()
    y = y + bias.double() if case.bias else y
    if case.glu == "halves":
        y = ACTS[case.act](y[:, :n]) * y[:, n:]
    elif case.glu == "pairs":
        y = ACTS[case.act](y[:, ::2]) * y[:, 1::2]
    else:
        y = ACTS[case.act](y)
    y = y * gate.double() if case.gate else y
    y = y + residual.double() if case.residual else y

    if case.then == "rms":
        y = torch.cat([y, y * (y.square().mean(-1, keepdim=True) + EPS).rsqrt()])
    elif case.then == "layer":
        y = torch.cat([y, F.layer_norm(y, (n,), eps=EPS)])

    def launch() -> tuple[Tensor, bool]:
        whole = torch.full((m if case.then == "none" else 2 * m, n + PAD), float("nan"), device=device, dtype=dtype)
        out, normed = whole[:m, :n], whole[m:, :n]
        if case.in_place:
            out.copy_(residual)
        split = case.config.split if case.config else 1
        room.product(
            x, w, out, bias=bias if case.bias else None, act=case.act,
            residual=None if not case.residual else out if case.in_place else residual,
            gate=gate if case.gate else None, glu=case.glu == "halves", pairs=case.glu == "pairs",
            row_scale=None if case.norm == "none" else scales, row_mean=means if case.norm == "layer" else None,
            column_sums=w.float().sum(0) if case.norm == "layer" else None,
            normed=None if case.then == "none" else normed, eps=EPS, centred=case.then == "layer",
            scratch=torch.full((split * m * n,), float("nan"), device=device), config=case.config,
        )  # fmt: skip
        return whole[:, :n], bool(whole[:, n:].isnan().all())

    found, contained = launch()
    repeated = device == "cpu" or torch.equal(found, launch()[0])
    return float((found.double() - y).norm() / y.norm()), contained, repeated


TINY = Config(16, 16, 16, 16)
SMALL = {
    "plain": Case(37, 24, 20, TINY),
    "transposed": Case(37, 24, 20, TINY._replace(swap=True)),
    "rows that are not aligned": Case(37, 21, 19, TINY),
    "one row": Case(1, 5, 3, TINY),
    "one piece, default tile": Case(5, 33, 20),
    "one tile after another": Case(37, 20, 36, TINY._replace(more=0, resident=1)),
    "split": Case(37, 36, 20, TINY._replace(split=3), "silu", True, True, True),
    "split finer than its steps": Case(5, 20, 36, TINY._replace(split=4)),
    **{f"everything {a}": Case(9, 20, 12, TINY, a, True, True, True) for a in ACTS},
    "residual in place": Case(37, 24, 20, TINY, residual=True, in_place=True),
    "split, residual in place": Case(21, 24, 20, TINY._replace(split=2), gate=True, residual=True, in_place=True),
    "halves": Case(37, 24, 20, TINY, "gelu_tanh", True, True, True, "halves"),
    "halves transposed": Case(37, 24, 20, TINY._replace(swap=True), "silu", True, glu="halves"),
    "pairs": Case(37, 24, 20, TINY, "gelu_tanh", True, glu="pairs"),
    "pairs, not aligned": Case(17, 21, 19, TINY, "silu", glu="pairs"),
    "rms norm": Case(37, 24, 20, TINY, norm="rms"),
    "layer norm": Case(37, 24, 20, TINY._replace(swap=True), bias=True, norm="layer"),
    "layer norm, split": Case(37, 24, 20, TINY._replace(split=2), "gelu_tanh", True, norm="layer"),
    "normed after": Case(9, 24, 20, TINY, residual=True, then="layer"),
    "normed after, split": Case(9, 36, 20, TINY._replace(split=3), residual=True, in_place=True, then="rms"),
    "centred after, split": Case(9, 36, 21, TINY._replace(split=2), "none", True, True, then="layer"),
    "rms norm, halves": Case(37, 24, 20, TINY, "silu", norm="rms", glu="halves"),
    "layer norm, pairs": Case(37, 24, 20, TINY, "silu", True, norm="layer", glu="pairs"),
}  # fmt: skip
LARGE = {
    "qkv": Case(560, 2048, 2560, norm="rms"),
    "down": Case(560, 16384, 2048, residual=True, in_place=True),
    "gate and up": Case(560, 2048, 16384, None, "gelu_tanh", glu="halves", norm="rms"),
    "fc1": Case(512, 1152, 4304, None, "gelu_tanh", True, norm="layer"),
    "patches": Case(512, 588, 1152, bias=True),
    "split and normed": Case(560, 2048, 2048, Config(64, 0, 64, 32, 3), residual=True, then="rms"),
    "split and centred": Case(
        512, 4304, 1152, Config(64, 0, 64, 32, 3), bias=True, residual=True, in_place=True, then="layer"
    ),
    "odd": Case(77, 333, 451, None, "silu", True, True, True),
    "odd halves": Case(77, 333, 451, None, "silu", True, glu="halves"),
}
TILES = [
    *((c._replace(split=s), "none") for c in room.PLAIN for s in (1, 3)),
    *((c, "halves") for c in room.HALVES),
    *((c, "pairs") for c in room.PAIRS),
]  # fmt: skip


# ---- under Triton's interpreter ----------------------------------------------------------------------


def interpret() -> None:
    """Run the small cases and print what they measured."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:  # numpy no longer turns an array of one entry into an index
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    room.let_next_start = room.wait_for_previous = nothing
    room.overlaps = lambda: True  # descriptors, except where rows are not aligned
    print(json.dumps({name: run(case, "cpu", F32, 0) for name, case in SMALL.items()}))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, tuple[float, bool, bool]]:
    """What the small cases measured, in a process whose Triton interprets from its import on."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], check=False, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SMALL)
def test_small_products(name: str, interpreted: dict[str, tuple[float, bool, bool]]) -> None:
    error, contained, _ = interpreted[name]
    assert error < 1e-5  # NaN left over from the poison fails too
    assert contained, "wrote outside of its output"


# ---- what is refused, and what is proposed -----------------------------------------------------------


def test_refusals() -> None:
    x, w, out = torch.zeros(4, 64), torch.zeros(64, 32), torch.zeros(4, 16)
    with pytest.raises(ValueError, match="not split"):
        room.product(x, w, out, glu=True, config=Config(split=2))
    with pytest.raises(ValueError, match="scratch"):
        room.product(x, w[:, :16], out, config=Config(split=2), scratch=torch.zeros(5))
    with pytest.raises(ValueError, match="dense"):
        room.product(x, torch.zeros(16, 64).t(), out)


@pytest.mark.parametrize("m", [1, 512, 560, 968, 4480])
@pytest.mark.parametrize(("k", "n", "glu"), [(2048, 16384, True), (16384, 2048, False), (588, 1152, False)])
def test_candidates(m: int, k: int, n: int, glu: bool) -> None:
    found = room.candidates(m, n, k, glu)
    assert 1 < len(found) <= 8
    assert len(set(found)) == len(found)
    assert not glu or all(c.split == 1 for c in found)


# ---- on a GPU ----------------------------------------------------------------------------------------


def check(case: Case, dtype: torch.dtype) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    error, contained, repeated = run(case, "cuda", dtype, seed)
    assert error < TOLERANCE[dtype], f"seed {seed}"
    assert contained, "wrote outside of its output"
    assert repeated, "other bits the second time"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_small_products_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    case = SMALL[name]
    bare = case.config and case.config._replace(warps=4, rows=64, more=64 if case.config.more else 0, columns=64)
    check(case._replace(config=bare), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large_products_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    check(LARGE[name], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize(("config", "glu"), TILES, ids=str)
def test_tiles_on_a_gpu(config: Config, glu: str, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_properties(0).shared_memory_per_block_optin < SHARED[90]:
        pytest.skip("tiles for Hopper")
    check(Case(333, 1152, 584, config, "gelu_tanh", True, True, glu=glu, norm="rms"), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("centred", [False, True])
def test_row_scales_on_a_gpu(centred: bool) -> None:
    x = torch.randn(333, 1160, device="cuda").add(1).to(BF16)[:, :1152]
    scales, means = torch.full((2, 333), float("nan"), device="cuda")
    room.row_scales(x, scales, EPS, means if centred else None)
    y = x.double()
    if centred:
        torch.testing.assert_close(means.double(), y.mean(-1), rtol=1e-5, atol=1e-5)
        y = y - y.mean(-1, keepdim=True)
    torch.testing.assert_close(scales.double(), (y.square().mean(-1) + EPS).rsqrt(), rtol=1e-5, atol=0)


# ---- compiled without a GPU --------------------------------------------------------------------------

SHARED = {80: 166912, 89: 101376, 90: 232448, 120: 101376}  # bytes of shared memory that a block may ask for
STACK = {80: 0, 89: 0, 90: 0, 120: 8}  # bytes a thread, spills not among them: descriptors take 8 on sm_120
NAMES = {BF16: "bf16", torch.float16: "fp16", F32: "fp32"}
LAUNCHES: dict[str, tuple[torch.dtype, Case]] = {
    "residual": (BF16, Case(65, 2048, 2048, bias=True, residual=True)),
    "halves": (BF16, Case(65, 2048, 1024, None, "gelu_tanh", glu="halves", norm="rms")),
    "patches": (BF16, Case(65, 588, 1152, bias=True)),
    "finish": (BF16, Case(65, 2048, 2048, Config(128, 0, 64, 32, split=4), residual=True, then="rms")),
    "f32": (F32, Case(65, 64, 64, None, "gelu_tanh", True, True)),
}


class Recorder:
    """Stands in for a kernel and keeps what its host function would launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.args: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.args, self.options = args, options

        return launch

    def compile(self, arch: int) -> Any:
        """The launch as compiled for an architecture: arguments as the runtime would specialise them."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.tools.tensor_descriptor import TensorDescriptor

        fresh = triton.jit(self.kernel.fn)  # remembers nothing of what its helpers were
        names = fresh.arg_names
        given = dict(zip(names, self.args, strict=False)) | self.options
        options = {k: given.pop(k) for k in ("num_warps", "num_stages", "launch_pdl") if k in given}
        signature, constants, attributes = {}, {}, {}
        for place, name in enumerate(names):
            value = given[name]
            if name in self.options:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = f"*{NAMES[value.dtype]}" if isinstance(value, Tensor) else "i32"
                if isinstance(value, Tensor) or value % 16 == 0:
                    attributes[place,] = [["tt.divisibility", 16]]
        source = ASTSource(fresh, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A compiler cache of this module's own: every kernel is really compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def build(case: Case, dtype: torch.dtype, arch: int, monkeypatch: pytest.MonkeyPatch, part: str = "") -> Any:
    """What a product would launch on an architecture, compiled: its tiles, or what finishes their parts."""
    from triton.backends.compiler import GPUTarget
    from triton.language import target_info

    def target() -> GPUTarget:
        return GPUTarget("cuda", arch, 32)

    target.__triton_builtin__ = True  # as the function that it replaces
    recorder = Recorder(room.product_kernel)
    monkeypatch.setattr(room, "product_kernel", recorder)
    finish = Recorder(room.finish_kernel)
    monkeypatch.setattr(room, "finish_kernel", finish)
    monkeypatch.setattr(room, "row_scales_kernel", Recorder(room.row_scales_kernel))
    monkeypatch.setattr(room, "overlaps", lambda: arch >= 90)
    monkeypatch.setattr(room, "_card", lambda device: (132, SHARED[arch]))
    monkeypatch.setattr(target_info, "current_target", target)
    run(case, "cpu", dtype, 0)
    return (finish if part == "finish" else recorder).compile(arch)


def tool(name: str, cubin: bytes, folder: Path, *flags: str) -> str | None:
    """What one of the disassemblers says, where it is at hand."""
    import triton.backends.nvidia as nvidia

    program = Path(nvidia.__file__).parent / "bin" / name
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    if not program.exists():
        return None
    return subprocess.run([program, *flags, file], capture_output=True, text=True, check=True).stdout


def fits(built: Any, arch: int, folder: Path) -> None:
    assert built.metadata.shared <= SHARED[arch]
    usage = tool("cuobjdump", built.asm["cubin"], folder, "-res-usage")
    if usage is not None:
        stack = re.search(r"STACK:(\d+)", usage)
        assert stack, usage
        assert int(stack[1]) <= STACK[arch]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_default_tiles_fit_their_card(launch: str, arch: int, monkeypatch: Any, tmp_path: Path) -> None:
    dtype, case = LAUNCHES[launch]
    built = build(case, dtype, arch, monkeypatch, launch)
    fits(built, arch, tmp_path)
    code = built.asm["ptx"]
    if arch >= 90:
        start, wait = code.index("griddepcontrol.launch_dependents"), code.index("griddepcontrol.wait")
        assert start < wait
        assert not re.search(r"\b(ld|st)\.global|bulk\.tensor", code[:wait]), "reads or writes before it waits"
    else:
        assert "griddepcontrol" not in code


QUICK = [*room.PLAIN[:1], *room.HALVES[:1], *room.PAIRS[:1]]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("config", "glu"),
    [pytest.param(c, g, marks=[] if c in QUICK and c.split == 1 else [pytest.mark.slow]) for c, g in TILES],
    ids=str,
)
def test_tiles_feed_the_tensor_cores_from_shared_memory(
    config: Config, glu: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On Hopper: no spill, TMA loads, asynchronous products that nothing serialises."""
    case = Case(65, 2048, 256, config, residual=True)
    if glu != "none":
        case = case._replace(residual=False, act="gelu_tanh", glu=glu, norm="rms")
    built = build(case, BF16, 90, monkeypatch)
    fits(built, 90, tmp_path)
    assert "cp.async.bulk.tensor" in built.asm["ptx"]
    assert "wgmma.mma_async" in built.asm["ptx"]
    code = tool("nvdisasm", built.asm["cubin"], tmp_path, "-c")
    if code is not None:
        assert code.count("WARPGROUP.DEPBAR") < 4 <= code.count("HGMMA") or config.depth == 32


if __name__ == "__main__":
    interpret()
