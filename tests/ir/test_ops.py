"""Every primitive op against an independent formula, in float64; then the corners that need their own case."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cortexflow.ir import OPS, Func, Op, Type, Value, function, ops, returns, run
from cortexflow.ir.fused import FUSED
from cortexflow.ir.ops import TORCH_DTYPES, scalar
from tests.ir.programs import MAKERS, random_func, random_inputs, random_tensor, random_weights
from tests.ir.references import REFERENCES, bucket

CONTROL = {"loop", "return", "yield", "weight"}  # tested below and in test_interpreter.py
PRIMITIVES = {f.__name__ for f in vars(ops).values() if callable(f) and getattr(f, "__name__", "") in OPS} | CONTROL
NAMES = {torch_dtype: name for name, torch_dtype in TORCH_DTYPES.items()}


def evaluate(build: Callable[..., Value | Sequence[Value]], *args: Tensor) -> list[Tensor]:
    """The results of a function of these arguments, each op in its declared dtype."""
    types = {f"a{i}": Type(NAMES[t.dtype], tuple(t.shape)) for i, t in enumerate(args)}
    with function("f", **types) as (func, values):
        built = build(*values)
        results = [built] if isinstance(built, Value) else built
        returns(**{f"r{i}": v for i, v in enumerate(results)})
    return list(run(func, dict(zip(types, args, strict=True)), {}).values())


def one(build: Callable[..., Value | Sequence[Value]], *args: Tensor) -> Tensor:
    (result,) = evaluate(build, *args)
    return result


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return random_tensor(Type("f64", shape), f"{seed}{shape}").to(dtype)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


# ---- all ops -------------------------------------------------------------------------------------


def test_every_op_has_a_reference_and_a_maker() -> None:
    builtin = {name for name in OPS if not name.startswith("fused.")} & PRIMITIVES
    assert {"matmul", "attention", "conv2d", "slice", "where", "loop"} <= PRIMITIVES, "the op table is empty"
    assert builtin - CONTROL == set(REFERENCES), "add the op to tests/ir/references.py"
    wanted = (builtin - {"return", "yield"}) | {f"fused.{f.__name__}" for f in FUSED}
    assert wanted == set(MAKERS), "add the op to tests/ir/programs.py"


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_op_agrees_with_its_reference(name: str) -> None:
    assert sum(compare(random_func(seed, [name], length=2), seed).count(name) for seed in range(25)) >= 50


def compare(func: Func, seed: int) -> list[str]:
    """Run a function and compare every op with its reference on the same operands; returns the ops seen."""
    inputs = random_inputs(func, seed, torch.float64)
    values: dict[Value, Tensor] = {func.args[n]: x for n, x in inputs.items()}
    seen = []

    def watch(op: Op, results: list[Tensor]) -> None:
        if op.name != "weight":
            operands = [values[v].numpy() for v in op.inputs]
            wanted = torch.as_tensor(np.array(REFERENCES[op.name](*operands, **op.attrs)))
            where = f"{op.name} of {', '.join(str(v.type) for v in op.inputs)} {op.attrs}"
            torch.testing.assert_close(results[0], wanted, rtol=1e-11, atol=1e-11, msg=lambda m: f"{where}: {m}")
        values.update(zip(op.outputs, results, strict=True))
        seen.append(op.name)

    run(func, inputs, random_weights(func, seed, torch.float64), torch.float64, watch)
    return seen


# ---- attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(1, 6), (4, 6), (6, 6), (6, 4)])
def test_causal_attention_counts_from_the_last_key(m: int, n: int) -> None:
    """Query i sees keys up to n - m + i; with m > n the first queries see nothing and attend uniformly."""
    q, k, v = normal(2, m, 4, 8), normal(2, n, 2, 8, seed=1), normal(2, n, 2, 5, seed=2)
    found = one(lambda *a: ops.attention(*a, scale=0.3, causal=True), q, k, v)
    for i in range(m):
        seen = n - m + i + 1
        part = (
            one(lambda *a: ops.attention(*a, scale=0.3), q[:, i : i + 1], k[:, :seen], v[:, :seen])
            if seen > 0
            else None
        )
        uniform = v.mean(1).repeat_interleave(2, 1)
        close(found[:, i], uniform if part is None else part[:, 0])


def test_attention_with_nothing_to_see_is_the_mean_and_never_nan() -> None:
    q, k, v = normal(1, 3, 2, 4), normal(1, 5, 1, 4, seed=1), normal(1, 5, 1, 4, seed=2)
    mask = torch.ones(1, 3, 5, dtype=torch.bool)
    mask[0, 1] = False
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        out = one(lambda *a: ops.attention(*a, scale=1.0), *(t.to(dtype) for t in (q, k, v)), mask)
        assert out.isfinite().all()
        mean = v.to(dtype).double().mean(1)[0].expand(2, 4)
        close(out[0, 1].double(), mean, 1e-12 if dtype == torch.float64 else 1e-2)


def test_a_token_that_does_not_see_itself() -> None:
    """RT-1's rule: j <= i, except between two action positions, itself included."""
    action = torch.arange(8) % 4 >= 2
    visible = torch.ones(8, 8, dtype=torch.bool).tril() & ~(action[:, None] & action[None, :])
    q, k, v = normal(1, 8, 1, 4), normal(1, 8, 1, 4, seed=1), normal(1, 8, 1, 4, seed=2)

    def build(q: Value, k: Value, v: Value) -> Value:
        i32 = "i32"
        kind = ops.broadcast_to(ops.le(scalar(2, i32), ops.iota(size=4)), shape=(2, 4))  # positions within a frame
        acts = ops.reshape(kind, shape=(8,))
        both = ops.and_(ops.reshape(acts, shape=(8, 1)), ops.reshape(acts, shape=(1, 8)))
        past = ops.le(ops.reshape(ops.iota(size=8), shape=(1, 8)), ops.reshape(ops.iota(size=8), shape=(8, 1)))
        mask = ops.reshape(ops.and_(past, ops.not_(both)), shape=(1, 8, 8))
        return ops.attention(q, k, v, mask, scale=0.5)

    wanted = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), visible, scale=0.5)
    close(one(build, q, k, v), wanted.transpose(1, 2))


def test_cached_decoding_equals_one_causal_pass() -> None:
    """A loop that writes keys and values into a cache and looks back gives what one pass gives."""
    b, n, groups, heads, d = 2, 5, 2, 4, 6
    q, k, v = normal(b, n, heads, d), normal(b, n, groups, d, seed=1), normal(b, n, groups, d, seed=2)

    def build(q: Value, k: Value, v: Value) -> Value:
        empty = [ops.broadcast_to(scalar(0.0, "f64"), shape=t.type.shape) for t in (k, v, q)]

        def step(i: Value, keys: Value, values: Value, out: Value) -> list[Value]:
            at = ops.reshape(i, shape=(1,))
            keys = ops.cache_update(keys, ops.gather(k, at, axis=1), i, axis=1)
            values = ops.cache_update(values, ops.gather(v, at, axis=1), i, axis=1)
            mask = ops.reshape(ops.le(ops.iota(size=n), i), shape=(1, 1, n))
            row = ops.attention(ops.gather(q, at, axis=1), keys, values, mask, scale=0.4)
            return [keys, values, ops.cache_update(out, row, i, axis=1)]

        return ops.loop(empty, n, step)[2]

    close(one(build, q, k, v), one(lambda *a: ops.attention(*a, scale=0.4, causal=True), q, k, v))


def test_relative_bias_of_a_cached_decoder_is_a_row_of_the_whole() -> None:
    """T5's decoder, a position at a time: the query's position is a value, not a shape."""
    n = 9
    table = normal(32, 3)

    def whole(t: Value) -> Value:
        return ops.relative_position_bias(t, ops.iota(size=n), ops.iota(size=n), bidirectional=False)

    def rows(t: Value) -> Value:
        def step(i: Value, out: Value) -> list[Value]:
            at = ops.reshape(i, shape=(1,))
            return [
                ops.cache_update(
                    out, ops.relative_position_bias(t, at, ops.iota(size=n), bidirectional=False), i, axis=1
                )
            ]

        return ops.loop([ops.broadcast_to(scalar(0.0, "f64"), shape=(3, n, n))], n, step)[0]

    close(one(rows, table), one(whole, table))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_far_beyond_the_last(bidirectional: bool) -> None:
    """Every distance up to 400, both signs, against the rule in plain numbers (32 buckets, 128 distances)."""
    table = torch.arange(32.0).reshape(32, 1)
    keys = torch.arange(-400, 401)
    found = one(
        lambda t, q, k: ops.relative_position_bias(t, q, k, bidirectional=bidirectional),
        table,
        torch.zeros(1, dtype=torch.int64),
        keys,
    )
    wanted = [bucket(int(k), 32, bidirectional, 128) for k in keys]
    different = [int(k) for k, f, w in zip(keys, found[0, 0].tolist(), wanted, strict=True) if f != w]
    assert not different
    assert found.max() == 31 and set(found[0, 0].tolist()) == set(range(32)) - ({16} if bidirectional else set())


# ---- convolution, rotation, norms --------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_depthwise_convolution_with_each_frameworks_padding(kernel: int, stride: int) -> None:
    """TensorFlow's fixed rule (k//2 - 1, k//2) for stride 2, XLA's SAME, and the symmetric rule."""
    x, w, b = normal(2, 6, 13, 10), normal(6, 1, kernel, kernel), normal(6)
    for pads in ((kernel // 2 - 1, kernel // 2), ((kernel - 1) // 2, kernel // 2), (kernel // 2, kernel // 2)):
        attrs = {"stride": (stride, stride), "padding": (pads, pads[::-1]), "groups": 6}
        found = one(partial(ops.conv2d, **attrs), x, w, b)
        close(found, F.conv2d(F.pad(x, (*pads[::-1], *pads)), w, b, stride=stride, groups=6))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_dilated_convolution(groups: int) -> None:
    x, w = normal(1, 8, 11, 12), normal(12, 8 // groups, 3, 2)
    found = one(lambda *a: ops.conv2d(*a, dilation=(2, 3), stride=(2, 1), groups=groups), x, w)
    close(found, F.conv2d(x, w, stride=(2, 1), dilation=(2, 3), groups=groups))


def test_rope_turns_each_pair_by_its_angle() -> None:
    x, angle = normal(2, 5, 3, 8), normal(2, 5, 4, seed=1)
    found = one(lambda x, a: ops.rope(x, ops.cos(a), ops.sin(a)), x, angle)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    close(found, torch.cat([turned.real, turned.imag], -1))
    shared = one(lambda x, a: ops.rope(x, ops.cos(a), ops.sin(a)), x, angle[0])  # one table for the batch
    close(shared[0], found[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "softmax", "reduce_sum", "reduce_mean", "cumsum", "matmul"])
def test_narrow_floats_take_statistics_in_float32(name: str, dtype: torch.dtype) -> None:
    """The result is the float32 result rounded once: sums over 4,000 elements lose nothing on the way."""
    n = 4000
    x = (normal(3, n) * 0.01 + 0.2).to(dtype)
    build: dict[str, Callable[..., Value]] = {
        "rms_norm": lambda x: ops.rms_norm(x, eps=1e-6),
        "layer_norm": lambda x: ops.layer_norm(x, eps=1e-6),
        "softmax": ops.softmax,
        "reduce_sum": lambda x: ops.reduce_sum(x, axes=(1,)),
        "reduce_mean": lambda x: ops.reduce_mean(x, axes=(1,)),
        "cumsum": lambda x: ops.cumsum(x, axis=1),
        "matmul": lambda x: ops.matmul(x, ops.transpose(x, perm=(1, 0))),
    }
    found = one(build[name], x)
    exact = one(build[name], x.double())
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps * 0.51  # half a unit in the last place, and float32's own error
    close(found.double(), exact, max(rounding, 1e-5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_round_once_behind_their_scale(dtype: torch.dtype) -> None:
    """Not before it: a model that rounds in between multiplies by itself."""
    x, g, b = (normal(40, 64, seed=i).to(dtype) for i in range(3))
    for build in (lambda x, g, _: ops.rms_norm(x, g, eps=1e-6), lambda *a: ops.layer_norm(*a, eps=1e-6)):
        found = one(build, x, g[0], b[0])
        exact = one(build, x.double(), g[0].double(), b[0].double())
        assert (found == exact.to(dtype)).double().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_may_keep_its_float32_sums(dtype: torch.dtype) -> None:
    """A wider result dtype shows the sums, not the sums rounded to the operands' dtype."""
    x, w = normal(3, 64, dtype=dtype), normal(64, 5, dtype=dtype)
    found = one(lambda x, w: ops.matmul(x, w, dtype="f32"), x, w)
    assert found.dtype == torch.float32
    close(found.double(), x.double() @ w.double(), 1e-5)


def test_a_product_in_a_narrower_dtype_rounds_once() -> None:
    x, w = normal(3, 64, dtype=torch.float32), normal(64, 5, dtype=torch.float32)
    assert torch.equal(one(lambda x, w: ops.matmul(x, w, dtype="bf16"), x, w), (x @ w).to(torch.bfloat16))


def test_mixed_precision_of_scales_and_biases() -> None:
    """Norm parameters and attention biases may be wider or narrower than what they act on."""
    for a, b in ((torch.float64, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.float64)):
        x, g = normal(2, 6, dtype=a), normal(6, dtype=b)
        for build in (lambda x, g: ops.layer_norm(x, g, g, eps=1e-6), lambda x, g: ops.rms_norm(x, g, eps=1e-6)):
            out = one(build, x, g)
            assert out.dtype == a
            close(out.double(), one(build, x.double(), g.double()), 1e-2 if a == torch.bfloat16 else 1e-6)
        q, bias = normal(1, 3, 2, 4, dtype=a), normal(1, 2, 3, 3, dtype=b)
        assert one(lambda q, e: ops.attention(q, q, q, e, scale=1.0), q, bias).dtype == a


# ---- reading and writing by index --------------------------------------------------------------------


def test_argmax_takes_the_first_of_equals() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [-math.inf] * 4])
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int32):
        found = one(lambda x: ops.argmax(x, axis=1), x.nan_to_num(neginf=-9).to(dtype))
        assert found.tolist() == [1, 0, 0] and found.dtype == torch.int32
    many = torch.randint(0, 3, (4, 3001), generator=torch.Generator().manual_seed(0)).float()
    assert one(lambda x: ops.argmax(x, axis=-1), many).tolist() == [row.tolist().index(2.0) for row in many]


def test_gather_by_a_scalar_drops_the_axis() -> None:
    table = normal(4, 3)
    for axis, wanted in ((0, table[2]), (1, table[:, 2]), (-1, table[:, 2])):
        close(one(partial(ops.gather, axis=axis), table, torch.tensor(2)), wanted)
    close(one(ops.gather, table[:, 0].contiguous(), torch.tensor(3)), table[3, 0])


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_cache_update_leaves_the_old_cache_alone(axis: int) -> None:
    cache = normal(4, 5, 6)
    new = normal(*(2 if i == axis % 3 else d for i, d in enumerate(cache.shape)), seed=1)
    before = cache.clone()
    for index in (0, 1, 2):
        old, out = evaluate(
            lambda c, n, i: [c, ops.cache_update(c, n, i, axis=axis)],
            cache,
            new,
            torch.tensor(index, dtype=torch.int32),
        )
        wanted = before.clone()
        wanted[tuple(slice(index, index + 2) if i == axis % 3 else slice(None) for i in range(3))] = new
        close(out, wanted)
        close(old, before)
    assert torch.equal(cache, before)


def test_casts_truncate_towards_zero_and_round_to_even() -> None:
    x = torch.tensor([-1.9, -0.5, 0.5, 1.9, 2.0])
    assert one(lambda x: ops.cast(x, dtype="i32"), x).tolist() == [-1, 0, 0, 1, 2]
    assert one(lambda x: ops.cast(x, dtype="bool"), torch.tensor([0.0, -0.0, 0.1])).tolist() == [False, False, True]
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])  # halfway between two bfloat16 numbers
    assert one(lambda x: ops.cast(x, dtype="bf16"), halves).tolist() == [1.0, 1 + 2**-6]


def test_constants_of_every_kind() -> None:
    def build() -> list[Value]:
        return [
            ops.const(value=(1, 2, 3, 4, 5, 6), dtype="i64", shape=(2, 3)),
            ops.const(value=(), dtype="f32", shape=(0,)),
            ops.const(value=(True,), dtype="bool", shape=(1,)),
            ops.const(value=-math.inf, dtype="bf16"),
            ops.iota(size=0),
        ]

    a, b, c, d, e = evaluate(build)
    assert a.tolist() == [[1, 2, 3], [4, 5, 6]] and a.dtype == torch.int64
    assert b.shape == (0,) and c.tolist() == [True] and d.item() == -math.inf and d.dtype == torch.bfloat16
    assert e.shape == (0,) and e.dtype == torch.int32


# ---- loops -------------------------------------------------------------------------------------------


def test_loop_hands_on_what_it_carries() -> None:
    def build(x: Value, w: Value) -> list[Value]:
        def body(step: Value, x: Value, count: Value) -> list[Value]:
            moved = ops.add(ops.mul(x, w), ops.cast(step, dtype="f64"))  # w is an outer value
            return [moved, ops.add(count, scalar(1, "i32"))]

        return ops.loop([x, scalar(10, "i32")], 4, body)

    x, w = normal(3), normal(3, seed=1)
    found, count = evaluate(build, x, w)
    for step in range(4):
        x = x * w + step
    close(found, x)
    assert count.item() == 14


@pytest.mark.parametrize(("stop_at", "steps"), [(0, 1), (2, 3), (5, 6), (99, 6)])
def test_early_stop_ends_after_the_step_that_says_so(stop_at: int, steps: int) -> None:
    def build(at: Value) -> list[Value]:
        def body(step: Value, n: Value) -> list[Value]:
            return [ops.eq(step, at), ops.add(n, scalar(1, "i32"))]

        return ops.loop([scalar(0, "i32")], 6, body, early_stop=True)

    assert one(build, torch.tensor(stop_at, dtype=torch.int32)).item() == steps


def test_greedy_decoding_keeps_the_rest_at_padding() -> None:
    """Tokens are written as they come; the end token is kept, what follows stays padding."""
    logits = torch.tensor([[0.0, 9, 1, 2], [0, 1, 9, 2], [9, 1, 2, 3], [1, 2, 3, 9]])  # 1, 2, then the end token 0

    def build(table: Value) -> list[Value]:
        def body(step: Value, tokens: Value) -> list[Value]:
            token = ops.argmax(ops.gather(table, step), axis=0)
            row = ops.reshape(token, shape=(1,))
            return [ops.eq(token, scalar(0, "i32")), ops.cache_update(tokens, row, step, axis=0)]

        return ops.loop([ops.const(value=(-1,) * 4, dtype="i32", shape=(4,))], 4, body, early_stop=True)

    assert one(build, logits).tolist() == [1, 2, 0, -1]


def test_nested_loops_read_outer_values_and_outer_steps() -> None:
    def build(x: Value) -> list[Value]:
        def outer(i: Value, total: Value) -> list[Value]:
            def inner(j: Value, t: Value) -> list[Value]:
                product = ops.mul(ops.cast(ops.mul(i, j), dtype="f64"), x)
                return [ops.eq(j, i), ops.add(t, product)]

            return ops.loop([total], 4, inner, early_stop=True)

        return ops.loop([scalar(0.0, "f64")], 3, outer)

    wanted = sum(i * j * 1.5 for i in range(3) for j in range(i + 1))
    assert one(build, torch.tensor(1.5, dtype=torch.float64)).item() == wanted


def test_loop_may_swap_and_pass_through() -> None:
    """What is yielded may be any carried value, more than once, or an outer one."""
    a, b, c = (torch.tensor(float(i)) for i in range(3))
    found = evaluate(lambda a, b, c: ops.loop([a, b, a], 3, lambda _, x, y, z: [y, x, c]), a, b, c)
    assert [t.item() for t in found] == [1.0, 0.0, 2.0]
