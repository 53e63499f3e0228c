"""What the IR's element types are in torch."""

from __future__ import annotations

import torch
from torch import Tensor

TORCH_DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "u8": torch.uint8,
    "bool": torch.bool,
}


def wide(x: Tensor) -> Tensor:
    """The operand in the precision in which statistics are taken: float32 at least."""
    return x if x.dtype == torch.float64 else x.float()
