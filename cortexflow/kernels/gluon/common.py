"""What Gluon kernels share: activations, and how a kernel overlaps its start with the one before it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of a program's threads; its name before 3.7


@gluon.jit
def let_next_start():
    """Programmatic dependent launch: the next kernel may become resident now."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_previous():
    """Programmatic dependent launch: everything that earlier kernels wrote is visible after this."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def activate(x, KIND: gl.constexpr):
    """An activation in float32; `none` is the identity."""
    if KIND == "gelu_tanh":  # 0.5 x (1 + tanh(y)) = x sigmoid(2 y)
        return x / (1.0 + gl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + gl.erf(x * 0.7071067811865476))
    elif KIND == "silu":
        return x / (1.0 + gl.exp(-x))
    elif KIND == "relu":
        return gl.maximum(x, 0.0)
    elif KIND == "sigmoid":
        return 1.0 / (1.0 + gl.exp(-x))
    elif KIND == "tanh":
        return 2.0 / (1.0 + gl.exp(-2.0 * x)) - 1.0
    else:
        return x
