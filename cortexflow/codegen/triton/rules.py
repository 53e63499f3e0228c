"""An op as one or more launches: a rule an op, each giving lines of the launch plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cortexflow.codegen.triton.claims import STREAMED, skinny_config, streams
from cortexflow.ir.core import Op, Value

if TYPE_CHECKING:
    from cortexflow.codegen.triton.program import Stage

Rule = Callable[["Stage", Op, str], list[str]]


def _flat(stage: Stage, v: Value) -> str:
    return f"flat({stage.name(v)})"


def _skinny(stage: Stage, op: Op, out: str) -> list[str]:
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
    k, n = given["w"].type.shape
    config = skinny_config(n, k, op.name.endswith("glu"), "eps" in op.attrs)
    parts.append(f"scratch=self.scratch, config={config}")
    return [f"skinny({', '.join(parts)})"]


def _decode_attention(stage: Stage, op: Op, out: str) -> list[str]:
    q, k0, v0, k1, v1, cosine, sine, mask = (f"{stage.name(v)}[0]" for v in op.inputs)
    config = "(16, 64, 5, 4)"
    return [
        f"decode_attention({q}, {k1}, {v1}, {k0}, {v0}, {cosine}, {sine}, {mask}, {out}[0], "
        f"{op.attrs['scale']!r}, self.scratch, {config})"
    ]


def _attention(stage: Stage, op: Op, out: str) -> list[str]:
    extra = op.inputs[3:]
    other = op.inputs[2].type.shape[-1] != op.inputs[0].type.shape[-1]  # values wider or narrower than keys
    if op.attrs["causal"] or other or any(e.type.dtype != "bool" for e in extra):
        return stage.copied(op, out)
    mask = f", mask={stage.name(extra[0])}" if extra else ""
    q, k, v = map(stage.name, op.inputs[:3])
    return [f"attention({q}, {k}, {v}, {out}, {op.attrs['scale']!r}{mask})"]


def _product(stage: Stage, op: Op, out: str) -> list[str]:
    x, w = op.inputs
    if len(w.type.shape) != 2 or op.out.type.dtype != x.type.dtype:
        return stage.copied(op, out)
    return [f"torch.mm({_flat(stage, x)}, {stage.name(w)}, out=rows({out}))"]


def _linear(stage: Stage, op: Op, out: str) -> list[str]:
    x, w, b = op.inputs
    return [f"torch.addmm({stage.name(b)}, {_flat(stage, x)}, {stage.name(w)}, out=rows({out}))"]


def _linear_act(stage: Stage, op: Op, out: str) -> list[str]:
    x, w, b = op.inputs
    flat = f"rows({out})"
    return [
        f"torch.mm({_flat(stage, x)}, {stage.name(w)}, out={flat})",
        f"epilogue({flat}, {flat}, bias={stage.name(b)}, act={op.attrs['kind']!r})",
    ]


def _linear_residual(stage: Stage, op: Op, out: str) -> list[str]:
    r, x, w, b = op.inputs
    flat = f"rows({out})"
    return [
        f"torch.addmm({_flat(stage, r)}, {_flat(stage, x)}, {stage.name(w)}, out={flat})",
        f"epilogue({flat}, {flat}, bias={stage.name(b)})",
    ]


def _matmul_residual(stage: Stage, op: Op, out: str) -> list[str]:
    if streams(op, 1, 2):
        return _skinny(stage, op, out)
    r, x, w = op.inputs
    return [f"torch.addmm({_flat(stage, r)}, {_flat(stage, x)}, {stage.name(w)}, out=rows({out}))"]


def _matmul_gated_residual(stage: Stage, op: Op, out: str) -> list[str]:
    if streams(op, 1, 2):
        return _skinny(stage, op, out)
    r, x, w, gate = op.inputs  # the result may stand where the residual stood: the product needs a place of its own
    product = f"torch.mm({_flat(stage, x)}, {stage.name(w)})"
    return [f"epilogue({product}, rows({out}), residual={_flat(stage, r)}, gate={stage.name(gate)}.view(-1))"]


def _act(stage: Stage, op: Op, out: str) -> list[str]:
    return [f"epilogue({_flat(stage, op.inputs[0])}, rows({out}), act={op.attrs['kind']!r})"]


def _norm(stage: Stage, op: Op, out: str) -> list[str]:
    params = [f"{n}={stage.name(v)}" for n, v in zip(("scale", "shift"), op.inputs[1:], strict=False)]
    return [f"{op.name}({_flat(stage, op.inputs[0])}, {', '.join([f'rows({out})', repr(op.attrs['eps']), *params])})"]


def _modulated_norm(stage: Stage, op: Op, out: str) -> list[str]:
    x, scale, shift = op.inputs
    vectors = f"{stage.name(scale)}.view(-1), {stage.name(shift)}.view(-1)"
    return [f"modulated_norm({_flat(stage, x)}, rows({out}), {vectors}, {op.attrs['eps']!r})"]


def _rope(stage: Stage, op: Op, out: str) -> list[str]:
    x, cosine, sine = op.inputs
    b = x.type.shape[0]
    if len(x.type.shape) != 4 or cosine.type.shape[0] not in (1, b):
        return stage.copied(op, out)
    lines = []
    for i in range(b):
        angles = ", ".join(f"{stage.name(t)}[{i if t.type.shape[0] > 1 else 0}]" for t in (cosine, sine))
        lines.append(f"rope({stage.name(x)}[{i}], {angles}, {out}[{i}])")
    return lines


def _glu(stage: Stage, op: Op, out: str) -> list[str]:
    return [f"glu({_flat(stage, op.inputs[0])}, rows({out}), {op.attrs['kind']!r})"]


RULES: dict[str, Rule] = {
    **dict.fromkeys(STREAMED, _skinny),
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
