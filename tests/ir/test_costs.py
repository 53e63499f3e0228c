"""Cost rules: the counts of a hand calculation, and what must hold for every op."""

from __future__ import annotations

import pytest

from cortexflow.ir import OPS, Cost, Op, Type, Value, function, fused, ops
from tests.ir.programs import MAKERS, random_func


def cost(value: Value) -> Cost:
    assert value.op is not None
    return OPS[value.op.name].cost(value.op)


def operands(*types: tuple[str, tuple[int, ...]]) -> list[Value]:
    return [Value(Type(*t)) for t in types]


def test_products_count_multiply_and_add() -> None:
    with function("f"):
        x, w, batch = operands(("bf16", (3, 5)), ("bf16", (5, 7)), ("bf16", (4, 3, 5)))
        assert cost(ops.matmul(x, w)) == Cost(2 * 3 * 5 * 7, 2 * (15 + 35), 2 * 21)
        assert cost(ops.matmul(x, w, dtype="f32")).written == 4 * 21
        assert cost(ops.matmul(batch, w)).flops == 4 * 2 * 3 * 5 * 7


def test_attention_counts_both_products_and_the_softmax() -> None:
    b, m, n, heads, groups, d, dv = 2, 3, 5, 4, 2, 8, 6
    with function("f"):
        q, k, v = operands(("f32", (b, m, heads, d)), ("f32", (b, n, groups, d)), ("f32", (b, n, groups, dv)))
        found = cost(ops.attention(q, k, v, scale=1.0))
    logits = b * heads * m * n
    assert found.flops == 2 * logits * d + 2 * logits * dv + 6 * logits
    assert found.read == 4 * (b * m * heads * d + b * n * groups * (d + dv))
    assert found.written == 4 * b * m * heads * dv


def test_convolutions_count_their_own_group_only() -> None:
    with function("f"):
        x, dense, depthwise = operands(("f32", (1, 6, 9, 9)), ("f32", (12, 6, 3, 3)), ("f32", (6, 1, 3, 3)))
        assert cost(ops.conv2d(x, dense)).flops == 2 * (12 * 7 * 7) * (6 * 3 * 3)
        assert cost(ops.conv2d(x, depthwise, groups=6)).flops == 2 * (6 * 7 * 7) * (3 * 3)
        assert cost(ops.conv2d(x, dense, stride=(2, 2))).flops == 2 * (12 * 4 * 4) * (6 * 3 * 3)


def test_loops_cost_their_body_times_their_trips() -> None:
    with function("f"):
        x, w = operands(("f32", (4, 4)), ("f32", (4, 4)))

        def inner(_: Value, y: Value) -> list[Value]:
            return [ops.matmul(y, w)]

        def outer(_: Value, y: Value) -> list[Value]:
            return [ops.add(ops.loop([y], 3, inner)[0], y)]

        found = cost(ops.loop([x], 10, outer)[0])
    matmul, add = Cost(2 * 4**3, 128, 64), Cost(16, 128, 64)
    assert found == (matmul * 3 + add) * 10


def test_what_moves_nothing_costs_nothing() -> None:
    with function("f"):
        (x,) = operands(("f32", (4, 6)))
        weight = ops.weight(key="w", type=Type("f32", (1000, 1000)))
        for value in (ops.reshape(x, shape=(24,)), ops.slice_(x, axis=0, stop=1), weight, ops.scalar(1.0, x)):
            assert cost(value) == Cost()
        assert cost(ops.transpose(x, perm=(1, 0))) == Cost(0, 96, 96)


def test_gather_and_cache_update_move_only_what_they_touch() -> None:
    with function("f"):
        table, index, one, row = operands(("bf16", (1000, 8)), ("i32", (3,)), ("i32", ()), ("bf16", (1, 8)))
        assert cost(ops.gather(table, index)) == Cost(0, 3 * 8 * 2 + 3 * 4, 3 * 8 * 2)
        assert cost(ops.cache_update(table, row, one, axis=0)) == Cost(0, 16, 16)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_no_cost_is_negative(name: str) -> None:
    for seed in range(3):
        for op in random_func(seed, [name], length=2).block.walk():
            found = OPS[op.name].cost(op)
            assert min(found.flops, found.read, found.written) >= 0, op.name
            assert all(type(n) is int for n in (found.flops, found.read, found.written)), op.name


@pytest.mark.parametrize("name", sorted(n for n in MAKERS if n.startswith("fused.")))
def test_fused_ops_cost_their_parts_less_the_traffic_between(name: str) -> None:
    for seed in range(3):
        (op,) = [op for op in random_func(seed, [name], length=1).block.ops if op.name == name]
        parts = expanded(op)
        whole = OPS[name].cost(op)
        assert whole.flops == sum(OPS[p.name].cost(p).flops for p in parts)
        assert whole.read == sum(v.type.nbytes for v in op.inputs)
        assert whole.written == op.out.type.nbytes


def expanded(op: Op) -> list[Op]:
    """The primitive ops that a fused op stands for."""
    decompose = OPS[op.name].decompose
    if decompose is None:
        return [op]
    with function("parts") as (func, _):
        decompose(*[Value(v.type) for v in op.inputs], **op.attrs)
    return [p for inner in func.block.ops for p in expanded(inner)]


def test_a_fused_op_counts_a_known_number() -> None:
    with function("f"):
        x, w, b = operands(("f32", (3, 5)), ("f32", (5, 7)), ("f32", (7,)))
        found = cost(fused.linear_act(x, w, b, kind="relu"))
    assert found == Cost(2 * 3 * 5 * 7 + 21 + 8 * 21, 4 * (15 + 35 + 7), 4 * 21)
