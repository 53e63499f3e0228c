"""The `triton` target: a launch plan over one arena, captured as one CUDA graph.

The source names every buffer with its offset, then one method a stage: a line a launch. Products with
few rows stream their weights through kernels that overlap (`kernels/triton/skinny.py`), large ones go to
cuBLAS with an epilogue kernel behind; ops off the hot path are copied from the torch target's rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cortexflow.codegen.target import Target
from cortexflow.codegen.torch import RULES as TORCH_RULES
from cortexflow.errors import InputError, TargetError
from cortexflow.ir.core import Block, Func, Module, Op, Value
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.passes.plan_buffers import Plan, plan_buffers

FEW_ROWS = 16  # products with at most so many rows stream their weights
SCRATCH = 1 << 22  # float32 entries for the parts of split products and split keys
COUNTERS = 8192  # one for each tile of a split
_TENSOR_CORES = ("bf16", "f16")


# ---- what the kernels can run ----------------------------------------------------------------------


def _power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _rows(v: Value) -> int:
    return prod(v.type.shape[:-1])


def _few(op: Op, x: int, w: int) -> bool:
    """Whether a product suits the streaming kernel: few rows, a plain matrix, extents that divide."""
    xt, wt = op.inputs[x].type, op.inputs[w].type
    plain = len(wt.shape) == 2 and xt.dtype in _TENSOR_CORES and op.out.type.dtype == xt.dtype
    return (
        plain and _rows(op.inputs[x]) <= FEW_ROWS and _power_of_two(wt.shape[0]) and 256 <= wt.shape[0] <= 4096
    ) and wt.shape[1] % 64 == 0


def _row_vector(v: Value, width: int) -> bool:
    return v.type.size == width


_SKINNY: Mapping[str, Callable[[Op], bool]] = {
    "fused.norm_matmul": lambda o: _few(o, 0, 1),
    "fused.norm_glu": lambda o: _few(o, 0, 1),
    "fused.modulated_norm_matmul": lambda o: _few(o, 0, 3) and _modulated(o),
    "fused.modulated_norm_glu": lambda o: _few(o, 0, 3) and _modulated(o),
}


def _modulated(op: Op) -> bool:
    width = op.inputs[0].type.shape[-1]
    return _row_vector(op.inputs[1], width) and _row_vector(op.inputs[2], width)


def _decode(op: Op) -> bool:
    """Whether attention over a cache suits the decoding kernel."""
    q, k0, cosine, mask = (op.inputs[i].type for i in (0, 1, 5, 7))
    b, m, _, d = q.shape
    fits = b == 1 and m <= FEW_ROWS and k0.shape[2] == 1 and _power_of_two(d) and d >= 64
    return fits and q.dtype in _TENSOR_CORES and not op.attrs["causal"] and mask.shape[0] == 1 and cosine.shape[0] == 1


def _plain_bias(op: Op) -> bool:
    return len(op.inputs[1].type.shape) == 2 and op.inputs[-1].type.shape == op.inputs[1].type.shape[1:]


def _residual_bias(op: Op) -> bool:
    return len(op.inputs[2].type.shape) == 2 and op.inputs[3].type.shape == op.inputs[2].type.shape[1:]


CLAIMS: Mapping[str, Callable[[Op], bool]] = {
    **_SKINNY,
    "fused.rotated_attention_segments": _decode,
    "fused.modulated_norm": lambda o: _modulated(o) and o.inputs[0].type.shape[-1] <= 8192,
    "fused.glu": lambda o: True,
    "fused.linear": _plain_bias,
    "fused.linear_act": _plain_bias,
    "fused.linear_residual": _residual_bias,
    "fused.matmul_residual": lambda o: len(o.inputs[2].type.shape) == 2,
    "fused.matmul_gated_residual": lambda o: (
        len(o.inputs[2].type.shape) == 2 and _row_vector(o.inputs[3], o.out.type.shape[-1])
    ),
}


def claims(op: Op) -> bool:
    """Whether this target runs a fused op as it is."""
    return op.name in CLAIMS and CLAIMS[op.name](op)


# ---- rules: an op as one or more launches -----------------------------------------------------------

Rule = Callable[["_Stage", Op, str], list[str]]


def _flat(stage: _Stage, v: Value) -> str:
    return f"flat({stage.name(v)})"


def _skinny(stage: _Stage, op: Op, out: str) -> list[str]:
    roles = {
        "fused.norm_matmul": ("x", "w"),
        "fused.norm_glu": ("x", "w"),
        "fused.modulated_norm_matmul": ("x", "scale", "shift", "w"),
        "fused.modulated_norm_glu": ("x", "scale", "shift", "w"),
        "fused.matmul_residual": ("r", "x", "w"),
        "fused.matmul_gated_residual": ("r", "x", "w", "gate"),
    }[op.name]
    given = dict(zip(roles, op.inputs, strict=True))
    parts = [_flat(stage, given["x"]), stage.transposed(given["w"]), f"rows({out})"]
    parts += [f"{k}={stage.name(given[k])}.view(-1)" for k in ("gate", "scale", "shift") if k in given]
    if "r" in given:
        parts.append(f"residual={_flat(stage, given['r'])}")
    if "eps" in op.attrs:
        parts.append(f"eps={op.attrs['eps']!r}")
    if op.name.endswith("glu"):
        parts.append(f"glu=True, act={op.attrs['kind']!r}")
    n, k = given["w"].type.shape[1], given["w"].type.shape[0]
    parts.append(f"scratch=self.scratch, config={skinny_config(n, k, op.name.endswith('glu'))}")
    return [f"skinny({', '.join(parts)})"]


def skinny_config(n: int, k: int, glu: bool) -> tuple[int, int, int, int]:
    """(columns of a program, splits of k, slices of k, warps), as measured on Hopper; see benchmarks/."""
    if glu:
        return (32, 1, 4, 4) if n % 64 == 0 else (16, 1, 4, 4)
    if n >= 2048:
        return (32, 1, 4, 4)
    return (16, max(1, k // 1024), 4, 4) if k > 2048 else (16, 1, 8, 8)


def _decode_attention(stage: _Stage, op: Op, out: str) -> list[str]:
    q, k0, v0, k1, v1, cosine, sine, mask = (f"{stage.name(v)}[0]" for v in op.inputs)
    config = "(16, 64, 5, 4)"
    return [
        f"decode_attention({q}, {k1}, {v1}, {k0}, {v0}, {cosine}, {sine}, {mask}, {out}[0], "
        f"{op.attrs['scale']!r}, self.scratch, {config})"
    ]


def _attention(stage: _Stage, op: Op, out: str) -> list[str]:
    extra = op.inputs[3:]
    other = op.inputs[2].type.shape[-1] != op.inputs[0].type.shape[-1]  # values wider or narrower than keys
    if op.attrs["causal"] or other or any(e.type.dtype != "bool" for e in extra):
        return stage.copied(op, out)
    mask = f", mask={stage.name(extra[0])}" if extra else ""
    q, k, v = map(stage.name, op.inputs[:3])
    return [f"attention({q}, {k}, {v}, {out}, {op.attrs['scale']!r}{mask})"]


def _product(stage: _Stage, op: Op, out: str) -> list[str]:
    x, w = op.inputs
    if len(w.type.shape) != 2 or op.out.type.dtype != x.type.dtype:
        return stage.copied(op, out)
    return [f"torch.mm({_flat(stage, x)}, {stage.name(w)}, out=rows({out}))"]


def _linear(stage: _Stage, op: Op, out: str) -> list[str]:
    x, w, b = op.inputs
    return [f"torch.addmm({stage.name(b)}, {_flat(stage, x)}, {stage.name(w)}, out=rows({out}))"]


def _linear_act(stage: _Stage, op: Op, out: str) -> list[str]:
    x, w, b = op.inputs
    flat = f"rows({out})"
    return [
        f"torch.mm({_flat(stage, x)}, {stage.name(w)}, out={flat})",
        f"epilogue({flat}, {flat}, bias={stage.name(b)}, act={op.attrs['kind']!r})",
    ]


def _linear_residual(stage: _Stage, op: Op, out: str) -> list[str]:
    r, x, w, b = op.inputs
    flat = f"rows({out})"
    return [
        f"torch.addmm({_flat(stage, r)}, {_flat(stage, x)}, {stage.name(w)}, out={flat})",
        f"epilogue({flat}, {flat}, bias={stage.name(b)})",
    ]


def _matmul_residual(stage: _Stage, op: Op, out: str) -> list[str]:
    if _few(op, 1, 2):
        return _skinny(stage, op, out)
    r, x, w = op.inputs
    return [f"torch.addmm({_flat(stage, r)}, {_flat(stage, x)}, {stage.name(w)}, out=rows({out}))"]


def _matmul_gated_residual(stage: _Stage, op: Op, out: str) -> list[str]:
    if _few(op, 1, 2):
        return _skinny(stage, op, out)
    r, x, w, gate = op.inputs  # the result may stand where the residual stood: the product needs a place of its own
    product = f"torch.mm({_flat(stage, x)}, {stage.name(w)})"
    return [f"epilogue({product}, rows({out}), residual={_flat(stage, r)}, gate={stage.name(gate)}.view(-1))"]


def _act(stage: _Stage, op: Op, out: str) -> list[str]:
    return [f"epilogue({_flat(stage, op.inputs[0])}, rows({out}), act={op.attrs['kind']!r})"]


def _norm(stage: _Stage, op: Op, out: str) -> list[str]:
    params = [f"{n}={stage.name(v)}" for n, v in zip(("scale", "shift"), op.inputs[1:], strict=False)]
    return [f"{op.name}({_flat(stage, op.inputs[0])}, {', '.join([f'rows({out})', repr(op.attrs['eps']), *params])})"]


def _modulated_norm(stage: _Stage, op: Op, out: str) -> list[str]:
    x, scale, shift = op.inputs
    vectors = f"{stage.name(scale)}.view(-1), {stage.name(shift)}.view(-1)"
    return [f"modulated_norm({_flat(stage, x)}, rows({out}), {vectors}, {op.attrs['eps']!r})"]


def _rope(stage: _Stage, op: Op, out: str) -> list[str]:
    x, cosine, sine = op.inputs
    b = x.type.shape[0]
    if len(x.type.shape) != 4 or cosine.type.shape[0] not in (1, b):
        return stage.copied(op, out)
    lines = []
    for i in range(b):
        angles = ", ".join(f"{stage.name(t)}[{i if t.type.shape[0] > 1 else 0}]" for t in (cosine, sine))
        lines.append(f"rope({stage.name(x)}[{i}], {angles}, {out}[{i}])")
    return lines


def _glu(stage: _Stage, op: Op, out: str) -> list[str]:
    return [f"glu({_flat(stage, op.inputs[0])}, rows({out}), {op.attrs['kind']!r})"]


RULES: dict[str, Rule] = {
    **dict.fromkeys(_SKINNY, _skinny),
    "fused.rotated_attention_segments": _decode_attention,
    "fused.modulated_norm": _modulated_norm,
    "fused.glu": _glu,
    "fused.linear": _linear,
    "fused.linear_act": _linear_act,
    "fused.linear_residual": _linear_residual,
    "fused.matmul_residual": _matmul_residual,
    "fused.matmul_gated_residual": _matmul_gated_residual,
    "act": _act,
    "attention": _attention,
    "matmul": _product,
    "rms_norm": _norm,
    "layer_norm": _norm,
    "rope": _rope,
}


# ---- the source -------------------------------------------------------------------------------------

_HEAD = '''"""{title}

Generated. BUFFERS: offset in the arena, dtype, shape, strides. A method runs one stage's launches.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cortexflow.kernels.torch.functions import *
from cortexflow.kernels.triton.decode_attention import decode_attention
from cortexflow.kernels.triton.prefill_attention import attention
from cortexflow.kernels.triton.rows import epilogue, glu, layer_norm, modulated_norm, rms_norm, rope
from cortexflow.kernels.triton.skinny import skinny


def rows(x: Tensor) -> Tensor:
    """A matrix of the last axis' rows, to write to; never a copy."""
    return x.view(-1, x.shape[-1])


def flat(x: Tensor) -> Tensor:
    """The same to read from; a copy where the rows are not evenly spaced."""
    return x.reshape(-1, x.shape[-1])


'''

_CLASS = '''
class Policy:
    """The launches of every stage, over one arena."""

    def __init__(self, weights: dict[str, Tensor], arena: Tensor, scratch: tuple[Tensor, Tensor]) -> None:
        self.device, self.scratch = arena.device, scratch
        for name, (key, transposed) in WEIGHTS.items():
            setattr(self, name, weights[key].t().contiguous() if transposed else weights[key])
        for name, (value, dtype, shape) in CONSTANTS.items():
            setattr(self, name, torch.tensor(value, dtype=dtype, device=self.device).reshape(shape))
        for name, (offset, dtype, shape, strides) in BUFFERS.items():
            typed = arena[offset:].view(dtype) if (arena.numel() - offset) % dtype.itemsize == 0 else None
            setattr(self, name, typed.as_strided(shape, strides))

'''


class _Stage:
    """Names and lines of one stage's method."""

    def __init__(self, program: _Program, func: Func) -> None:
        self.program, self.func = program, func
        self.direct: dict[Value, str] = {}
        self.lines: list[str] = []

    def text(self) -> str:
        """The method's source."""
        self.block(self.func.block, "        ")
        return "\n".join([f"    def {self.func.name}(self) -> None:", *self.lines, "        return None"])

    def name(self, v: Value) -> str:
        """How a value is written."""
        return self.direct.get(v) or self.program.buffer(v)

    def transposed(self, w: Value) -> str:
        """A weight stored [n, k]."""
        assert w.op is not None
        return f"self.{self.program.weight(w.op.attrs['key'], True)}"

    def block(self, block: Block, indent: str) -> None:
        """One line an op, or nothing for a view."""
        for op in block.ops:
            if op.name == "weight":
                self.direct[op.out] = f"self.{self.program.weight(op.attrs['key'], False)}"
            elif op.name == "const":
                self.direct[op.out] = f"self.{self.program.constant(op)}"
            elif op.name == "loop":
                self.loop(op, indent)
            elif op.name not in ("return", "yield"):
                self.launch(op, indent)

    def launch(self, op: Op, indent: str) -> None:
        """Run one op, unless the plan made its result a view or it is a row of a table."""
        self.copies(op, False, indent)
        if op.name == "gather" and op.inputs[1] in self.direct and op.inputs[1] in self.program.steps:
            self.direct[op.out] = f"{self.name(op.inputs[0])}[{self.direct[op.inputs[1]]}]"
            return
        if op.out in self.program.plan.layouts:
            return
        out = self.name(op.out)
        rule = RULES.get(op.name)
        for line in rule(self, op, out) if rule else self.copied(op, out):
            self.lines.append(f"{indent}{line}  # {op.note}".rstrip(" #"))

    def copied(self, op: Op, out: str) -> list[str]:
        """An op off the hot path, by the torch target's rule."""
        if op.name not in TORCH_RULES:
            raise TargetError(f"target 'triton' has no rule for op {op.name!r}{f' at {op.note}' if op.note else ''}")
        return [f"{out}.copy_({TORCH_RULES[op.name](op, *map(self.name, op.inputs))})"]

    def loop(self, op: Op, indent: str) -> None:
        """A counted loop; carried values stay in their buffers."""
        assert op.body is not None
        if op.attrs["early_stop"]:
            raise TargetError("target 'triton' captures one CUDA graph and cannot stop a loop early")
        step = op.body.args[0]
        self.copies(op, False, indent)
        self.program.steps.add(step)
        self.direct[step] = "step"
        self.lines.append(f"{indent}for step in range({op.attrs['trips']}):  # {op.note}".rstrip(" #"))
        others = [o for o in op.body.walk() if step in o.inputs and not (o.name == "gather" and o.inputs[1] is step)]
        if others:
            raise TargetError(f"target 'triton': op {others[0].name!r} reads a loop's step other than as a table's row")
        self.block(op.body, indent + "    ")
        self.copies(op, True, indent + "    ")

    def copies(self, op: Op, each: bool, indent: str) -> None:
        """The plan's copies that belong here."""
        for copy in self.program.plan.copies:
            if copy.op is op and copy.each_iteration == each:
                self.lines.append(f"{indent}{self.program.buffer(copy.target)}.copy_({self.name(copy.source)})")


class _Program:
    """Tables that all stages share: weights, constants, buffers."""

    def __init__(self, module: Module, plan: Plan) -> None:
        self.module, self.plan = module, plan
        self.weights: dict[tuple[str, bool], str] = {}
        self.constants: dict[str, str] = {}
        self.buffers: dict[tuple[int, str, tuple[int, ...], tuple[int, ...]], str] = {}
        self.steps: set[Value] = set()

    def weight(self, key: str, transposed: bool) -> str:
        """The attribute that holds a weight, as it is or transposed."""
        return self.weights.setdefault((key, transposed), f"w{len(self.weights)}{'t' if transposed else ''}")

    def constant(self, op: Op) -> str:
        """The attribute that holds a constant."""
        value, dtype, shape = op.attrs["value"], TORCH_DTYPES[op.attrs["dtype"]], op.attrs["shape"]
        text = re.sub(r"\b(inf|nan)\b", r"math.\1", repr(value))
        return self.constants.setdefault(f"({text}, {dtype}, {shape!r})", f"c{len(self.constants)}")

    def buffer(self, v: Value) -> str:
        """The attribute that is a value's place in the arena."""
        if v not in self.plan.offsets:
            raise TargetError(f"target 'triton': value %{v.name or '?'} ({v.type}) has no place in the arena")
        entry = (self.plan.offsets[v], v.type.dtype, v.type.shape, self.plan.layout(v).strides)
        return f"self.{self.buffers.setdefault(entry, f'b{len(self.buffers)}')}"

    def text(self) -> str:
        """The whole source."""
        methods = "\n\n".join(_Stage(self, stage).text() for stage in self.module.stages)
        title = ", ".join(f"{k}={v}" for k, v in self.module.meta.items() if k != "keep") or "A module"
        weights = "".join(f"    {n!r}: ({k!r}, {t}),\n" for (k, t), n in self.weights.items())
        constants = "".join(f"    {n!r}: {text},\n" for text, n in self.constants.items())
        buffers = "".join(
            f"    {n!r}: ({o}, {TORCH_DTYPES[d]}, {s!r}, {st!r}),\n" for (o, d, s, st), n in self.buffers.items()
        )
        tables = f"WEIGHTS = {{\n{weights}}}\n\nCONSTANTS = {{\n{constants}}}\n\nBUFFERS = {{\n{buffers}}}\n\n"
        return _HEAD.format(title=title) + tables + _CLASS + methods + "\n"


# ---- running ----------------------------------------------------------------------------------------


class TritonExecutable:
    """The launches with weights and arena, replayed as CUDA graphs: one for all stages, others for what is asked."""

    def __init__(self, module: Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self._module, self._device = module, device
        self._plan = plan_buffers(module)
        program = _Program(module, self._plan)
        program.text()  # names every buffer that a launch touches; those of results may be missing yet
        self._places = {v: program.buffer(v).removeprefix("self.") for s in module.stages for v in _wired(s)}
        self._text = program.text()
        scope: dict[str, Any] = {"__name__": "cortexflow_generated"}
        exec(compile(self._text, "<cortexflow triton>", "exec"), scope)
        arena = torch.empty(self._plan.peak, dtype=torch.uint8, device=device)
        parts = torch.empty(SCRATCH, dtype=torch.float32, device=device)
        scratch = (parts, torch.zeros(COUNTERS, dtype=torch.int32, device=device))
        self._policy = scope["Policy"]({k: t.to(device) for k, t in weights.items()}, arena, scratch)
        self._graphs: dict[tuple[str, ...], torch.cuda.CUDAGraph] = {}

    def run_stage(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replay one stage on named inputs."""
        self.replay(inputs, name)
        return {n: self._at(v).clone() for n, v in self._module.funcs[name].results.items()}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replay all stages."""
        self.replay(inputs, *[s.name for s in self._module.stages])
        wired = {n: v for s in self._module.stages for n, v in s.results.items()}
        return {n: self._at(wired[n]).clone() for n in self._module.outputs}

    def replay(self, inputs: Mapping[str, Tensor], *stages: str) -> None:
        """Write the inputs of some stages and replay their graph; the first call captures it."""
        self.write(inputs, *stages)
        if stages not in self._graphs:
            self._graphs[stages] = self._capture(stages)
            self.write(inputs, *stages)  # the plan reuses an input's bytes after its last reader
        self._graphs[stages].replay()

    def write(self, inputs: Mapping[str, Tensor], *stages: str) -> None:
        """Copy the inputs of some stages to their places."""
        made: set[str] = set()
        for stage in map(self._module.funcs.__getitem__, stages):
            for name, arg in stage.args.items():
                if name in made:
                    continue
                if name not in inputs:
                    raise InputError(f"@{stage.name}: missing input {name!r} ({arg.type})")
                self._at(arg).copy_(inputs[name])
                made.add(name)
            made |= set(stage.results)

    def graph(self, *stages: str) -> torch.cuda.CUDAGraph:
        """The captured graph of some stages, for timing; `replay` makes it."""
        return self._graphs[stages]

    def source(self) -> str:
        """The launch plan."""
        return self._text

    def save(self, folder: Path) -> list[Path]:
        """Launch plans run this package's kernels: there is no form that runs alone."""
        raise TargetError("target 'triton' cannot be saved: its plan runs this package's kernels; save target 'torch'")

    def _at(self, v: Value) -> Tensor:
        place: Tensor = getattr(self._policy, self._places[v])
        return place

    def _capture(self, stages: tuple[str, ...]) -> torch.cuda.CUDAGraph:
        """Run once on a side stream, which compiles the kernels, then record every launch."""
        current, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._launch(stages)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._launch(stages)
        return graph

    def _launch(self, stages: tuple[str, ...]) -> None:
        for name in stages:
            getattr(self._policy, name)()


def _wired(stage: Func) -> list[Value]:
    return [*stage.args.values(), *stage.results.values()]


def build(module: Module, weights: Mapping[str, Tensor], device: torch.device) -> TritonExecutable:
    """Build a legalised module for an NVIDIA GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise TargetError(
            f"target 'triton' runs on an NVIDIA GPU, found device {str(device)!r}; "
            "use device='cuda', or target 'torch' or 'onnx'"
        )
    return TritonExecutable(module, weights, device)


TARGET = Target("triton", frozenset(CLAIMS), build, claims, frozenset({"patches"}))
