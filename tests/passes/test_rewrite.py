"""The driver of local rewrites."""

from __future__ import annotations

import pytest

from cortexflow.errors import VerifyError
from cortexflow.ir import Module, Op, Value, dump, ops, parse, verify
from cortexflow.passes import rewrite
from cortexflow.passes.rewrite import constant, producer


def module_of(body: str, args: str = "%x: f32[3]", result: str = "%y") -> Module:
    return parse(f"func @f({args}) {{\n{body}\nreturn({result}) {{names=('y',)}}\n}}")


def names(module: Module) -> list[str]:
    return [op.name for f in module.funcs.values() for op in f.block.walk()]


def swap(old: str, new) -> object:
    """The rule that one elementwise op becomes another."""
    return lambda op: new(*op.inputs) if op.name == old else None


def double_negation(op: Op) -> Value | None:
    inner = producer(op.inputs[0], "neg") if op.name == "neg" else None
    return inner.inputs[0] if inner else None


def test_it_counts() -> None:
    module = module_of("%0 = exp(%x) : f32[3]\n%y = exp(%0) : f32[3]")
    assert rewrite(module, swap("exp", ops.sin)) == 2
    assert names(module) == ["sin", "sin", "return"]
    assert rewrite(module, swap("exp", ops.sin)) == 0


def test_rules_fire_on_each_others_output() -> None:
    module = module_of("%0 = exp(%x) : f32[3]\n%y = exp(%0) : f32[3]")
    assert rewrite(module, swap("exp", ops.sin), swap("sin", ops.cos), swap("cos", ops.neg)) == 6
    assert names(module) == ["neg", "neg", "return"]


def test_the_order_of_rules_does_not_matter_for_that() -> None:
    module = module_of("%0 = exp(%x) : f32[3]\n%y = exp(%0) : f32[3]")
    assert rewrite(module, swap("cos", ops.neg), swap("sin", ops.cos), swap("exp", ops.sin)) == 6
    assert names(module) == ["neg", "neg", "return"]


def test_a_rule_sees_operands_that_are_rewritten() -> None:
    module = module_of("%0 = exp(%x) : f32[3]\n%1 = neg(%0) : f32[3]\n%y = exp(%1) : f32[3]")
    rewrite(module, swap("exp", ops.neg), double_negation)
    verify(module)
    ret = module.funcs["f"].block.ops[-1]
    assert ret.inputs[0].op is not None and ret.inputs[0].op.inputs[0].name == "x"


def test_a_rule_may_emit_several_ops_and_outer_values_stay() -> None:
    module = module_of("%y = exp(%x) : f32[3]")
    rewrite(module, lambda op: ops.add(ops.sin(op.inputs[0]), ops.cos(op.inputs[0])) if op.name == "exp" else None)
    verify(module)
    assert names(module) == ["sin", "cos", "add", "return"]


def test_what_a_rule_emits_before_it_declines_is_dropped() -> None:
    def declines(op: Op) -> Value | None:
        if op.name == "exp":
            ops.sin(op.inputs[0])
        return None

    module = module_of("%y = exp(%x) : f32[3]")
    assert rewrite(module, declines) == 0
    assert names(module) == ["exp", "return"]


@pytest.mark.parametrize("delayed", [False, True], ids=["at once", "a round later"])
def test_rules_that_undo_each_other_are_an_error(delayed: bool) -> None:
    module = module_of("%y = exp(%x) : f32[3]")
    seen = set(module.funcs["f"].block.ops)

    def patient(op: Op) -> bool:
        """Whether this op was seen before: what a rule has just emitted has to wait."""
        known = op in seen
        seen.add(op)
        return known or not delayed

    def there(op: Op) -> Value | None:
        return ops.sin(*op.inputs) if op.name == "exp" and patient(op) else None

    def back(op: Op) -> Value | None:
        return ops.exp(*op.inputs) if op.name == "sin" and patient(op) else None

    with pytest.raises(VerifyError, match="do two rules undo each other"):
        rewrite(module, there, back)


def test_a_rule_that_changes_a_type_is_refused() -> None:
    module = module_of("%y = exp(%x) : f32[3]")
    with pytest.raises(VerifyError, match=r"a rewrite of exp turns f32\[3\] into f64\[3\]"):
        rewrite(module, lambda op: ops.cast(op.inputs[0], dtype="f64") if op.name == "exp" else None)


def test_names_and_notes_are_passed_on() -> None:
    module = module_of("%wave = exp(%x) : f32[3]  # layers.2.mlp\n%y = neg(%wave) : f32[3]")
    rewrite(module, lambda op: ops.sin(ops.cos(op.inputs[0])) if op.name == "exp" else None)
    first, second = module.funcs["f"].block.ops[:2]
    assert (first.name, first.note, first.out.name) == ("cos", "layers.2.mlp", "")
    assert (second.name, second.note, second.out.name) == ("sin", "layers.2.mlp", "wave")


def test_a_name_that_is_there_is_not_overwritten() -> None:
    module = module_of("%a = neg(%x) : f32[3]\n%b = neg(%a) : f32[3]\n%c = exp(%a) : f32[3]", result="%c")
    rewrite(module, lambda op: op.inputs[0] if op.name == "exp" else None)
    assert module.funcs["f"].results["y"].name == "a"
    assert module.funcs["f"].args["x"].name == "x"


def test_an_argument_keeps_its_name() -> None:
    module = module_of("%b = exp(%x) : f32[3]\n%y = neg(%b) : f32[3]")
    rewrite(module, lambda op: op.inputs[0] if op.name == "exp" else None)
    assert list(module.funcs["f"].args) == ["x"]


NESTED = """
func @f(%x: f32[3]) {
  %a = exp(%x) : f32[3]
  %r = loop(%a) {trips=2} do (%i: i32[], %c: f32[3]) {
    %b = exp(%a) : f32[3]
    %s = loop(%c) {trips=2} do (%j: i32[], %d: f32[3]) {
      %e = exp(%b) : f32[3]
      %g = add(%d, %e) : f32[3]
      yield(%g)
    } : f32[3]
    yield(%s)
  } : f32[3]
  return(%r) {names=('y',)}
}
"""


def test_bodies_are_rewritten_and_read_what_was_rewritten_outside() -> None:
    module = parse(NESTED)
    assert rewrite(module, swap("exp", ops.sin)) == 3
    verify(module)
    assert "exp" not in names(module)
    assert dump(module) == dump(parse(NESTED.replace("exp", "sin")))


def test_values_of_a_loop_can_be_replaced() -> None:
    module = parse(NESTED)
    rewrite(module, lambda op: list(op.inputs) if op.name == "loop" else None)
    verify(module)
    assert names(module) == ["exp", "return"]


def test_every_function_is_rewritten() -> None:
    module = parse(NESTED + NESTED.replace("@f", "@g"))
    assert rewrite(module, swap("exp", ops.sin)) == 6


def test_producer_and_constant() -> None:
    module = module_of(
        "%c = const() {value=2.0} : f32[]\n%v = const() {value=(1.0, 2.0)} : f32[2]\n%y = mul(%x, %c) : f32[3]"
    )
    c, v, y = (op.out for op in module.funcs["f"].block.ops[:3])
    assert constant(c) == 2.0 and constant(v) is None and constant(y) is None
    assert (
        producer(y, "mul") is y.op
        and producer(y, "add") is None
        and producer(module.funcs["f"].args["x"], "mul") is None
    )
