"""Layouts: a convolution that never overlaps itself is a product over patches.

With stride equal to the kernel and no padding, cutting the picture into patches is a reshape and one
transpose, and the kernel becomes a matrix, once. Channels-last pictures then need no other transpose.
"""

from __future__ import annotations

from cortexflow.ir.core import Module, Op, Value
from cortexflow.ir.ops import add, matmul, reshape, transpose
from cortexflow.passes.dependence import Dependence, Level
from cortexflow.passes.rewrite import producer, rewrite_func


def layout(module: Module) -> int:
    """Rewrite patch convolutions; returns how many."""
    fired = 0
    for func in module.funcs.values():
        level = Dependence(func)

        def patches(op: Op, level: Dependence = level) -> Value | None:
            return _patches(op) if op.name == "conv2d" and level(op.inputs[1]) == Level.STATIC else None

        fired += rewrite_func(func, patches)
    return fired


def _patches(op: Op) -> Value | None:
    x, w, *bias = op.inputs
    (n, c, height, width), (out, _, kh, kw) = x.type.shape, w.type.shape
    plain = op.attrs["padding"] == ((0, 0), (0, 0)) and op.attrs["dilation"] == (1, 1) and op.attrs["groups"] == 1
    if not plain or op.attrs["stride"] != (kh, kw) or height % kh or width % kw or (kh, kw) == (1, 1):
        return None
    rows, columns = height // kh, width // kw
    last = producer(x, "transpose")
    if last and last.attrs["perm"] == (0, 3, 1, 2):  # the picture is channels last underneath
        cut = reshape(last.inputs[0], shape=(n, rows, kh, columns, kw, c))
        cut = transpose(cut, perm=(0, 1, 3, 2, 4, 5))
        kernel = transpose(w, perm=(2, 3, 1, 0))
    else:
        cut = transpose(reshape(x, shape=(n, c, rows, kh, columns, kw)), perm=(0, 2, 4, 1, 3, 5))
        kernel = transpose(w, perm=(1, 2, 3, 0))
    size = c * kh * kw
    y = matmul(reshape(cut, shape=(n, rows * columns, size)), reshape(kernel, shape=(size, out)))
    if bias:
        y = add(y, bias[0])
    return reshape(transpose(y, perm=(0, 2, 1)), shape=(n, out, rows, columns))
