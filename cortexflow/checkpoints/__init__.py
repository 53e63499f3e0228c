"""Checkpoints: one file per on-disk format, canonical tensors for all, and the doctor for what does not fit."""

from cortexflow.checkpoints.checkpoint import Checkpoint, Size, build_checkpoint, open_checkpoint
from cortexflow.checkpoints.doctor import match
from cortexflow.checkpoints.lerobot import save_lerobot
from cortexflow.checkpoints.tensors import LazyTensor, count_nonfinite

__all__ = [
    "Checkpoint",
    "LazyTensor",
    "Size",
    "build_checkpoint",
    "count_nonfinite",
    "match",
    "open_checkpoint",
    "save_lerobot",
]
