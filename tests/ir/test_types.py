"""Type rules: what is inferred is what evaluation gives, and operands that do not fit are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from cortexflow.errors import VerifyError
from cortexflow.ir import Op, Type, Value, function, fused, ops, run
from cortexflow.ir.core import FLOATS
from cortexflow.ir.ops import TORCH_DTYPES
from tests.ir.programs import MAKERS, random_func, random_inputs, random_weights


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_inferred_types_are_what_evaluation_gives(name: str) -> None:
    for seed in range(4 * len(FLOATS)):
        func = random_func(seed, [name], floats=[FLOATS[seed % len(FLOATS)]], length=2)

        def watch(op: Op, results: list[Tensor]) -> None:
            declared = [(TORCH_DTYPES[v.type.dtype], v.type.shape) for v in op.outputs]
            found = [(t.dtype, tuple(t.shape)) for t in results]
            operands = ", ".join(str(v.type) for v in op.inputs)
            assert found == declared, f"{op.name}({operands}) {op.attrs}"

        run(func, random_inputs(func, seed), random_weights(func, seed), watch=watch)


F32, F64, BF16, I32, BOOL = "f32", "f64", "bf16", "i32", "bool"
X = (F32, 2, 6)  # an operand that suits most ops

BAD: list[tuple[Callable[..., Any], list[tuple[Any, ...]], dict[str, Any], str]] = [
    # build, operands as (dtype, *shape), attributes, a part of the message
    (ops.neg, [(I32, 2)], {}, "neg: expected a floating-point operand, found i32[2]"),
    (ops.neg, [X, X], {}, "neg() takes 1 positional argument"),
    (ops.exp, [], {}, "missing 1 required positional argument"),
    (ops.floor, [(BOOL,)], {}, "found bool[]"),
    (ops.add, [X, (F64, 2, 6)], {}, "operands must share a dtype, found f32[2,6], f64[2,6]"),
    (ops.add, [X, (F32, 4)], {}, "shapes (2, 6), (4,) do not broadcast"),
    (ops.add, [(BOOL, 2), (BOOL, 2)], {}, "found bool[2] and bool[2]"),
    (ops.sub, [X], {}, "sub() missing 1 required positional argument: 'b'"),
    (ops.div, [(I32, 2), (I32, 2)], {}, "operands must be f64, f32, bf16, f16"),
    (ops.pow_, [(I32, 2), (I32, 2)], {}, "operands must be f64"),
    (ops.lt, [(BOOL,), (BOOL,)], {}, "operands must be"),
    (ops.eq, [(I32, 3), (I32, 2)], {}, "do not broadcast"),
    (ops.and_, [(BOOL,), (I32,)], {}, "expected bool operands"),
    (ops.or_, [(BOOL,)], {}, "takes 2 operands, found 1"),
    (ops.not_, [X], {}, "expected bool operands, found f32[2,6]"),
    (ops.act, [X], {"kind": "swish"}, "unknown activation 'swish'; there are gelu"),
    (ops.act, [X], {}, "act: missing attribute 'kind'"),
    (ops.act, [(I32, 2)], {"kind": "relu"}, "floating-point"),
    (ops.act, [X], {"kind": "relu", "alpha": 1}, "unknown attribute 'alpha'; it takes kind"),
    (ops.cast, [X], {"dtype": "float32"}, "unknown dtype 'float32'; the IR has f64"),
    (ops.where, [X, X, X], {}, "the condition must be bool"),
    (ops.where, [(BOOL,), X, (I32, 2, 6)], {}, "share a dtype"),
    (ops.where, [(BOOL, 5), X, X], {}, "do not broadcast"),
    (ops.const, [], {"value": 1.0, "dtype": F32, "shape": (1,)}, "a scalar has shape ()"),
    (ops.const, [], {"value": (1.0,), "dtype": F32}, "a scalar has shape ()"),
    (ops.const, [], {"value": (1, 2), "dtype": I32, "shape": (3,)}, "2 values do not fill shape (3,)"),
    (ops.const, [], {"value": [1, 2], "dtype": I32, "shape": (2,)}, "an array a tuple"),
    (ops.iota, [], {"size": -1}, "non-negative integers"),
    (ops.iota, [], {"size": 2.0}, "non-negative integers"),
    (ops.iota, [], {"size": 2, "dtype": BOOL}, "counts in numbers"),
    (ops.reshape, [X], {"shape": (5, 2)}, "f32[2,6] has 12 elements, shape (5, 2) has 10"),
    (ops.reshape, [X], {"shape": (-1,)}, "non-negative integers, found (-1,)"),
    (ops.reshape, [X], {"shape": [3, 4]}, "a shape is a tuple"),
    (ops.transpose, [X], {"perm": (0, 0)}, "(0, 0) does not permute the axes of f32[2,6]"),
    (ops.transpose, [X], {"perm": (0, -1)}, "does not permute"),
    (ops.broadcast_to, [X], {"shape": (6,)}, "f32[2,6] does not broadcast to (6,)"),
    (ops.broadcast_to, [X], {"shape": (3, 2, 5)}, "do not broadcast"),
    (ops.concat, [], {"axis": 0}, "at least one operand"),
    (ops.concat, [X, (F32, 3, 6)], {"axis": 1}, "operands differ off axis 1"),
    (ops.concat, [X, (F32, 6)], {"axis": 0}, "operands differ off axis 0"),
    (ops.concat, [(F32,), (F32,)], {"axis": 0}, "axis 0 is outside f32[]"),
    (ops.concat, [X, (I32, 2, 6)], {"axis": 0}, "share a dtype"),
    (ops.slice_, [X], {"axis": 2}, "axis 2 is outside f32[2,6]"),
    (ops.slice_, [X], {"axis": 1, "start": 3, "stop": 3}, "slice 3:3 is empty"),
    (ops.slice_, [X], {"axis": 1, "stop": 7}, "outside an extent of 6"),
    (ops.slice_, [X], {"axis": 1, "start": -2}, "outside an extent of 6"),
    (ops.slice_, [X], {"axis": 1, "step": 0}, "a slice step is positive"),
    (ops.pad, [X], {"pads": ((0, 1),)}, "one pair for each axis of f32[2,6], found 1"),
    (ops.pad, [X], {"pads": ((0, 1), (-1, 0))}, "pads are not negative"),
    (ops.pad, [X], {"pads": ((0,), (1,))}, "pad: not enough values to unpack"),
    (ops.gather, [X, X], {}, "expected an integer operand"),
    (ops.gather, [(F32,), (I32, 2)], {}, "axis 0 is outside f32[]"),
    (ops.cache_update, [X, (F32, 3, 6), (I32,)], {"axis": 0}, "f32[3,6] does not fit into f32[2,6] along axis 0"),
    (ops.cache_update, [X, (F32, 1, 5), (I32,)], {"axis": 0}, "does not fit"),
    (ops.cache_update, [X, (F32, 6), (I32,)], {"axis": 0}, "does not fit"),
    (ops.cache_update, [X, (BF16, 1, 6), (I32,)], {"axis": 0}, "share a dtype"),
    (ops.cache_update, [X, (F32, 1, 6), (I32, 1)], {"axis": 0}, "the index must be a scalar, found i32[1]"),
    (ops.cache_update, [X, (F32, 1, 6), (F32,)], {"axis": 0}, "expected an integer operand"),
    (ops.reduce_sum, [(BOOL, 3)], {"axes": (0,)}, "found bool[3]"),
    (ops.reduce_mean, [(I32, 3)], {"axes": (0,)}, "found i32[3]"),
    (ops.reduce_max, [X], {"axes": ()}, "axes () repeat or are empty"),
    (ops.reduce_max, [X], {"axes": (1, -1)}, "repeat"),
    (ops.reduce_max, [X], {"axes": (2,)}, "axis 2 is outside"),
    (ops.argmax, [X], {"axis": -3}, "axis -3 is outside"),
    (ops.argmax, [(BOOL, 3)], {"axis": 0}, "expected numbers, found bool[3]"),
    (ops.cumsum, [(BOOL, 3)], {"axis": 0}, "expected numbers"),
    (ops.cumsum, [X], {"axis": 5}, "outside"),
    (ops.matmul, [X, (F32, 5, 2)], {}, "inner extents differ: f32[2,6] @ f32[5,2]"),
    (ops.matmul, [(F32, 6), (F32, 6, 2)], {}, "operands need two axes"),
    (ops.matmul, [X, (BF16, 6, 2)], {}, "share a dtype"),
    (ops.matmul, [(I32, 2, 2), (I32, 2, 2)], {}, "floating-point"),
    (ops.matmul, [(F32, 3, 2, 6), (F32, 2, 6, 2)], {}, "do not broadcast"),
    (ops.matmul, [X, (F32, 6, 2)], {"dtype": I32}, "the result's dtype must be a float"),
    (ops.softmax, [X], {"axis": 2}, "axis 2 is outside"),
    (ops.softmax, [(F32,)], {}, "axis -1 is outside f32[]"),
    (ops.rms_norm, [X, (F32, 2)], {"eps": 1e-6}, "the scale must be (6,)"),
    (ops.rms_norm, [X], {}, "missing attribute 'eps'"),
    (ops.rms_norm, [X, (F32, 6), (F32, 6)], {"eps": 1e-6}, "at most a scale"),
    (ops.rms_norm, [(F32,)], {"eps": 1e-6}, "axis -1 is outside f32[]"),
    (ops.layer_norm, [X, (F32, 6)], {"eps": 1e-6}, "x alone, or x, scale and shift"),
    (ops.layer_norm, [X, (F32, 6), (F32, 2, 6)], {"eps": 1e-6}, "scale and shift must be (6,)"),
    (ops.rope, [(F32, 4, 3, 5), (F32, 4, 2), (F32, 4, 2)], {}, "even d"),
    (ops.rope, [(F32, 4, 3, 6), (F32, 4, 2), (F32, 4, 2)], {}, "shapes"),
    (ops.rope, [(F32, 4, 3, 6), (F32, 4, 3), (F32, 1, 3)], {}, "cosine and sine must agree"),
    (ops.rope, [(F32, 4, 3, 6), (F32,), (F32,)], {}, "axis -1 is outside"),
    (ops.rope, [(F32, 4, 3, 6), (F32, 2, 4, 3), (F32, 2, 4, 3)], {}, "does not fit f32[4,3,6]"),
    (ops.attention, [(F32, 1, 3, 4, 8), (F32, 1, 5, 3, 8), (F32, 1, 5, 3, 8)], {"scale": 1.0}, "do not group"),
    (ops.attention, [(F32, 1, 3, 4, 8), (F32, 1, 5, 0, 8), (F32, 1, 5, 0, 8)], {"scale": 1.0}, "do not group"),
    (ops.attention, [(F32, 1, 3, 4, 8), (F32, 1, 5, 2, 7), (F32, 1, 5, 2, 8)], {"scale": 1.0}, "do not group"),
    (ops.attention, [(F32, 1, 3, 4, 8), (F32, 1, 5, 2, 8), (F32, 1, 6, 2, 8)], {"scale": 1.0}, "do not pair"),
    (ops.attention, [(F32, 2, 3, 4, 8), (F32, 1, 5, 2, 8), (F32, 1, 5, 2, 8)], {"scale": 1.0}, "do not pair"),
    (ops.attention, [(F32, 3, 4, 8), (F32, 5, 2, 8), (F32, 5, 2, 8)], {"scale": 1.0}, "expected four axes each"),
    (ops.attention, [(F32, 1, 3, 4, 8)] + [(F32, 1, 5, 4, 8)] * 2, {}, "missing attribute 'scale'"),
    (ops.attention, [(F32, 1, 3, 4, 8)] * 3 + [(BOOL, 1, 3, 4)], {"scale": 1.0}, "do not broadcast"),
    (ops.attention, [(F32, 1, 3, 4, 8)] * 3 + [(BOOL, 3, 3)], {"scale": 1.0}, "mask bool[3,3] does not broadcast"),
    (ops.attention, [(F32, 1, 3, 4, 8)] * 3 + [(BOOL, 1, 3, 1)], {"scale": 1.0}, "mask bool[1,3,1] does not broadcast"),
    (ops.attention, [(F32, 1, 3, 4, 8)] * 3 + [(BOOL, 2, 3, 3)], {"scale": 1.0}, "does not broadcast to (1, 3, 3)"),
    (ops.attention, [(F32, 1, 3, 4, 8)] * 3 + [(F32, 1, 3, 3)], {"scale": 1.0}, "bias f32[1,3,3] does not broadcast"),
    (ops.attention, [(F32, 1, 3, 4, 8)] * 3 + [(BOOL, 1, 3, 3)] * 2, {"scale": 1.0}, "at most one bool mask"),
    (ops.conv2d, [(F32, 1, 4, 9, 9), (F32, 8, 3, 3, 3)], {}, "1 groups do not fit"),
    (ops.conv2d, [(F32, 1, 4, 9, 9), (F32, 5, 2, 3, 3)], {"groups": 2}, "2 groups do not fit"),
    (ops.conv2d, [(F32, 1, 4, 9, 9), (F32, 5, 4, 3, 3)], {"groups": 0}, "0 groups do not fit"),
    (ops.conv2d, [(F32, 1, 4, 9, 9), (F32, 8, 4, 3, 3), (F32, 4)], {}, "the bias must be (8,)"),
    (ops.conv2d, [(F32, 4, 9, 9), (F32, 8, 4, 3, 3)], {}, "expected [n,c,h,w]"),
    (ops.conv2d, [(F32, 1, 4, 2, 9), (F32, 8, 4, 3, 3)], {}, "larger than the padded extent of 2"),
    (ops.conv2d, [(F32, 1, 4, 9, 9), (F32, 8, 4, 3, 3)], {"stride": (0, 1)}, "stride and dilation are positive"),
    (ops.conv2d, [(F32, 1, 4, 9, 9), (F32, 8, 4, 3, 3)], {"stride": 2}, "conv2d: "),
    (ops.conv2d, [(F32, 1, 4, 9, 9), (F32, 8, 4, 3, 3)], {"padding": ((0, -1), (0, 0))}, "padding is not negative"),
    (ops.conv2d, [(F32, 1, 4, 9, 9), (F64, 8, 4, 3, 3)], {}, "share a dtype"),
    (ops.relative_position_bias, [(F32, 30, 2), (I32, 3), (I32, 3)], {"bidirectional": True}, "the table must be [4·n"),
    (ops.relative_position_bias, [(F32, 0, 2), (I32, 3), (I32, 3)], {"bidirectional": True}, "the table must be [4·n"),
    (ops.relative_position_bias, [(F32, 32, 2), (I32, 3), (F32, 3)], {"bidirectional": True}, "integer operand"),
    (
        ops.relative_position_bias,
        [(F32, 32, 2), (I32,), (I32, 3)],
        {"bidirectional": True},
        "positions must be vectors",
    ),
    (
        ops.relative_position_bias,
        [(F32, 32, 2), (I32, 3), (I32, 3)],
        {"bidirectional": False, "max_distance": 16},
        "max_distance must exceed the 16 exact distances, found 16",
    ),
    (fused.linear, [X, (F32, 5, 2), (F32, 2)], {}, "fused.linear: matmul: inner extents differ"),
    (fused.linear, [X, (F32, 6, 2)], {}, "missing 1 required positional argument: 'b'"),
    (fused.norm_matmul, [X, (F32, 6, 2)], {}, "fused.norm_matmul: missing attribute 'eps'"),
    (fused.glu, [X], {"kind": "gelu", "width": 4}, "fused.glu: mul: shapes"),
    (fused.norm_matmul, [X, (F32, 6, 2)], {"eps": 1e-6, "kind": "relu"}, "unknown attribute 'kind'; it takes eps"),
]


@pytest.mark.parametrize("case", BAD, ids=[f"{i}-{c[0].__name__}" for i, c in enumerate(BAD)])
def test_bad_operands_are_refused(case: tuple[Callable[..., Any], list[tuple[Any, ...]], dict[str, Any], str]) -> None:
    build, operands, attrs, message = case
    args = {f"x{i}": Type(dtype, tuple(shape)) for i, (dtype, *shape) in enumerate(operands)}
    with function("f", **args) as (_, values), pytest.raises(VerifyError) as error:
        build(*values, **attrs)
    assert message in str(error.value)
    assert str(error.value).startswith((f"{build.__name__}: ", f"fused.{build.__name__}: "))


def test_every_op_with_operands_refuses_something() -> None:
    """An op of the table refuses what it cannot take, and says so under its own name."""
    tried = {build.__name__ for build, *_ in BAD}
    easy = {"abs", "cos", "sin", "log", "sqrt", "rsqrt", "mul", "max", "min", "le", "loop", "weight"}  # as neg, add, lt
    missing = {n for n in MAKERS if not n.startswith("fused.")} - tried - easy
    assert not missing


Body = Callable[..., list[Value]]
BAD_LOOPS: list[tuple[list[tuple[Any, ...]], int, Body, bool, str]] = [
    ([X], 3, lambda i, x: [x, x], False, "yields [f32[2,6], f32[2,6]]"),
    ([X], 3, lambda i, x: [i], False, "carries [f32[2,6]], takes [f32[2,6]], yields [i32[]]"),
    ([X], 0, lambda i, x: [x], False, "trips must be positive, found 0"),
    ([X], 3, lambda i, x: [x], True, "yields a bool scalar first"),
    ([X], 3, lambda i, x: [ops.eq(i, i)], True, "yields []"),
    ([], 3, lambda i: [], True, "yields a bool scalar first"),
    ([X], 3, lambda i, x: [ops.cast(x, dtype="f64")], False, "yields [f64[2,6]]"),
]


@pytest.mark.parametrize("case", BAD_LOOPS, ids=[c[-1] for c in BAD_LOOPS])
def test_bad_loops_are_refused(case: tuple[list[tuple[Any, ...]], int, Body, bool, str]) -> None:
    operands, trips, body, early_stop, message = case
    args = {f"x{i}": Type(dtype, tuple(shape)) for i, (dtype, *shape) in enumerate(operands)}
    with function("f", **args) as (_, values), pytest.raises(VerifyError) as error:
        ops.loop(values, trips, body, early_stop)
    assert message in str(error.value) and str(error.value).startswith("loop: ")


def test_types_check_themselves() -> None:
    for dtype, shape in (("f33", ()), ("f32", (-1,)), ("f32", (True,)), ("f32", (2.0,)), ("f32", [2]), ("f32", 2)):
        with pytest.raises(VerifyError):
            Type(dtype, shape)  # type: ignore[arg-type]
    t = Type("bf16", (2, 3))
    assert (t.size, t.nbytes, str(t)) == (6, 12, "bf16[2,3]")
    assert Type("f32", ()).size == 1 and Type("f32", (0, 3)).nbytes == 0


def test_an_op_outside_a_function_is_refused() -> None:
    with pytest.raises(VerifyError, match="no function under construction"):
        ops.neg(Value(Type("f32", ())))
    with pytest.raises(VerifyError, match="no function under construction"):
        ops.scalar(1.0, "f32")


def test_attributes_stand_in_one_order() -> None:
    """However they are given, so that equal ops print and compare equal."""
    with function("f", x=Type("f32", (4, 6)), w=Type("f32", (6, 8))) as (_, [x, w]):
        a = fused.norm_glu(x, w, eps=1e-6, kind="relu", width=4)
        b = fused.norm_glu(x, w, width=4, kind="relu", eps=1e-6)
    assert a.op is not None and b.op is not None
    assert list(a.op.attrs.items()) == list(b.op.attrs.items())
