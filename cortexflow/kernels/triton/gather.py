"""Rows of a table by number: an embedding whose table may be too large, or too rarely read, for the card's memory."""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl
from cortexflow.kernels.triton.common import let_next_start, overlaps, wait_for_previous


@triton.jit
def embed_kernel(table, tokens, out, scale, table_row, token_step, out_row, WIDTH, BLOCK: tl.constexpr):
    """A piece of one row, scaled in float32 and rounded once."""
    let_next_start()
    wait_for_previous()
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row * token_step).to(tl.int64)
    entries = tl.load(table + token * table_row + k, mask=k < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + k, (entries * scale).to(out.dtype.element_ty), mask=k < WIDTH)


def embed(table: Tensor, tokens: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """out [n, width] = table [vocabulary, width] at tokens [n] (int32 or int64, each within it), times a scale.

    The table may lie in pinned host memory: the kernel then reads its rows over the bus, each once. An unpinned host
    tensor is refused at the launch (ValueError). Rows may be strided; table and out may differ in their dtype.
    """
    width = out.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    embed_kernel[(tokens.shape[0], triton.cdiv(width, block))](
        table, tokens, out, float(scale), table.stride(0), tokens.stride(0), out.stride(0), width,
        BLOCK=block, num_warps=4, launch_pdl=overlaps(),
    )  # fmt: skip
