"""π0.5: the state is in the prompt, and flow time enters the expert through adaptive norms.

Source: openpi `src/openpi/models/pi0.py` (`pi05=True`), LeRobot `policies/pi05/modeling_pi05.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from cortexflow.ir import Func, Module, Value, named, scope
from cortexflow.ir.ops import act, broadcast_to, cast, scalar
from cortexflow.models import pi
from cortexflow.models.base import VLAModel, register_model
from cortexflow.models.config import ModelConfig, Signature, VLAModelType
from cortexflow.models.gemma import adaptive_norm
from cortexflow.models.params import Params
from cortexflow.models.transformer import Norm


@register_model
class PI05(VLAModel):
    """π0.5 of Physical Intelligence."""

    family = VLAModelType.PI05

    def build(self, signature: Signature, dtype: str = "f32") -> Module:
        """The three stages; see `VLAModel.build`."""
        decoder = _decoder(self.config, signature, dtype)
        return pi.assemble(self.config, signature, dtype, "pi05", decoder)


def _decoder(c: ModelConfig, s: Signature, dtype: str) -> Func:
    tower, f32 = pi.expert_tower(c), Params("", "f32")

    def embed(x: Value, step: Value) -> tuple[Value, Callable[[Params], Norm]]:
        """Action tokens, and norms driven by the flow time's condition."""
        with scope("time_mlp"):
            h = act(f32.at("time_mlp_in").linear(pi.time_embedding(step, c, s), c.decoder_dim, bias=True), kind="silu")
            condition = act(f32.at("time_mlp_out").linear(h, c.decoder_dim, bias=True), kind="silu")
            named(condition, "adarms_cond")
        with scope("action_in"):
            tokens = f32.at("action_in_proj").linear(x, c.decoder_dim, bias=True)
        return cast(tokens, dtype=dtype), lambda p: adaptive_norm(tower, p, condition)

    def suffix(_: list[Value]) -> tuple[int, Callable[..., tuple[Value, Callable[[Params], Norm]]], Value]:
        everything = broadcast_to(scalar(True, "bool"), shape=(1, s.chunk))
        return 0, embed, everything

    return pi.transformer_decoder(c, s, dtype, {}, suffix)
