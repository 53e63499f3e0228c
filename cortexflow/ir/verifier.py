"""The rules of the IR. One place decides a type; the verifier runs that rule again and compares."""

from __future__ import annotations

from cortexflow.errors import VerifyError
from cortexflow.ir.builder import OPS, infer
from cortexflow.ir.core import PREPARE, Block, Func, Module, Op, Type, Value


def verify(module: Module) -> None:
    """Check every function, the wiring of the stages and the weights. Raises `VerifyError`."""
    wired: dict[str, Type] = {}
    inputs = module.inputs
    for func in module.funcs.values():
        verify_func(func)
        if func.name == PREPARE:
            if func.args:
                raise VerifyError(f"@{PREPARE} reads weights only, but takes {', '.join(func.args)}")
            continue
        for name, arg in func.args.items():
            given = wired.get(name, inputs.get(name))
            if given != arg.type:
                raise VerifyError(f"@{func.name}: argument %{name} is {arg.type}, but it is wired to {given}")
        wired |= {n: v.type for n, v in func.results.items()}
    _verify_weights(module)


def verify_func(func: Func) -> None:
    """Check one function: definitions before uses, known ops and attributes, inferred types."""
    if len(func.args) != len(func.block.args):
        raise VerifyError(f"@{func.name}: argument names repeat")
    if not func.block.ops or func.block.ops[-1].name != "return":
        raise VerifyError(f"@{func.name}: the last op must be return")
    _verify_block(func.block, set(), f"@{func.name}", "return")


def _verify_block(block: Block, outer: set[Value], where: str, end: str) -> None:
    known = outer | set(block.args)
    for i, op in enumerate(block.ops):
        here = f"{where}, op {i} ({op.name}{' at ' + op.note if op.note else ''})"
        _verify_op(op, known, here)
        last = i == len(block.ops) - 1
        if (op.name in ("return", "yield")) != last or (last and op.name != end):
            raise VerifyError(f"{here}: a body holds one {end}, as its last op")
        for out in op.outputs:
            if out in known:
                raise VerifyError(f"{here}: a value is defined twice")
            if out.op is not op:
                raise VerifyError(f"{here}: a result does not point back to its op")
        known.update(op.outputs)


def _verify_op(op: Op, known: set[Value], here: str) -> None:
    if op.name not in OPS:
        raise VerifyError(f"{here}: unknown op; declare it in ir/ops.py or ir/fused.py")
    for k, v in enumerate(op.inputs):
        if v not in known:
            raise VerifyError(f"{here}: operand {k} (%{v.name or '?'}: {v.type}) is not defined before its use")
    if op.body:
        _verify_block(op.body, known, here, "yield")
    try:
        if OPS[op.name].complete(op.attrs).keys() != op.attrs.keys():
            raise VerifyError(f"{op.name}: attributes are incomplete")
        wanted = infer(op.name, [v.type for v in op.inputs], op.attrs, op.body)
    except VerifyError as e:
        raise VerifyError(f"{here}: {e}") from None
    found = [v.type for v in op.outputs]
    if wanted != found:
        raise VerifyError(f"{here}: results are {', '.join(map(str, found))}, inferred {', '.join(map(str, wanted))}")


def _verify_weights(module: Module) -> None:
    types: dict[str, Type] = {}
    made = {n: v.type for n, v in module.funcs[PREPARE].results.items()} if PREPARE in module.funcs else {}
    for func in module.funcs.values():
        for op in func.block.walk():
            if op.name != "weight":
                continue
            key, t = op.attrs["key"], op.attrs["type"]
            wanted = made.get(key) if func.name != PREPARE else None
            if (wanted or types.setdefault(key, t)) != t:
                raise VerifyError(f"@{func.name}: weight {key!r} is read as {t}, elsewhere it is {wanted or types[key]}")
