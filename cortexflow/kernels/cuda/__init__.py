"""Kernels in CUDA C++ for what Triton cannot say: instructions of any width, thread block clusters."""
