"""The kernels in CUDA C++: that they compile where there is NVRTC, and on a Hopper card what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cortexflow.kernels.cuda import attention, launch, nvrtc, product
from cortexflow.kernels.cuda.product import Tile, candidates
from cortexflow.kernels.triton.rows import summed_norm
from tests.kernels.numerics import BF16, EPS, F16, NAN, TOLERANCE, Draw, check, meaning, measure

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper card")
compiles = pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC: pip install nvidia-cuda-nvrtc")
DTYPES = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])

# Rows, columns, k: an image tower's of two and three pictures, and sizes that no tile divides.
SIZES = [(512, 4304, 1152), (512, 3456, 1152), (512, 1152, 1152), (768, 1152, 1152), (768, 4304, 1152)]
ODD = [(64, 4304, 64), (100, 4304, 72), (513, 1160, 1096), (300, 3456, 200), (777, 2048, 648)]
LONG = [(512, 1152, 4304), (768, 1152, 4304), (333, 1160, 2056)]


def tiles(m: int, n: int, k: int, added: bool) -> list[Tile]:
    found = candidates(m, n, k, added)
    assert found, "no tile for this size"
    return found


@DTYPES
@pytest.mark.parametrize("size", SIZES + ODD, ids=str)
@pytest.mark.parametrize("act", ["none", "gelu_tanh"])
@pytest.mark.gpu
@on_hopper
def test_products_with_bias_and_activation(size: tuple[int, int, int], act: str, dtype: torch.dtype) -> None:
    m, n, k = size
    for config in tiles(m, n, k, False):
        draw = Draw("cuda", dtype, 1)
        x, w, bias = draw.rows(m, k), draw.weight(n, k, k=k), draw.normal(n)

        def run(config: Tile = config, draw: Draw = draw, x: Tensor = x, w: Tensor = w, b: Tensor = bias) -> Any:
            out = draw.poisoned(m, n)
            product.product(x, w, out, bias=b, act=act, config=config)
            expected = x.double() @ w.double().T + b.double()
            return [(out, expected if act == "none" else meaning("act", expected, kind=act))]

        check(measure(run, draw), TOLERANCE[dtype], str(config))


@DTYPES
@pytest.mark.parametrize("size", [s for s in SIZES + ODD if s[1] <= 2048], ids=str)
@pytest.mark.gpu
@on_hopper
def test_products_are_added_to_their_own_place(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = size
    for config in [c for c in tiles(m, n, k, True) if c.split == 1]:
        draw = Draw("cuda", dtype, 2)
        x, w, bias, before = draw.rows(m, k), draw.weight(n, k, k=k), draw.normal(n), draw.normal(m, n)

        def run(c: Tile = config, d: Draw = draw, x: Tensor = x, w: Tensor = w, b: Any = bias, r: Any = before) -> Any:
            out = d.poisoned(m, n)
            out.copy_(r)
            product.product(x, w, out, bias=b, residual=out, config=c)
            return [(out, r.double() + x.double() @ w.double().T + b.double())]

        check(measure(run, draw), TOLERANCE[dtype], str(config))


@DTYPES
@pytest.mark.parametrize("size", LONG, ids=str)
@pytest.mark.gpu
@on_hopper
def test_parts_that_a_norm_adds(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = size
    for config in [c for c in tiles(m, n, k, True) if c.split > 1]:
        draw = Draw("cuda", dtype, 3)
        x, w, bias, before = draw.rows(m, k), draw.weight(n, k, k=k), draw.normal(n), draw.normal(m, n)
        room = torch.full((config.split * m * n,), NAN, device="cuda")

        def run(c: Tile = config, d: Draw = draw, x: Any = x, w: Any = w, b: Any = bias, r: Any = before,
                scratch: Tensor = room) -> Any:  # fmt: skip
            out, normed = d.poisoned(m, n), d.poisoned(m, n)
            scratch.fill_(NAN)
            parts = product.product(x, w, out, scratch=scratch, config=c)
            summed_norm(parts, out, normed, EPS, residual=r, bias=b, parts=c.split, centred=True)
            return [(out, r.double() + x.double() @ w.double().T + b.double())]

        check(measure(run, draw), TOLERANCE[dtype], str(config))


@DTYPES
@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["centred", "off centre"])
@pytest.mark.parametrize("m", [300, 512, 513, 768])
@pytest.mark.gpu
@on_hopper
def test_a_norm_between_two_products(m: int, shift: float, dtype: torch.dtype) -> None:
    """The first one writes the sums from which the second one norms its rows; rows may have a mean of 3 deviations."""
    k, width, n = 1152, 1160, 4304
    for first in [c for c in tiles(m, width, k, True) if width <= product.MOST_STATS * c.columns]:
        draw = Draw("cuda", dtype, 4)
        x, w, bias = draw.rows(m, k), draw.weight(width, k, k=k), draw.normal(width) + shift
        w2, bias2 = draw.weight(n, width, k=width), draw.normal(n)
        sums, stats = w2.sum(1, dtype=torch.float32), torch.full((product.stats_size(m, width, first),), NAN).cuda()
        for second in tiles(m, n, width, False):

            def run(one: Tile = first, two: Tile = second, x: Any = x, w: Any = w, b: Any = bias, d: Draw = draw,
                    w2: Any = w2, b2: Any = bias2, stats: Any = stats, sums: Any = sums) -> Any:  # fmt: skip
                out, result = d.poisoned(m, width), d.poisoned(m, n)
                out.copy_(torch.ones_like(out))
                stats.fill_(NAN)
                product.product(x, w, out, bias=b, residual=out, new_stats=stats, config=one)
                product.product(out, w2, result, bias=b2, act="gelu_tanh", normed=(stats, sums, EPS), config=two)
                made = out.double()
                normed = (made - made.mean(1, keepdim=True)) / (made.var(1, correction=0, keepdim=True) + EPS).sqrt()
                expected = meaning("act", normed @ w2.double().T + b2.double(), kind="gelu_tanh")
                return [(out, 1 + x.double() @ w.double().T + b.double()), (result, expected)]

            check(measure(run, draw), TOLERANCE[dtype], f"{first} {second}")


@DTYPES
@pytest.mark.parametrize("d", [64, 72, 80])
@pytest.mark.parametrize(("b", "m", "n"), [(2, 256, 256), (3, 256, 256), (1, 1, 1), (2, 37, 129), (1, 300, 255)])
@pytest.mark.gpu
@on_hopper
def test_attention_to_few_keys(b: int, m: int, n: int, d: int, dtype: torch.dtype) -> None:
    heads, draw = 5, Draw("cuda", dtype, 5)
    q = draw.normal(b, m, 3, heads, d)[:, :, 1] * 4
    k, v = draw.normal(b, n, 2, heads, d).unbind(2)

    def run() -> Any:
        out = draw.poisoned(b, m, heads * d).unflatten(-1, (heads, d))
        attention.attention(q, k, v, out, d**-0.5)
        return [(out, meaning("attention", q, k, v, scale=d**-0.5, causal=False))]

    check(measure(run, draw), TOLERANCE[dtype])


@pytest.mark.gpu
@on_hopper
def test_a_map_is_not_made_while_a_graph_is_recorded() -> None:
    x, w = (torch.randn(s, 512, device="cuda").bfloat16() for s in (64, 1152))
    out = torch.empty(64, 1152, device="cuda", dtype=BF16)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        out.zero_()
        with pytest.raises(RuntimeError, match="launch once before"):
            product.product(x, w, out, config=Tile(rows=64, columns=64))


# ---- without a card ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES + LONG + [(256, 4304, 1152)], ids=str)
def test_tiles_fill_the_card_at_most_once(size: tuple[int, int, int]) -> None:
    m, n, k = size
    for c in tiles(m, n, k, True):
        count = -(-m // (c.rows * c.cluster)) * c.cluster * -(-n // c.columns) * c.split
        assert count <= 132
        assert product.shared_bytes(c, residual=c.split == 1) <= product.SHARED_BYTES
        assert c.columns % 8 == 0 and (c.columns // c.cluster) % 8 == 0


@pytest.mark.parametrize("size", [(4096, 4304, 1152), (512, 1150, 1152), (512, 1152, 1150), (63, 1152, 1152)], ids=str)
def test_what_no_tile_suits(size: tuple[int, int, int]) -> None:
    assert not candidates(*size, added=True)


@contextmanager
def prepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Names and sources of the kernels that are launched in the block, where nothing is launched."""
    texts: list[tuple[str, str]] = []
    monkeypatch.setattr(launch, "compiled", lambda name, text: texts.append((name, text)) or b"")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launch._function.cache_clear()
    token = launch.PREPARING.set(lambda key, load: load() and None)
    try:
        yield texts
    finally:
        launch.PREPARING.reset(token)
        launch._function.cache_clear()


@compiles
@DTYPES
def test_kernels_compile(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x, long, wide = (torch.empty(512, k, dtype=dtype) for k in (1152, 4304, 3456))
    w, w_long = torch.empty(4304, 1152, dtype=dtype), torch.empty(1152, 4304, dtype=dtype)
    stats = torch.empty(2 * 512 * 16)
    with prepared(monkeypatch) as texts:
        first, added = candidates(512, 4304, 1152, False)[0], candidates(512, 1152, 1152, True)[0]
        parted = next(c for c in candidates(512, 1152, 4304, True) if c.cluster > 1)
        product.product(x, w, long, bias=w[:, 0], act="gelu_tanh", normed=(stats, stats, EPS), config=first)
        product.product(x, w[:1152], x, bias=w[:1152, 0], residual=x, new_stats=stats, config=added)
        product.product(long, w_long, x, scratch=torch.empty(1 << 22), config=parted)
        q, k, v = wide.view(2, 256, 3, 16, 72).unbind(2)
        attention.attention(q, k, v, x.view(2, 256, 16, 72), 1.0)
        attention.attention(q, k[:, :100], v[:, :100], x.view(2, 256, 16, 72), 1.0)
    assert len(texts) == 5
    for _, text in texts:
        assert nvrtc.compiled("kernel", text)[:4] == b"\x7fELF"
    kept = sorted((tmp_path / "cortexflow" / "kernels").iterdir())
    assert len(kept) == 5
    monkeypatch.setattr(nvrtc, "_compile", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.compiled("kernel", texts[0][1]) in [f.read_bytes() for f in kept]


@compiles
@pytest.mark.parametrize("damage", [b"", bytes(64)], ids=["empty", "zeros"])
def test_a_damaged_file_in_the_cache_is_no_kernel(damage: bytes, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = 'extern "C" __global__ void kernel() {}'
    made = nvrtc.compiled("kernel", text)
    (kept,) = (tmp_path / "cortexflow" / "kernels").iterdir()
    kept.write_bytes(damage)
    assert nvrtc.compiled("kernel", text) == made == kept.read_bytes()


@compiles
def test_a_kernel_that_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"kernel broken does not compile(.|\n)*undefined"):
        nvrtc.compiled("broken", "__device__ int f() { return nothing; }")


def test_without_nvrtc_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(nvrtc.ctypes, "CDLL", missing)
    nvrtc.library.cache_clear()
    try:
        assert not nvrtc.available()
        with pytest.raises(RuntimeError, match="pip install nvidia-cuda-nvrtc"):
            nvrtc.library()
    finally:
        nvrtc.library.cache_clear()


def test_what_the_kernels_cannot_do_is_refused() -> None:
    x, w, out = (torch.empty(64, n, dtype=BF16) for n in (128, 128, 64))
    c = Tile(rows=64, columns=64)
    with pytest.raises(ValueError, match="silu"):
        product.product(x, w, out, act="silu", config=c)
    with pytest.raises(ValueError, match="scratch"):
        product.product(x, w, out, config=c._replace(split=2))
    with pytest.raises(ValueError, match="stats"):
        product.product(x, w, out, new_stats=torch.empty(8), config=c)
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        product.product(x.float(), w.float(), out.float(), config=c)
    with pytest.raises(ValueError, match="not finished"):
        product.product(x, w, out, residual=out, scratch=torch.empty(1 << 13), config=c._replace(split=2))
    with pytest.raises(ValueError, match="float32"):
        product.product(x, w, out, bias=torch.empty(64), config=c)
    with pytest.raises(ValueError, match="16 bytes"):
        product.product(x[:, 1:], w, out, config=c)
    heads = torch.empty(1, 257, 2, 72, dtype=BF16)
    with pytest.raises(ValueError, match="at most 256"):
        attention.attention(heads, heads, heads, heads, 1.0)
