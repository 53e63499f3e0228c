"""Triton kernels and the functions that launch them; the `triton` target's source calls these functions."""
