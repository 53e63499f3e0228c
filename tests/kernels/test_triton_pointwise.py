"""Chains of small ops: each gives the bits of its ops one by one, under the interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cortexflow.codegen.triton import chains
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.kernels.triton import pointwise as room
from tests.kernels.builds import SHARED, around_wait, check_fits, record
from tests.kernels.numerics import interpret

NAN = float("nan")
BY_TORCH: dict[str, Any] = {
    "max": torch.maximum, "min": torch.minimum, "and": torch.bitwise_and, "or": torch.bitwise_or,
    "not": torch.bitwise_not, "cast": lambda x: x,
}  # fmt: skip


def by_torch(chain: str, sources: Sequence[Tensor], targets: Mapping[str, Tensor]) -> None:
    """The same by PyTorch's ops one by one; everything is read before anything is written."""
    steps, at = room.parsed(chain, len(sources))
    values = [x.clone() for x in sources]
    for name, dtype, given in steps:
        if name == "number":
            values.append(torch.full_like(values[0], given[0], dtype=TORCH_DTYPES[dtype]))
            continue
        count = 3 if name == "where" else 1 if name in ("neg", "abs", "not", "cast") else 2
        result = (BY_TORCH.get(name) or getattr(torch, name))(*[values[i] for i in given[:count]])
        values.append(result.to(TORCH_DTYPES[dtype]))
    for name, target in targets.items():
        target.copy_(values[at[name]].view(target.shape))


# name: chain, dtypes of its sources, dtypes of what is stored
CHAINS: dict[str, tuple[str, list[str], dict[str, str]]] = {
    "floats": (
        "v3: f32 = mul(v0, 0.3); v4: f32 = add(v3, v1); v5: f32 = sub(v4, v2); v6: f32 = neg(v5)",
        ["f32", "f32", "f32"],
        {"v4": "f32", "v6": "f32"},
    ),
    "halves": (
        "v2: f16 = add(v0, v1); v3: f16 = mul(v2, v2); v4: f32 = cast(v3); v5: f16 = cast(v4); v6: f16 = abs(v5)",
        ["f16", "f16"],
        {"v2": "f16", "v4": "f32", "v6": "f16"},
    ),
    "bfloats": (
        "v2: bf16 = add(v0, v1); v3: bf16 = mul(v2, 45.25); v4: f32 = cast(v3); v5: bf16 = sub(v3, v0)",
        ["bf16", "bf16"],
        {"v3": "bf16", "v4": "f32", "v5": "bf16"},
    ),
    "nan": (
        "v2: f32 = max(v0, v1); v3: f32 = min(v0, 0.0); v4: bool = eq(v0, v0); v5: f32 = where(v4, v2, 1.5)",
        ["f32", "f32"],
        {"v2": "f32", "v3": "f32", "v4": "bool", "v5": "f32"},
    ),
    "whole numbers": (
        "v2: i32 = sub(v0, 1); v3: i32 = max(v2, v1); v4: i32 = min(v3, 16777217); v5: i32 = mul(v4, -3); "
        "v6: bool = lt(v5, v1); v7: bool = le(v0, v1)",
        ["i32", "i32"],
        {"v5": "i32", "v6": "bool", "v7": "bool"},
    ),
    "marks": (
        "v3: bool = and(v0, v1); v4: bool = or(v3, v2); v5: bool = not(v4); v6: bool = or(v5, True); "
        "v7: i32 = cast(v5)",
        ["bool", "bool", "bool"],
        {"v3": "bool", "v5": "bool", "v6": "bool", "v7": "i32"},
    ),
    "choices": (
        "v3: i32 = where(v0, v1, 7); v4: f32 = cast(v3); v5: i32 = cast(v2); v6: bool = cast(v2); v7: bool = cast(v1)",
        ["bool", "i32", "f32"],
        {"v4": "f32", "v5": "i32", "v6": "bool", "v7": "bool"},
    ),
}


def drawn(dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values with some zeros, and some NaN among floats."""
    if dtype in ("bool", "i32"):
        return torch.randint(-5, 6, shape, generator=generator).to(TORCH_DTYPES[dtype])
    x = torch.randn(shape, generator=generator) * 3
    x[torch.rand(shape, generator=generator) < 0.1] = 0.0
    return x.to(TORCH_DTYPES[dtype])


def difference(name: str, device: str) -> int:
    """Entries with other bits than PyTorch's, over shapes, strides, broadcast and results over sources."""
    chain, given, stored = CHAINS[name]
    generator, wrong = torch.Generator().manual_seed(len(name)), 0
    for shape in ((1,), (), (5, 7), (3, 700), (2, 33, 65)):
        sources = [drawn(d, shape, generator).to(device) for d in given]
        if name == "nan" and shape:
            sources[0].view(-1)[::5] = NAN
        if len(shape) > 1:
            sources[-1] = sources[-1][..., :1].expand(shape)  # broadcast
            wide = torch.stack([sources[0], sources[0]], -1)
            sources[0] = wide[..., 0]  # every second entry
        found, wanted = (
            {n: torch.ones(shape, dtype=TORCH_DTYPES[d], device=device) for n, d in stored.items()} for _ in range(2)
        )
        by_torch(chain, sources, wanted)
        first = next(n for n, d in stored.items() if d == given[0]) if given[0] in stored.values() else None
        if first:  # a result over the source that lies as it does
            place = sources[0]
            found[first] = place
        room.pointwise(chain, sources, found)
        for n in stored:
            a, b = (t[n].cpu().contiguous().view(-1) for t in (found, wanted))
            wrong += int(((a != b) & ~((a != a) & (b != b))).sum())
    return wrong


def test_what_a_chain_may_be_is_what_the_kernel_does() -> None:
    assert (chains.OPS, chains.MOST_SOURCES, chains.MOST_TARGETS) == (room.STEPS, room.MOST_SOURCES, room.MOST_TARGETS)


def test_chains_under_the_interpreter(interpreted: dict[str, int]) -> None:
    assert set(interpreted) == CHAINS.keys() - {"bfloats"} and not any(interpreted.values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHAINS)
def test_chains_on_a_gpu(name: str) -> None:
    assert difference(name, "cuda") == 0


@pytest.mark.parametrize("text", ["", "v1 = add(v0, v0)", "v1: f32 = exp(v0)", "v1: f32 = add(v0, v7)"])
def test_what_is_no_chain(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a step|v7"):
        room.parsed(text, 1)


def test_tensors_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="as many entries"):
        room.pointwise("v1: f32 = neg(v0)", [torch.ones(3)], {"v1": torch.ones(4)})


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("arch", SHARED)
def test_compiles(arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sums and products stay two roundings, and the launch overlaps where the card can."""
    recorder = record(room, "pointwise_kernel", arch, monkeypatch)
    x = torch.empty(3, 512)
    room.pointwise("v2: f32 = mul(v0, v1); v3: f32 = add(v2, v1)", [x, x], {"v3": x})
    built = recorder.compile()
    check_fits(built, arch, tmp_path)
    around_wait(built, arch)
    assert "fma" not in built.asm["ptx"]


if __name__ == "__main__":
    interpret(lambda: {name: difference(name, "cpu") for name in CHAINS if name != "bfloats"}, room)
