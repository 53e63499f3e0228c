"""Writes functions of the IR as one ONNX graph.

A node is placed in the outermost graph that knows its operands: what a loop's body computes from
outer values alone is computed once, before the loop. Equal nodes are written once. What follows
from constants alone is computed here, by the ops' own evaluation rules. Weights stay where they
are: the graph refers to them by name, and `Model.tensors` holds them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor

from cortexflow.errors import InputError, TargetError
from cortexflow.ir import Block, Func, Module, Op, Type, Value
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.ir.interpreter import evaluate

OPSET, IR_VERSION = 20, 9  # the lowest opset with Gelu; onnxruntime reads it since 1.17
INLINE_BYTES = 1024  # constants up to this size stand in the graph, larger ones beside it
FOLD_ELEMENTS = 1 << 20  # a larger result of constants is computed at run time
ONNX_DTYPES: dict[str, int] = {
    "f64": TensorProto.DOUBLE,
    "f32": TensorProto.FLOAT,
    "bf16": TensorProto.BFLOAT16,
    "f16": TensorProto.FLOAT16,
    "i64": TensorProto.INT64,
    "i32": TensorProto.INT32,
    "u8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}
# The rule of each op: (emitter, op, names of its operands) → the name of its result; a loop's are several.
RULES: dict[str, Callable[..., Any]] = {}
_NAMES = {t: n for n, t in TORCH_DTYPES.items()}
ELSEWHERE = "weights"  # the location written for tensors that are not in the graph


@dataclass
class Model:
    """A graph without its weights, and the tensors that it names."""

    proto: onnx.ModelProto
    tensors: dict[str, Tensor]
    inputs: dict[str, Type]
    outputs: dict[str, tuple[str, Type]]  # the name in the graph differs where an input has it too
    dtypes: set[str]  # those that any value has

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors beside the graph."""
        return sum(t.nbytes for t in self.tensors.values())

    def text(self) -> str:
        """The graph as text; tensors beside it show as name, dtype and shape."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        _forget_infos(proto.graph)
        text = onnx.printer.to_text(proto)
        text = text.replace(f' = ["location": "{ELSEWHERE}"]', "")
        text = re.sub(r'\["([^"\n]*)"\] (?="\1")', "", text)  # a node named as its result
        lines = text.split("\n")
        for i, line in enumerate(lines):
            if line.startswith("   <"):  # the tensors, one a line
                lines[i] = re.sub(r", (?=[a-z]+\d*(?:\[[\d,]*\])? [\w\"])", ",\n    ", line)
        return "\n".join(lines)


@dataclass
class _Scope:
    """The main graph, or the body of a loop, under construction."""

    nodes: list[NodeProto] = field(default_factory=list)
    infos: list[onnx.ValueInfoProto] = field(default_factory=list)


class Emitter:
    """The graph under construction. Rules call `node`, `constant`, `ints` and the other small helpers."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.tensors: dict[str, Tensor] = {}
        self.initializers: list[TensorProto] = []
        self.scopes = [_Scope()]
        self.env: dict[Value, str] = {}
        self.known: dict[Value, Tensor] = {}  # values that follow from constants; written when a node reads them
        self.labels: dict[Value, str] = {}  # the names that results must have
        self.note = ""
        self.read: set[str] = set()
        self._taken: dict[str, int] = {}
        self._depth: dict[str, int] = {}  # of names made inside loops; all others are known everywhere
        self._memo: dict[Any, list[str]] = {}
        self._last: tuple[NodeProto, list[str]] | None = None

    # ---- what rules use

    def node(self, kind: str, *inputs: str, **attrs: Any) -> str:
        """Add a node with one result and return the result's name."""
        return self.nodes(kind, inputs, 1, **attrs)[0]

    def nodes(self, kind: str, inputs: Sequence[str], count: int, here: bool = False, **attrs: Any) -> list[str]:
        """Add a node with some results; `here` keeps it in the innermost graph, and apart from equal ones."""
        key = None if here else (kind, tuple(inputs), count, tuple(sorted((k, str(v)) for k, v in attrs.items())))
        if key is not None and key in self._memo:
            return self._memo[key]
        depth = len(self.scopes) - 1 if here else max((self._depth.get(i, 0) for i in inputs), default=0)
        name = self.fresh(f"{self.note}/{kind}" if self.note else kind)
        outputs = [name] if count == 1 else [self.fresh(f"{name}.{i}") for i in range(count)]
        node = helper.make_node(kind, list(inputs), outputs, name=name, **attrs)
        self.scopes[depth].nodes.append(node)
        self.read.update(inputs)
        self._depth.update((o, depth) for o in outputs if depth)
        self._last = (node, outputs)
        if key is not None:
            self._memo[key] = outputs
        return outputs

    def constant(self, value: Tensor) -> str:
        """A constant tensor; equal small ones are one."""
        value = value.detach().cpu().contiguous()
        small = value.nbytes <= INLINE_BYTES
        key = ("constant", value.dtype, tuple(value.shape), raw_bytes(value).tobytes()) if small else None
        if key in self._memo:
            return self._memo[key][0]
        name = self.fresh("const")
        self._initializer(name, value, small)
        if key is not None:
            self._memo[key] = [name]
        return name

    def ints(self, values: Sequence[int]) -> str:
        """A vector of i64: a shape, axes or bounds."""
        return self.constant(torch.tensor(list(values), dtype=torch.int64))

    def scalar(self, value: float, dtype: str) -> str:
        """A scalar constant."""
        return self.constant(torch.tensor(value, dtype=TORCH_DTYPES[dtype]))

    def cast(self, x: str, source: str, target: str) -> str:
        """x in another dtype."""
        return x if source == target else self.node("Cast", x, to=ONNX_DTYPES[target])

    def reshape(self, x: str, *shape: int) -> str:
        """x in another shape."""
        return self.node("Reshape", x, self.ints(shape), **({"allowzero": 1} if 0 in shape else {}))

    def transpose(self, x: str, *perm: int) -> str:
        """x with permuted axes."""
        return x if list(perm) == sorted(perm) else self.node("Transpose", x, perm=list(perm))

    def weight(self, key: str, type: Type) -> str:
        """A weight, by its key."""
        if ("weight", key) not in self._memo:
            if key not in self.weights:
                raise InputError(f"weight {key!r} ({type}) is not among the {len(self.weights)} weights given")
            name = self.fresh(key)
            self._memo["weight", key] = [name]
            self._initializer(name, self.weights[key], False)
        return self._memo["weight", key][0]

    # ---- names and values

    def fresh(self, base: str) -> str:
        """A name that nothing else has."""
        name = base
        while name in self._taken:
            name = f"{base}_{self._taken[base]}"
            self._taken[base] += 1
        self._taken[name] = 1
        return name

    def ref(self, value: Value) -> str:
        """The name under which nodes read a value. Constants and weights are written when this asks for them."""
        if value not in self.env:
            if value.op is not None and value.op.name == "weight":
                self.env[value] = self.weight(**value.op.attrs)
            else:
                self.env[value] = self.constant(self.known[value])
        return self.env[value]

    def argument(self, name: str, t: Type) -> onnx.ValueInfoProto:
        """An argument of the loop body under construction."""
        name = self.fresh(name)
        self._depth[name] = len(self.scopes) - 1
        return _info(name, t)

    def end(self, results: Sequence[str], names: Sequence[str]) -> list[str]:
        """Make each result a different tensor of the innermost graph, under the name wanted for it."""
        final: list[str] = []
        produced = {o for n in self.scopes[-1].nodes for o in n.output}
        for result, name in zip(results, names, strict=True):
            if result not in produced or result in final or (name and result != name):
                (result,) = self.nodes("Identity", [result], 1, here=True)
                if name:
                    self._rename(result, name)
                    result = name
            final.append(result)
        return final

    def _rename(self, old: str, new: str) -> None:
        """Rename a result of the last node; no other node may have read it."""
        assert self._last is not None
        node, outputs = self._last
        at = outputs.index(old)
        node.output[at] = outputs[at] = new
        if old in self._depth:
            self._depth[new] = self._depth.pop(old)

    def _initializer(self, name: str, value: Tensor, inline: bool) -> None:
        t = TensorProto(name=name, data_type=ONNX_DTYPES[_NAMES[value.dtype]], dims=value.shape)
        if inline:
            t.raw_data = raw_bytes(value).tobytes()
        else:
            t.data_location = TensorProto.EXTERNAL
            t.external_data.add(key="location", value=ELSEWHERE)
            self.tensors[name] = value
        self.initializers.append(t)

    # ---- blocks

    def block(self, block: Block) -> list[Value]:
        """Write the ops of a block; returns the operands of its last op."""
        for op in block.ops[:-1]:
            self._op(op)
        return block.ops[-1].inputs

    def _op(self, op: Op) -> None:
        rule = RULES.get(op.name)
        if rule is None:
            at = f" at {op.note}" if op.note else ""
            raise TargetError(f"target 'onnx' has no rule for op {op.name!r}{at}; legalize it or add one to its RULES")
        if op.name == "weight":
            return  # see `ref`
        if op.name != "loop" and op.out.type.size <= FOLD_ELEMENTS:
            constants = [self.known[v] for v in op.inputs if v in self.known]
            if len(constants) == len(op.inputs):
                self.known[op.out] = evaluate(op, constants)
                return
        self.note, self._last = op.note, None
        made = rule(self, op, *map(self.ref, op.inputs))
        if op.name == "loop":
            self.env.update(zip(op.outputs, made, strict=True))
        else:
            self.env[op.out] = self._labelled(made, op.out)

    def _labelled(self, made: str, value: Value) -> str:
        """Give a result its own name, where a node was made for it, and declare its type."""
        if self._last is None or self._last[1] != [made]:
            return made
        label = self.labels.get(value)
        if label or value.name:
            self._rename(made, made := label or self.fresh(value.name))
        if not label:  # the results of the graph are declared as such
            self.scopes[self._depth.get(made, 0)].infos.append(_info(made, value.type))
        return made

    def loop(self, op: Op, init: Sequence[str]) -> list[str]:
        """Write a loop as one `Loop` whose body reads outer values by name."""
        assert op.body is not None
        note, body = self.note, op.body
        self.scopes.append(_Scope())
        step, go = self.argument("step", Type("i64", ())), self.argument("go", Type("bool", ()))
        carried = [self.argument(a.name or "carried", a.type) for a in body.args[1:]]
        if any(body.args[0] in o.inputs for o in body.walk()):
            self.env[body.args[0]] = self.cast(step.name, "i64", "i32")
        self.env.update(zip(body.args[1:], (c.name for c in carried), strict=True))
        yielded = [self.ref(v) for v in self.block(body)]
        self.note = note
        if op.attrs["early_stop"]:
            stop, *yielded = yielded
            go_on = self.nodes("Not", [stop], 1, here=True)[0]
        else:
            go_on = go.name
        names = self.end([go_on, *yielded], [""] * (1 + len(yielded)))
        results = [_info(n, t) for n, t in zip(names, (Type("bool", ()), *(v.type for v in op.outputs)), strict=True)]
        scope = self.scopes.pop()
        infos = [i for i in scope.infos if i.name not in names]
        graph = helper.make_graph(scope.nodes, self.fresh("body"), [step, go, *carried], results, value_info=infos)
        trips, true = self.scalar(op.attrs["trips"], "i64"), self.scalar(True, "bool")
        outputs = self.nodes("Loop", [trips, true, *init], len(op.outputs), here=True, body=graph)
        for i, v in enumerate(op.outputs):
            if label := self.labels.get(v):
                self._rename(outputs[i], label)
        return outputs


def export(module: Module, stages: Sequence[Func], weights: Mapping[str, Tensor]) -> Model:
    """Some stages of a module as one model. Its results are the module's, or those of a single stage."""
    part = Module({s.name: s for s in stages}, {}, module.meta)
    g = Emitter(weights)
    for name in part.inputs:
        g.fresh(name)
    outputs = {n: (g.fresh(n), t) for n, t in part.outputs.items()}
    wired = {n: n for n in part.inputs}
    last = {n: v for s in stages for n, v in s.results.items() if n in outputs}
    g.labels = {v: outputs[n][0] for n, v in reversed(last.items())}  # the first of a value's names
    for stage in stages:
        g.env.update((arg, wired[n]) for n, arg in stage.args.items())
        g.block(stage.block)
        wired |= {n: g.ref(v) for n, v in stage.results.items()}
    g.note = ""
    g.end([wired[n] for n in outputs], [name for name, _ in outputs.values()])
    main = g.scopes[0]
    graph = helper.make_graph(
        main.nodes,
        stages[0].name if len(stages) == 1 else "policy",
        [_info(n, t) for n, t in part.inputs.items()],
        [_info(n, t) for n, t in outputs.values()],
        [t for t in g.initializers if t.name in g.read],
        value_info=main.infos,
    )
    proto = helper.make_model(
        graph, producer_name="cortexflow", ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
    )
    facts = {"producer": "cortexflow", "stages": " ".join(s.name for s in stages)}
    helper.set_model_props(proto, facts | {str(k): str(v) for k, v in module.meta.items()})
    tensors = {n: t for n, t in g.tensors.items() if n in g.read}
    values = [v for s in stages for block in s.block.blocks() for op in block.ops for v in op.outputs]
    return Model(proto, tensors, part.inputs, outputs, {v.type.dtype for v in values})


def raw_bytes(t: Tensor) -> Any:
    """The bytes of a contiguous host tensor, as a numpy array that shares them."""
    return t.reshape(-1).view(torch.uint8).numpy()


def _forget_infos(graph: onnx.GraphProto) -> None:
    del graph.value_info[:]
    for node in graph.node:
        for a in node.attribute:
            if a.type == onnx.AttributeProto.GRAPH:
                _forget_infos(a.g)


def _info(name: str, t: Type) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ONNX_DTYPES[t.dtype], t.shape)
