"""Dead code elimination: ops that no result depends on, and stage results that no later stage reads."""

from __future__ import annotations

from cortexflow.ir.core import PREPARE, Block, Func, Module, Value


def dce(module: Module) -> int:
    """Remove dead ops, dead loop carries, and stage results nobody reads; returns how many went."""
    removed = _unread_results(module)
    for func in module.funcs.values():
        removed += _carries(func.block)
        removed += _sweep(func)
    return removed


def _unread_results(module: Module) -> int:
    """Drop results of earlier stages that neither a later stage nor the caller wants."""
    wanted = set(module.meta.get("keep", ()))
    removed = 0
    for stage in reversed(module.stages):
        ret = stage.block.ops[-1]
        if stage is not module.stages[-1]:
            kept = [(n, v) for n, v in stage.results.items() if n in wanted]
            removed += len(ret.inputs) - len(kept)
            ret.attrs["names"] = tuple(n for n, _ in kept)
            ret.inputs = [v for _, v in kept]
            removed += _sweep(stage)
        read = {v for op in stage.block.walk() for v in op.inputs}
        stage.block.args = [a for a in stage.block.args if a in read]
        wanted |= set(stage.args)
    if PREPARE in module.funcs:
        removed += _unread_weights(module)
    return removed


def _unread_weights(module: Module) -> int:
    """Drop results of `prepare` that no stage reads."""
    keys = {op.attrs["key"] for s in module.stages for op in s.block.walk() if op.name == "weight"}
    ret = module.funcs[PREPARE].block.ops[-1]
    kept = [(n, v) for n, v in module.funcs[PREPARE].results.items() if n in keys]
    removed = len(ret.inputs) - len(kept)
    ret.attrs["names"], ret.inputs = tuple(n for n, _ in kept), [v for _, v in kept]
    return removed


def _sweep(func: Func) -> int:
    """Remove ops whose results nobody reads: one walk from the end."""
    return _sweep_block(func.block, set())


def _sweep_block(block: Block, live: set[Value]) -> int:
    removed, kept = 0, []
    for op in reversed(block.ops):
        if op.outputs and live.isdisjoint(op.outputs):
            removed += 1 + (sum(1 for _ in op.body.walk()) if op.body else 0)
            continue
        live.update(op.inputs)
        if op.body:
            removed += _sweep_block(op.body, live)
        kept.append(op)
    block.ops = kept[::-1]
    return removed


def _carries(block: Block) -> int:
    """Remove carried values that neither the loop's readers nor the rest of its body need."""
    removed = 0
    read = {v for op in block.walk() for v in op.inputs}
    for op in block.ops:
        if not op.body:
            continue
        removed += _carries(op.body)
        first = 1 if op.attrs["early_stop"] else 0
        end = op.body.ops[-1]
        for i in reversed(range(len(op.outputs))):
            arg = op.body.args[1 + i]
            others = {v for o in op.body.walk() for j, v in enumerate(o.inputs) if not (o is end and j == first + i)}
            if op.outputs[i] not in read and arg not in others:
                del op.inputs[i], op.outputs[i], op.body.args[1 + i], end.inputs[first + i]
                removed += 1
    return removed
