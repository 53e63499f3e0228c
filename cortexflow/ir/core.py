"""The whole representation: types, values, ops, blocks, functions and modules.

A body is one block in SSA form; inner blocks may read outer values; every op is pure. There are no
use-lists kept up by hand and no control-flow graph: `uses` counts when somebody asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from cortexflow.errors import VerifyError

DTYPE_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "i64": 8, "i32": 4, "u8": 1, "bool": 1}
FLOATS = ("f64", "f32", "bf16", "f16")
INTEGERS = ("i64", "i32", "u8")


@dataclass(frozen=True, slots=True)
class Type:
    """An element type and a static shape, row major."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise VerifyError(f"unknown dtype {self.dtype!r}; the IR has {', '.join(DTYPE_BYTES)}")
        if not isinstance(self.shape, tuple) or any(type(d) is not int or d < 0 for d in self.shape):
            raise VerifyError(f"a shape is a tuple of non-negative integers, found {self.shape!r}")

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense array."""
        return self.size * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(eq=False, slots=True)
class Value:
    """What an op or a block defines. `name` is a label for readers; identity is the object."""

    type: Type
    name: str = ""
    op: Op | None = field(default=None, repr=False)  # None: a block argument, or a wildcard of a pattern


@dataclass(eq=False, slots=True)
class Op:
    """One operation. `note` says where in the model it came from (`layers.3.attn`)."""

    name: str
    inputs: list[Value]
    attrs: dict[str, Any] = field(default_factory=dict)
    outputs: list[Value] = field(default_factory=list)
    body: Block | None = None
    note: str = ""

    @property
    def out(self) -> Value:
        """The only output."""
        (value,) = self.outputs
        return value


@dataclass(eq=False, slots=True)
class Block:
    """Arguments and ops in order; the last op is `return` (a function) or `yield` (a loop)."""

    args: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    def walk(self) -> Iterator[Op]:
        """Every op, an op before those of its body."""
        for op in self.ops:
            yield op
            if op.body:
                yield from op.body.walk()

    def blocks(self) -> Iterator[Block]:
        """This block and every block inside it."""
        yield self
        for op in self.ops:
            if op.body:
                yield from op.body.blocks()


@dataclass(eq=False, slots=True)
class Func:
    """A named block. Its results are the operands of the final `return`, named by its `names`."""

    name: str
    block: Block

    @property
    def args(self) -> dict[str, Value]:
        """Arguments by name, in order."""
        return {a.name: a for a in self.block.args}

    @property
    def results(self) -> dict[str, Value]:
        """Returned values by name, in order."""
        ret = self.block.ops[-1]
        return dict(zip(ret.attrs["names"], ret.inputs, strict=True))


SOURCES = ("weight", "const")  # ops whose results are there before a function runs
PREPARE = "prepare"  # the function that runs once, when weights are loaded


@dataclass(eq=False, slots=True)
class Module:
    """Functions in the order in which they run, the weights they read, and facts about the model.

    An argument of a stage is wired to the result of the same name of an earlier stage; what no
    earlier stage gives is an input of the module. The results of the last stage are the module's.
    `prepare`, where present, runs once: its results are weights that the stages read by that name.
    """

    funcs: dict[str, Func] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def stages(self) -> list[Func]:
        """The functions that run at every inference, in order."""
        return [f for f in self.funcs.values() if f.name != PREPARE]

    @property
    def inputs(self) -> dict[str, Type]:
        """What a caller must give, by name."""
        found: dict[str, Type] = {}
        made: set[str] = set()
        for stage in self.stages:
            found |= {n: a.type for n, a in stage.args.items() if n not in made}
            made |= set(stage.results)
        return found

    @property
    def outputs(self) -> dict[str, Type]:
        """What a caller gets, by name: the last stage's results, and others marked in `meta['keep']`."""
        keep = set(self.meta.get("keep", ()))
        found = {n: v.type for s in self.stages[:-1] for n, v in s.results.items() if n in keep}
        return found | {n: v.type for n, v in self.stages[-1].results.items()}

    def weight_types(self) -> dict[str, Type]:
        """The weights that the module reads from outside (not those that `prepare` makes), by key."""
        made = set(self.funcs[PREPARE].results) if PREPARE in self.funcs else set()
        reads = ((f, op) for f in self.funcs.values() for op in f.block.walk() if op.name == "weight")
        return {o.attrs["key"]: o.attrs["type"] for f, o in reads if f.name == PREPARE or o.attrs["key"] not in made}


def uses(block: Block) -> Counter[Value]:
    """How often each value is read in the block and the blocks inside it."""
    return Counter(v for op in block.walk() for v in op.inputs)


def readers(block: Block) -> dict[Value, list[Op]]:
    """The ops that read each value, in order, an op once for each operand."""
    found: dict[Value, list[Op]] = {}
    for op in block.walk():
        for v in op.inputs:
            found.setdefault(v, []).append(op)
    return found


def substitute(block: Block, new: Mapping[Value, Value]) -> None:
    """Replace operands throughout the block. Chains (a→b, b→c) are followed to their end."""

    def final(v: Value) -> Value:
        while v in new:
            v = new[v]
        return v

    if new:
        for op in block.walk():
            op.inputs = [final(v) for v in op.inputs]


def clone_block(block: Block, env: dict[Value, Value]) -> Block:
    """A deep copy. `env` maps outer values to what the copy reads, and is filled with the copies."""
    copy = Block()
    for arg in block.args:
        copy.args.append(env.setdefault(arg, Value(arg.type, arg.name)))
    for op in block.ops:
        copy.ops.append(clone_op(op, env))
    return copy


def clone_op(op: Op, env: dict[Value, Value]) -> Op:
    """A copy of one op that reads through `env`; its outputs are added to `env`."""
    copy = Op(op.name, [env.get(v, v) for v in op.inputs], dict(op.attrs), note=op.note)
    if op.body:
        copy.body = clone_block(op.body, env)
    for out in op.outputs:
        env[out] = Value(out.type, out.name, copy)
        copy.outputs.append(env[out])
    return copy


def clone(module: Module) -> Module:
    """A deep copy of the functions; weights are shared."""
    funcs = {n: Func(f.name, clone_block(f.block, {})) for n, f in module.funcs.items()}
    return Module(funcs, module.weights, dict(module.meta))
