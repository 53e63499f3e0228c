"""Reading checkpoint tensors inside a graph: names below a prefix, float32 in the file's place, cast once.

Weights are declared float32 whatever a file stores, so that folds are computed in float32 and
rounded once, to the precision of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from cortexflow.ir import Type, Value
from cortexflow.ir.ops import add, cast, matmul, transpose, weight


@dataclass(frozen=True)
class Params:
    """The tensors below a prefix, as values of dtype `dtype`."""

    prefix: str
    dtype: str

    def at(self, name: str) -> Params:
        """The tensors one level further down."""
        return Params(f"{self.prefix}.{name}" if self.prefix else name, self.dtype)

    def to(self, dtype: str) -> Params:
        """The same tensors in another precision."""
        return Params(self.prefix, dtype)

    def get(self, name: str, *shape: int) -> Value:
        """One tensor, in the precision of these parameters."""
        key = f"{self.prefix}.{name}" if self.prefix else name
        return cast(weight(key=key, type=Type("f32", shape)), dtype=self.dtype)

    def linear(self, x: Value, out: int, bias: bool = False, result: str | None = None) -> Value:
        """x [..., in] through a PyTorch linear layer: `weight` [out, in] and, where told, `bias` [out].

        `result` is the dtype of the product where it is not that of these parameters.
        """
        w = transpose(self.to("f32").get("weight", out, x.type.shape[-1]), perm=(1, 0))
        y = matmul(x, cast(w, dtype=self.dtype), dtype=None if result == self.dtype else result)
        return add(y, self.get("bias", out)) if bias else y
