"""Random programs: valid functions over any set of ops, and inputs to run them on.

    func = random_func(seed)                      # a few ops of every kind
    func = random_func(seed, ops=["matmul"])      # at least one of these, and what their operands need
    results = run(func, random_inputs(func, seed), random_weights(func, seed))

The same seed gives the same program. Values stay small (no chain of products or exponentials grows),
indices stay in range, so that results are finite and can be compared between precisions.
A new op needs a maker here: a function that emits it on operands that a `Source` finds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from cortexflow.ir import Func, Module, Type, Value, function, fused, named, ops, returns, scope
from cortexflow.ir.core import FLOATS
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.ir.ops import ACTIVATIONS

Shape = tuple[int, ...]
Maker = Callable[["Source"], Value | list[Value]]
MAKERS: dict[str, Maker] = {}

SIZES = (1, 1, 2, 3, 4, 5, 7)
_BOUNDED = ("softmax", "rms_norm", "layer_norm", "sin", "cos", "attention", "reduce_max", "relative_position_bias")
_MAX_DEGREE = 4


def random_func(seed: int, ops: Sequence[str] | None = None, floats: Sequence[str] = ("f32",), length: int = 8) -> Func:
    """A valid function of about `length` ops drawn from `ops` (default: all), each at least once if they fit."""
    rng = random.Random(f"{seed}/{','.join(ops or ())}")
    names = list(MAKERS if ops is None else ops)
    chosen = rng.sample(names, min(length, len(names)))
    chosen += [rng.choice(names) for _ in range(length - len(chosen))]
    with function(f"random{seed}") as (func, _):
        source = Source(func, rng, rng.choice(list(floats)))
        for i, name in enumerate(chosen):
            with scope(f"part.{i}") if rng.random() < 0.5 else scope("whole"):
                source.make(name)
        results = source.loose_ends() or [source.float(())]
        returns(**{f"r{i}": v for i, v in enumerate(results)})
    return func


def random_module(seed: int, ops: Sequence[str] | None = None, floats: Sequence[str] = ("f32",)) -> Module:
    """Two stages in a module; they share no values, and the second's arguments are inputs of the module."""
    rng = random.Random(seed)
    funcs = {}
    for i in range(2):
        func = random_func(seed * 2 + i, ops, floats, length=rng.randint(1, 8))
        func.name = f"stage{i}"
        for v in func.block.args:
            v.name = f"{v.name}.{i}"
        for op in func.block.walk():
            if op.name == "weight":
                op.attrs["key"] = f"{i}.{op.attrs['key']}"
        funcs[func.name] = func
    return Module(funcs, {}, {"seed": seed, "floats": tuple(floats)})


def random_inputs(func: Func, seed: int, floats: torch.dtype | None = None) -> dict[str, Tensor]:
    """A tensor for every argument; floating-point ones in `floats`, by default as declared."""
    return {name: random_tensor(v.type, f"{seed}/{name}", floats) for name, v in func.args.items()}


def random_weights(func: Func, seed: int, floats: torch.dtype | None = None) -> dict[str, Tensor]:
    """A tensor for every weight that the function reads."""
    found = {op.attrs["key"]: op.attrs["type"] for op in func.block.walk() if op.name == "weight"}
    return {key: random_tensor(t, f"{seed}/{key}", floats) for key, t in found.items()}


def random_tensor(t: Type, seed: int | str, floats: torch.dtype | None = None) -> Tensor:
    """Small random numbers of a type: normal, integers from -3 to 9 (0 to 9 for u8), or coin flips."""
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(48))
    if t.dtype in FLOATS:
        x = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        return x.to(TORCH_DTYPES[t.dtype]).to(floats or TORCH_DTYPES[t.dtype])
    if t.dtype == "bool":
        return torch.rand(t.shape, generator=generator) < 0.5
    return torch.randint(0 if t.dtype == "u8" else -3, 10, t.shape, generator=generator).to(TORCH_DTYPES[t.dtype])


class Source:
    """Finds operands while a function is built: values that exist, or new arguments."""

    def __init__(self, func: Func, rng: random.Random, dtype: str) -> None:
        self.func, self.rng, self.dtype = func, rng, dtype
        self.scope: list[Value] = []
        self.degree: dict[Value, int] = {}
        self.made: list[Value] = []
        self.depth = 0

    def make(self, name: str) -> list[Value]:
        """Emit one op of this name."""
        made = MAKERS[name](self)
        results = made if isinstance(made, list) else [made]
        for v in results:
            reads = [self.degree.get(x, 1) for x in (v.op.inputs if v.op else ()) if x.type.dtype in FLOATS]
            self.degree[v] = 1 if name in _BOUNDED else min(sum(reads), 9)
            if self.rng.random() < 0.2:
                named(v, self.rng.choice(["h", "out.x", "h", "layer-3"]))
        self.scope += results
        self.made += results if not self.depth else []
        return results

    def loose_ends(self) -> list[Value]:
        """What the program made, the unread values first and at least one."""
        read = {v for op in self.func.block.walk() for v in op.inputs}
        return [v for v in self.made if v not in read] or self.made[-1:]

    # ---- shapes

    def dim(self, *sizes: int) -> int:
        return self.rng.choice(sizes or SIZES)

    def shape(self, low: int = 0, high: int = 4) -> Shape:
        """The shape of a value at hand, or a new one."""
        known = [v.type.shape for v in self.scope if low <= len(v.type.shape) <= high]
        if known and self.rng.random() < 0.6:
            return self.rng.choice(known)
        return tuple(self.dim() for _ in range(self.rng.randint(low, high)))

    def axis(self, shape: Shape) -> int:
        return self.rng.randrange(-len(shape), len(shape))

    def narrower(self, shape: Shape) -> Shape:
        """A shape that broadcasts to this one."""
        kept = tuple(1 if self.rng.random() < 0.3 else d for d in shape)
        return kept[self.rng.randint(0, len(kept)) :] if self.rng.random() < 0.3 else kept

    def pair(self) -> tuple[Shape, Shape]:
        """Two shapes that broadcast, in either order."""
        shapes = [(full := self.shape()), self.narrower(full)]
        self.rng.shuffle(shapes)
        return shapes[0], shapes[1]

    # ---- values

    def value(self, dtype: str, shape: Shape) -> Value:
        """A value of this type: one at hand if there is one and the dice say so, else a new argument."""
        t = Type(dtype, shape)
        same = [v for v in self.scope if v.type == t]
        if same and self.rng.random() < 0.8:
            return self.rng.choice(same)
        alike = [v for v in self.scope if v.type.dtype == dtype and v.type.size == t.size]
        if alike and self.rng.random() < 0.5:
            return self.inherit(ops.reshape(self.rng.choice(alike), shape=shape))
        if self.rng.random() < 0.1:
            return ops.weight(key=f"weights.{len(self.func.block.args)}.{len(self.scope)}.{self.rng.random()}", type=t)
        arg = Value(t, f"x{len(self.func.block.args)}")
        self.func.block.args.append(arg)
        self.scope.insert(0, arg)
        return arg

    def inherit(self, v: Value) -> Value:
        assert v.op is not None
        self.degree[v] = max(self.degree.get(x, 1) for x in v.op.inputs)
        return v

    def float(self, shape: Shape | None = None) -> Value:
        """A value in the program's float dtype, of moderate size."""
        v = self.value(self.dtype, self.shape() if shape is None else shape)
        return ops.act(v, kind="tanh") if self.degree.get(v, 1) > _MAX_DEGREE else v

    def number(self, shape: Shape, like: Value | None = None) -> Value:
        if like is None:
            return self.float(shape) if self.rng.random() < 0.7 else self.value(self.rng.choice(["i32", "i64"]), shape)
        return self.float(shape) if like.type.dtype in FLOATS else self.value(like.type.dtype, shape)

    def bool(self, shape: Shape | None = None) -> Value:
        return self.value("bool", self.shape() if shape is None else shape)

    def any(self, shape: Shape | None = None) -> Value:
        where = self.shape() if shape is None else shape
        return self.bool(where) if self.rng.random() < 0.1 else self.number(where)

    def index(self, shape: Shape, below: int) -> Value:
        """Integers from 0 to below - 1."""
        v = self.value(self.rng.choice(["i32", "i64"]), shape)
        return ops.max_(ops.min_(v, ops.scalar(below - 1, v)), ops.scalar(0, v))

    def positive(self, shape: Shape | None = None) -> Value:
        v = self.float(shape)
        return ops.add(ops.abs_(v), ops.scalar(0.5, v))

    def mask(self, *extents: int) -> Value:
        return self.bool(
            tuple(1 if i < len(extents) - 1 and self.rng.random() < 0.4 else d for i, d in enumerate(extents))
        )


def maker(name: str) -> Callable[[Maker], Maker]:
    def register(fn: Maker) -> Maker:
        MAKERS[name] = fn
        return fn

    return register


# ---- element by element ----------------------------------------------------------------------------


def _unary(build: Callable[[Value], Value], operand: Callable[[Source], Value]) -> Maker:
    return lambda s: build(operand(s))


for _name in ("neg", "sin", "cos", "abs_", "floor"):
    MAKERS[_name.rstrip("_")] = _unary(getattr(ops, _name), Source.float)
for _name in ("log", "sqrt", "rsqrt"):
    MAKERS[_name] = _unary(getattr(ops, _name), Source.positive)


def _binary(build: Callable[[Value, Value], Value]) -> Maker:
    def make(s: Source) -> Value:
        left, right = s.pair()
        a = s.number(left)
        return build(a, s.number(right, like=a))

    return make


for _name in ("add", "sub", "mul", "max_", "min_", "lt", "le"):
    MAKERS[_name.rstrip("_")] = _binary(getattr(ops, _name))


@maker("eq")
def _eq(s: Source) -> Value:
    left, right = s.pair()
    dtype = s.rng.choice(["i32", "i64", "bool"])
    return ops.eq(s.value(dtype, left), s.value(dtype, right))


@maker("exp")
def _exp(s: Source) -> Value:
    x = s.float()
    return ops.exp(ops.min_(x, ops.scalar(2.0, x)))


@maker("div")
def _div(s: Source) -> Value:
    left, right = s.pair()
    return ops.div(s.float(left), s.positive(right))


@maker("pow")
def _pow(s: Source) -> Value:
    left, right = s.pair()
    return ops.pow_(ops.act(s.positive(left), kind="sigmoid"), ops.act(s.float(right), kind="tanh"))


@maker("and")
def _and(s: Source) -> Value:
    left, right = s.pair()
    return ops.and_(s.bool(left), s.bool(right))


@maker("or")
def _or(s: Source) -> Value:
    left, right = s.pair()
    return ops.or_(s.bool(left), s.bool(right))


@maker("not")
def _not(s: Source) -> Value:
    return ops.not_(s.bool())


@maker("act")
def _act(s: Source) -> Value:
    return ops.act(s.float(), kind=s.rng.choice(list(ACTIVATIONS)))


@maker("cast")
def _cast(s: Source) -> Value:
    return ops.cast(s.any(), dtype=s.rng.choice(["f64", "f32", "bf16", "f16", "i64", "i32", "bool"]))


@maker("where")
def _where(s: Source) -> Value:
    full = s.shape()
    a = s.number(s.narrower(full))
    return ops.where(s.bool(s.narrower(full)), a, s.number(s.narrower(full), like=a))


# ---- sources ---------------------------------------------------------------------------------------


@maker("weight")
def _weight(s: Source) -> Value:
    key = s.rng.choice(["a.weight", "it's", 'b "c", {d}', "e  # f", "g} : f32[2]", "h\\"])
    return ops.weight(key=f"{key}{s.rng.random()}", type=Type(s.dtype, s.shape()))


@maker("const")
def _const(s: Source) -> Value:
    dtype = s.rng.choice([s.dtype, "i32", "bool"])
    number = {"i32": lambda: s.rng.randint(-3, 9), "bool": lambda: s.rng.random() < 0.5}.get(dtype)
    if number is None:
        number = lambda: s.rng.choice([0.0, -0.0, 1.5, s.rng.gauss(0, 1), 3])  # noqa: E731
    shape = s.rng.choice([(), (1,), (3,), (2, 2)])
    return ops.const(value=tuple(number() for _ in range(prod(shape))) if shape else number(), dtype=dtype, shape=shape)


@maker("iota")
def _iota(s: Source) -> Value:
    return ops.iota(size=s.dim(), dtype=s.rng.choice(["i32", "i64", s.dtype]))


# ---- shape -----------------------------------------------------------------------------------------


@maker("reshape")
def _reshape(s: Source) -> Value:
    x = s.any()
    dims = list(x.type.shape)
    s.rng.shuffle(dims)
    if len(dims) > 1 and s.rng.random() < 0.5:
        dims = [dims[0] * dims[1], *dims[2:]]
    if s.rng.random() < 0.3:
        dims.insert(s.rng.randint(0, len(dims)), 1)
    return ops.reshape(x, shape=tuple(dims))


@maker("transpose")
def _transpose(s: Source) -> Value:
    x = s.any()
    return ops.transpose(x, perm=tuple(s.rng.sample(range(len(x.type.shape)), len(x.type.shape))))


@maker("broadcast_to")
def _broadcast_to(s: Source) -> Value:
    full = s.shape()
    return ops.broadcast_to(s.any(s.narrower(full)), shape=full)


@maker("concat")
def _concat(s: Source) -> Value:
    shape = s.shape(1)
    axis = s.axis(shape)
    first = s.any(shape)
    parts = [first]
    for _ in range(s.rng.randint(0, 2)):
        other = list(shape)
        other[axis] = s.dim()
        parts.append(s.value(first.type.dtype, tuple(other)))
    return ops.concat(*parts, axis=axis)


@maker("slice")
def _slice(s: Source) -> Value:
    x = s.any(s.shape(1))
    axis = s.axis(x.type.shape)
    start, stop = sorted(s.rng.sample(range(x.type.shape[axis] + 1), 2))
    end = None if stop == x.type.shape[axis] and s.rng.random() < 0.5 else stop
    return ops.slice_(x, axis=axis, start=start, stop=end, step=s.rng.randint(1, 3))


@maker("pad")
def _pad(s: Source) -> Value:
    x = s.any()
    pads = tuple((s.rng.randint(0, 2), s.rng.randint(0, 2)) for _ in x.type.shape)
    value = s.rng.choice([0.0, -0.0, 1.0, 2.5]) if x.type.dtype in FLOATS else 1
    return ops.pad(x, pads=pads, **({"value": value} if s.rng.random() < 0.7 else {}))


# ---- index and reduction ---------------------------------------------------------------------------


@maker("gather")
def _gather(s: Source) -> Value:
    table = s.any(s.shape(1, 3))
    axis = s.axis(table.type.shape)
    return ops.gather(table, s.index(s.shape(0, 2), table.type.shape[axis]), axis=axis)


@maker("cache_update")
def _cache_update(s: Source) -> Value:
    cache = s.any(s.shape(1))
    axis = s.axis(cache.type.shape)
    part = list(cache.type.shape)
    room = s.rng.randrange(part[axis])
    part[axis] -= room
    return ops.cache_update(cache, s.value(cache.type.dtype, tuple(part)), s.index((), room + 1), axis=axis)


def _reduction(build: Callable[..., Value], operand: Callable[[Source, Shape], Value]) -> Maker:
    def make(s: Source) -> Value:
        x = operand(s, s.shape(1))
        rank = len(x.type.shape)
        axes = tuple(a - rank * (s.rng.random() < 0.3) for a in s.rng.sample(range(rank), s.rng.randint(1, rank)))
        return build(x, axes=axes, **({"keepdims": True} if s.rng.random() < 0.5 else {}))

    return make


MAKERS["reduce_sum"] = _reduction(ops.reduce_sum, lambda s, shape: s.number(shape))
MAKERS["reduce_mean"] = _reduction(ops.reduce_mean, lambda s, shape: s.float(shape))
MAKERS["reduce_max"] = _reduction(ops.reduce_max, lambda s, shape: s.any(shape))


@maker("argmax")
def _argmax(s: Source) -> Value:
    x = s.number(s.shape(1))
    return ops.argmax(x, axis=s.axis(x.type.shape), keepdims=s.rng.random() < 0.5)


@maker("cumsum")
def _cumsum(s: Source) -> Value:
    x = s.number(s.shape(1))
    return ops.cumsum(x, axis=s.axis(x.type.shape))


# ---- transformers and convolutional towers ---------------------------------------------------------


@maker("matmul")
def _matmul(s: Source) -> Value:
    m, k, n = s.dim(), s.dim(), s.dim()
    left = s.shape(0, 2)
    right = s.narrower(left)
    if s.rng.random() < 0.3:
        left, right = right, left
    dtype = s.rng.choice([None, None, "f32", "f64"])
    return ops.matmul(s.float((*left, m, k)), s.float((*right, k, n)), dtype=dtype)


@maker("softmax")
def _softmax(s: Source) -> Value:
    x = s.float(s.shape(1))
    return ops.softmax(x, axis=s.axis(x.type.shape))


@maker("rms_norm")
def _rms_norm(s: Source) -> Value:
    x = s.float(s.shape(1))
    return ops.rms_norm(x, *([s.float(x.type.shape[-1:])] if s.rng.random() < 0.5 else []), eps=1e-6)


@maker("layer_norm")
def _layer_norm(s: Source) -> Value:
    x = s.float(s.shape(1))
    n = x.type.shape[-1:]
    return ops.layer_norm(x, *([s.float(n), s.float(n)] if s.rng.random() < 0.5 else []), eps=1e-5)


@maker("rope")
def _rope(s: Source) -> Value:
    lead, m, heads, half = s.shape(0, 1), s.dim(), s.dim(), s.dim(1, 2, 3)
    table = (*(lead if s.rng.random() < 0.5 else ()), m, half)
    angle = s.float(table)
    return ops.rope(s.float((*lead, m, heads, 2 * half)), ops.cos(angle), ops.sin(angle))


@maker("attention")
def _attention(s: Source) -> Value:
    b, m, n, groups, d, dv = s.dim(1, 2), s.dim(), s.dim(), s.dim(1, 2), s.dim(), s.dim()
    heads = groups * s.dim(1, 2, 3)
    q, k, v = s.float((b, m, heads, d)), s.float((b, n, groups, d)), s.float((b, n, groups, dv))
    bias = s.float(s.rng.choice([(1, 1, m, n), (b, heads, m, n), (1, heads, 1, n)]))
    extra = s.rng.choice([[], [s.mask(b, m, n)], [bias], [bias, s.mask(b, m, n)], [s.mask(b, m, n), bias]])
    return ops.attention(q, k, v, *extra, scale=s.rng.choice([1.0, d**-0.5]), causal=s.rng.random() < 0.4)


@maker("conv2d")
def _conv2d(s: Source) -> Value:
    groups, per_in, per_out = s.rng.choice([(1, 3, 2), (2, 1, 1), (3, 1, 2), (2, 2, 1), (1, 1, 1)])
    kernel = [s.dim(1, 2, 3) for _ in range(2)]
    attrs = {
        "stride": (s.dim(1, 2, 3), s.dim(1, 2)),
        "padding": tuple((s.rng.randint(0, 2), s.rng.randint(0, 2)) for _ in range(2)),
        "dilation": (s.dim(1, 2), s.dim(1, 2)),
        "groups": groups,
    }
    x = s.float((s.dim(1, 2), groups * per_in, *(2 * (k - 1) + s.dim() for k in kernel)))
    w = s.float((groups * per_out, per_in, *kernel))
    bias = [s.float((groups * per_out,))] if s.rng.random() < 0.5 else []
    return ops.conv2d(x, w, *bias, **{k: v for k, v in attrs.items() if s.rng.random() < 0.7 or k == "groups"})


@maker("relative_position_bias")
def _relative_position_bias(s: Source) -> Value:
    table = s.float((s.dim(4, 8, 32), s.dim(1, 2, 3)))
    positions = [s.value(s.rng.choice(["i32", "i64"]), (s.dim(),)) for _ in range(2)]
    distance = s.rng.choice([20, 128])
    return ops.relative_position_bias(table, *positions, bidirectional=s.rng.random() < 0.5, max_distance=distance)


# ---- control ---------------------------------------------------------------------------------------


@maker("loop")
def _loop(s: Source) -> list[Value]:
    early_stop = s.rng.random() < 0.5
    inner = [n for n in MAKERS if n not in ("loop", "weight") or (n == "loop" and s.depth < 1)]
    init = [s.any(s.shape(0, 2)) for _ in range(s.rng.randint(1, 2))]

    def body(step: Value, *carried: Value) -> list[Value]:
        before, s.depth = len(s.func.block.args), s.depth + 1
        kept, s.scope = s.scope, [*s.scope, *carried]
        for _ in range(s.rng.randint(1, 3)):
            s.make(s.rng.choice(inner))
        following = [_advance(s, c) for c in carried]
        stop = [ops.le(ops.scalar(s.rng.randint(0, 3), step), step)] if early_stop else []
        s.depth -= 1
        s.scope = [*s.func.block.args[before:], *kept]
        return [*stop, *following]

    return ops.loop(init, s.rng.randint(1, 4), body, early_stop)


def _advance(s: Source, carried: Value) -> Value:
    """The next value of what a loop carries: of the same type, and no larger."""
    match carried.type.dtype:
        case "bool":
            return ops.not_(carried)
        case "i32" | "i64":
            return ops.min_(ops.add(carried, ops.scalar(1, carried)), s.value(carried.type.dtype, carried.type.shape))
    other = s.value(carried.type.dtype, carried.type.shape)
    return ops.act(ops.add(carried, other), kind="tanh")


# ---- fused -----------------------------------------------------------------------------------------


class _Product:
    """Operands of x @ w, and of what stands around it."""

    def __init__(self, s: Source, even: bool = False) -> None:
        self.s, self.lead, self.m = s, s.shape(0, 1), s.dim()
        self.k, self.n = s.dim(), 2 * s.dim(1, 2, 3) if even else s.dim()

    @property
    def x(self) -> Value:
        return self.s.float((*self.lead, self.m, self.k))

    @property
    def w(self) -> Value:
        return self.s.float((self.k, self.n))

    @property
    def b(self) -> Value:
        return self.s.float((self.n,))

    @property
    def r(self) -> Value:
        return self.s.float((*self.lead, self.m, self.n))

    @property
    def modulation(self) -> tuple[Value, Value]:
        shape = (1, self.k) if self.s.rng.random() < 0.5 else (self.m, self.k)
        return self.s.float(shape), self.s.float(shape)

    @property
    def kind(self) -> str:
        return self.s.rng.choice(list(ACTIVATIONS))


@maker("fused.linear")
def _linear(s: Source) -> Value:
    p = _Product(s)
    return fused.linear(p.x, p.w, p.b)


@maker("fused.linear_act")
def _linear_act(s: Source) -> Value:
    p = _Product(s)
    return fused.linear_act(p.x, p.w, p.b, kind=p.kind)


@maker("fused.linear_residual")
def _linear_residual(s: Source) -> Value:
    p = _Product(s)
    return fused.linear_residual(p.r, p.x, p.w, p.b)


@maker("fused.matmul_residual")
def _matmul_residual(s: Source) -> Value:
    p = _Product(s)
    return fused.matmul_residual(p.r, p.x, p.w)


@maker("fused.matmul_gated_residual")
def _matmul_gated_residual(s: Source) -> Value:
    p = _Product(s)
    return fused.matmul_gated_residual(p.r, p.x, p.w, s.float((1, p.n)))


@maker("fused.glu")
def _glu(s: Source) -> Value:
    p = _Product(s, even=True)
    return fused.glu(p.r, kind=p.kind, width=p.n // 2)


@maker("fused.norm_matmul")
def _norm_matmul(s: Source) -> Value:
    p = _Product(s)
    return fused.norm_matmul(p.x, p.w, eps=1e-6)


@maker("fused.matmul_glu")
def _matmul_glu(s: Source) -> Value:
    p = _Product(s, even=True)
    return fused.matmul_glu(p.x, p.w, kind=p.kind, width=p.n // 2)


@maker("fused.norm_glu")
def _norm_glu(s: Source) -> Value:
    p = _Product(s, even=True)
    return fused.norm_glu(p.x, p.w, width=p.n // 2, kind=p.kind, eps=1e-6)


@maker("fused.modulated_norm")
def _modulated_norm(s: Source) -> Value:
    p = _Product(s)
    return fused.modulated_norm(p.x, *p.modulation, eps=1e-6)


@maker("fused.modulated_norm_matmul")
def _modulated_norm_matmul(s: Source) -> Value:
    p = _Product(s)
    return fused.modulated_norm_matmul(p.x, *p.modulation, p.w, eps=1e-6)


@maker("fused.modulated_norm_glu")
def _modulated_norm_glu(s: Source) -> Value:
    p = _Product(s, even=True)
    return fused.modulated_norm_glu(p.x, *p.modulation, p.w, kind=p.kind, eps=1e-6, width=p.n // 2)


@maker("fused.layer_norm_linear")
def _layer_norm_linear(s: Source) -> Value:
    p = _Product(s)
    return fused.layer_norm_linear(p.x, p.w, p.b, eps=1e-6)


@maker("fused.layer_norm_linear_act")
def _layer_norm_linear_act(s: Source) -> Value:
    p = _Product(s)
    return fused.layer_norm_linear_act(p.x, p.w, p.b, kind=p.kind, eps=1e-6)


@maker("fused.attention_segments")
def _attention_segments(s: Source) -> Value:
    b, m, n0, n1, groups, d = s.dim(1, 2), s.dim(), s.dim(), s.dim(), s.dim(1, 2), s.dim()
    q = s.float((b, m, groups * s.dim(1, 2), d))
    k0, v0, k1, v1 = (s.float((b, n, groups, d)) for n in (n0, n0, n1, n1))
    mask = s.mask(b, m, n0 + n1)
    return fused.attention_segments(q, k0, v0, k1, v1, mask, scale=d**-0.5, causal=s.rng.random() < 0.3)


@maker("fused.rotated_attention_segments")
def _rotated_attention_segments(s: Source) -> Value:
    b, m, n0, groups, half = s.dim(1, 2), s.dim(), s.dim(), s.dim(1, 2), s.dim(1, 3)
    q = s.float((b, m, groups * s.dim(1, 2), 2 * half))
    k0, v0, k1, v1 = (s.float((b, n, groups, 2 * half)) for n in (n0, n0, m, m))
    cosine, sine = s.float((b, m, half)), s.float((b, m, half))
    mask = s.mask(b, m, n0 + m)
    return fused.rotated_attention_segments(q, k0, v0, k1, v1, cosine, sine, mask, scale=0.5, causal=False)
