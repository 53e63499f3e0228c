"""How ops are declared and emitted: the registry, `@op`, `@fused`, and the block under construction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from cortexflow.errors import VerifyError
from cortexflow.ir.core import Block, Func, Op, Type, Value


@dataclass(frozen=True, slots=True)
class Cost:
    """Arithmetic operations and bytes moved. A multiply-add is two operations."""

    flops: int = 0
    read: int = 0
    written: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.read + other.read, self.written + other.written)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.flops * times, self.read * times, self.written * times)


def traffic(op: Op, flops: int = 0) -> Cost:
    """The cost of an op that reads each operand once and writes each result once."""
    return Cost(flops, sum(v.type.nbytes for v in op.inputs), sum(v.type.nbytes for v in op.outputs))


def per_element(operations: int) -> Callable[[Op], Cost]:
    """The cost rule of so many operations for each element of the result."""
    return lambda op: traffic(op, operations * op.outputs[0].type.size)


def no_traffic(_: Op) -> Cost:
    """The cost rule of an op that moves nothing."""
    return Cost()


@dataclass(frozen=True, slots=True)
class OpDef:
    """What is known of an op: its type rule, its meaning (evaluation or decomposition), its cost."""

    name: str
    infer: Callable[..., list[Type]]
    evaluate: Callable[..., Any] | None = None
    decompose: Callable[..., Any] | None = None
    cost: Callable[[Op], Cost] = traffic
    defaults: dict[str, Any] | None = None  # attributes that may be left out; None: no attribute check
    required: tuple[str, ...] = ()
    view: bool = False  # the result is its first operand's bytes, seen differently
    doc: str = ""

    def complete(self, attrs: dict[str, Any]) -> dict[str, Any]:
        """Attributes with defaults filled in; an unknown or missing one is an error."""
        if self.defaults is None:
            return attrs
        known = (*self.required, *self.defaults)
        if bad := [k for k in attrs if k not in known]:
            raise VerifyError(f"{self.name}: unknown attribute {bad[0]!r}; it takes {', '.join(known) or 'none'}")
        if missing := [k for k in self.required if k not in attrs]:
            raise VerifyError(f"{self.name}: missing attribute {missing[0]!r}")
        given = {**self.defaults, **attrs}
        return {k: given[k] for k in known}  # in one order, however they were given


OPS: dict[str, OpDef] = {}
_block: ContextVar[Block] = ContextVar("block")
_note: ContextVar[str] = ContextVar("note", default="")


@contextmanager
def building(block: Block) -> Iterator[Block]:
    """Emit into this block."""
    token = _block.set(block)
    try:
        yield block
    finally:
        _block.reset(token)


def adopt(op: Op) -> None:
    """Put an op that is there already into the block under construction."""
    _block.get().ops.append(op)


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Note that the ops emitted inside belong to this part of the model (`layers.3`, then `attn`)."""
    outer = _note.get()
    token = _note.set(f"{outer}.{name}" if outer else name)
    try:
        yield
    finally:
        _note.reset(token)


@contextmanager
def noted(note: str) -> Iterator[None]:
    """Emit ops with exactly this note (a rewrite passes on the note of what it replaces)."""
    token = _note.set(note)
    try:
        yield
    finally:
        _note.reset(token)


WILD = Type("f32", ())  # the type of values inside a pattern, where nothing is inferred
_in_pattern: ContextVar[bool] = ContextVar("in_pattern", default=False)


@contextmanager
def building_pattern() -> Iterator[Block]:
    """Emit a pattern: ops without inferred types."""
    token = _in_pattern.set(True)
    try:
        with building(Block()) as block:
            yield block
    finally:
        _in_pattern.reset(token)


def define(definition: OpDef) -> OpDef:
    """Register an op. A name is registered once."""
    if definition.name in OPS:
        raise VerifyError(f"op {definition.name!r} is already defined")
    OPS[definition.name] = definition
    return definition


def infer(name: str, types: Sequence[Type], attrs: dict[str, Any], body: Block | None = None) -> list[Type]:
    """The result types of an op: the one place where a type is decided."""
    if name not in OPS:
        raise VerifyError(f"unknown op {name!r}")
    try:
        return OPS[name].infer(*types, **attrs, **({"body": body} if body else {}))
    except VerifyError as e:
        raise VerifyError(f"{name}: {e}") from None
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as e:  # of a kind no rule expects
        shown = f"operands are {', '.join(map(str, types)) or 'none'}, attributes {attrs}"
        raise VerifyError(f"{name}: {e}; {shown}") from None


def emit(name: str, inputs: Sequence[Value], attrs: dict[str, Any], body: Block | None = None) -> list[Value]:
    """Append an op to the block under construction and return its results."""
    if name not in OPS:
        raise VerifyError(f"unknown op {name!r}")
    attrs = OPS[name].complete(attrs)
    wild = _in_pattern.get()
    types = [WILD] if wild else infer(name, [v.type for v in inputs], attrs, body)
    op = Op(name, list(inputs), attrs, body=body, note="" if wild else _note.get())
    op.outputs = [Value(t, op=op) for t in types]
    block = _block.get(None)
    if block is None:
        raise VerifyError(f"{name}: there is no function under construction; use `with function(...)`")
    block.ops.append(op)
    return op.outputs


def _attributes(rule: Callable[..., Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The keyword-only parameters of a type rule: those without and those with a default."""
    params = [p for p in inspect.signature(rule).parameters.values() if p.kind is p.KEYWORD_ONLY and p.name != "body"]
    required = tuple(p.name for p in params if p.default is p.empty)
    return required, {p.name: p.default for p in params if p.default is not p.empty}


def op(
    evaluate: Callable[..., Any] | None = None, cost: Callable[[Op], Cost] = traffic, view: bool = False
) -> Callable[[Callable[..., Type]], Callable[..., Value]]:
    """Declare a primitive op with one result.

    The decorated function is its type rule: positional parameters are operand types, keyword-only
    parameters are attributes, the return value is the result type. `evaluate` is its meaning on
    torch tensors. What comes back is the builder: the same call on values.
    """

    def declare(rule: Callable[..., Type]) -> Callable[..., Value]:
        name = rule.__qualname__ = rule.__name__.rstrip("_")
        required, defaults = _attributes(rule)
        define(
            OpDef(
                name,
                lambda *types, **attrs: [rule(*types, **attrs)],
                evaluate,
                cost=cost,
                defaults=defaults,
                required=required,
                view=view,
                doc=inspect.getdoc(rule) or "",
            )
        )

        def build(*inputs: Value, **attrs: Any) -> Value:
            return emit(name, inputs, attrs)[0]

        build.__name__, build.__doc__ = name, rule.__doc__
        return build

    return declare


def fused(fn: Callable[..., Value]) -> Callable[..., Value]:
    """Declare a fused op by what it means.

    The body is at once the pattern that finds the op, the reference that tests it, its type rule,
    and what a target that lacks it gets. Its cost is that of its parts, less the traffic between them.
    """
    name = f"fused.{fn.__name__}"
    required, defaults = _attributes(fn)

    def expand(types: Sequence[Type], attrs: dict[str, Any]) -> tuple[Block, Value]:
        with noted(""), building(Block()) as block:
            return block, fn(*[Value(t) for t in types], **attrs)

    def cost(op: Op) -> Cost:
        block, _ = expand([v.type for v in op.inputs], op.attrs)
        return traffic(op, sum(OPS[o.name].cost(o).flops for o in block.ops))

    define(
        OpDef(
            name,
            lambda *types, **attrs: [expand(types, attrs)[1].type],
            decompose=fn,
            cost=cost,
            defaults=defaults,
            required=required,
            doc=inspect.getdoc(fn) or "",
        )
    )

    def build(*inputs: Value, **attrs: Any) -> Value:
        return fn(*inputs, **attrs) if _in_pattern.get() else emit(name, inputs, attrs)[0]

    build.__name__, build.__doc__ = fn.__name__, fn.__doc__
    return build


@contextmanager
def function(name: str, **args: Type) -> Iterator[tuple[Func, list[Value]]]:
    """Build a function: `with function("f", x=Type("f32", (2,))) as (f, [x]): ...; returns(y=...)`."""
    func = Func(name, Block([Value(t, n) for n, t in args.items()]))
    with building(func.block), noted(""):
        yield func, list(func.block.args)


def returns(**results: Value) -> None:
    """End the function under construction with these named results."""
    emit("return", list(results.values()), {"names": tuple(results)})


def named(value: Value, name: str) -> Value:
    """Label a value, so that listings show it and `expose` can find it."""
    value.name = name
    return value
