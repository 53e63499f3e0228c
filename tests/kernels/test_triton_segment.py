"""Attention of few tokens to a cache and to themselves: its meaning, what it leaves alone, and what it costs to hold.

As in `test_triton_prefill.py`: tiny sizes under Triton's interpreter in float32, realistic and odd ones on a GPU, and
the launches' own arguments compiled for several architectures without one.
"""

from __future__ import annotations

import importlib
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
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from cortexflow.ir import ops  # noqa: E402, F401  (registers the ops)
from cortexflow.ir.builder import OPS  # noqa: E402

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")  # the interpreter looks for this name beside a kernel

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAN = float("nan")


@triton.jit
def nothing():
    """Stands in for the instructions that overlap launches: the interpreter has none."""
    pass


@triton.jit
def same(x):
    """Stands in for an instruction that only moves numbers."""
    return x


# ---- cases -------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """`mask`: keys [1, n + m], pairs [m, n + m], causal (the prefix and tokens up to oneself) or blind (one sees none).

    `peak` multiplies the queries, so that the softmax is sharp.
    """

    m: int
    n: int
    heads: int = 8
    d: int = 256
    mask: str = "pairs"
    peak: float = 1.0


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
    around: Tensor


def draw(case: Case, device: str, dtype: torch.dtype, seed: int) -> Inputs:
    m, n, heads, d, mask, peak = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    whole = normal(m, (heads + 2) * d)
    q, k, v = whole.split([heads * d, d, d], dim=-1)
    q.mul_(peak)
    cache = torch.full((2, n + 3, 2 * d), NAN, device=device, dtype=dtype)  # rows that are not there are not read
    cache[:, :n, :d] = normal(2, n, d)
    angle = torch.rand((m, d // 2), generator=generator).to(device) * 700
    seen = torch.rand((1 if mask == "keys" else m, n + m), generator=generator) < 0.6
    if mask == "causal":
        seen = torch.ones(m, n + m).tril(n).bool()
    if mask == "blind":
        seen[m // 2] = False
    around = torch.full((m + 1, heads * d + 8), NAN, device=device, dtype=dtype)
    return Inputs(
        q.unflatten(-1, (heads, d)), k.unsqueeze(1), v.unsqueeze(1), cache[0, :n, None, :d], cache[1, :n, None, :d],
        angle.cos(), angle.sin(), seen.to(device), around[:m, : heads * d].unflatten(-1, (heads, d)), around,
    )  # fmt: skip


def meaning(x: Inputs, scale: float) -> Tensor:
    """The ops' evaluation rules in float64."""

    def rule(name: str, *inputs: Tensor, **attrs: Any) -> Tensor:
        evaluate = OPS[name].evaluate
        assert evaluate is not None
        return evaluate(*inputs, **attrs)

    angles = x.cosine.double(), x.sine.double()
    q, k = rule("rope", x.q.double(), *angles), rule("rope", x.own_k.double(), *angles)
    keys, values = torch.cat([x.cached_k.double(), k]), torch.cat([x.cached_v.double(), x.own_v.double()])
    return rule("attention", q[None], keys[None], values[None], x.mask[None], scale=scale, causal=False)[0]


def run(x: Inputs, config: Any) -> None:
    from cortexflow.kernels.triton import segment_attention as module

    m, heads, d = x.q.shape
    size = module.scratch_size(m, heads, len(x.cached_k), config)
    scratch = torch.full((max(size, 1),), NAN, device=x.q.device), torch.empty(0)
    module.segment_attention(*x[:9], d**-0.5, scratch, config)


def measure(case: Case, config: Any, device: str, dtype: torch.dtype, seed: int) -> tuple[float, bool]:
    """‖found - expected‖ / ‖expected‖, and whether nothing was written outside of the output."""
    x = draw(case, device, dtype, seed)
    run(x, config)
    expected = meaning(x, case.d**-0.5)
    error = (x.out.double() - expected).norm() / expected.norm()
    written = ~x.around.isnan()
    return error.item(), bool(written[: case.m, : case.heads * case.d].all()) and written.sum().item() == x.out.numel()


SMALL: dict[str, tuple[Case, tuple[int, ...]]] = {
    "one token": (Case(1, 1, 1, 32, "keys"), (16, 16, 1, 16, 16, 1)),
    "keys": (Case(3, 21, 3, 32, "keys"), (16, 16, 1, 16, 32, 1)),
    "pairs": (Case(5, 37, 8, 32, "pairs"), (16, 32, 1, 16, 16, 1)),
    "causal": (Case(18, 16, 2, 64, "causal"), (32, 16, 1, 16, 32, 1)),
    "blind": (Case(4, 19, 6, 32, "blind"), (32, 16, 1, 16, 32, 1)),
    "one blind token": (Case(1, 19, 2, 32, "blind"), (16, 32, 1, 32, 32, 1)),
    "sharp": (Case(3, 50, 8, 64, "pairs", 40.0), (16, 16, 1, 32, 64, 1)),
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
    "d 64": Case(10, 333, 12, 64),
    "d 128, one head": Case(13, 450, 1, 128),
    "d 128, four heads": Case(9, 401, 4, 128, "blind"),
    "d 128": Case(9, 401, 5, 128, "blind"),
}


# ---- under Triton's interpreter ----------------------------------------------------------------------


def interpret() -> None:
    """Run the small cases, without the instructions that only a GPU has, and print what they measured."""
    from triton.runtime import interpreter

    from cortexflow.kernels.triton import segment_attention as module

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:  # numpy no longer turns an array of one entry into an index
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    module.let_next_start = module.wait_for_previous = nothing
    module.settle = same
    found = {n: measure(case, module.Config(*tiles), "cpu", torch.float32, 0) for n, (case, tiles) in SMALL.items()}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, tuple[float, bool]]:
    """What the small cases measured, in a process whose Triton interprets from its import on."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], check=False, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SMALL)
def test_small_cases_mean_what_the_ops_mean(name: str, interpreted: dict[str, tuple[float, bool]]) -> None:
    error, contained = interpreted[name]
    assert error < 1e-5  # NaN left over from the poison fails too
    assert contained, "wrote outside of its output, or left some of it"


def test_scratch_that_is_too_small_is_refused() -> None:
    from cortexflow.kernels.triton import segment_attention as module

    x, config = draw(Case(3, 21, 3, 32), "cpu", torch.float32, 0), module.FEW[0]
    size = module.scratch_size(3, 3, 21, config)
    with pytest.raises(ValueError, match=str(size)):
        module.segment_attention(*x[:9], 1.0, (torch.empty(size - 1), torch.empty(0)), config)


@pytest.mark.parametrize("case", LARGE.values(), ids=list(LARGE))
def test_candidates_are_few_and_the_first_is_the_default(case: Case) -> None:
    from cortexflow.kernels.triton import segment_attention as module

    shape = case.m, case.heads, case.d, case.n
    found = module.candidates(*shape)
    assert 1 <= len(set(found)) == len(found) <= 5
    assert found[0] == module.default(*shape)


def test_a_hopper_card_is_offered_what_only_it_can_do(monkeypatch: Any) -> None:
    from cortexflow.kernels.triton import segment_attention as module

    monkeypatch.setattr(module, "_has_warpgroups", lambda: True)
    assert isinstance(module.default(10, 8, 256, 560), module.Config)
    assert isinstance(module.default(50, 8, 256, 968), module.Split)
    assert isinstance(module.default(10, 12, 64, 333), module.Config)
    for case in LARGE.values():
        found = module.candidates(case.m, case.heads, case.d, case.n)
        assert any(isinstance(c, module.Config) for c in found)
        assert 1 <= len(set(found)) == len(found) <= 5


# ---- on a GPU ----------------------------------------------------------------------------------------


ON_CARDS = [(name, torch.bfloat16) for name in LARGE]
ON_CARDS += [(name, torch.float16) for name in ("chunk 10", "chunk 51", "blind", "d 64")]
THOROUGH = ("chunk 10", "chunk 50")  # every candidate; compiling them all for every case would take minutes


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), ON_CARDS, ids=str)
def test_large_cases_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """The first configuration of either kind, or every one; each gives the same bits again and again."""
    from cortexflow.kernels.triton import segment_attention as module

    case = LARGE[name]
    seed = int.from_bytes(os.urandom(4), "little")
    configs = module.candidates(case.m, case.heads, case.d, case.n)
    if name not in THOROUGH or dtype != torch.bfloat16:
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
@pytest.mark.parametrize("name", SMALL)
def test_small_cases_on_a_gpu(name: str) -> None:
    from cortexflow.kernels.triton import segment_attention as module

    case, tiles = SMALL[name]
    error, contained = measure(case, module.Config(*tiles), "cuda", torch.float32, 0)
    assert error < TOLERANCE[torch.float32]
    assert contained


# ---- compiled without a GPU --------------------------------------------------------------------------

SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes that a block may have
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8"}
BUILDS = [(10, 560, arch) for arch in SHARED] + [(50, 968, 89), (50, 968, 90)]


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

    def compile(self, arch: int, jit: Any, source: Any) -> Any:
        """The launch as compiled for an architecture: arguments as the runtime would specialise them."""
        from triton.backends.compiler import GPUTarget

        fresh = jit(self.kernel.fn)  # remembers nothing of what its helpers were
        given = dict(zip(fresh.arg_names, self.args, strict=False)) | self.options
        options = {k: given.pop(k) for k in ("num_warps", "num_ctas", "maxnreg", "launch_pdl") if k in given}
        signature, constants, attributes = {}, {}, {}
        for place, name in enumerate(fresh.arg_names):
            value = given[name]
            if name in self.options:
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
                if isinstance(value, Tensor) or value % 16 == 0:
                    attributes[place,] = [["tt.divisibility", 16]]
        target = GPUTarget("cuda", arch, 32)
        return triton.compile(source(fresh, signature, constants, attributes), target=target, options=options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A compiler cache of this module's own: every kernel is really compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def record(
    case: Case, config: Any, arch: int, monkeypatch: pytest.MonkeyPatch, *places: tuple[str, str]
) -> list[Recorder]:
    """What a call would launch on an architecture; `places`: module and kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.language import target_info

    def target() -> GPUTarget:
        return GPUTarget("cuda", arch, 32)

    target.__triton_builtin__ = True  # as the function that it replaces
    monkeypatch.setattr(target_info, "current_target", target)
    recorders = []
    for room, kernel in places:
        module = importlib.import_module(f"cortexflow.kernels.{room}")
        recorders.append(Recorder(getattr(module, kernel)))
        monkeypatch.setattr(module, kernel, recorders[-1])
        monkeypatch.setattr(module, "overlaps", lambda: arch >= 90)
    run(draw(case, "cpu", torch.bfloat16, 0), config)
    return recorders


def usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers of a thread, bytes of its stack and static shared memory, where the disassembler is at hand."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.exists():
        return {"REG": 0, "STACK": 0, "SHARED": 0}
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}


@pytest.mark.parametrize(("m", "n", "arch"), BUILDS)
def test_two_kernels_fit_every_card(m: int, n: int, arch: int, cache: None, tmp_path: Path, monkeypatch: Any) -> None:
    """The first choice of the two kernels: no spills, and shared memory that the card has."""
    from triton.compiler import ASTSource

    from cortexflow.kernels.triton import segment_attention as module

    monkeypatch.setattr(module, "_has_warpgroups", lambda: arch == 90)
    monkeypatch.setattr(module, "_shared_memory", lambda: SHARED[arch])
    config = next(c for c in module.candidates(m, 8, 256, n) if isinstance(c, module.Config))
    places = [("triton.segment_attention", k) for k in ("weights_kernel", "values_kernel")]
    for launch in record(Case(m, n), config, arch, monkeypatch, *places):
        made = launch.compile(arch, triton.jit, ASTSource)
        assert made.metadata.shared <= SHARED[arch]
        assert usage(made.asm["cubin"], tmp_path)["STACK"] == 0
        assert ("griddepcontrol.wait" in made.asm["ptx"]) == (arch >= 90)


def build(
    case: Case, config: Any, monkeypatch: Any, folder: Path, *places: tuple[str, str]
) -> list[tuple[Any, dict[str, int]]]:
    """A call's Gluon kernels for a Hopper card, and what they use."""
    from triton.experimental import gluon
    from triton.experimental.gluon._runtime import GluonASTSource

    launches = record(case, config, 90, monkeypatch, *places)
    made = [launch.compile(90, gluon.jit, GluonASTSource) for launch in launches]
    return [(kernel, usage(kernel.asm["cubin"], folder)) for kernel in made]


@pytest.mark.parametrize(("case", "place"), [(Case(50, 968), 0), (Case(10, 560), 1), (Case(9, 401, 4, 128), 0)])
def test_a_split_fits_a_hopper_card(case: Case, place: int, cache: None, tmp_path: Path, monkeypatch: Any) -> None:
    from cortexflow.kernels.gluon.split_attention import fits
    from cortexflow.kernels.triton import segment_attention as module

    config = module.SPLITS[place]
    assert fits(case.m, case.heads, case.d, case.n, config)
    kernels = [("gluon.split_attention", k) for k in ("part_kernel", "add_kernel")]
    for made, used in build(case, config, monkeypatch, tmp_path, *kernels):
        assert used["STACK"] == 0
        assert made.metadata.shared <= 116 << 10
        assert "griddepcontrol.wait" in made.asm["ptx"]


def test_what_has_no_layout_does_not_fit() -> None:
    from cortexflow.kernels.gluon import split_attention

    split = split_attention.Split()
    assert split_attention.fits(50, 8, 256, 968, split)
    assert not split_attention.fits(50, 12, 256, 968, split), "heads"
    assert not split_attention.fits(50, 8, 64, 968, split), "columns"
    assert not split_attention.fits(50, 8, 256, 1793, split), "parts"


if __name__ == "__main__":
    interpret()
