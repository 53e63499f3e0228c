"""Which fused ops the Triton kernels run as they are, which products suit which kernel: shapes and dtypes that fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from cortexflow.ir.core import Op, Value
from cortexflow.kernels.cuda.launch import SHARED_BYTES

FEW_ROWS = 16  # products with at most so many rows stream their weights through matrix instructions of 16 rows
SOME_ROWS = 64  # of one warpgroup instruction
MORE_ROWS = 128  # products with at most so many stream them too, through one or two warpgroups
SCRATCH = 1 << 23  # float32 entries for the parts of split products and of attention
TENSOR_CORES = ("bf16", "f16")


def _power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def row_count(v: Value) -> int:
    """Rows of a value as a matrix of its last axis."""
    return prod(v.type.shape[:-1])


def streams(op: Op, x: int, w: int, glu: bool = False, norm: bool = False, modulated: bool = False) -> bool:
    """Whether a product suits the kernels for up to 16 rows: a plain matrix, extents that divide and fit.

    A modulated norm's shift takes one of the rows.
    """
    if not _matrix(op, x, w):
        return False
    k, n = op.inputs[w].type.shape
    fits = _power_of_two(k) and 512 <= k <= (2048 if norm else 8192) and n % 64 == 0
    rows = row_count(op.inputs[x]) + modulated
    return fits and rows <= FEW_ROWS and skinny_config(n, k, glu, norm) is not None


def grouped(op: Op, x: int, w: int, glu: bool = False, whole: bool = False) -> bool:
    """Whether a product suits the kernels for up to 128 rows.

    `whole`: rows are added up as a whole, by one program, whose extent is a power of two.
    """
    if not _matrix(op, x, w):
        return False
    from cortexflow.kernels.gluon.warpgroup import default

    k, n = op.inputs[w].type.shape
    n //= 1 + glu
    config = default(n, k, glu) if k % 256 == 0 and n % 64 == 0 else None
    added = whole or (config is not None and config.split > 1)
    fits = config is not None and (not added or (_power_of_two(n) and 128 <= n <= 8192))
    return fits and FEW_ROWS < row_count(op.inputs[x]) <= MORE_ROWS


def stored(v: Value) -> bool:
    """Whether a value is a weight: it may be stored in any form, and read before a kernel waits."""
    return v.op is not None and v.op.name == "weight"


def _matrix(op: Op, x: int, w: int) -> bool:
    xt, wt = op.inputs[x].type, op.inputs[w].type
    return len(wt.shape) == 2 and stored(op.inputs[w]) and xt.dtype in TENSOR_CORES and op.out.type.dtype == xt.dtype


def skinny_config(n: int, k: int, glu: bool, norm: bool) -> tuple[int, int, int, int] | None:
    """(columns of a program, splits of k, slices of k, warps) for cards before Hopper.

    None where the tiles would not fit a block's shared memory. A norm needs whole rows: k is not split.
    """
    if glu or norm or n >= 2048:
        columns, split, slices, warps = 32, 1, 4, 4
    elif k > 2048:
        columns, split, slices, warps = 16, k // 1024, 4, 4
    else:
        columns, split, slices, warps = 16, 1, 8, 8
    tile = (columns * (2 if glu else 1) + FEW_ROWS) * (k // split) * 2  # bytes: a program's weights and its input
    return (columns, split, slices, warps) if tile <= SHARED_BYTES else None


def _row_vector(v: Value, width: int) -> bool:
    return v.type.size == width and v.type.shape[-1:] == (width,)


def _like_result(op: Op, residual: int) -> bool:
    return op.inputs[residual].type.shape == op.out.type.shape


STREAMED: Mapping[str, Callable[[Op], bool]] = {
    "fused.norm_matmul": lambda o: streams(o, 0, 1, norm=True),
    "fused.norm_glu": lambda o: streams(o, 0, 1, glu=True, norm=True),
    "fused.modulated_norm_matmul": lambda o: streams(o, 0, 3, norm=True, modulated=True) and _modulated(o),
    "fused.modulated_norm_glu": lambda o: streams(o, 0, 3, glu=True, norm=True, modulated=True) and _modulated(o),
}


def _modulated(op: Op) -> bool:
    width = op.inputs[0].type.shape[-1]
    return _row_vector(op.inputs[1], width) and _row_vector(op.inputs[2], width)


def has_table(x: Value, cosine: Value) -> bool:
    """Whether the angles of x [b, t, heads, d] are a table [1|b, t, d / 2]: a row a token."""
    if len(x.type.shape) != 4:
        return False
    b, t, _, d = x.type.shape
    return cosine.type.shape in ((1, t, d // 2), (b, t, d // 2))


def _segments(op: Op) -> bool:
    """Whether attention over a cache suits the decoding kernels, and its weights fit the scratch."""
    q, k0, v0, mask = (op.inputs[i].type for i in (0, 1, 2, 7))
    b, m, heads, d = q.shape
    fits = m <= SOME_ROWS and k0.shape == v0.shape and k0.shape[2] == 1 and d in (32, 64, 128, 256)
    rows, keys = -(-m * heads // 64) * 64, k0.shape[1] + m + 256  # with what tiles add at most
    fits = fits and b * rows * keys * 17 // 16 <= SCRATCH  # two sums in 32 keys
    plain = q.dtype in TENSOR_CORES and mask.dtype == "bool" and not op.attrs["causal"]
    return fits and plain and has_table(op.inputs[0], op.inputs[5])


def _token(op: Op) -> bool:
    """Whether attention of one token to two caches suits its kernel."""
    q, k0, v0, mask = (op.inputs[i].type for i in (0, 1, 2, 5))
    _, m, _, d = q.shape
    fits = m == 1 and k0.shape == v0.shape and d in (64, 128, 256)
    return fits and q.dtype in TENSOR_CORES and not op.attrs["causal"] and mask.shape[1] == 1


def _plain_bias(op: Op) -> bool:
    w, b = op.inputs[1], op.inputs[2]
    return len(w.type.shape) == 2 and _row_vector(b, w.type.shape[1])


def _residual_bias(op: Op) -> bool:
    w, b = op.inputs[2].type.shape, op.inputs[3].type.shape
    return len(w) == 2 and b == w[1:] and _like_result(op, 0)


def _gated_unit(op: Op) -> bool:
    """A gated unit inside its product's kernel: 16-bit types, a weight whose columns come in whole tiles."""
    return _matrix(op, 0, 1) and op.attrs["width"] % 64 == 0 and op.inputs[0].type.shape[-1] % 64 == 0


CLAIMS: Mapping[str, Callable[[Op], bool]] = {
    **STREAMED,
    "fused.rotated_attention_segments": _segments,
    "fused.attention_segments": _token,
    "fused.modulated_norm": lambda o: _modulated(o) and o.inputs[0].type.shape[-1] <= 8192,
    "fused.matmul_glu": _gated_unit,
    "fused.glu": lambda o: True,
    "fused.linear": _plain_bias,
    "fused.linear_act": _plain_bias,
    "fused.linear_residual": _residual_bias,
    "fused.matmul_residual": lambda o: len(o.inputs[2].type.shape) == 2 and _like_result(o, 0),
    "fused.matmul_gated_residual": lambda o: (
        len(o.inputs[2].type.shape) == 2 and _like_result(o, 0) and _row_vector(o.inputs[3], o.out.type.shape[-1])
    ),
}

SWITCHED = {"streaming": frozenset(STREAMED), "epilogues": frozenset({"fused.matmul_glu"})}  # claims that can be off


def claims(op: Op, without: frozenset[str] = frozenset()) -> bool:
    """Whether this target runs a fused op as it is."""
    off = any(op.name in SWITCHED.get(name, ()) for name in without)
    return not off and op.name in CLAIMS and CLAIMS[op.name](op)
