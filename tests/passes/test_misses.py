"""When a fusion does not fire, the matcher says why."""

from __future__ import annotations

import pytest

from cortexflow.ir import fused, parse
from cortexflow.passes import fuse, nearest_misses

TWO_READERS = """
func @f(%x: f32[2,3], %r: f32[2,4]) {
  %w = weight() {key='w'} : f32[3,4]
  %0 = matmul(%x, %w) : f32[2,4]
  %1 = add(%r, %0) : f32[2,4]  # layers.3.mlp
  return(%0, %1) {names=('a', 'b')}
}
"""
OUTSIDE = """
func @f(%x: f32[2,3], %r: f32[2,4]) {
  %w = weight() {key='w'} : f32[3,4]
  %0 = matmul(%x, %w) : f32[2,4]
  %s = loop(%r) {trips=2} do (%step: i32[], %c: f32[2,4]) {
    %1 = add(%c, %0) : f32[2,4]
    yield(%1)
  } : f32[2,4]
  return(%s) {names=('y',)}
}
"""
ATTRIBUTE = """
func @f(%h: f32[2,8]) {
  %0 = slice(%h) {axis=-1, stop=4} : f32[2,4]
  %1 = act(%0) {kind='silu'} : f32[2,4]
  %2 = slice(%h) {axis=-1, start=3, stop=7} : f32[2,4]
  %3 = mul(%1, %2) : f32[2,4]
  return(%3) {names=('y',)}
}
"""
FIXED_ATTRIBUTE = """
func @f(%x: f32[2,3], %b: f64[4]) {
  %w = weight() {key='w'} : f32[3,4]
  %0 = matmul(%x, %w) {dtype='f64'} : f64[2,4]
  %1 = add(%0, %b) : f64[2,4]
  return(%1) {names=('y',)}
}
"""
OTHER_OP = """
func @f(%x: f32[2,3], %b: f32[4]) {
  %w = weight() {key='w'} : f32[3,4]
  %0 = layer_norm(%x) {eps=1e-06} : f32[2,3]
  %1 = matmul(%0, %w) : f32[2,4]
  %2 = add(%1, %b) : f32[2,4]
  return(%2) {names=('y',)}
}
"""
OPERANDS = """
func @f(%q: f32[1,2,4,8], %k: f32[1,3,2,8], %l: f32[1,2,2,8], %v: f32[1,5,2,8]) {
  %0 = concat(%k, %l) {axis=1} : f32[1,5,2,8]
  %1 = attention(%q, %0, %v) {scale=0.5} : f32[1,2,4,8]
  return(%1) {names=('y',)}
}
"""
ITS_OWN_RESIDUAL = """
func @f(%x: f32[2,3]) {
  %w = weight() {key='w'} : f32[3,4]
  %0 = matmul(%x, %w) : f32[2,4]
  %1 = add(%0, %0) : f32[2,4]
  return(%1) {names=('y',)}
}
"""
SHARED = """
func @f(%q: f32[1,2,4,8], %k: f32[1,3,2,8], %l: f32[1,2,2,8], %m: bool[1,1,5]) {
  %0 = concat(%k, %l) {axis=1} : f32[1,5,2,8]
  %1 = attention(%q, %0, %0, %m) {scale=0.5} : f32[1,2,4,8]
  return(%1) {names=('y',)}
}
"""
TWO_VALUES = """
func @f(%h: f32[2,8], %g: f32[2,8]) {
  %0 = slice(%h) {axis=-1, stop=4} : f32[2,4]
  %1 = act(%0) {kind='silu'} : f32[2,4]
  %2 = slice(%g) {axis=-1, start=4} : f32[2,4]
  %3 = mul(%1, %2) : f32[2,4]
  return(%3) {names=('y',)}
}
"""


@pytest.mark.parametrize(
    ("text", "op", "why"),
    [
        (TWO_READERS, fused.matmul_residual, "matmul has 2 readers"),
        (OUTSIDE, fused.matmul_residual, "matmul stands outside the loop"),
        (ATTRIBUTE, fused.glu, "attribute width is 4 in one place and 3 in another"),
        (FIXED_ATTRIBUTE, fused.linear, "matmul has dtype='f64' instead of None"),
        (OTHER_OP, fused.modulated_norm, "mul is wanted where matmul stands"),
        (OTHER_OP, fused.norm_matmul, "rms_norm is wanted where layer_norm stands"),
        (OPERANDS, fused.attention_segments, "attention has 3 operands instead of 4"),
        (ITS_OWN_RESIDUAL, fused.matmul_residual, "matmul is an operand as well"),
        (SHARED, fused.attention_segments, "one concat would stand for two"),
        (TWO_VALUES, fused.glu, "%h stands for two values"),
    ],
)
def test_the_reason_is_named(text: str, op, why: str) -> None:
    module = parse(text)
    before = str(nearest_misses(module, op))
    assert not fuse(module, [op])
    misses = nearest_misses(module, op)
    assert str(misses) == before  # asking changes nothing
    if "is wanted where" in why or "instead of 4" in why:  # the root alone fitted: not near
        assert not misses
    else:
        assert [m.why for m in misses] == [why]


def test_a_miss_reads_like_a_sentence() -> None:
    (miss,) = nearest_misses(parse(TWO_READERS), fused.matmul_residual)
    assert str(miss) == "fused.matmul_residual at layers.3.mlp: 2 of 2 ops fit, then matmul has 2 readers"


def test_the_nearest_miss_comes_first() -> None:
    text = OTHER_OP.replace("layer_norm(", "exp(").replace(" {eps=1e-06}", "")
    near = TWO_VALUES.replace("@f", "@g").replace("%g:", "%i:").replace("(%g)", "(%i)")
    misses = nearest_misses(parse(text + near), fused.norm_glu)
    assert [m.matched for m in misses] == sorted([m.matched for m in misses], reverse=True)
    assert misses and misses[0].matched > 1


def test_what_fires_is_no_miss() -> None:
    module = parse(TWO_READERS.replace("return(%0, %1) {names=('a', 'b')}", "return(%1) {names=('b',)}"))
    assert nearest_misses(module, fused.matmul_residual) == []
    assert fuse(module, [fused.matmul_residual])
