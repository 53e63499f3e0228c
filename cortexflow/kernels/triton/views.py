"""A tensor as the matrix of its last axis' rows, for kernels and library products that take matrices."""

from __future__ import annotations

from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """A matrix [rows, width] to write to; never a copy. Raises RuntimeError where the rows are not evenly spaced."""
    return x.view(-1, x.shape[-1])


def flat(x: Tensor) -> Tensor:
    """The same to read from; a copy where the rows are not evenly spaced."""
    return x.reshape(-1, x.shape[-1])


def halves(scratch: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
    """Room [rows, 2 width] in the scratch for both factors of a gated unit's result `out` [rows, width]."""
    return scratch[0].view(out.dtype)[: 2 * out.numel()].view(len(out), -1)
