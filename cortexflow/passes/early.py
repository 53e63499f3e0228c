"""Early: what a stage computes from the module's inputs alone, as a function in front of the stages.

It may run beside the first stage, which the stages behind wait for: some tens of small launches for masks, positions
and embeddings. Views, weights and constants stay where they are read as well; loops stay.
"""

from __future__ import annotations

from collections.abc import Mapping

from cortexflow.ir.builder import OPS
from cortexflow.ir.core import SOURCES, Func, Module, Op, Value, clone_block, substitute
from cortexflow.passes.dce import sweep
from cortexflow.passes.plan_buffers import STRIDED
from cortexflow.passes.schedule import reads


def split_early(module: Module) -> tuple[Module, dict[str, str]]:
    """The module with early functions in front, and their names by stage; a stage keeps the arguments that it had."""
    there = {n: n for n in module.inputs if not any(n in s.results for s in module.stages)}  # as early functions see it
    front, stages, early = dict[str, Func](), dict(module.funcs), dict[str, str]()
    for stage in module.stages:
        name, found = f"early_{stage.name}", _found(stage, there) if stage is not module.stages[0] else []
        names = {v: f"{name}.{i}" for i, v in enumerate(found)}
        if found:
            front[name], stages[stage.name] = _apart(stage, name, names, there)
            early[stage.name] = name
        known = names | {arg: there[n] for n, arg in stage.args.items() if n in there}
        there = {n: m for n, m in there.items() if n not in stage.results}
        there |= {n: known[v] for n, v in stage.results.items() if v in known}
    return Module({**front, **stages}, module.weights, module.meta), early


def _found(stage: Func, there: Mapping[str, str]) -> list[Value]:
    """What a stage computes from what is there, as far as its other ops, or later stages, read it."""
    ready = {arg for name, arg in stage.args.items() if name in there}
    moved: dict[Op, None] = {}
    for op in stage.block.ops:
        if op.outputs and not op.body and ready.issuperset(op.inputs):
            ready.add(op.out)
            moved |= {} if op.name in (*SOURCES, *STRIDED) or OPS[op.name].view else {op: None}
    live: set[Value] = set()
    for op in reversed(stage.block.ops):
        if op.name == "return" or (op not in moved and not live.isdisjoint(op.outputs)):
            live.update(reads(op))
    return [op.out for op in moved if op.out in live]


def _apart(stage: Func, name: str, names: Mapping[Value, str], there: Mapping[str, str]) -> tuple[Func, Func]:
    """The function that makes some values of a stage, and the stage that reads them."""
    args: dict[str, Value] = {}  # a stage may know one of them under two names
    new = {a: args.setdefault(n, Value(a.type, n)) for a in stage.block.args if (n := there.get(a.name))}
    early = Func(name, clone_block(stage.block, new))
    early.block.ops[-1] = Op("return", [new[v] for v in names], {"names": tuple(names.values())})
    sweep(early)
    early.block.args = [arg for arg in args.values() if any(arg in op.inputs for op in early.block.ops)]
    new = {}
    rest = Func(stage.name, clone_block(stage.block, new))
    made = {new[v]: Value(v.type, n) for v, n in names.items()}
    rest.block.args += made.values()
    substitute(rest.block, made)
    sweep(rest)
    return early, rest
