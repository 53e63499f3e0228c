"""Dead code elimination: ops that no result depends on, and stage results that no later stage reads."""

from __future__ import annotations

from cortexflow.ir.core import PREPARE, Block, Func, Module, Op, Value


def dce(module: Module) -> int:
    """Remove dead ops, dead loop carries, and stage results nobody reads; returns how many went."""
    removed = _unread_results(module)
    if PREPARE in module.funcs:
        removed += _unread_weights(module) + sweep(module.funcs[PREPARE])
    return removed


def sweep(func: Func) -> int:
    """Remove ops and loop carries of one function whose results nobody reads; returns how many went."""
    return _sweep_block(func.block, set())


def _unread_results(module: Module) -> int:
    """Drop results of stages that neither a later stage nor the caller wants, and all that led to them."""
    wanted = set(module.meta.get("keep", ()))
    removed = 0
    for stage in reversed(module.stages):
        ret = stage.block.ops[-1]
        if stage is not module.stages[-1]:
            kept = [(n, v) for n, v in stage.results.items() if n in wanted]
            removed += len(ret.inputs) - len(kept)
            ret.attrs["names"] = tuple(n for n, _ in kept)
            ret.inputs = [v for _, v in kept]
        removed += sweep(stage)
        read = {v for op in stage.block.walk() for v in op.inputs}
        stage.block.args = [a for a in stage.block.args if a in read]
        wanted |= set(stage.args)
    return removed


def _unread_weights(module: Module) -> int:
    """Drop results of `prepare` that no stage reads."""
    keys = {op.attrs["key"] for s in module.stages for op in s.block.walk() if op.name == "weight"}
    ret = module.funcs[PREPARE].block.ops[-1]
    kept = [(n, v) for n, v in module.funcs[PREPARE].results.items() if n in keys]
    removed = len(ret.inputs) - len(kept)
    ret.attrs["names"], ret.inputs = tuple(n for n, _ in kept), [v for _, v in kept]
    return removed


def _sweep_block(block: Block, live: set[Value]) -> int:
    """One walk from the end; `live` holds what is read behind the block, and gains what the block reads."""
    removed, kept = 0, []
    for op in reversed(block.ops):
        if _dead(op, live):
            removed += 1 + (sum(1 for _ in op.body.walk()) if op.body else 0)
            continue
        if op.body:
            removed += _drop_carries(op, live)
            removed += _sweep_block(op.body, live)
        live.update(op.inputs)
        kept.append(op)
    block.ops = kept[::-1]
    return removed


def _dead(op: Op, live: set[Value]) -> bool:
    return op.name not in ("return", "yield") and live.isdisjoint(op.outputs)


def _drop_carries(op: Op, live: set[Value]) -> int:
    """Remove what a loop carries for nobody: not read behind it, nor by what leads to what is read."""
    assert op.body is not None
    first, needed = int(op.attrs["early_stop"]), _needed(op, live)[0]
    dead = [i for i in reversed(range(len(op.outputs))) if i not in needed]
    for i in dead:
        del op.inputs[i], op.outputs[i], op.body.args[1 + i], op.body.ops[-1].inputs[first + i]
    return len(dead)


def _needed(op: Op, live: set[Value]) -> tuple[set[int], set[Value]]:
    """Which carried values a loop needs where `live` is read behind it, and what the loop reads for them."""
    assert op.body is not None
    first, end = int(op.attrs["early_stop"]), op.body.ops[-1]
    needed = {i for i, out in enumerate(op.outputs) if out in live}
    while True:
        inside = {*end.inputs[:first], *(end.inputs[first + i] for i in needed)}
        for inner in reversed(op.body.ops[:-1]):
            if not _dead(inner, inside):
                inside |= _needed(inner, inside)[1] if inner.body else set(inner.inputs)
        found = needed | {i for i, arg in enumerate(op.body.args[1:]) if arg in inside}
        if found == needed:
            return needed, inside | {op.inputs[i] for i in needed}
        needed = found
