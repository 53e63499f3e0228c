"""The verifier: every way in which a module can be broken is named, with its function and op."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cortexflow.errors import VerifyError
from cortexflow.ir import PREPARE, Block, Func, Module, Op, Type, Value, function, named, ops, returns, scope, verify
from cortexflow.ir.builder import OPS, Cost, OpDef, building, define, emit, op
from cortexflow.ir.verifier import verify_func
from tests.ir.programs import MAKERS, random_func, random_module

T = Type("f32", (2, 3))


def func(name: str = "f") -> Func:
    """y = (x @ w) * 2 in layer 0, then a loop that adds x three times."""
    with function(name, x=T) as (f, [x]):
        with scope("layer"):
            w = ops.weight(key="w", type=Type("f32", (3, 3)))
            y = ops.matmul(x, w)
            y = ops.mul(y, ops.scalar(2.0, y))
        (z,) = ops.loop([y], 3, lambda _, c: [ops.add(c, x)])
        returns(y=z)
    return f


def module(*funcs: Func) -> Module:
    return Module({f.name: f for f in funcs})


def the(f: Func, name: str) -> Op:
    return next(o for o in f.block.walk() if o.name == name)


# Each takes a good function and breaks it.
def use_before_definition(f: Func) -> None:
    f.block.ops[0], f.block.ops[1] = f.block.ops[1], f.block.ops[0]


def operand_of_another_function(f: Func) -> None:
    the(f, "mul").inputs[0] = the(func(), "matmul").out


def value_of_a_loop_read_outside(f: Func) -> None:
    f.block.ops[-1].inputs[0] = the(f, "add").out


def wrong_dtype(f: Func) -> None:
    the(f, "matmul").out.type = Type("bf16", (2, 3))


def wrong_shape(f: Func) -> None:
    the(f, "add").out.type = Type("f32", (3, 2))


def too_many_results(f: Func) -> None:
    o = the(f, "mul")
    o.outputs.append(Value(T, op=o))


def unknown_op(f: Func) -> None:
    the(f, "mul").name = "multiply"


def unknown_attribute(f: Func) -> None:
    the(f, "matmul").attrs["precision"] = "high"


def incomplete_attributes(f: Func) -> None:
    del the(f, "matmul").attrs["dtype"]


def missing_attribute(f: Func) -> None:
    del the(f, "weight").attrs["key"]


def attribute_of_numpy(f: Func) -> None:
    the(f, "const").attrs["value"] = np.float64(2.0)


def attribute_that_is_an_object(f: Func) -> None:
    the(f, "weight").attrs["key"] = object()


def no_return(f: Func) -> None:
    f.block.ops.pop()


def empty_body(f: Func) -> None:
    f.block.ops.clear()


def return_in_the_middle(f: Func) -> None:
    f.block.ops.insert(1, Op("return", [f.block.args[0]], {"names": ("a",)}))


def return_names_do_not_match(f: Func) -> None:
    f.block.ops[-1].attrs["names"] = ("a", "b")


def return_names_repeat(f: Func) -> None:
    f.block.ops[-1].inputs *= 2
    f.block.ops[-1].attrs["names"] = ("a", "a")


def no_yield(f: Func) -> None:
    the(f, "loop").body.ops.pop()  # type: ignore[union-attr]


def empty_loop(f: Func) -> None:
    the(f, "loop").body.ops.clear()  # type: ignore[union-attr]


def yield_ends_the_function(f: Func) -> None:
    f.block.ops[-1] = Op("yield", [f.block.args[0]], {})


def return_ends_the_loop(f: Func) -> None:
    body = the(f, "loop").body
    assert body
    body.ops[-1] = Op("return", body.ops[-1].inputs, {"names": ("a",)})


def no_body(f: Func) -> None:
    the(f, "loop").body = None


def body_where_none_belongs(f: Func) -> None:
    the(f, "mul").body = Block([], [Op("yield", [], {})])


def carries_another_number(f: Func) -> None:
    the(f, "yield").inputs.append(f.block.args[0])


def carries_another_type(f: Func) -> None:
    the(f, "loop").inputs[0] = the(f, "weight").out


def step_of_another_type(f: Func) -> None:
    the(f, "loop").body.args[0].type = Type("i64", ())  # type: ignore[union-attr]


def early_stop_without_bool(f: Func) -> None:
    the(f, "loop").attrs["early_stop"] = True


def defined_by_two_ops(f: Func) -> None:
    a, b = the(f, "matmul"), the(f, "mul")
    b.outputs = a.outputs


def the_same_op_twice(f: Func) -> None:
    f.block.ops.insert(3, f.block.ops[2])


def argument_twice(f: Func) -> None:
    f.block.args.append(f.block.args[0])


def argument_names_repeat(f: Func) -> None:
    f.block.args.append(Value(T, "x"))


def argument_without_a_name(f: Func) -> None:
    f.block.args.append(Value(T, ""))


def argument_with_a_number_for_a_name(f: Func) -> None:
    f.block.args.append(Value(T, "7"))


def argument_name_that_does_not_print(f: Func) -> None:
    f.block.args[0].name = "image/base, left"


def argument_of_an_op(f: Func) -> None:
    f.block.args.append(named(the(f, "const").out, "c"))


def loop_argument_is_an_outer_value(f: Func) -> None:
    loop = the(f, "loop")
    assert loop.body
    loop.body.args[1] = loop.inputs[0]


def result_of_no_op(f: Func) -> None:
    the(f, "mul").out.op = None


def function_name_that_does_not_print(f: Func) -> None:
    f.name = "f(x)"


BROKEN: list[tuple[Callable[[Func], None], str]] = [
    (use_before_definition, "@f, op 0 (matmul at layer): operand 1 (%?: f32[3,3]) is not defined before its use"),
    (operand_of_another_function, "@f, op 3 (mul at layer): operand 0 (%?: f32[2,3]) is not defined before its use"),
    (value_of_a_loop_read_outside, "@f, op 5 (return): operand 0 (%?: f32[2,3]) is not defined before its use"),
    (wrong_dtype, "@f, op 1 (matmul at layer): results are bf16[2,3], inferred f32[2,3]"),
    (wrong_shape, "@f, op 4 (loop), op 0 (add): results are f32[3,2], inferred f32[2,3]"),
    (too_many_results, "@f, op 3 (mul at layer): results are f32[2,3], f32[2,3], inferred f32[2,3]"),
    (unknown_op, "@f, op 3 (multiply at layer): unknown op"),
    (unknown_attribute, "@f, op 1 (matmul at layer): matmul: unknown attribute 'precision'; it takes dtype"),
    (incomplete_attributes, "@f, op 1 (matmul at layer): matmul: attributes are incomplete"),
    (missing_attribute, "@f, op 0 (weight at layer): weight: missing attribute 'key'"),
    (attribute_of_numpy, "@f, op 2 (const at layer): const: attribute 'value' holds no plain value: np.float64(2.0)"),
    (attribute_that_is_an_object, "@f, op 0 (weight at layer): weight: attribute 'key' holds no plain value"),
    (no_return, "@f: the last op of the body must be return"),
    (empty_body, "@f: the last op of the body must be return"),
    (return_in_the_middle, "@f, op 1 (return): a body holds one return, as its last op"),
    (return_names_do_not_match, "@f, op 5 (return): return: 1 values are returned under 2 names"),
    (return_names_repeat, "@f, op 5 (return): return: result names repeat: a, a"),
    (no_yield, "@f, op 4 (loop): the last op of the body must be yield"),
    (empty_loop, "@f, op 4 (loop): the last op of the body must be yield"),
    (yield_ends_the_function, "@f: the last op of the body must be return"),
    (return_ends_the_loop, "@f, op 4 (loop): the last op of the body must be yield"),
    (no_body, "@f, op 4 (loop): loop: "),
    (body_where_none_belongs, "@f, op 3 (mul at layer): mul: "),
    (
        carries_another_number,
        "@f, op 4 (loop): loop: carries [f32[2,3]], takes [f32[2,3]], yields [f32[2,3], f32[2,3]]",
    ),
    (carries_another_type, "@f, op 4 (loop): loop: carries [f32[3,3]], takes [f32[2,3]], yields [f32[2,3]]"),
    (step_of_another_type, "@f, op 4 (loop): loop: the body's first argument is the step, i32[]"),
    (early_stop_without_bool, "@f, op 4 (loop): loop: with early_stop the body yields a bool scalar first"),
    (defined_by_two_ops, "@f, op 3 (mul at layer): a value (%?: f32[2,3]) is defined twice"),
    (the_same_op_twice, "@f, op 3 (const at layer): a value (%?: f32[]) is defined twice"),
    (argument_twice, "@f: argument names repeat"),
    (argument_names_repeat, "@f: argument names repeat"),
    (argument_without_a_name, "@f: '' does not name an argument"),
    (argument_with_a_number_for_a_name, "@f: '7' does not name an argument"),
    (argument_name_that_does_not_print, "@f: 'image/base, left' does not name an argument"),
    (argument_of_an_op, "@f: a value (%c: f32[]) is an argument, and yet it points to an op"),
    (loop_argument_is_an_outer_value, "@f, op 4 (loop): a value (%?: f32[2,3]) is defined twice"),
    (result_of_no_op, "@f, op 3 (mul at layer): a value (%?: f32[2,3]) does not point back to its op"),
    (function_name_that_does_not_print, "@f(x): a function's name is made of letters"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[d.__name__ for d, _ in BROKEN])
def test_a_broken_function_is_named(damage: Callable[[Func], None], message: str) -> None:
    f = func()
    verify(module(f))
    damage(f)
    for check in (lambda: verify_func(f), lambda: verify(module(f))):
        with pytest.raises(VerifyError) as error:
            check()
        assert message in str(error.value)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_what_the_builders_make_is_valid(name: str) -> None:
    for seed in range(5):
        verify_func(random_func(seed, [name], floats=["f32", "f64", "bf16", "f16"], length=3))


def test_random_modules_are_valid() -> None:
    for seed in range(20):
        verify(random_module(seed))


# ---- modules -----------------------------------------------------------------------------------------


def stage(name: str, args: dict[str, Type], results: dict[str, Type]) -> Func:
    """A function of this signature; its results are weights."""
    with function(name, **args) as (f, _):
        returns(**{n: ops.weight(key=f"{name}.{n}", type=t) for n, t in results.items()})
    return f


def test_stages_are_wired_by_name() -> None:
    first = stage("first", {"x": T}, {"h": T, "k": Type("bf16", (4,))})
    second = stage("second", {"h": T, "n": Type("i64", ())}, {"y": T})
    third = stage("third", {"k": Type("bf16", (4,)), "y": T, "x": T}, {"z": T})
    m = module(first, second, third)
    verify(m)
    assert m.inputs == {"x": T, "n": Type("i64", ())}
    assert m.outputs == {"z": T}
    m.meta["keep"] = ("k",)
    assert m.outputs == {"k": Type("bf16", (4,)), "z": T}


def test_a_stage_wired_to_another_type() -> None:
    m = module(stage("a", {}, {"h": T}), stage("b", {"h": Type("bf16", (2, 3))}, {"y": T}))
    with pytest.raises(VerifyError, match=r"@b: argument %h is bf16\[2,3\], but it is wired to f32\[2,3\]"):
        verify(m)


def test_an_input_taken_at_two_types() -> None:
    m = module(stage("a", {"x": T}, {"h": T}), stage("b", {"x": Type("f32", (3,))}, {"y": T}))
    with pytest.raises(VerifyError, match=r"@a: argument %x is f32\[2,3\], but it is wired to f32\[3\]"):
        verify(m)


def test_a_weight_read_at_two_types() -> None:
    with function("f") as (f, _):
        returns(a=ops.weight(key="w", type=T), b=ops.weight(key="w", type=Type("f32", (3, 2))))
    with pytest.raises(VerifyError, match=r"@f: weight 'w' is read as f32\[3,2\], elsewhere it is f32\[2,3\]"):
        verify(module(f))


def test_a_prepared_weight_read_at_another_type() -> None:
    with function("f") as (f, _):
        returns(y=ops.weight(key="made", type=Type("bf16", (2, 3))))
    with pytest.raises(VerifyError, match=r"@f: weight 'made' is read as bf16\[2,3\], elsewhere it is f32\[2,3\]"):
        verify(module(stage(PREPARE, {}, {"made": T}), f))


def test_prepare_takes_no_arguments() -> None:
    with pytest.raises(VerifyError, match=r"@prepare reads weights only, but takes x, y"):
        verify(module(stage(PREPARE, {"x": T, "y": T}, {"made": T})))


def test_prepared_weights_are_not_asked_for() -> None:
    """What `prepare` makes is not read from outside, but what it reads is, also under the same name."""
    with function(PREPARE) as (prepare, _):
        w = ops.weight(key="w", type=T)
        returns(w=ops.neg(w), v=ops.neg(w))
    with function("f") as (f, _):
        w, v, u = (ops.weight(key=k, type=T) for k in ("w", "v", "u"))
        returns(y=ops.add(ops.add(w, v), u))
    m = module(prepare, f)
    verify(m)
    assert m.weight_types() == {"w": T, "u": T}
    assert [s.name for s in m.stages] == ["f"]


def test_functions_share_no_values() -> None:
    a = func("a")
    b = Func("b", a.block)
    with pytest.raises(VerifyError, match=r"@b: a value .* is defined twice"):
        verify(module(a, b))


def test_a_function_stands_under_its_name() -> None:
    with pytest.raises(VerifyError, match="@f stands in the module under the name 'g'"):
        verify(Module({"g": func("f")}))


@pytest.mark.parametrize("meta", [{"a": {1, 2}}, {"a": np.int64(3)}, {"a": [object()]}, {"a b": 1}, {1: 2}])
def test_facts_are_plain_values(meta: dict[str, object]) -> None:
    with pytest.raises(VerifyError, match="meta holds plain values"):
        verify(Module({"f": func()}, {}, meta))


# ---- declaring ops -----------------------------------------------------------------------------------


def test_an_op_is_declared_once_and_can_be_used_at_once() -> None:
    try:

        @op(evaluate=lambda x, by: x * by)
        def test_scaled(x: Type, *, by: float = 2.0) -> Type:
            """x times a number."""
            return x

        with function("f", x=T) as (f, [x]):
            returns(y=test_scaled(x, by=3.0))
        verify_func(f)
        assert OPS["test_scaled"].doc == "x times a number." and OPS["test_scaled"].defaults == {"by": 2.0}
        with pytest.raises(VerifyError, match="'test_scaled' is already defined"):
            define(OpDef("test_scaled", lambda x: [x]))
    finally:
        OPS.pop("test_scaled", None)


def test_emit_refuses_what_it_does_not_know() -> None:
    with building(Block()) as block:
        with pytest.raises(VerifyError, match="unknown op 'nothing'"):
            emit("nothing", [], {})
        assert not block.ops


def test_costs_add_and_multiply() -> None:
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)
    assert Cost(1, 2, 3) * 4 == Cost(4, 8, 12)
