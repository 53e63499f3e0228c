"""What passes stand on: walking, counting readers, substitution, copies, notes."""

from __future__ import annotations

import pytest

from cortexflow.ir import Func, Module, Type, Value, clone, dump, function, named, ops, readers, returns, scope, uses
from cortexflow.ir.builder import building, noted
from cortexflow.ir.core import Block, clone_op, substitute
from cortexflow.ir.verifier import verify_func
from tests.ir.programs import random_func, random_module

T = Type("f32", (4,))


def nested() -> tuple[Func, Value, Value]:
    """Loops in a loop that read an outer value twice, and the function's argument."""
    with function("f", x=T) as (f, [x]):
        outer = named(ops.exp(x), "outer")

        def body(_: Value, c: Value) -> list[Value]:
            return ops.loop([ops.add(c, outer)], 2, lambda _, d: [ops.mul(d, ops.mul(outer, x))])

        returns(y=ops.loop([x], 3, body)[0], outer=outer)
    return f, x, outer


def test_walk_enters_bodies_after_their_op() -> None:
    f, _, _ = nested()
    names = ["exp", "loop", "add", "loop", "mul", "mul", "yield", "yield", "return"]
    assert [op.name for op in f.block.walk()] == names
    assert [len(b.ops) for b in f.block.blocks()] == [3, 3, 3]


def test_uses_and_readers_count_every_operand_in_every_body() -> None:
    f, x, outer = nested()
    assert uses(f.block)[x] == 3 and uses(f.block)[outer] == 3
    assert [op.name for op in readers(f.block)[outer]] == ["add", "mul", "return"]
    with function("g", x=T) as (g, [y]):
        returns(y=ops.mul(y, y))
    assert uses(g.block)[y] == 2 and [op.name for op in readers(g.block)[y]] == ["mul", "mul"]


def test_substitution_follows_chains_into_bodies() -> None:
    f, x, outer = nested()
    middle, last = Value(T), x
    substitute(f.block, {outer: middle, middle: last})
    assert uses(f.block)[outer] == 0 and uses(f.block)[middle] == 0 and uses(f.block)[x] == 6
    verify_func(f)


@pytest.mark.parametrize("seed", range(20))
def test_copies_print_alike_and_share_nothing(seed: int) -> None:
    module = random_module(seed)
    module.weights = {"w": 1}
    before = dump(module)
    copy = clone(module)
    assert dump(copy) == before and copy.weights is module.weights
    values = [{v for op in m.funcs["stage0"].block.walk() for v in op.outputs} for m in (module, copy)]
    assert not values[0] & values[1]
    for func in copy.funcs.values():
        verify_func(func)
        for op in func.block.walk():
            op.attrs.clear()
            op.inputs.clear()
        func.block.ops.clear()
    copy.meta.clear()
    assert dump(module) == before


def test_a_copied_op_reads_through_its_map_and_fills_it() -> None:
    f, x, _ = nested()
    other = Value(T)
    env = {x: other}
    copies = [clone_op(op, env) for op in f.block.ops[:2]]
    assert copies[0].inputs == [other] and copies[1].inputs == [other]
    assert all(
        env[old] is new
        for op, c in zip(f.block.ops, copies, strict=False)
        for old, new in zip(op.outputs, c.outputs, strict=True)
    )
    assert uses(Block([], copies))[x] == 0, "the copy of a body reads the new value too"


def test_an_op_of_two_results_has_no_single_one() -> None:
    with function("f", x=T) as (f, [x]):
        ops.loop([x, x], 2, lambda _, a, b: [b, a])
    with pytest.raises(ValueError, match="too many values"):
        _ = f.block.ops[0].out


def test_notes_nest_and_end() -> None:
    with function("f", x=T) as (f, [x]):
        with scope("layers.3"):
            ops.neg(x)
            with scope("attn"):
                ops.neg(x)
                with noted("elsewhere"):
                    ops.neg(x)
                with function("g"):
                    ops.scalar(1.0, "f32")
            ops.neg(x)
        ops.neg(x)
    assert [op.note for op in f.block.ops] == ["layers.3", "layers.3.attn", "elsewhere", "layers.3", ""]


def test_building_ends_where_it_began_even_after_an_error() -> None:
    with function("f", x=T) as (f, [x]):
        with pytest.raises(RuntimeError), building(Block()):
            ops.neg(x)
            raise RuntimeError
        ops.exp(x)
    assert [op.name for op in f.block.ops] == ["exp"]


def test_programs_are_made_again_by_their_seed() -> None:
    for seed in range(10):
        assert dump(random_func(seed)) == dump(random_func(seed))
    assert len({dump(Module({"f": random_func(s)})) for s in range(10)}) == 10
