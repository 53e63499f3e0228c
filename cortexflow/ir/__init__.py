"""The intermediate representation: one typed SSA form, its ops, text form, verifier and interpreter."""

from cortexflow.ir import fused, ops
from cortexflow.ir.builder import OPS, Cost, OpDef, building, function, named, returns, scope
from cortexflow.ir.core import PREPARE, Block, Func, Module, Op, Type, Value, clone, readers, uses
from cortexflow.ir.interpreter import run, run_module
from cortexflow.ir.text import dump, parse
from cortexflow.ir.verifier import verify

__all__ = [
    "OPS",
    "PREPARE",
    "Block",
    "Cost",
    "Func",
    "Module",
    "Op",
    "OpDef",
    "Type",
    "Value",
    "building",
    "clone",
    "dump",
    "function",
    "fused",
    "named",
    "ops",
    "parse",
    "readers",
    "returns",
    "run",
    "run_module",
    "scope",
    "uses",
    "verify",
]
