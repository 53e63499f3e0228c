"""`same_func` sees what a function is, and overlooks names, notes and the order of ops."""

from __future__ import annotations

import pytest

from cortexflow.ir import Func, parse
from cortexflow.ir.compare import same_func

BASE = """
func @f(%x: f32[3], %y: f32[3]) {
  %a = exp(%x) : f32[3]  # here
  %b = neg(%y) : f32[3]
  %r = loop(%a) {trips=2} do (%step: i32[], %c: f32[3]) {
    %d = add(%c, %b) : f32[3]
    yield(%d)
  } : f32[3]
  return(%r) {names=('out',)}
}
"""


def func(text: str) -> Func:
    (found,) = parse(text).funcs.values()
    return found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("%a", "%other"),
        ("  # here", ""),
        ("%c", "%carried"),
        ("@f(", "@g("),
        (
            "%a = exp(%x) : f32[3]  # here\n  %b = neg(%y) : f32[3]",
            "%b = neg(%y) : f32[3]\n  %a = exp(%x) : f32[3]",
        ),
    ],
)
def test_the_same(old: str, new: str) -> None:
    assert BASE.replace(old, new) != BASE and same_func(func(BASE), func(BASE.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("exp(%x)", "sin(%x)"),
        ("exp(%x)", "exp(%y)"),
        ("add(%c, %b)", "add(%b, %c)"),
        ("trips=2", "trips=3"),
        ("yield(%d)", "yield(%c)"),
        ("'out'", "'result'"),
        ("return(%r)", "return(%a)"),
        ("%y", "%z"),
        ("  %b = neg", "  %dead = neg(%y) : f32[3]\n  %b = neg"),
    ],
)
def test_not_the_same(old: str, new: str) -> None:
    assert not same_func(func(BASE), func(BASE.replace(old, new)))


def test_types_count() -> None:
    assert not same_func(func(BASE), func(BASE.replace("f32[3]", "f64[3]")))


def test_the_step_of_one_loop_is_not_that_of_another() -> None:
    text = """
func @f(%x: i32[]) {
  %r = loop(%x) {trips=2} do (%i: i32[], %c: i32[]) {
    %s = loop(%c) {trips=2} do (%j: i32[], %d: i32[]) {
      %e = add(%d, %i) : i32[]
      yield(%e)
    } : i32[]
    yield(%s)
  } : i32[]
  return(%r) {names=('y',)}
}
"""
    assert same_func(func(text), func(text))
    assert not same_func(func(text), func(text.replace("add(%d, %i)", "add(%d, %j)")))
