"""The text form: print, parse, print is the identity, and what is parsed runs as the original."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexflow.errors import ParseError
from cortexflow.ir import (
    Func,
    Module,
    Type,
    Value,
    dump,
    function,
    fused,
    named,
    ops,
    parse,
    returns,
    run,
    run_module,
    scope,
    verify,
)
from cortexflow.ir.builder import noted
from tests.ir.programs import MAKERS, random_func, random_inputs, random_module, random_weights


def through_text(module: Module) -> Module:
    """The module read back from its listing, which prints as the original and is valid."""
    text = dump(module)
    back = parse(text)
    assert dump(back) == text
    verify(back)
    return back


def alone(func: Func, **meta: Any) -> Module:
    return Module({func.name: func}, {}, meta)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, t in wanted.items():
        torch.testing.assert_close(found[name], t, rtol=0, atol=0, equal_nan=True, msg=name)


# ---- the round trip ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_every_op_survives_text(name: str) -> None:
    for seed in range(6):
        func = random_func(seed, [name], floats=["f32", "bf16"], length=2)
        back = through_text(alone(func)).funcs[func.name]
        for old, new in zip(func.block.walk(), back.block.walk(), strict=True):
            assert (old.name, old.note, repr(old.attrs)) == (new.name, new.note, repr(new.attrs))
            assert [v.type for v in old.outputs] == [v.type for v in new.outputs]


@given(st.integers(0, 10**9))
@settings(max_examples=60)
def test_random_modules_survive_text_and_run_alike(seed: int) -> None:
    module = random_module(seed, floats=["f32", "bf16", "f64"])
    verify(module)
    back = through_text(module)
    assert back.inputs == module.inputs and back.outputs == module.outputs
    assert back.weight_types() == module.weight_types() and back.meta == module.meta
    inputs: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for func in module.stages:
        inputs |= random_inputs(func, seed)
        weights |= random_weights(func, seed)
    same(run_module(back, inputs, weights), run_module(module, inputs, weights))


@given(st.integers(0, 10**9))
@settings(max_examples=20)
def test_a_function_prints_alone(seed: int) -> None:
    func = random_func(seed, length=12)
    assert dump(parse(dump(func)).funcs[func.name]) == dump(func)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(Type("bf16", (2, 3))),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["family", "keep", "n", "steps"]), plain))
def test_facts_of_any_plain_kind_survive(meta: dict[str, Any]) -> None:
    with function("f", x=Type("f32", ())) as (func, [x]):
        returns(y=x)
    assert repr(through_text(alone(func, **meta)).meta) == repr(meta)


@given(key=st.text(), result=st.text(), note=st.text(), label=st.text())
def test_any_string_survives(key: str, result: str, note: str, label: str) -> None:
    """Strings are kept to the letter; notes keep their words, and labels are bent to what can be a name."""
    with function("f") as (func, _):
        with noted(note):
            w = named(ops.weight(key=key, type=Type("f32", (2,))), label)
        out = named(ops.neg(w), label)
        returns(**{result: out})
    back = through_text(alone(func)).funcs["f"]
    assert back.block.ops[0].attrs["key"] == key
    assert list(back.results) == [result]
    assert back.block.ops[0].note.split() == note.split()


AWKWARD = [
    "a, b",
    "{c}",
    "d}",
    "it's",
    'say "x"',
    'it\'s "both"',
    "e  # f",
    "g} : f32[2]  # h",
    "i) do (%j: f32[]) {",
    "back\\",
    "back\\\\'",
    "line\nbreak",
    "",
    " ",
    "=",
    "k=v",
    "inf",
    "f32[2]",
    "π",
    "\u2028",
    "//",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_strings_in_every_place(text: str) -> None:
    with function("f") as (func, _), scope(text):
        w = ops.weight(key=text, type=Type("f32", (2,)))

        def body(_: Value, x: Value) -> list[Value]:
            return [ops.add(x, named(ops.weight(key=text, type=Type("f32", (2,))), text))]

        returns(**{text: ops.loop([w], 2, body)[0]})
    back = through_text(alone(func, note=text, more=(text, [text], {text: text})))
    assert back.meta == {"note": text, "more": (text, [text], {text: text})}
    assert back.weight_types() == {text: Type("f32", (2,))}


@given(st.floats(), st.floats(), st.booleans())
def test_every_float_survives_to_the_bit(a: float, b: float, many: bool) -> None:
    with function("f", x=Type("f64", (2,))) as (func, [x]):
        c = ops.const(value=(a, b), dtype="f64", shape=(2,)) if many else ops.scalar(a, "f64")
        returns(y=ops.pad(ops.mul(x, c), pads=((1, 0),), value=b))
    back = through_text(alone(func)).funcs["f"]
    assert repr(back.block.ops[0].attrs["value"]) == repr((a, b) if many else a)
    (pad,) = [op for op in back.block.ops if op.name == "pad"]
    assert math.copysign(1, pad.attrs["value"]) == math.copysign(1, b) or math.isnan(b)
    same(run(back, {"x": torch.ones(2)}, {}), run(func, {"x": torch.ones(2)}, {}))


def test_a_default_in_another_guise_is_printed() -> None:
    """-0.0 equals the default 0.0, and 1 equals True: neither is left out, for each means something else."""
    with function("f", x=Type("f32", (1,))) as (func, [x]):
        returns(y=ops.pad(x, pads=((0, 1),), value=-0.0), z=ops.pad(x, pads=((0, 1),)))
    assert "value=-0.0" in dump(func) and dump(func).count("value") == 1
    back = through_text(alone(func)).funcs["f"]
    padded = run(back, {"x": torch.ones(1)}, {})["y"]
    assert math.copysign(1, padded[1].item()) == -1


def test_attributes_given_in_any_order_print_alike() -> None:
    with function("f", h=Type("f32", (2, 4)), w=Type("f32", (4, 6))) as (func, [h, w]):
        a = fused.norm_glu(h, w, width=3, kind="relu", eps=1e-6)
        assert a.op is not None
        a.op.attrs = dict(reversed(a.op.attrs.items()))
        returns(y=a)
    assert "{eps=1e-06, kind='relu', width=3}" in dump(func)
    through_text(alone(func))


# ---- names -------------------------------------------------------------------------------------------


def test_equal_labels_are_told_apart() -> None:
    with function("f", x=Type("f32", ())) as (func, [x]):
        for label in ("x", "x_1", "x", "7", "0", "a b", "a_b", "q%", "²"):
            x = named(ops.neg(x), label)
        returns(y=x)
    listing = dump(func)
    printed = [line.split(" = ")[0].strip() for line in listing.splitlines() if " = " in line]
    assert printed == ["%x_1", "%x_1_1", "%x_2", "%4", "%5", "%a_b", "%a_b_1", "%q_", "%²"]
    through_text(alone(func))


def test_labels_and_argument_names_come_back() -> None:
    with function("main.step-1", **{"images.base-0": Type("u8", (2,)), "state": Type("f32", ())}) as (func, [a, s]):
        returns(images=named(ops.cast(a, dtype="f32"), "pixels"), s=s)
    back = through_text(alone(func)).funcs["main.step-1"]
    assert list(back.args) == ["images.base-0", "state"]
    assert [v.name for v in back.results.values()] == ["pixels", "state"]


def test_loops_nest_in_text() -> None:
    with function("f", x=Type("f32", (2,)), n=Type("i32", ())) as (func, [x, n]):

        def outer(i: Value, y: Value) -> list[Value]:
            def inner(j: Value, z: Value) -> list[Value]:
                return [ops.le(n, j), named(ops.add(z, ops.mul(ops.cast(ops.add(i, j), dtype="f32"), x)), "z")]

            with scope("inner"):
                return ops.loop([named(y, "z")], 3, inner, early_stop=True)

        with scope("outer"):
            returns(y=ops.loop([x], 2, outer)[0])
    listing = dump(func)
    assert listing.count("loop(") == 2 and "  # outer.inner" in listing and "early_stop=True" in listing
    back = through_text(alone(func)).funcs["f"]
    given_inputs = {"x": torch.tensor([1.0, 2.0]), "n": torch.tensor(1)}
    same(run(back, given_inputs, {}), run(func, given_inputs, {}))


def test_a_listing_is_readable() -> None:
    with function("mlp", x=Type("f32", (1, 2))) as (func, [x]), scope("layers.0"), scope("mlp"):
        w = ops.weight(key="fc.weight", type=Type("f32", (2, 4)))
        y = named(ops.matmul(x, w), "hidden")
        returns(y=ops.slice_(ops.add(y, ops.scalar(0.5, y)), axis=-1, start=1))
    assert dump(alone(func, family="toy", views=2)) == (
        "module {family='toy', views=2}\n"
        "\n"
        "func @mlp(%x: f32[1,2]) {\n"
        "  %1 = weight() {key='fc.weight'} : f32[2,4]  # layers.0.mlp\n"
        "  %hidden = matmul(%x, %1) : f32[1,4]  # layers.0.mlp\n"
        "  %3 = const() {value=0.5} : f32[]  # layers.0.mlp\n"
        "  %4 = add(%hidden, %3) : f32[1,4]  # layers.0.mlp\n"
        "  %5 = slice(%4) {axis=-1, start=1} : f32[1,3]  # layers.0.mlp\n"
        "  return(%5) {names=('y',)}  # layers.0.mlp\n"
        "}\n"
    )


def test_hand_written_text_parses() -> None:
    """Blank lines, comments, any indent, defaults written out, loops of several results."""
    module = parse(
        """
        // a comment
        module {}
        func @f(%x: f32[2,3], %n: i64[]) {

            // what follows is a product
            %y = matmul(%x, %w) {dtype=None} : f32[2,2]
        }""".replace(
            "%y = matmul(%x, %w) {dtype=None} : f32[2,2]",
            """
            %w = weight() {key="a", type=f32[3,2]} : f32[3,2]
            %y = matmul(%x, %w) {dtype=None} : f32[2,2] # a note
            %a, %b = loop(%y, %n) {trips=3} do (%i: i32[], %c: f32[2,2], %d: i64[]) {
                yield(%c, %d)
            } : f32[2,2], i64[]
            return(%a, %b) {names=("a", "b")}""",
        )
    )
    verify(module)
    assert module.funcs["f"].block.ops[1].note == "a note"
    through_text(module)


# ---- what does not parse -----------------------------------------------------------------------------

HEAD = "func @f(%x: f32[2]) {\n"
TAIL = "  return(%x) {names=('y',)}\n}\n"
MALFORMED = [
    # text, a part of the message
    ("what is this", "line 1: expected `module`, `func` or a comment, found 'what is this'"),
    ("module {}\n\nmodule", "line 3: expected `module`"),
    ("module family='x'", "line 1: expected `module`"),
    ("module {family}", "line 1: expected key=value, found 'family'"),
    ("module {a=1, a=2}", "line 1: a is given twice"),
    ("module {a=b}", "line 1: not a literal: 'b'"),
    ("module {a=(1, [b])}", "line 1: not a literal: 'b'"),
    ("module {a={1: 2: 3}}", "line 1: not a literal: '{1: 2: 3}'"),
    ("module {a=__import__('os')}", "line 1: not a literal"),
    ("func f() {\n}", "line 1: expected"),
    ("func @f(%x f32[2]) {\n" + TAIL, "line 1: expected `%name: type`, found '%x f32[2]'"),
    ("func @f(%x: f32[2], %x: f32[3]) {\n" + TAIL, "line 1: %x is defined twice"),
    ("func @f(%x: f33[2]) {\n" + TAIL, "line 1: not a type: 'f33[2]'"),
    ("func @f(%x: f32[2,]) {\n" + TAIL, "line 1: not a type: 'f32[2,]'"),
    ("func @f(%x: f32[-2]) {\n" + TAIL, "line 1: not a type: 'f32[-2]'"),
    ("func @f(%x: f32) {\n" + TAIL, "line 1: not a type: 'f32'"),
    (HEAD + TAIL + HEAD + TAIL, "line 4: @f is defined twice"),
    (HEAD, "line 1: the body that opens here is not closed"),
    (HEAD + "  %y = neg(%x) : f32[2]\n", "line 1: the body that opens here is not closed"),
    (HEAD + "  return(%x) {names=('y',)}\n} : f32[2]\n", "line 1: @f ends in result types 'f32[2]'"),
    (HEAD + "  %y = neg(%z) : f32[2]\n" + TAIL, "line 2: %z is not defined"),
    (HEAD + "  %y = neg(x) : f32[2]\n" + TAIL, "line 2: x is not defined"),
    (HEAD + "\n// comment\n  %x = neg(%x) : f32[2]\n" + TAIL, "line 4: %x is defined twice"),
    (HEAD + "  %y = negate(%x) : f32[2]\n" + TAIL, "line 2: unknown op 'negate'"),
    (HEAD + "  %y = neg(%x)\n" + TAIL, "line 2: 1 results but 0 result types"),
    (HEAD + "  neg(%x) : f32[2]\n" + TAIL, "line 2: 0 results but 1 result types"),
    (HEAD + "  %y = neg(%x : f32[2]\n" + TAIL, "line 2: not an op: '%y = neg(%x : f32[2]'"),
    (HEAD + "  %y = neg %x : f32[2]\n" + TAIL, "line 2: not an op"),
    (HEAD + "  %y := neg(%x) : f32[2]\n" + TAIL, "line 2: not an op"),
    (HEAD + "  %y = neg(%x) : f32[2] f32\n" + TAIL, "line 2: not a type: 'f32[2] f32'"),
    (HEAD + "  %y = act(%x) {kind='relu' : f32[2]\n" + TAIL, "line 2: not an op"),
    (HEAD + "  %y = act(%x) {kind='relu} : f32[2]\n" + TAIL, "line 2: not an op"),
    (HEAD + "  %y = act(%x) {kind=relu} : f32[2]\n" + TAIL, "line 2: not a literal: 'relu'"),
    (HEAD + "  %y = act(%x) {kind} : f32[2]\n" + TAIL, "line 2: expected key=value"),
    (HEAD + "  %y = act(%x) {kind='relu', kind='gelu'} : f32[2]\n" + TAIL, "line 2: kind is given twice"),
    (
        HEAD + "  %y = loop(%x) {trips=2} do (%i: i32[], %c: f32[2]) {\n    yield(%c)\n" + TAIL,
        "line 2: 1 results but 0",
    ),
    (
        HEAD + "  %y = loop(%x) {trips=2} do (%i: i32[], %x: f32[2]) {\n    yield(%x)\n  } : f32[2]\n" + TAIL,
        "line 2: %x",
    ),
    (
        HEAD + "  %y = loop(%x) {trips=2} do (%i: i32[], %c: f32[2]) {\n    yield(%c)\n",
        "line 2: the body that opens here",
    ),
]


@pytest.mark.parametrize(("text", "message"), MALFORMED, ids=[m for _, m in MALFORMED])
def test_malformed_text_names_its_line(text: str, message: str) -> None:
    with pytest.raises(ParseError) as error:
        parse(text)
    assert message in str(error.value)


@given(st.integers(0, 40), st.data())
@settings(max_examples=60)
def test_damaged_text_parses_or_says_where(seed: int, data: st.DataObject) -> None:
    """One character lost, doubled or changed: a module or a ParseError, nothing else."""
    text = dump(random_module(seed))
    at = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(st.sampled_from(["", text[at] * 2, *"{}()[]'\"%,:=# \n\\x1"]))
    try:
        parse(text[:at] + new + text[at + 1 :])
    except ParseError as e:
        assert str(e).startswith("line ")
