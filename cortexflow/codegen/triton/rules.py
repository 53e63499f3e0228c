"""An op as one or more launches: a rule an op, each giving lines of the launch plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cortexflow.codegen.triton.claims import has_table
from cortexflow.codegen.triton.configs import TILED, attending, segmented
from cortexflow.codegen.triton.products import PRODUCTS, Rule, normed
from cortexflow.ir.core import Op

if TYPE_CHECKING:
    from cortexflow.codegen.triton.program import Stage


def _segments(stage: Stage, op: Op, out: str) -> list[str]:
    dense = (2,) * 5 + (3, 3, 1)  # axes that the kernels take to lie one behind the other
    q, k0, v0, *rest = (stage.read(v, axes) for v, axes in zip(op.inputs, dense, strict=True))
    operands = f"{', '.join([q, *rest[:2], k0, v0, *rest[2:]])}, {out}, {op.attrs['scale']!r}"
    early = stage.settled(op.inputs[1], op.inputs[2])
    if op in stage.rotating and stage.rotating[op] in stage.squares:
        operands = f"{', '.join([q, *rest[:2], k0, v0, rest[4]])}, {out}, {op.attrs['scale']!r}"
        return [*early, f"resident_attention.segment_attention({operands}, self.scratch[0])"]
    rotated = ", rotated=True" if op in stage.rotating else ""
    return [*early, f"segment_attention({operands}, self.scratch, {segmented(stage, op)!r}{rotated})"]


def _token(stage: Stage, op: Op, out: str) -> list[str]:
    """Attention of one token to a prefix that stands, and to what was generated since."""
    q, k0, v0, k1, v1 = (stage.read(v, 2) for v in op.inputs[:5])
    early = stage.settled(op.inputs[1], op.inputs[2])
    return [
        *early,
        f"token_attention({q}, {k0}, {v0}, {k1}, {v1}, {stage.read(op.inputs[5])}, {out}, {op.attrs['scale']!r})",
    ]


def _attention(stage: Stage, op: Op, out: str) -> list[str]:
    extra = op.inputs[3:]
    other = op.inputs[2].type.shape[-1] != op.inputs[0].type.shape[-1]  # values wider or narrower than keys
    causal = op.attrs["causal"]
    if (causal and extra) or other or any(e.type.dtype != "bool" for e in extra):
        return stage.copied(op, out)
    mask = ", causal=True" if causal else f", mask={stage.read(extra[0])}" if extra else ""
    q, k, v = (stage.read(x, 2) for x in op.inputs[:3])
    config = attending(stage, op)
    if config == TILED:
        return [f"tiled_attention.attention({q}, {k}, {v}, {out}, {op.attrs['scale']!r})"]
    tile = f", config=prefill_attention.{config!r}, scratch=self.scratch" if config is not None else ""
    return [f"prefill_attention.attention({q}, {k}, {v}, {out}, {op.attrs['scale']!r}{mask}{tile})"]


# ---- row by row --------------------------------------------------------------------------------------


def _act(stage: Stage, op: Op, out: str) -> list[str]:
    return [f"epilogue({stage.flat(op.inputs[0])}, rows({out}), act={op.attrs['kind']!r})"]


def concatenates_rows(op: Op) -> bool:
    """Whether an op puts matrices below each other, in every sample, as `_concat` copies them."""
    rows = op.name == "concat" and len(op.out.type.shape) == 3 and op.attrs["axis"] in (1, -2)
    return rows and op.out.type.dtype in ("f32", "bf16", "f16")


def _concat(stage: Stage, op: Op, out: str) -> list[str]:
    if not concatenates_rows(op):
        return stage.copied(op, out)
    lines, at = [], 0
    for part in op.inputs:
        end = at + part.type.shape[1]
        lines.append(f"epilogue({stage.read(part)}, {out}[:, {at}:{end}])")
        at = end
    return lines


def _argmax(stage: Stage, op: Op, out: str) -> list[str]:
    x = op.inputs[0]
    if x.type.dtype not in ("f32", "bf16", "f16") or op.attrs["axis"] not in (-1, len(x.type.shape) - 1):
        return stage.copied(op, out)
    return [f"argmax({stage.flat(x)}, {out}.view(-1))"]


def _cache_update(stage: Stage, op: Op, out: str) -> list[str]:
    """Into the cache where it stands (the plan copies it before, if it must not change) at a loop's step."""
    _, new, index = op.inputs
    if index not in stage.program.steps:
        return stage.copied(op, out)
    return [f"{stage.slot(op)}.copy_({stage.name(new)})"]


def _norm(stage: Stage, op: Op, out: str) -> list[str]:
    return [normed(stage, op, out)]


def _modulated_norm(stage: Stage, op: Op, out: str) -> list[str]:
    x, scale, shift = op.inputs
    vectors = f"{stage.row(scale)}, {stage.row(shift)}"
    return [f"modulated_norm({stage.flat(x)}, rows({out}), {vectors}, {op.attrs['eps']!r})"]


def _rope(stage: Stage, op: Op, out: str) -> list[str]:
    x, cosine, sine = op.inputs
    if not has_table(x, cosine):  # PyTorch's function of the same name
        return [f"{out}.copy_(functions.rope({', '.join(map(stage.name, op.inputs))}))"]
    angles = f"{stage.read(cosine, 3)}, {stage.read(sine, 3)}"
    if op in stage.rotated:
        joined = stage.rotated[op]
        keys, values = (stage.slot(o) if o.name == "cache_update" else stage.name(o.out) for o in joined.moves)
        queries = "None" if joined.moves[0] is op else out
        return [
            f"rope_and_cache({stage.read(joined.source)}, {angles}, {queries}, {keys}, {values}.view({joined.shape}))"
        ]
    return [f"rope({stage.read(x)}, {angles}, {out})"]


def _glu(stage: Stage, op: Op, out: str) -> list[str]:
    return [f"glu({stage.flat(op.inputs[0])}, rows({out}), {op.attrs['kind']!r})"]


def _gather(stage: Stage, op: Op, out: str) -> list[str]:
    table, index = op.inputs
    plain = len(table.type.shape) == 2 and op.attrs["axis"] == 0 and table.type.dtype in ("f32", "bf16", "f16")
    if not plain or index.type.dtype not in ("i32", "i64"):
        return stage.copied(op, out)
    return [f"embed({stage.read(table)}, {stage.name(index)}.reshape(-1), rows({out}))"]


RULES: dict[str, Rule] = {
    **PRODUCTS,
    "fused.rotated_attention_segments": _segments,
    "fused.attention_segments": _token,
    "fused.modulated_norm": _modulated_norm,
    "fused.glu": _glu,
    "act": _act,
    "cache_update": _cache_update,
    "argmax": _argmax,
    "attention": _attention,
    "concat": _concat,
    "gather": _gather,
    "rms_norm": _norm,
    "layer_norm": _norm,
    "rope": _rope,
}
