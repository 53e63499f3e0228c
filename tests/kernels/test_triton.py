"""Triton kernels against formulas in float64, on fresh random data with poisoned outputs; compiled without a card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from cortexflow.kernels.torch.functions import attention as reference_attention
from cortexflow.kernels.triton import prefill_attention, rows, skinny
from tests.kernels.builds import around_wait, check_fits, record
from tests.kernels.numerics import TOLERANCE, distance, rms

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
gpu = pytest.mark.gpu


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), device="cuda", dtype=dtype)


def near(found: Tensor, wanted: Tensor) -> None:
    far = distance(found, wanted)
    assert far < TOLERANCE[found.dtype], far  # NaN is not below anything


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    y = torch.complex(*x.double().chunk(2, -1)) * torch.complex(cosine.double(), sine.double()).unsqueeze(-2)
    return torch.cat([y.real, y.imag], -1)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 64), (37, 1153), (560, 2048)])
def test_norms(dtype: torch.dtype, m: int, k: int) -> None:
    x, scale, shift = random(m, k, dtype=dtype), random(k, dtype=dtype), random(k, dtype=dtype)
    out = poisoned(m, k, dtype=dtype)
    rows.rms_norm(x, out, 1e-6)
    near(out, rms(x))
    out = poisoned(m, k, dtype=dtype)
    rows.layer_norm(x, out, 1e-6, scale, shift)
    near(out, F.layer_norm(x.double(), (k,), scale.double(), shift.double(), 1e-6))
    out = poisoned(m, k, dtype=dtype)
    rows.modulated_norm(x, out, scale, shift, 1e-6)
    near(out, rms(x) * scale.double() + shift.double())


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("act", "reference"), [("gelu", F.gelu), ("silu", F.silu), ("relu", F.relu), ("tanh", torch.tanh)]
)
def test_gated_units_and_epilogues(dtype: torch.dtype, act: str, reference) -> None:
    h, out = random(13, 1998, dtype=dtype), poisoned(13, 999, dtype=dtype)
    rows.glu(h, out, act)
    near(out, reference(h[:, :999].double()) * h[:, 999:].double())
    x, bias, gate, r = (random(*s, dtype=dtype) for s in ((13, 999), (999,), (999,), (13, 999)))
    out = poisoned(13, 999, dtype=dtype)
    rows.epilogue(x, out, bias=bias, act=act, residual=r, gate=gate)
    wanted = r.double() + reference(x.double() + bias.double()) * gate.double()
    near(out, wanted)
    rows.epilogue(x, r, bias=bias, act=act, residual=r, gate=gate)  # in place over the residual
    near(r, wanted)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_of_a_slice(dtype: torch.dtype) -> None:
    wide, out = random(2, 21, 640, dtype=dtype), poisoned(2, 21, 8, 64, dtype=dtype)
    x = wide[..., 64:576].view(2, 21, 8, 64)
    cosine, sine = random(2, 21, 32, dtype=torch.float32), random(2, 21, 32, dtype=torch.float32)
    rows.rope(x, cosine, sine, out)
    near(out, turned(x, cosine, sine))


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("b", "m", "n", "heads", "groups", "d", "masked"),
    [
        (2, 256, 256, 16, 16, 72, False),
        (1, 560, 560, 8, 1, 256, True),
        (3, 37, 53, 6, 2, 16, True),
        (2, 5, 131, 4, 1, 40, True),
    ],
)
def test_prefill_attention(dtype, b: int, m: int, n: int, heads: int, groups: int, d: int, masked: bool) -> None:
    """Queries, keys and values are slices of one buffer; the last sample sees no key at all."""
    wide = random(b, max(m, n), (heads + 2 * groups) * d, dtype=dtype)
    q = wide[:, :m, : heads * d].view(b, m, heads, d)
    k = wide[:, :n, heads * d : (heads + groups) * d].view(b, n, groups, d)
    v = wide[:, :n, (heads + groups) * d :].view(b, n, groups, d)
    mask = torch.rand(b, 1, n, device="cuda") > 0.3 if masked else None
    if mask is not None and b > 1:
        mask[-1] = False
    out = poisoned(b, m, heads, d, dtype=dtype)
    prefill_attention.attention(q, k, v, out, d**-0.5, mask)
    near(out, reference_attention(q.double(), k.double(), v.double(), mask, None, d**-0.5, False))


@gpu
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("m", [1, 10, 16])
def test_skinny_products(dtype: torch.dtype, split: int, m: int) -> None:
    device = torch.device("cuda")
    scratch = torch.empty(1 << 20, device=device), torch.zeros(256, dtype=torch.int32, device=device)
    x, r, gate = random(m, 2048, dtype=dtype), random(m, 1024, dtype=dtype), random(1024, dtype=dtype)
    w = (torch.randn(1024, 2048, device=device) * 2048**-0.5).to(dtype)
    out = poisoned(m, 1024, dtype=dtype)
    skinny.skinny(x, w, out, residual=r, gate=gate, scratch=scratch, config=(16, split, 4, 4))
    near(out, r.double() + (x.double() @ w.double().T) * gate.double())
    again = out.clone()
    for _ in range(20):  # identical runs, identical bits
        skinny.skinny(x, w, again, residual=r, gate=gate, scratch=scratch, config=(16, split, 4, 4))
        assert torch.equal(again, out)


@gpu
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("m", [1, 10, 16])
def test_skinny_norm_and_gated_unit(dtype: torch.dtype, m: int) -> None:
    x, scale, shift = random(m, 1024, dtype=dtype), random(1024, dtype=dtype), random(1024, dtype=dtype)
    w = (torch.randn(2 * 512, 1024, device="cuda") * 1024**-0.5).to(dtype)
    out, y = poisoned(m, 512, dtype=dtype), (rms(x) * scale.double() + shift.double()) @ w.double().T
    skinny.skinny(x, w, out, scale=scale, shift=shift, eps=1e-6, glu=True, act="gelu_tanh", config=(32, 1, 4, 4))
    near(out, F.gelu(y[:, :512], approximate="tanh") * y[:, 512:])


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("warps", [4, 8])
def test_streaming_products_compile_for_hopper(warps: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = record(skinny, "skinny_kernel", 90, monkeypatch)
    x, w, (out, residual) = (torch.empty(s, dtype=torch.bfloat16) for s in ((10, 2048), (1024, 2048), (2, 10, 1024)))
    skinny.skinny(x, w, out, residual=residual, gate=w[:, 0].contiguous(), config=(16, 1, warps, warps))
    built = recorder.compile()
    check_fits(built, 90, tmp_path)
    around_wait(built, 90)
    assert len(built.asm["cubin"]) > 1000
