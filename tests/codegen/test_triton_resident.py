"""Products and attention of few rows that leave room for their neighbours: where they run, what they hand on."""

from __future__ import annotations

import re

import pytest

from cortexflow.ir import Module, Type, Value, function, fused, ops, returns
from cortexflow.passes.plan_buffers import plan_buffers

pytest.importorskip("triton")

from cortexflow.codegen.triton import configs
from cortexflow.codegen.triton.program import Program

WIDTH, HEADS, HIDDEN, KEYS = 1024, 2048, 4096, 560


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "hand_written", lambda stage, switch="tiles": switch not in stage.program.without)


def weight(key: str, *shape: int) -> Value:
    return ops.weight(key=key, type=Type("bf16", shape))


def layer(rows: int = 10, change: str = "", batch: int = 1) -> Module:
    """A sum, then an action expert's layer; `change`: what is not as the kernels want it."""
    table, cache = Type("f32", (1, rows, 128)), Type("bf16", (batch, KEYS, 1, 256))
    given = {"x": Type("bf16", (batch, rows, HEADS)), "r": Type("bf16", (batch, rows, WIDTH)), "c": table, "s": table}
    given |= {"k": cache, "v": cache, "m": Type("bool", (1, 1, KEYS + rows))}
    with function("f", **given) as (f, [x, r, c, s, k, v, m]):

        def norm(y: Value, key: str) -> tuple[Value, Value, Value]:
            return y, weight(f"{key} scale", WIDTH), weight(f"{key} shift", WIDTH)

        y = fused.matmul_gated_residual(r, x, weight("first", HEADS, WIDTH), weight("gate", WIDTH))
        if change == "another launch":
            r = ops.neg(r)
        qkv = fused.modulated_norm_matmul(*norm(y, "a"), weight("qkv", WIDTH, HEADS + 512), eps=1e-6)
        if change == "angles made behind":
            c = ops.neg(c)
        parts = [ops.slice_(qkv, axis=-1, start=a, stop=b) for a, b in ((0, 2048), (2048, 2304), (2304, 2560))]
        own = [ops.reshape(p, shape=(batch, rows, p.type.shape[-1] // 256, 256)) for p in parts]
        a = fused.rotated_attention_segments(own[0], k, v, *own[1:], c, s, m, scale=0.1, causal=False)
        a = ops.reshape(a, shape=(batch, rows, HEADS))
        y = fused.matmul_gated_residual(y, a, weight("output", HEADS, WIDTH), weight("gate", WIDTH))
        z = fused.modulated_norm_glu(
            *norm(y, "b"), weight("unit", WIDTH, 2 * HIDDEN), eps=1e-6, kind="gelu_tanh", width=HIDDEN
        )
        y = fused.matmul_gated_residual(y, z, weight("down", HIDDEN, WIDTH), weight("gate", WIDTH))
        returns(y=y, r=r)
    return Module({"f": f})


def launched(module: Module, without: frozenset[str] = frozenset()) -> list[str]:
    text = Program(module, plan_buffers(module), without).text()
    return [line.strip() for line in text[text.index("def f(self)") :].splitlines()[2:-1]]


def names(lines: list[str]) -> list[str]:
    return [line.split("(")[0] for line in lines]


def test_a_layer_hands_on_its_rows_squares_and_rotates_in_its_product() -> None:
    lines = launched(layer())
    product, attention = "resident.streaming", "resident_attention.segment_attention"
    assert names(lines) == [product, product, attention, product, product, product]
    first, qkv, attends, output, unit, down = lines
    handed = "squares=resident.row_squares(self.scratch, 128)"
    assert f"new_{handed}" in first and f", {handed}" in qkv and f"new_{handed}" in output and f", {handed}" in unit
    assert "squares" not in down, "nobody norms what it makes"
    assert "rotated=2304" in qkv and "angles=" in qkv
    assert re.search(r"self\.scratch\[0\]\)", attends) and "rotated" not in attends


def test_without_the_switch_other_kernels_run() -> None:
    lines = launched(layer(), frozenset({"resident"}))
    assert not any("resident" in line for line in lines)
    assert [n for n in names(lines) if n.startswith("stream")] == ["streaming.streaming"] * 5


def test_squares_are_not_handed_past_another_launch() -> None:
    lines = launched(layer(change="another launch"))  # which may write the scratch
    first, qkv = (next(line for line in lines if call in line) for call in ("resident.streaming(", "eps="))
    assert "new_squares" not in first and qkv.startswith("streaming.streaming(")
    assert any(line.startswith("segment_attention(") for line in lines), "it rotates what it reads"
    assert not any("rotated" in line for line in lines)


def test_angles_that_come_too_late_are_the_attentions() -> None:
    lines = launched(layer(change="angles made behind"))
    qkv = next(line for line in lines if "eps=" in line)
    assert qkv.startswith("resident.streaming(") and "angles" not in qkv
    assert any(line.startswith("segment_attention(") for line in lines)


def test_a_batch_that_is_few_rows_attends_by_the_other_kernel() -> None:
    lines = launched(layer(rows=5, batch=3))
    assert sum("resident.streaming(" in line for line in lines) == 5
    assert any(line.startswith("segment_attention(") for line in lines)
    assert not any("rotated" in line for line in lines)


def test_small_products_hand_on_their_squares_past_a_cast() -> None:
    with function("f", x=Type("f32", (1, 10, 32))) as (f, [x]):
        w, b = (ops.weight(key=key, type=Type("f32", shape)) for key, shape in (("in", (32, WIDTH)), ("b", (WIDTH,))))
        y = ops.cast(fused.linear(x, w, b), dtype="bf16")
        unit = weight("unit", WIDTH, 2 * HIDDEN)
        returns(z=fused.norm_glu(y, unit, eps=1e-6, kind="silu", width=HIDDEN))
    first, second = launched(Module({"f": f}))
    assert first.startswith("thin(") and "squares=resident.row_squares(self.scratch, 8)" in first
    assert second.startswith("resident.streaming(") and ", squares=resident.row_squares(self.scratch, 8)" in second
