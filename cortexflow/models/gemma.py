"""The norms of Gemma's decoder layers: plain, and adaptive to a condition. The layers are `transformer`'s.

Source: openpi `src/openpi/models/gemma.py`; transformers `GemmaModel`. Both towers of a π model are
made of these.
"""

from __future__ import annotations

from cortexflow.ir import Value, named
from cortexflow.ir.ops import add, cast, mul, rms_norm, scalar, slice_
from cortexflow.models.params import Params
from cortexflow.models.transformer import Norm, Tower

ACT = "gelu_tanh"


def plain_norm(t: Tower, p: Params) -> Norm:
    """RMSNorm whose factor is 1 + weight, as Gemma stores it."""

    def apply(x: Value, name: str) -> tuple[Value, Value | None]:
        factor = add(p.to("f32").get(f"{name}.weight", t.width), scalar(1.0, "f32"))
        return rms_norm(x, cast(factor, dtype=p.dtype), eps=t.eps), None

    return apply


def adaptive_norm(t: Tower, p: Params, condition: Value) -> Norm:
    """RMSNorm whose factor, shift and gate are a linear function of a condition f32 [1, width]."""

    def apply(x: Value, name: str) -> tuple[Value, Value | None]:
        modulation = p.to("f32").at(f"{name}.dense").linear(condition, 3 * t.width, bias=True)
        scale, shift, gate = (slice_(modulation, axis=-1, start=i * t.width, stop=(i + 1) * t.width) for i in range(3))
        scale = add(scale, scalar(1.0, "f32"))
        parts = {"scale": scale, "shift": shift, "gate": gate}
        scale, shift, gate = (named(cast(v, dtype=p.dtype), n) for n, v in parts.items())
        return add(mul(rms_norm(x, eps=t.eps), scale), shift), gate

    return apply
