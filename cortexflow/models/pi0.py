"""π0: a state token before the actions, and flow time mixed into every action token.

Source: openpi `src/openpi/models/pi0.py`, LeRobot `policies/pi0/modeling_pi0.py`. Files whose time and
action projections are already folded (realtime-vla's) say so in `ModelConfig.folded_time_steps`.
"""

from __future__ import annotations

from collections.abc import Callable

from cortexflow.errors import ConfigError
from cortexflow.ir import Func, Module, Type, Value, scope
from cortexflow.ir.ops import (
    act,
    add,
    broadcast_to,
    cast,
    concat,
    gather,
    iota,
    le,
    lt,
    matmul,
    or_,
    reshape,
    scalar,
    transpose,
)
from cortexflow.models import pi
from cortexflow.models.base import VLAModel, register_model
from cortexflow.models.config import ModelConfig, Signature, VLAModelType
from cortexflow.models.gemma import plain_norm
from cortexflow.models.params import Params
from cortexflow.models.transformer import Norm


@register_model
class PI0(VLAModel):
    """π0 of Physical Intelligence."""

    family = VLAModelType.PI0

    def build(self, signature: Signature, dtype: str = "f32") -> Module:
        """The three stages; see `VLAModel.build`."""
        folded = self.config.folded_time_steps
        if folded is not None and folded != signature.steps:
            raise ConfigError(
                f"this checkpoint has its flow time folded in for {folded} steps, but {signature.steps} were asked "
                f"for; compile with steps={folded} or bring the unconverted checkpoint"
            )
        return pi.assemble(self.config, signature, dtype, "pi0", _decoder(self.config, signature, dtype))


def _decoder(c: ModelConfig, s: Signature, dtype: str) -> Func:
    tower, f32 = pi.expert_tower(c), Params("", "f32")

    def suffix(inputs: list[Value]) -> tuple[int, Callable[..., tuple[Value, Callable[[Params], Norm]]], Value]:
        with scope("state"):
            state = f32.at("state_proj").linear(
                reshape(inputs[0], shape=(s.batch, 1, c.state_dim)), c.decoder_dim, True
            )

        def embed(x: Value, step: Value) -> tuple[Value, Callable[[Params], Norm]]:
            with scope("action_time"):
                h = _folded_input(x, step, c) if c.folded_time_steps else _input(x, step, c, s)
                actions = f32.at("action_time_mlp_out").linear(act(h, kind="silu"), c.decoder_dim, bias=True)
            return cast(concat(state, actions, axis=1), dtype=dtype), lambda p: plain_norm(tower, p)

        return 1, embed, _visible(s.chunk + 1)

    return pi.transformer_decoder(c, s, dtype, {"state": Type("f32", (s.batch, c.state_dim))}, suffix)


def _input(x: Value, step: Value, c: ModelConfig, s: Signature) -> Value:
    """The first layer of the action-time MLP, on [projected action, time embedding]."""
    f32, shape = Params("", "f32"), (s.batch, s.chunk, c.decoder_dim)
    actions = f32.at("action_in_proj").linear(x, c.decoder_dim, bias=True)
    time = broadcast_to(reshape(pi.time_embedding(step, c, s), shape=(1, 1, c.decoder_dim)), shape=shape)
    return f32.at("action_time_mlp_in").linear(concat(actions, time, axis=2), c.decoder_dim, bias=True)


def _folded_input(x: Value, step: Value, c: ModelConfig) -> Value:
    """The same from a file that stores the folded product and one bias for each step."""
    f32 = Params("folded", "f32")
    w = transpose(f32.get("action_in.weight", c.decoder_dim, c.action_dim), perm=(1, 0))
    return add(matmul(x, w), gather(f32.get("time_bias", c.folded_time_steps or 1, c.decoder_dim), step))


def _visible(m: int) -> Value:
    """The state token sees itself; every action sees the state and all actions: bool [m, m]."""
    query, key = reshape(iota(size=m), shape=(m, 1)), reshape(iota(size=m), shape=(1, m))
    return or_(lt(scalar(0, "i32"), query), le(key, scalar(0, "i32")))
