"""The `torch` target: the source of an `nn.Module` with one method for each stage.

A rule per op gives one expression. The source is what runs: it needs torch, a dictionary of weights,
and nothing of this package.
"""

from __future__ import annotations

import inspect
import linecache
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cortexflow.codegen import torch_kernels
from cortexflow.codegen.target import Target
from cortexflow.errors import TargetError
from cortexflow.ir.core import Block, Func, Module, Op, Value, uses
from cortexflow.ir.dtypes import TORCH_DTYPES

Rule = Callable[..., str]

CLAIMS = frozenset({"fused.linear", "fused.attention_segments"})
_KEEP_BYTES = 1 << 16  # smaller values are left to the end of the method

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "eq": "==", "and": "&", "or": "|"}
_CALLS = {"pow": "torch.pow", "max": "torch.maximum", "min": "torch.minimum", "where": "torch.where"}
_UNARY = {n: f"torch.{n}" for n in ("exp", "log", "sqrt", "rsqrt", "sin", "cos", "abs", "floor")}
_ACTIVATIONS = {
    "gelu": "F.gelu({})",
    "gelu_tanh": 'F.gelu({}, approximate="tanh")',
    "silu": "F.silu({})",
    "relu": "F.relu({})",
    "sigmoid": "torch.sigmoid({})",
    "tanh": "torch.tanh({})",
}


def _dtype(name: str) -> str:
    return str(TORCH_DTYPES[name])


def _reduction(fn: str) -> Rule:
    def rule(op: Op, x: str) -> str:
        t = op.inputs[0].type
        x = f"{x}.float()" if t.dtype in ("bf16", "f16") else x
        back = f".to({_dtype(t.dtype)})" if t.dtype != "f32" else ""
        return f"torch.{fn}({x}, dim={op.attrs['axes']!r}, keepdim={op.attrs['keepdims']}){back}"

    return rule


def _const(op: Op) -> str:
    value, dtype, shape = op.attrs["value"], _dtype(op.attrs["dtype"]), op.attrs["shape"]
    text = repr(value).replace("inf", "math.inf").replace("nan", "math.nan")
    made = f"torch.tensor({text}, dtype={dtype}, device=self.device)"
    return f"{made}.reshape({shape!r})" if len(shape) > 1 else made


def _slice(op: Op, x: str) -> str:
    a, rank = op.attrs, len(op.out.type.shape)
    axis = a["axis"] % rank
    part = f"{a['start'] or ''}:{'' if a['stop'] is None else a['stop']}" + (f":{a['step']}" if a["step"] != 1 else "")
    lead = ["..."] if axis == rank - 1 and rank > 1 else [":"] * axis
    return f"{x}[{', '.join([*lead, part])}]"


def _gather(op: Op, table: str, index: str) -> str:
    axis, rank = op.attrs["axis"] % len(op.inputs[0].type.shape), len(op.inputs[1].type.shape)
    if rank == 0:
        return f"{table}[{index}]" if axis == 0 else f"{table}.select({axis}, int({index}))"
    if axis == 0:
        return f"F.embedding({index}, {table})" if len(op.inputs[0].type.shape) == 2 else f"{table}[{index}]"
    return f"{table}[{', '.join([':'] * axis + [index])}]"


def _conv2d(op: Op, x: str, w: str, bias: str = "None") -> str:
    a = op.attrs
    pads = (*a["padding"][1], *a["padding"][0])
    x = f"F.pad({x}, {pads!r})" if any(pads) else x
    return f"F.conv2d({x}, {w}, {bias}, stride={a['stride']}, dilation={a['dilation']}, groups={a['groups']})"


def _attention(op: Op, q: str, k: str, v: str, *extra: str) -> str:
    given = dict(zip(("mask" if e.type.dtype == "bool" else "bias" for e in op.inputs[3:]), extra, strict=True))
    mask, bias = given.get("mask", "None"), given.get("bias", "None")
    return f"attention({q}, {k}, {v}, {mask}, {bias}, {op.attrs['scale']!r}, {op.attrs['causal']})"


def _matmul(op: Op, x: str, w: str) -> str:
    if op.out.type.dtype == op.inputs[0].type.dtype:
        return f"{x} @ {w}"
    return f"(wide({x}) @ wide({w})).to({_dtype(op.out.type.dtype)})"


def _layer_norm(op: Op, x: str, scale: str = "None", shift: str = "None") -> str:
    t = op.inputs[0].type
    eps = repr(op.attrs["eps"])
    if t.dtype in ("f32", "f64"):
        return f"F.layer_norm({x}, {t.shape[-1:]!r}, {scale}, {shift}, {eps})"
    affine = [f"{p}.float()" if p != "None" else p for p in (scale, shift)]
    return f"F.layer_norm({x}.float(), {t.shape[-1:]!r}, {', '.join(affine)}, {eps}).to({_dtype(t.dtype)})"


def _softmax(op: Op, x: str) -> str:
    t = op.out.type.dtype
    if t in ("f32", "f64"):
        return f"torch.softmax({x}, {op.attrs['axis']})"
    return f"torch.softmax({x}.float(), {op.attrs['axis']}).to({_dtype(t)})"


def _linear(op: Op, x: str, w: str, b: str) -> str:
    """`w` is [in, out], contiguous: its transpose costs nothing."""
    plain = op.inputs[1].type.shape[1:] == op.inputs[2].type.shape and len(op.inputs[1].type.shape) == 2
    return f"F.linear({x}, {w}.t(), {b})" if plain else f"{x} @ {w} + {b}"


def _pad(op: Op, x: str) -> str:
    pads = [n for pair in reversed(op.attrs["pads"]) for n in pair]
    return f"F.pad({x}, {pads!r}, value={op.attrs['value']!r})"


RULES: dict[str, Rule] = {
    **{name: lambda op, a, b, sign=sign: f"{a} {sign} {b}" for name, sign in _INFIX.items()},
    **{name: lambda op, *xs, fn=fn: f"{fn}({', '.join(xs)})" for name, fn in (_CALLS | _UNARY).items()},
    "neg": lambda op, x: f"-{x}",
    "not": lambda op, x: f"~{x}",
    "act": lambda op, x: _ACTIVATIONS[op.attrs["kind"]].format(x),
    "cast": lambda op, x: f"{x}.to({_dtype(op.attrs['dtype'])})",
    "const": _const,
    "iota": lambda op: f"torch.arange({op.attrs['size']}, dtype={_dtype(op.attrs['dtype'])}, device=self.device)",
    "reshape": lambda op, x: f"{x}.reshape({op.attrs['shape']!r})",
    "transpose": lambda op, x: f"{x}.permute({op.attrs['perm']!r})",
    "broadcast_to": lambda op, x: f"{x}.expand({op.attrs['shape']!r})",
    "concat": lambda op, *xs: f"torch.cat(({', '.join(xs)},), dim={op.attrs['axis']})",
    "slice": _slice,
    "pad": _pad,
    "gather": _gather,
    "cache_update": lambda op, c, n, i: f"cache_update({c}, {n}, {i}, {op.attrs['axis']})",
    "reduce_sum": _reduction("sum"),
    "reduce_mean": _reduction("mean"),
    "reduce_max": _reduction("amax"),
    "argmax": lambda op, x: f"{x}.argmax({op.attrs['axis']}, keepdim={op.attrs['keepdims']}).to(torch.int32)",
    "cumsum": lambda op, x: f"{x}.cumsum({op.attrs['axis']}, dtype={_dtype(op.out.type.dtype)})",
    "matmul": _matmul,
    "softmax": _softmax,
    "rms_norm": lambda op, x, g="None": f"rms_norm({x}, {g}, {op.attrs['eps']!r})",
    "layer_norm": _layer_norm,
    "rope": lambda op, x, c, s: f"rope({x}, {c}, {s})",
    "attention": _attention,
    "conv2d": _conv2d,
    "relative_position_bias": lambda op, t, q, k: (
        f"relative_position_bias({t}, {q}, {k}, {op.attrs['bidirectional']}, {op.attrs['max_distance']})"
    ),
    "fused.linear": _linear,
    "fused.attention_segments": lambda op, *xs: (
        f"attention_segments({', '.join(xs)}, {op.attrs['scale']!r}, {op.attrs['causal']})"
    ),
}


# ---- the source -----------------------------------------------------------------------------------

_HEAD = '''"""{title}

Generated; it needs torch alone. `Policy(weights)` takes a tensor for each key of WEIGHTS.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

'''


def emit_source(module: Module) -> str:
    """The source of a module: weights table, the functions it needs, `Policy` with a method for each stage."""
    keys = list(module.weight_types())
    buffers = {key: f"w{i}" for i, key in enumerate(keys)}
    methods = [_Method(stage, buffers).text() for stage in module.stages]
    body = "\n\n".join([*methods, _forward(module)])
    family = module.meta.get("family")
    title = f"{family or 'A module'}: " + ", ".join(
        f"{k}={v}" for k, v in module.meta.items() if k not in ("family", "keep")
    )
    table = "\n".join(f"    {key!r}: {name!r},  # {module.weight_types()[key]}" for key, name in buffers.items())
    return (
        _HEAD.format(title=title.rstrip(": "))
        + f"WEIGHTS = {{\n{table}\n}}\n\n\n"
        + _used_functions(body)
        + _CLASS
        + body
        + "\n"
    )


_CLASS = '''class Policy(nn.Module):
    """One method for each stage, and `forward` through all of them."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for key, name in WEIGHTS.items():
            self.register_buffer(name, weights[key])
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.anchor.device

'''


def _used_functions(body: str) -> str:
    """The text of the functions that the source calls, callees first."""
    known = {n: f for n, f in vars(torch_kernels).items() if inspect.isfunction(f)}
    texts = {n: inspect.getsource(f) for n, f in known.items()}
    wanted = {n for n in known if re.search(rf"\b{n}\(", body)}
    wanted |= {n for n in known for w in set(wanted) if n != w and re.search(rf"\b{n}\(", texts[w])}
    return "".join(f"{texts[n]}\n\n" for n in known if n in wanted)


def _forward(module: Module) -> str:
    lines = [f"    def forward(self, {', '.join(f'{n}: Tensor' for n in module.inputs)}) -> dict[str, Tensor]:"]
    for stage in module.stages:
        results = ", ".join(map(_identifier, stage.results))
        lines.append(
            f"        {results}{',' if len(stage.results) == 1 else ''} = self.{stage.name}({', '.join(map(_identifier, stage.args))})"
        )
    outputs = ", ".join(f"{n!r}: {_identifier(n)}" for n in module.outputs)
    return "\n".join([*lines, f"        return {{{outputs}}}"])


def _identifier(name: str) -> str:
    """A Python name for a value's or a result's name."""
    clean = re.sub(r"\W", "_", name)
    return f"_{clean}" if not clean or clean[0].isdigit() else clean


class _Method:
    """One stage as a method: names for values, lines of code, and when a value may go."""

    def __init__(self, func: Func, buffers: Mapping[str, str]) -> None:
        self.func, self.buffers = func, buffers
        self.names: dict[Value, str] = {}
        self.taken: set[str] = {"self"}
        self.lines: list[str] = []
        self.left = uses(func.block)

    def text(self) -> str:
        """The method's source."""
        args = [f"{self.name(a)}: Tensor" for a in self.func.block.args]
        self.block(self.func.block, "        ", set(self.func.block.args), [])
        head = f"    def {self.func.name}(self, {', '.join(args)}) -> tuple[Tensor, ...]:"
        return "\n".join([head, *self.lines])

    def name(self, v: Value) -> str:
        """The value's own name where it is free, else a number."""
        if v not in self.names:
            stem = name = _identifier(v.name) if v.name else f"t{len(self.names)}"
            n = 1
            while name in self.taken:
                n += 1
                name = f"{stem}_{n}"
            self.taken.add(name)
            self.names[v] = name
        return self.names[v]

    def block(self, block: Block, indent: str, own: set[Value], carried: list[str]) -> None:
        """Emit the ops of a body. `own` are the values that this body may let go."""
        for op in block.ops:
            if _is_scalar(op):
                continue  # written where it is read
            if op.name == "weight":
                self.names[op.out] = f"self.{self.buffers[op.attrs['key']]}"
            elif op.name == "return":
                self.lines.append(f"{indent}return {', '.join(self.operand(v, op) for v in op.inputs)},")
            elif op.name == "yield":
                self.end_of_step(op, indent, carried)
            elif op.name == "loop":
                self.loop(op, indent)
                own.update(op.outputs)
                self.let_go(op, own, indent)
            else:
                self.statement(op, indent)
                own.update(op.outputs)
                self.let_go(op, own, indent)

    def statement(self, op: Op, indent: str) -> None:
        """One op, one line."""
        rule = RULES.get(op.name)
        if rule is None:
            raise TargetError(f"target 'torch' has no rule for op {op.name!r}{f' at {op.note}' if op.note else ''}")
        expression = rule(op, *[self.operand(v, op) for v in op.inputs])
        self.lines.append(f"{indent}{self.name(op.out)} = {expression}  # {op.out.type}  {op.note}".rstrip())

    def operand(self, v: Value, reader: Op) -> str:
        """How an operand is written: by name, a scalar constant as a number where Python's arithmetic allows it."""
        if v.op is None or not _is_scalar(v.op):
            return self.name(v)
        others = [i for i in reader.inputs if i is not v]
        plain = reader.name in _INFIX and others and not any(o.op and _is_scalar(o.op) for o in others)
        if plain and v.type.dtype in ("f32", "i32") and math.isfinite(v.op.attrs["value"]):
            return f"({v.op.attrs['value']!r})" if v.op.attrs["value"] < 0 else repr(v.op.attrs["value"])
        return _const(v.op)

    def loop(self, op: Op, indent: str) -> None:
        """A counted loop that reassigns its carried names."""
        assert op.body is not None
        step, *args = op.body.args
        carried = [self.name(a) for a in args]
        if carried:
            init = ", ".join(self.operand(v, op) for v in op.inputs)
            self.lines.append(f"{indent}{', '.join(carried)} = {init}")
        counter = f"{self.name(step)}_number"
        self.lines.append(f"{indent}for {counter} in range({op.attrs['trips']}):  # {op.note}".rstrip(" #"))
        inner = indent + "    "
        if all(o.name in ("gather", "cache_update") and o.inputs[-1] is step for o in _readers_of(step, op.body)):
            self.names[step] = counter
        else:
            self.lines.append(
                f"{inner}{self.name(step)} = torch.tensor({counter}, dtype=torch.int32, device=self.device)"
            )
        self.block(op.body, inner, set(), carried)
        for out, name in zip(op.outputs, carried, strict=True):
            self.names[out] = name

    def end_of_step(self, op: Op, indent: str, carried: list[str]) -> None:
        """Hand the yielded values to the next step, and stop where the body says so."""
        names = [self.operand(v, op) for v in op.inputs]
        stop = names.pop(0) if len(names) > len(carried) else None
        if carried:
            self.lines.append(f"{indent}{', '.join(carried)} = {', '.join(names)}")
        if stop:
            self.lines += [f"{indent}if bool({stop}):", f"{indent}    break"]
        if not carried and not stop:
            self.lines.append(f"{indent}pass")

    def let_go(self, op: Op, own: set[Value], indent: str) -> None:
        """Delete the large values that this op was the last to read."""
        reads = Counter(op.inputs)
        if op.body:
            reads += uses(op.body)
        self.left.subtract(reads)
        kept = {self.names.get(o) for o in op.outputs}
        large = [v for v in reads if v in own and self.left[v] <= 0 and v.type.nbytes >= _KEEP_BYTES]
        gone = [v for v in large if self.names[v] not in kept]
        if gone:
            self.lines.append(f"{indent}del {', '.join(self.names[v] for v in gone)}")


def _is_scalar(op: Op) -> bool:
    return op.name == "const" and op.attrs["shape"] == ()


def _readers_of(v: Value, block: Block) -> list[Op]:
    return [op for op in block.walk() if v in op.inputs]


# ---- running --------------------------------------------------------------------------------------


class TorchExecutable:
    """The generated module with its weights on a device."""

    def __init__(self, module: Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self._stages = {s.name: (list(s.args), list(s.results)) for s in module.stages}
        self._outputs = list(module.outputs)
        self._device = device
        self._text = emit_source(module)
        self.policy = load_source(self._text, weights).to(device)

    def run_stage(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one stage on named inputs."""
        args, results = self._stages[name]
        with torch.inference_mode():
            values = getattr(self.policy, name)(*[inputs[n].to(self._device) for n in args])
        return dict(zip(results, values, strict=True))

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run all stages."""
        values = dict(inputs)
        for name in self._stages:
            values |= self.run_stage(name, values)
        return {n: values[n] for n in self._outputs}

    def source(self) -> str:
        """The generated source."""
        return self._text


def load_source(text: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """The module that generated source defines; tracebacks show its lines."""
    name = f"<cortexflow torch {abs(hash(text)):x}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"__name__": name}
    exec(compile(text, name, "exec"), scope)
    policy: nn.Module = scope["Policy"](dict(weights))
    return policy.eval()


def build(module: Module, weights: Mapping[str, Tensor], device: torch.device) -> TorchExecutable:
    """Build a legalised module for a device that PyTorch has."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TargetError("target 'torch' on device 'cuda': PyTorch finds no CUDA GPU here; use device='cpu'")
    return TorchExecutable(module, weights, device)


TARGET = Target("torch", CLAIMS, build)
