"""Which variant of a kernel a launch runs: what was measured on the card (`tuning`), else the kernel's own default."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cortexflow.codegen.triton.claims import SCRATCH, SOME_ROWS, TENSOR_CORES
from cortexflow.codegen.triton.tuning import choose, timed
from cortexflow.ir.core import Op
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.kernels.cuda.launch import SHARED_BYTES

if TYPE_CHECKING:
    from cortexflow.codegen.triton.program import Stage

# In place of a config: PyTorch's product, with its epilogue behind, of a weight [k, n]; of one stored as [n, k]; with k
# in two parts, which a norm behind adds.
LIBRARY: tuple[Any, ...] = ()
LIBRARY_ROWS: tuple[Any, ...] = ("rows",)
LIBRARY_PARTS: tuple[Any, ...] = ("parts", 2)
TILED: tuple[Any, ...] = ("cuda",)  # begins the variants of `kernels/cuda/product.py`, and is that of its attention


def streamed(stage: Stage, op: Op, n: int, k: int, glu: bool, norm: bool) -> Any:
    """Of `kernels/gluon/streaming.py`; its best depends on the neighbours in the chain, so it is not tuned alone."""
    from cortexflow.kernels.gluon.streaming import default

    return default(n, k, glu, norm)


def warped(stage: Stage, op: Op, n: int, k: int, glu: bool) -> Any:
    """Of `kernels/gluon/warpgroup.py`; as for `streamed`."""
    from cortexflow.kernels.gluon.warpgroup import default

    return default(n, k, glu)


def resident(stage: Stage, op: Op, n: int, k: int, glu: bool, norm: bool, modulated: bool) -> Any:
    """Of `kernels/cuda/streaming.py`, None where that cannot run; as for `streamed`."""
    from cortexflow.kernels.cuda.streaming import default

    return default(n, k, glu, norm, modulated) if hand_written(stage, "resident") else None


def segmented(stage: Stage, op: Op) -> Any:
    """Of `kernels/triton/segment_attention.py`; as for `streamed`."""
    from cortexflow.kernels.triton.segment_attention import default

    b, m, heads, d = op.inputs[0].type.shape
    return default(b, m, heads, d, op.inputs[1].type.shape[1], room=SCRATCH)


def multiplying(stage: Stage, dtype: str, m: int, n: int, k: int, what: str, result: str, stored: bool = False) -> Any:
    """Of `kernels/triton/product.py` for x [m, k] @ w [k, n], or the library, whose w may be stored in either order.

    `what`: `matmul` or the fused op's name, which says the epilogue; `pairs` for a gated unit, which stands behind the
    library's product. `result`: its dtype, wider than `dtype` where logits are wanted as they were summed: ours then.
    """
    from cortexflow.kernels.triton import product

    unit, wider, few = what == "pairs", result != dtype, m <= product.FEW_ROWS
    off = "epilogues" in stage.program.without or (few and "streaming" in stage.program.without)
    if dtype == "f32" and not off and m > product.FEW_ROWS and (m <= SOME_ROWS or m * n * k <= 1 << 30):
        # On an H200 50 x 1024 x 1024 take 6.8 µs in four parts, 13.5 in the library; 512 x 1152 x 588 take 23 and 31.
        split = 4 if m <= SOME_ROWS and k >= 512 and 4 * m * n <= SCRATCH else 1
        return product.default(m, n, k, unit, _shared_bytes(), 4)._replace(split=split)
    if not unit and not wider and (off or dtype not in TENSOR_CORES or product.FEW_ROWS < m < 64):
        return LIBRARY
    offered: Sequence[Any] = product.candidates(m, n, k, pairs=unit, count=8 if few else 6)
    described = "overlap" not in stage.program.without  # without it blocks come through pointers
    default: Any = product.default(m, n, k, unit, _shared_bytes(), described=described)
    if not wider and (not unit or m * n <= SCRATCH):
        # of pairs, 277 rows were faster in the library (86 µs against 113), 532 and more in tiles of ours
        offered, default = [LIBRARY, *offered], default if few or (unit and not 128 < m < 512) else LIBRARY
        if stored and "linear" in what:  # not a prefix' products: plans for other prompts would hold weights twice
            offered += [LIBRARY_ROWS, *_tiles(stage, m, n, k, what)]
            default = default if few else _form_of_a_sample(stage, dtype, m, n, k, what)
        if stored and "residual" in what and k % 16 == 0 and 2 * m * n <= SCRATCH:
            offered.append(LIBRARY_PARTS)
    measure = _measure_product(offered, TORCH_DTYPES[dtype], m, n, k, what, result) if stage.program.tune else None
    key = (dtype, m, n, k, what) if result == dtype else (dtype, m, n, k, what, result)
    found = choose("product", key, offered, default, measure)
    ours = found not in (LIBRARY, LIBRARY_ROWS, LIBRARY_PARTS) and found[:1] != TILED
    return product.Config(*found) if ours else found


def _tiles(stage: Stage, m: int, n: int, k: int, what: str) -> Sequence[Any]:
    """Variants of `kernels/cuda/product.py`, where it has the epilogue."""
    from cortexflow.kernels.cuda.product import candidates

    suits = hand_written(stage) and what in ("linear", "linear_act", "linear_residual")
    return candidates(m, n, k, "residual" in what) if suits else []


def hand_written(stage: Stage, switch: str = "tiles") -> bool:
    """Whether the kernels in CUDA C++ can run: Hopper's instructions, and the compiler that PyTorch brings."""
    from cortexflow.kernels.cuda.nvrtc import available

    on = stage.program.capability // 10 == 9 and switch not in stage.program.without
    return on and torch.cuda.is_available() and available()


def _form_of_a_sample(stage: Stage, dtype: str, m: int, n: int, k: int, what: str) -> tuple[Any, ...]:
    """The library, its weight stored as for the most of m's divisors that was measured: plans for batches share it.

    Of up to 64 samples; [k, n] where none was measured.
    """
    from cortexflow.kernels.triton.product import candidates

    unknown, library = ("unknown",), [LIBRARY, LIBRARY_ROWS, LIBRARY_PARTS]
    for rows in (m // b for b in range(1, 65) if m % b == 0):
        in_rows = [LIBRARY_ROWS, *_tiles(stage, rows, n, k, what)]
        offered = [*library, *candidates(rows, n, k, pairs=False, count=6), *in_rows]
        known = choose("product", (dtype, rows, n, k, what), offered, unknown)
        if known != unknown:
            return LIBRARY_ROWS if known in in_rows else LIBRARY
    return LIBRARY


def attending(stage: Stage, op: Op) -> Any:
    """Of `kernels/triton/prefill_attention.py`, or TILED; None for the former's default."""
    from cortexflow.kernels.cuda.attention import fits
    from cortexflow.kernels.triton import prefill_attention as kernel

    if not torch.cuda.is_available():
        return None
    (b, m, heads, d), (_, n, groups, _) = op.inputs[0].type.shape, op.inputs[1].type.shape
    pairs, dtype = op.attrs["causal"] or (len(op.inputs) > 3 and op.inputs[3].type.shape[1] > 1), op.out.type.dtype
    on = kernel.card()
    default = kernel.default(d, dtype == "f32", pairs, on)
    if dtype not in ("bf16", "f16") or pairs:
        return default
    offered: list[Any] = [*kernel.candidates(m, n, heads // groups, d, on)]
    if hand_written(stage) and len(op.inputs) == 3 and fits(n, heads != groups, d):
        offered.append(TILED)
    key = (dtype, b, m, n, heads, groups, d, len(op.inputs) > 3)
    measure = _measure_attention(offered, TORCH_DTYPES[dtype], *key[1:]) if stage.program.tune else None
    found = choose("attention", key, offered, default, measure)
    return found if found == TILED else kernel.Config(*found)


def _shared_bytes() -> int:
    """Shared memory that a block may have; Hopper's where there is no card."""
    from cortexflow.kernels.triton.common import shared_memory

    return shared_memory() if torch.cuda.is_available() else SHARED_BYTES


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def _measure_product(
    offered: Sequence[Any], dtype: torch.dtype, m: int, n: int, k: int, what: str, result: str
) -> Callable[[Any], float]:
    """Microseconds of a product between norms, over weights that the cache does not hold from call to call.

    A kernel of ours overlaps with those beside it, which the library's do not; and a norm may add parts. Ahead of the
    second product of a pair (k > n) is a first one in place of a norm, where it is one that overlaps too.
    """
    from cortexflow.kernels.cuda.product import candidates
    from cortexflow.kernels.cuda.product import product as tiled
    from cortexflow.kernels.triton import product
    from cortexflow.kernels.triton.rows import epilogue, glu, layer_norm, rms_norm, summed_norm

    unit = what == "pairs"
    wide = 2 * n if unit else n
    copies = max(2, min(8, (200 << 20) // (k * wide * 2)))
    x, bias, ahead, normed = (_random(*s, dtype=dtype) for s in ((m, k), (n,), (m, min(k, 2048)), (m, n)))
    out = _random(m, n, dtype=TORCH_DTYPES[result])
    scratch = torch.empty(SCRATCH, device="cuda")
    ws = itertools.cycle([_random(k, wide, dtype=dtype) * k**-0.5 for _ in range(copies)])
    ends: dict[str, Any] = {"bias": bias} if "linear" in what else {}
    ends |= {"residual": out} if "residual" in what else {}
    centred = "linear" in what
    norm = layer_norm if centred else rms_norm
    act = what.split()[1] if what.startswith("linear_act ") else "gelu_tanh"
    firsts = candidates(m, k, n, False) if k > n and any(c[:1] == TILED for c in offered) else []
    ends |= {"act": act} if "act" in what or unit else {}

    def launch(config: Any) -> None:
        if firsts:
            tiled(normed, next(ws).view(k, n), x, act="gelu_tanh", config=firsts[0])
        else:
            rms_norm(ahead, ahead, 1e-6)
        w = next(ws)
        if config == LIBRARY_ROWS:
            w = w.view(n, k).t()
        if config[:1] == TILED:
            more = {} if config.split > 1 else ends | ({"new_stats": scratch} if "residual" in ends else {})
            y = tiled(x, w.view(n, k), out, **more, scratch=scratch, config=config)
            if config.split > 1:  # else the next product norms what it reads
                summed_norm(y, out, normed, 1e-6, **ends, centred=centred, parts=config.split)
        elif config == LIBRARY_PARTS:
            y, split = product.parted(x, w, scratch, config[1]), config[1]
            summed_norm(y, out, normed, 1e-6, **ends, centred=centred, parts=split)
        elif config not in (LIBRARY, LIBRARY_ROWS):
            c = product.Config(*config)
            adds = c.split > 1 and "residual" in ends
            y = product.product(x, w, out, **ends, pairs=unit, scratch=scratch, config=c, finish=not adds)
            if adds:
                summed_norm(y, out, normed, 1e-6, **ends, centred=centred, parts=c.split)
            elif "residual" in ends:
                norm(out, normed, 1e-6)
        elif unit:
            both = scratch.view(dtype)[: 2 * m * n].view(m, -1)
            torch.mm(x, w, out=both)
            glu(both, out, act, pairs=True)
        elif what == "linear_act":
            torch._addmm_activation(bias, x, w, use_gelu=True, out=out)
        elif "act" in ends:
            torch.mm(x, w, out=out)
            epilogue(out, out, bias=bias, act=act)
        elif "residual" in ends:
            torch.addmm(out, x, w, out=out)
            norm(out, normed, 1e-6, bias=ends.get("bias"))
        elif "bias" in ends:
            torch.addmm(bias, x, w, out=out)
        else:
            torch.mm(x, w, out=out)

    return timed(launch, offered)


def _measure_attention(
    offered: Sequence[Any], dtype: torch.dtype, b: int, m: int, n: int, heads: int, groups: int, d: int, masked: bool
) -> Callable[[Any], float]:
    from cortexflow.kernels.cuda.attention import attention as tiled
    from cortexflow.kernels.triton.prefill_attention import Config, attention

    q, k, v, out = (_random(b, s, h, d, dtype=dtype) for s, h in ((m, heads), (n, groups), (n, groups), (m, heads)))
    mask = torch.ones(b, 1, n, dtype=torch.bool, device="cuda") if masked else None
    scratch = torch.empty(1 << 22, device="cuda"), torch.zeros(8192, dtype=torch.int32, device="cuda")

    def launch(config: Any) -> None:
        if config == TILED:
            tiled(q, k, v, out, d**-0.5)
        else:
            attention(q, k, v, out, d**-0.5, mask, Config(*config), scratch)

    return timed(launch, offered)
