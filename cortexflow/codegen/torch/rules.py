"""An op as one PyTorch expression: a rule an op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cortexflow.ir.core import Op
from cortexflow.ir.dtypes import TORCH_DTYPES

Rule = Callable[..., str]

CLAIMS = frozenset({"fused.linear", "fused.attention_segments"})


INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "eq": "==", "and": "&", "or": "|"}
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


def _literal(value: Any) -> str:
    """A number, or a tuple of numbers, as Python writes it."""
    return repr(value).replace("inf", "math.inf").replace("nan", "math.nan")


def constant(op: Op) -> str:
    """A tensor of a constant's values, on the policy's device."""
    value, dtype, shape = op.attrs["value"], _dtype(op.attrs["dtype"]), op.attrs["shape"]
    if shape and len(set(map(repr, value))) == 1:
        return f"torch.full({shape!r}, {_literal(value[0])}, dtype={dtype}, device=self.device)"
    made = f"torch.tensor({_literal(value)}, dtype={dtype}, device=self.device)"
    return f"{made}.reshape({shape!r})" if len(shape) > 1 else made


def _slice(op: Op, x: str) -> str:
    a, rank = op.attrs, len(op.out.type.shape)
    axis = a["axis"] % rank
    part = f"{a['start'] or ''}:{'' if a['stop'] is None else a['stop']}" + (f":{a['step']}" if a["step"] != 1 else "")
    lead = ["..."] if axis == rank - 1 and rank > 1 else [":"] * axis
    return f"{x}[{', '.join([*lead, part])}]"


def _gather(op: Op, table: str, index: str) -> str:
    axis, rank = op.attrs["axis"] % len(op.inputs[0].type.shape), len(op.inputs[1].type.shape)
    index = f"{index}.long()" if op.inputs[1].type.dtype == "u8" else index  # bytes would select as a mask does
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


def _layer_norm(op: Op, x: str, *affine: str) -> str:
    t = op.inputs[0].type
    scale, shift = affine or ("None", "None")
    fn = f"F.layer_norm({x}, {t.shape[-1:]!r}," if _same_wide(op) else f"layer_norm({x},"
    return f"{fn} {scale}, {shift}, {op.attrs['eps']!r})"


def _same_wide(op: Op) -> bool:
    """Whether all operands are in the precision in which statistics are taken."""
    return {v.type.dtype for v in op.inputs} in ({"f32"}, {"f64"})


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
    return f"F.pad({x}, {pads!r}, value={_literal(op.attrs['value'])})"


def _cumsum(op: Op, x: str) -> str:
    t = op.out.type.dtype
    if t in ("bf16", "f16"):
        return f"{x}.float().cumsum({op.attrs['axis']}).to({_dtype(t)})"
    return f"{x}.cumsum({op.attrs['axis']}, dtype={_dtype(t)})"


def closing(items: Sequence[str]) -> str:
    """The end of a tuple's display."""
    return ",)" if len(items) == 1 else ")"


RULES: dict[str, Rule] = {
    **{name: lambda op, a, b, sign=sign: f"{a} {sign} {b}" for name, sign in INFIX.items()},
    **{name: lambda op, *xs, fn=fn: f"{fn}({', '.join(xs)})" for name, fn in (_CALLS | _UNARY).items()},
    "neg": lambda op, x: f"-{x}",
    "not": lambda op, x: f"~{x}",
    "act": lambda op, x: _ACTIVATIONS[op.attrs["kind"]].format(x),
    "cast": lambda op, x: f"{x}.to({_dtype(op.attrs['dtype'])})",
    "const": constant,
    "iota": lambda op: f"torch.arange({op.attrs['size']}, dtype={_dtype(op.attrs['dtype'])}, device=self.device)",
    "reshape": lambda op, x: f"{x}.reshape({op.attrs['shape']!r})",
    "transpose": lambda op, x: f"{x}.permute({op.attrs['perm']!r})",
    "broadcast_to": lambda op, x: f"{x}.expand({op.attrs['shape']!r})",
    "concat": lambda op, *xs: f"torch.cat(({', '.join(xs)}{closing(xs)}, dim={op.attrs['axis']})",
    "slice": _slice,
    "pad": _pad,
    "gather": _gather,
    "cache_update": lambda op, c, n, i: f"cache_update({c}, {n}, {i}, {op.attrs['axis']})",
    "reduce_sum": _reduction("sum"),
    "reduce_mean": _reduction("mean"),
    "reduce_max": _reduction("amax"),
    "argmax": lambda op, x: f"{x}.argmax({op.attrs['axis']}, keepdim={op.attrs['keepdims']}).to(torch.int32)",
    "cumsum": _cumsum,
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
