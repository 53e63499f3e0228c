"""Kernels in Gluon, Triton's dialect with explicit layouts, for Hopper and later: what plain Triton cannot place."""
