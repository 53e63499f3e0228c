"""The rules of the IR. One place decides a type; the verifier runs that rule again and compares."""

from __future__ import annotations

import re
from typing import Any

from cortexflow.errors import VerifyError
from cortexflow.ir.builder import OPS, infer
from cortexflow.ir.core import PREPARE, Block, Func, Module, Op, Type, Value

_FUNC_NAME = re.compile(r"[\w.\-]+")
_ARG_NAME = re.compile(r"[^\W\d][\w.\-]*")


def verify(module: Module) -> None:
    """Check every function, the wiring of the stages and the weights. Raises `VerifyError`."""
    defined: set[Value] = set()
    for name, func in module.funcs.items():
        if func.name != name:
            raise VerifyError(f"@{func.name} stands in the module under the name {name!r}")
        _verify_func(func, defined)
    _verify_wiring(module)
    _verify_weights(module)
    if not _printable(module.meta) or not all(isinstance(k, str) and k.isidentifier() for k in module.meta):
        raise VerifyError(f"meta holds plain values under plain names, which print and parse; found {module.meta!r}")


def _verify_wiring(module: Module) -> None:
    wired: dict[str, Type] = {}
    inputs = module.inputs
    for func in module.funcs.values():
        if func.name == PREPARE:
            if func.args:
                raise VerifyError(f"@{PREPARE} reads weights only, but takes {', '.join(func.args)}")
            continue
        for name, arg in func.args.items():
            given = wired.get(name, inputs.get(name))
            if given != arg.type:
                raise VerifyError(f"@{func.name}: argument %{name} is {arg.type}, but it is wired to {given}")
        wired |= {n: v.type for n, v in func.results.items()}


def verify_func(func: Func) -> None:
    """Check one function: definitions before uses, known ops and attributes, inferred types."""
    _verify_func(func, set())


def _verify_func(func: Func, defined: set[Value]) -> None:
    if not _FUNC_NAME.fullmatch(func.name):
        raise VerifyError(f"@{func.name}: a function's name is made of letters, digits, '_', '.' and '-'")
    if bad := [n for n in func.args if not _ARG_NAME.fullmatch(n)]:
        raise VerifyError(f"@{func.name}: {bad[0]!r} does not name an argument; use letters, digits, '_', '.', '-'")
    if len(func.args) != len(func.block.args):
        raise VerifyError(f"@{func.name}: argument names repeat")
    _verify_block(func.block, set(), defined, f"@{func.name}", "return")


def _verify_block(block: Block, outer: set[Value], defined: set[Value], where: str, end: str) -> None:
    """Check a block that may read `outer`; `defined` is every definition so far, wherever it stands."""
    for arg in block.args:
        _define(arg, None, defined, where)
    known = outer | set(block.args)
    if not block.ops or block.ops[-1].name != end:
        raise VerifyError(f"{where}: the last op of the body must be {end}")
    for i, op in enumerate(block.ops):
        here = f"{where}, op {i} ({op.name}{' at ' + op.note if op.note else ''})"
        if op.name in ("return", "yield") and i < len(block.ops) - 1:
            raise VerifyError(f"{here}: a body holds one {end}, as its last op")
        _verify_op(op, known, defined, here)
        for out in op.outputs:
            _define(out, op, defined, here)
        known.update(op.outputs)


def _define(value: Value, op: Op | None, defined: set[Value], here: str) -> None:
    shown = f"%{value.name or '?'}: {value.type}"
    if value in defined:
        raise VerifyError(f"{here}: a value ({shown}) is defined twice")
    if value.op is not op:
        wanted = "does not point back to its op" if op else "is an argument, and yet it points to an op"
        raise VerifyError(f"{here}: a value ({shown}) {wanted}")
    defined.add(value)


def _printable(value: Any) -> bool:
    """Whether the text form can show a value and read it back."""
    if isinstance(value, (tuple, list)):
        return type(value) in (tuple, list) and all(map(_printable, value))
    if isinstance(value, dict):
        return all(map(_printable, (*value, *value.values())))
    return value is None or type(value) in (bool, int, float, str, Type)


def _verify_op(op: Op, known: set[Value], defined: set[Value], here: str) -> None:
    if op.name not in OPS:
        raise VerifyError(f"{here}: unknown op; declare it in ir/ops.py or ir/fused.py")
    for k, v in enumerate(op.inputs):
        if v not in known:
            raise VerifyError(f"{here}: operand {k} (%{v.name or '?'}: {v.type}) is not defined before its use")
    if op.body:
        _verify_block(op.body, known, defined, here, "yield")
    try:
        if OPS[op.name].complete(op.attrs).keys() != op.attrs.keys():
            raise VerifyError(f"{op.name}: attributes are incomplete")
        if bad := [k for k, v in op.attrs.items() if not _printable(v)]:
            raise VerifyError(f"{op.name}: attribute {bad[0]!r} holds no plain value: {op.attrs[bad[0]]!r}")
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
                elsewhere = wanted or types[key]
                raise VerifyError(f"@{func.name}: weight {key!r} is read as {t}, elsewhere it is {elsewhere}")
