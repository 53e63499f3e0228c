"""Products as launches: which kernel, in which form of the weight, with which epilogue, and the norms beside them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from cortexflow.codegen.triton.claims import (
    SCRATCH,
    SOME_ROWS,
    STREAMED,
    grouped,
    row_count,
    skinny_config,
    stored,
    streams,
)
from cortexflow.codegen.triton.configs import (
    LIBRARY,
    LIBRARY_PARTS,
    LIBRARY_ROWS,
    TILED,
    multiplying,
    resident,
    segmented,
    streamed,
    warped,
)
from cortexflow.ir.core import Op, Value

if TYPE_CHECKING:
    from cortexflow.codegen.triton.program import Stage

Rule = Callable[["Stage", Op, str], list[str]]

THIN = 1 << 16  # entries of a weight that `kernels/triton/thin.py` is made for

ROLES = {
    "fused.norm_matmul": ("x", "w"),
    "fused.norm_glu": ("x", "w"),
    "fused.modulated_norm_matmul": ("x", "scale", "shift", "w"),
    "fused.modulated_norm_glu": ("x", "scale", "shift", "w"),
    "fused.matmul_residual": ("r", "x", "w"),
    "fused.matmul_gated_residual": ("r", "x", "w", "gate"),
}


def _few(stage: Stage, op: Op, x: int, w: int) -> bool:
    return "streaming" not in stage.program.without and streams(op, x, w)


def _some(stage: Stage, op: Op, x: int, w: int, glu: bool = False, whole: bool = False) -> bool:
    """Warpgroup instructions are Hopper's alone."""
    hopper = stage.program.capability // 10 == 9
    return hopper and "streaming" not in stage.program.without and grouped(op, x, w, glu, whole)


def affine(stage: Stage, norm: Op) -> list[str]:
    return [f"{n}={stage.row(v)}" for n, v in zip(("scale", "shift"), norm.inputs[1:], strict=False)]


def normed(stage: Stage, op: Op, out: str, more: str = "") -> str:
    params = affine(stage, op) + ([more] if more else [])
    name = op.name.removeprefix("fused.")
    return f"{name}({stage.flat(op.inputs[0])}, {', '.join([f'rows({out})', repr(op.attrs['eps']), *params])})"


# ---- products of few rows ----------------------------------------------------------------------------


def _streamed(stage: Stage, op: Op, out: str) -> list[str]:
    given = dict(zip(ROLES[op.name], op.inputs, strict=True))
    glu, norm = op.name.endswith("glu"), "eps" in op.attrs
    parts = [stage.flat(given["x"]), stage.weight(given["w"], "rows"), f"rows({out})"]
    parts += [f"{k}={stage.row(given[k])}" for k in ("gate", "scale", "shift") if k in given]
    if "r" in given:
        parts.append(f"residual={stage.flat(given['r'])}")
    if norm:
        parts.append(f"eps={op.attrs['eps']!r}")
    if glu:
        parts.append(f"glu=True, act={op.attrs['kind']!r}")
    k, n = given["w"].type.shape
    early = stage.settled(*(given.get(name) for name in ("gate", "scale", "shift")))
    config = _resident(stage, op)
    if config and (op in stage.squares or not norm):
        if norm:
            parts.append(f"squares=resident.row_squares(self.scratch, {stage.squares[op]})")
        elif sums := _square_sums(stage, op, n // config.mine):
            parts.append(f"new_squares={sums}")
        if op in stage.rotating:
            early = early or stage.settled(*stage.rotating[op].inputs[5:7])
            parts.append(_rotation(stage, op))
        return [*early, f"resident.streaming({', '.join(parts)}, config=resident.{config!r})"]
    if op in stage.rotating:  # nobody hands it sums
        stage.rotating.pop(stage.rotating.pop(op))
    if stage.program.capability >= 90:
        return [
            *early,
            f"streaming.streaming({', '.join(parts)}, config=streaming.{streamed(stage, op, n, k, glu, norm)!r})",
        ]
    return [*early, f"skinny({', '.join(parts)}, scratch=self.scratch, config={skinny_config(n, k, glu, norm)})"]


def _resident(stage: Stage, op: Op) -> Any:
    """The variant of a product of few rows that leaves room for its neighbours; None where there is none."""
    given, glu = dict(zip(ROLES[op.name], op.inputs, strict=True)), op.name.endswith("glu")
    if not _few(stage, op, op.inputs.index(given["x"]), op.inputs.index(given["w"])):
        return None
    k, n = given["w"].type.shape
    return resident(stage, op, n // (1 + glu), k, glu, "eps" in op.attrs, "scale" in given)


def _square_sums(stage: Stage, op: Op, count: int) -> str | None:
    """Where an op's kernel leaves sums of its rows' squares, `count` a row, for the norm's product launched next."""
    cast = stage.casts.get(op, op)
    reader = next((o for o in stage.behind(op) if o is not cast), op)
    fits = reader.name in STREAMED and reader.inputs[0] is cast.out and _resident(stage, reader) and count % 4 == 0
    if not fits or not stage.share_scratch(op, reader):
        return None
    stage.squares[reader] = count
    return f"resident.row_squares(self.scratch, {count})"


def _rotation(stage: Stage, product: Op) -> str:
    """The angles, and how many columns they rotate: queries and keys, not values."""
    _, _, _, _, v, cosine, sine, _ = stage.rotating[product].inputs
    rotated = product.out.type.shape[-1] - v.type.shape[-1]
    return f"angles=({stage.read(cosine, 3)}, {stage.read(sine, 3)}), rotated={rotated}"


def _warped(stage: Stage, op: Op, out: str, x: Value, w: Value, glu: bool = False) -> list[str]:
    """A product of up to 128 rows, whole."""
    k, n = w.type.shape
    config = warped(stage, op, n // (1 + glu), k, glu)
    if config.split > 1:
        return [*_parts(stage, x, w, config), f"warpgroup.combine(self.scratch[0], rows({out}), {config.split})"]
    unit = f"glu=True, act={op.attrs['kind']!r}, " if glu else ""
    if op in stage.rotating:
        unit = f"{_rotation(stage, op)}, "
    operands = f"{stage.flat(x)}, {stage.weight(w, 'interleaved')}, rows({out})"
    return [f"warpgroup.warpgroup({operands}, {unit}config=warpgroup.{config!r})"]


def can_rotate(stage: Stage, product: Op, attention: Op) -> bool:
    """Whether a product's kernel can rotate queries and keys, and the attention's kernel leave them as they are."""
    b, m, heads, d = attention.inputs[0].type.shape
    if product.name in STREAMED and not product.name.endswith("glu") and _resident(stage, product):
        from cortexflow.kernels.cuda.segment_attention import fits

        return fits(b, m, heads, d, attention.inputs[1].type.shape[1], SCRATCH)
    if product.name != "matmul" or not _some(stage, product, 0, 1):
        return False
    from cortexflow.kernels.gluon.split_attention import Split
    from cortexflow.kernels.gluon.warpgroup import rotates

    k, n = product.inputs[1].type.shape
    suits = rotates(n, d // 2, warped(stage, product, n, k, False))
    return suits and isinstance(segmented(stage, attention), Split)


def _parts(stage: Stage, x: Value, w: Value, config: Any) -> list[str]:
    """A product's parts of k, to the scratch."""
    scratch = f"self.scratch[0].view(-1, {w.type.shape[1]})"
    operands = f"{stage.flat(x)}, {stage.weight(w, 'interleaved')}, {scratch}"
    return [f"warpgroup.warpgroup({operands}, config=warpgroup.{config!r})"]


def _combined(stage: Stage, op: Op, out: str, r: Value, x: Value, w: Value, gate: Value | None) -> list[str]:
    """A product of up to 128 rows added to a residual; the norm that follows comes with the addition."""
    k, n = w.type.shape
    config = warped(stage, op, n, k, False)
    parts = [f"self.scratch[0], rows({out}), {config.split}, residual={stage.flat(r)}"]
    early = [gate]
    if gate is not None:
        parts.append(f"gate={stage.row(gate)}")
    if norm := stage.take_norm(op, "fused.modulated_norm", "rms_norm"):
        early += norm.inputs[1:]
        parts += [f"normed=rows({stage.name(norm.out)}), eps={norm.attrs['eps']!r}", *affine(stage, norm)]
    return [*stage.settled(*early), *_parts(stage, x, w, config), f"warpgroup.combine({', '.join(parts)})"]


# ---- products of many rows ---------------------------------------------------------------------------


def _product(stage: Stage, op: Op, out: str) -> list[str]:
    x, w = op.inputs
    wider = (x.type.dtype, op.out.type.dtype) in (("bf16", "f32"), ("f16", "f32"))
    if len(w.type.shape) != 2 or not (wider or op.out.type.dtype == x.type.dtype):
        return stage.copied(op, out)
    if wider:
        return _multiplied(stage, op, out, x, w, lambda _: stage.copied(op, out))
    if small := _thin(stage, op, out, x, w):
        return small
    if _some(stage, op, 0, 1):
        return _warped(stage, op, out, x, w)
    return _multiplied(stage, op, out, x, w, lambda given: [f"torch.mm({given}, out=rows({out}))"])


def is_thin(stage: Stage, op: Op) -> bool:
    """Whether a product is one for `kernels/triton/thin.py`."""
    if op.name not in ("matmul", "fused.linear", "fused.linear_act", "fused.linear_residual", "fused.matmul_residual"):
        return False
    x, w = op.inputs["residual" in op.name :][:2]
    small = len(w.type.shape) == 2 and stored(w) and w.type.size <= THIN and row_count(x) <= SOME_ROWS
    return small and w.type.dtype == op.out.type.dtype == "f32" and "streaming" not in stage.program.without


def _thin(
    stage: Stage, op: Op, out: str, x: Value, w: Value, bias: Value | None = None, **ends: str
) -> list[str] | None:
    """A small product in float32, which the library's kernels are slow to start for."""
    if not is_thin(stage, op):
        return None
    from cortexflow.kernels.triton.thin import square_sums

    if bias is not None:
        ends["bias"] = stage.row(bias)
    if sums := _square_sums(stage, op, square_sums(w.type.shape[1])):
        ends["squares"] = sums
    given = "".join(f", {name}={value}" for name, value in ends.items())
    return [*stage.settled(bias), f"thin({stage.flat(x)}, {stage.name(w)}, rows({out}){given})"]


def _linear(stage: Stage, op: Op, out: str) -> list[str]:
    x, w, b = op.inputs
    bias = stage.row(b)
    if small := _thin(stage, op, out, x, w, b):
        return small

    def library(given: str) -> list[str]:
        return [f"torch.addmm({bias}, {given}, out=rows({out}))"]

    return _multiplied(stage, op, out, x, w, library, f"bias={bias}")


def _linear_act(stage: Stage, op: Op, out: str) -> list[str]:
    x, w, b = op.inputs
    kind, bias, flat = op.attrs["kind"], stage.row(b), f"rows({out})"
    if small := _thin(stage, op, out, x, w, b, act=repr(kind)):
        return small

    def library(given: str) -> list[str]:
        if kind == "gelu_tanh" and "epilogues" not in stage.program.without and op.out.type.dtype in ("bf16", "f16"):
            return [f"torch._addmm_activation({bias}, {given}, use_gelu=True, out={flat})"]  # its GELU is the tanh form
        return [f"torch.mm({given}, out={flat})", f"epilogue({flat}, {flat}, bias={bias}, act={kind!r})"]

    return _multiplied(stage, op, out, x, w, library, f"bias={bias}, act={kind!r}")


def _linear_residual(stage: Stage, op: Op, out: str) -> list[str]:
    r, x, w, b = op.inputs
    if small := _thin(stage, op, out, x, w, b, residual=stage.flat(r)):
        return small

    def library(given: str) -> list[str]:
        product = f"torch.addmm({stage.flat(r)}, {given}, out={flat})"
        if norm := stage.take_norm(op, "layer_norm", "rms_norm"):
            return [product, normed(stage, norm, stage.name(norm.out), f"bias={stage.name(b)}")]
        return [product, f"epilogue({flat}, {flat}, bias={stage.name(b)})"]

    flat = f"rows({out})"
    ends = f"bias={stage.name(b)}, residual={stage.flat(r)}"
    return _multiplied(stage, op, out, x, w, library, ends, sums=True)


def _matmul_residual(stage: Stage, op: Op, out: str) -> list[str]:
    r, x, w = op.inputs
    if _few(stage, op, 1, 2):
        return _streamed(stage, op, out)
    if _some(stage, op, 1, 2, whole=True):
        return _combined(stage, op, out, r, x, w, None)
    if small := _thin(stage, op, out, x, w, residual=stage.flat(r)):
        return small

    def library(given: str) -> list[str]:
        return [f"torch.addmm({stage.flat(r)}, {given}, out=rows({out}))"]

    return _multiplied(stage, op, out, x, w, library, f"residual={stage.flat(r)}", sums=True)


def _matmul_gated_residual(stage: Stage, op: Op, out: str) -> list[str]:
    r, x, w, gate = op.inputs
    if _few(stage, op, 1, 2):
        return _streamed(stage, op, out)
    if _some(stage, op, 1, 2, whole=True):
        return _combined(stage, op, out, r, x, w, gate)
    # the result may stand where the residual stood: the product needs a place of its own
    product = f"torch.mm({stage.flat(x)}, {stage.name(w)})"
    ends = f"residual={stage.flat(r)}, gate={stage.row(gate)}"
    if norm := stage.take_norm(op, "fused.modulated_norm", "rms_norm"):
        return _summed(stage, norm, product, out, ends, 1)
    return [f"epilogue({product}, rows({out}), {ends})"]


def _matmul_glu(stage: Stage, op: Op, out: str) -> list[str]:
    x, w = op.inputs
    if _some(stage, op, 0, 1, glu=True):
        return _warped(stage, op, out, x, w, glu=True)
    k, n = w.type.shape
    config = multiplying(stage, x.type.dtype, row_count(x), n // 2, k, "pairs", x.type.dtype)
    operands, act = f"{stage.flat(x)}, {stage.weight(w, 'pairs')}", f"act={op.attrs['kind']!r}, pairs=True"
    if config != LIBRARY:
        return [f"product.product({operands}, rows({out}), {act}, config=product.{config!r})"]
    both = f"halves(self.scratch, rows({out}))"  # the library's product of pairs, the unit behind it
    return [f"torch.mm({operands}, out={both})", f"glu({both}, rows({out}), {act})"]


def _config(stage: Stage, op: Op, x: Value, w: Value) -> Any:
    """The variant of a product with its epilogue."""
    k, n = w.type.shape
    what = op.name.removeprefix("fused.")
    if op.attrs.get("kind", "gelu_tanh") != "gelu_tanh":  # the one activation that the library has
        what += f" {op.attrs['kind']}"
    return multiplying(stage, x.type.dtype, row_count(x), n, k, what, op.out.type.dtype, stored(w))


def _multiplied(
    stage: Stage,
    op: Op,
    out: str,
    x: Value,
    w: Value,
    library: Callable[[str], list[str]],
    ends: str = "",
    sums: bool = False,
) -> list[str]:
    """A product with its epilogue: in a kernel of ours, or as `library` has it of its operands, whichever is faster.

    `sums`: it is added to a residual, so that a norm behind it may add the parts of k.
    """
    config = _config(stage, op, x, w)
    if config[:1] == TILED and (lines := _tiled(stage, op, out, x, w, config, ends)):
        return lines
    if config == LIBRARY_ROWS or config[:1] == TILED:
        return library(f"{stage.flat(x)}, {stage.weight(w, 'rows')}.t()")
    operands = f"{stage.flat(x)}, {stage.name(w)}"
    split = config[1] if config == LIBRARY_PARTS else 1 if config == LIBRARY else config.split
    norm = stage.take_norm(op, "layer_norm", "rms_norm", "fused.modulated_norm") if sums and split > 1 else None
    if config == LIBRARY or (config == LIBRARY_PARTS and norm is None):
        return library(operands)
    ours = f"{operands}, rows({out}), {{}}config=product.{config!r}"
    if norm is None:
        ends += ", scratch=self.scratch[0]" if split > 1 else ""
        return [f"product.product({ours.format(f'{ends}, '.lstrip(', '))})"]
    parts = f"product.parted({operands}, self.scratch[0], {split})"
    if config != LIBRARY_PARTS:
        parts = f"product.product({ours.format('scratch=self.scratch[0], finish=False, ')})"
    return _summed(stage, norm, parts, out, ends, split)


def _summed(stage: Stage, norm: Op, parts: str, out: str, ends: str, split: int) -> list[str]:
    """The sum of a product's parts of k with the norm that follows."""
    more = [f"parts={split}"] * (split > 1) + ["centred=True"] * (norm.name == "layer_norm") + affine(stage, norm)
    places = f"rows({out}), rows({stage.name(norm.out)}), {norm.attrs['eps']!r}"
    return [f"summed_norm({', '.join([parts, places, ends, *more])})"]


def _tiled(stage: Stage, op: Op, out: str, x: Value, w: Value, config: Any, ends: str) -> list[str] | None:
    """A product of `kernels/cuda`, with the layer norms ahead and behind it that need no launch of their own."""
    of, normed = stage.folded.get(x, (x, ""))
    if normed:
        rows = stage.weight(w, "rows").removeprefix("self.")
        sums = stage.program.sums.setdefault(rows, f"s{len(stage.program.sums)}")
        ends += f", normed=({normed.format(sums=f'self.{sums}')})"
    operands = f"{stage.flat(of)}, {stage.weight(w, 'rows')}, rows({out})"
    if config.split > 1:
        norm = stage.take_norm(op, "layer_norm", "rms_norm")
        if norm is None:
            return None
        parts = f"tiled.product({operands}, scratch=self.scratch[0], config=tiled.{config!r})"
        return _summed(stage, norm, parts, out, ends, config.split)
    if size := _folds(stage, op, config):
        ends += f", new_stats=self.scratch[0][:{size}]"
    return [f"tiled.product({operands}, {ends}, config=tiled.{config!r})"]


def _folds(stage: Stage, op: Op, config: Any) -> int:
    """Numbers of the stats by which the product behind the next norm can norm its rows itself; 0 where it cannot.

    Nothing is launched in between, nobody else reads what is normed, and the sum is needed later, so that it stays.
    """
    from cortexflow.kernels.cuda.product import MOST_STATS, stats_size

    behind, n = [*islice(stage.behind(op), 2)], op.out.type.shape[-1]
    if len(behind) < 2 or not op.name.endswith("residual") or "joined" in stage.program.without:
        return 0
    norm, reader = behind
    suits = norm.name == "layer_norm" and tuple(norm.inputs) == (op.out,) and n <= MOST_STATS * config.columns
    suits = suits and reader.name in ("fused.linear", "fused.linear_act") and reader.inputs[0] is norm.out
    suits = suits and sum(norm.out is v for o in stage.func.block.walk() for v in o.inputs) == 1
    suits = suits and any(op.out in o.inputs for o in stage.after[reader])
    suits = suits and stage.share_scratch(op, reader)
    if not suits or _config(stage, reader, *reader.inputs[:2])[:1] != TILED:
        return 0
    stage.done.add(norm)
    size = stats_size(row_count(op.out), n, config)
    stage.folded[norm.out] = op.out, f"self.scratch[0][:{size}], {{sums}}, {norm.attrs['eps']!r}"
    return size


PRODUCTS: dict[str, Rule] = {
    **dict.fromkeys(STREAMED, _streamed),
    "fused.matmul_glu": _matmul_glu,
    "fused.linear": _linear,
    "fused.linear_act": _linear_act,
    "fused.linear_residual": _linear_residual,
    "fused.matmul_residual": _matmul_residual,
    "fused.matmul_gated_residual": _matmul_gated_residual,
    "matmul": _product,
}
