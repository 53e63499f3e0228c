"""The triton target: its launch plan on any machine, its actions on a GPU."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import cortexflow
from cortexflow.codegen import find_target
from cortexflow.compiler import lower
from cortexflow.errors import TargetError
from cortexflow.ir import Module, Type, Value, function, fused, ops, returns, run_module
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.models import ModelConfig, Signature, VLAModelType, create_model
from cortexflow.passes.plan import Plan
from cortexflow.passes.plan_buffers import plan_buffers
from cortexflow.weights import random_weights, stages_of
from tests.kernels.test_triton_pointwise import by_torch
from tests.models.cases import Batch, batches, case_folders, distance
from tests.models.openvla_cases import batch_of, requests, write_checkpoint

pytest.importorskip("triton")

from cortexflow.codegen.triton import build
from cortexflow.codegen.triton.claims import SCRATCH, skinny_config
from cortexflow.codegen.triton.executable import Layout, TritonExecutable
from cortexflow.codegen.triton.program import Program
from cortexflow.kernels.triton import segment_attention

WIDE = ModelConfig(vision_num_layers=1, num_encoder_layers=2, num_decoder_layers=2, vocab_size=512, max_token_len=48)


def plan_text(
    config: ModelConfig, dtype: str = "bf16", without: tuple[str, ...] = (), capability: int = 90, **signature: int
) -> tuple[str, int]:
    """The launch plan and the bytes of its arena."""
    stages, plan = planned(config, dtype, without, tuple(signature.items()))
    return Program(stages, plan, frozenset(without), capability=capability).text(), plan.peak


@cache
def planned(
    config: ModelConfig, dtype: str, without: tuple[str, ...], signature: tuple[tuple[str, int], ...]
) -> tuple[Module, Plan]:
    """The stages and their buffers; several tests look at the same."""
    chosen = Signature.of(config, **dict(signature))
    module, _ = lower(create_model(config), chosen, dtype, target="triton", without=without)
    stages = Module({f.name: f for f in module.stages}, {}, module.meta)
    return stages, plan_buffers(stages)


def launches(text: str, stage: str, scope: str) -> list[str]:
    """What the lines of one scope of a stage call, in their order."""
    method = text[text.index(f"def {stage}(") :].split("return None", maxsplit=1)[0]
    lines = [line.strip() for line in method.splitlines() if re.search(rf"# {re.escape(scope)}(\.|$)", line)]
    return ["copy" if ".copy_(" in line else line.split("(")[0] for line in lines]


LAYER_OF_FEW_ROWS = ["streaming.streaming", "segment_attention", *["streaming.streaming"] * 3]
LAYER_OF_SOME_ROWS = ["warpgroup.warpgroup", "segment_attention", *["warpgroup.warpgroup", "warpgroup.combine"] * 2]
LAYER_OF_SOME_ROWS.insert(4, "warpgroup.warpgroup")


@pytest.mark.parametrize(
    ("kind", "chunk", "layer"),
    [(VLAModelType.PI05, 10, LAYER_OF_FEW_ROWS), (VLAModelType.PI0, 10, LAYER_OF_FEW_ROWS),
     (VLAModelType.PI05, 50, LAYER_OF_SOME_ROWS), (VLAModelType.PI0, 50, LAYER_OF_SOME_ROWS)],
)  # fmt: skip
def test_a_decoder_layer_is_a_few_launches(kind: VLAModelType, chunk: int, layer: list[str]) -> None:
    """Up to 16 rows: five. Up to 64: seven, since a split product is added up by another, which norms as well."""
    text, _ = plan_text(ModelConfig(model_type=kind), prompt=48, chunk=chunk)
    first = ["modulated_norm" if kind is VLAModelType.PI05 else "rms_norm"] if layer is LAYER_OF_SOME_ROWS else []
    for i in range(18):
        found = launches(text, "transformer_decoder", f"expert.layers.{i}")
        assert found == [*([] if i else first), *layer], i


def test_before_hopper_the_decoder_has_no_kernel_of_hoppers() -> None:
    for capability in (80, 89):
        text, _ = plan_text(ModelConfig(), prompt=48, capability=capability)
        layer = launches(text, "transformer_decoder", "expert.layers.3")
        assert layer == ["skinny", "segment_attention", "skinny", "skinny", "skinny"]
    for capability in (80, 89, 100, 120):
        text, _ = plan_text(ModelConfig(), prompt=48, chunk=50, capability=capability)
        assert "warpgroup." not in text[text.index("class Policy") :]
        assert not any(form == "interleaved" for form in re.findall(r"^    'w\d+\w?': \('.*', '(\w+)'\),$", text, re.M))


def test_the_encoder_has_a_launch_for_every_product_and_norm_and_copies_nothing() -> None:
    text, _ = plan_text(ModelConfig(), prompt=48)
    attention = ["rms_norm", "torch.mm", "rope_and_cache", "prefill_attention.attention", "torch.addmm"]
    unit = ["rms_norm", "product.product", "torch.addmm"]
    for i in range(17):
        assert launches(text, "transformer_encoder", f"prefix.layers.{i}") == [*attention, *unit]
    vision = ["torch.addmm", "prefill_attention.attention", "torch.addmm", "layer_norm"]
    vision += ["torch._addmm_activation", "torch.addmm", "layer_norm"]
    assert launches(text, "transformer_encoder", "prefix.layers.17") == ["rms_norm", "torch.mm", "rope_and_cache"]
    for i in range(1, 27):
        assert launches(text, "vision_encoder", f"vision.layers.{i}") == vision


@pytest.mark.parametrize("switch", ["streaming", "epilogues", "joined"])
def test_what_is_switched_off_is_not_launched(switch: str) -> None:
    """The decoder and the encoder, each with the launches that stand in."""
    text, _ = plan_text(ModelConfig(), prompt=48, without=(switch,))
    decoder, encoder = (
        launches(text, f"transformer_{stage}", f"{part}.layers.3")
        for stage, part in (("decoder", "expert"), ("encoder", "prefix"))
    )
    if switch == "streaming":
        assert not {"streaming.streaming", "warpgroup.warpgroup", "thin"} & {*decoder}
        assert "thin(" not in text[text.index("class Policy") :]
    else:
        assert decoder == LAYER_OF_FEW_ROWS
    assert ("product.product" in encoder) is (switch != "epilogues")
    assert ("glu" in encoder) is (switch == "epilogues")
    assert ("rope_and_cache" in encoder) is (switch != "joined")
    if switch == "joined":  # the values' move is a copy, the rotations are two
        assert encoder[:6] == ["rms_norm", "torch.mm", "copy", "rope", "rope", "prefill_attention.attention"]


# ---- launched together ------------------------------------------------------------------------------


def rotations(change: str = "", batch: int = 1, angles: tuple[int, ...] = (1, 5, 8)) -> Module:
    """Queries and keys rotated, values moved, as a prefix does it; `change`: what is not as the kernel wants it.

    Six heads of queries, one of keys, one of values, 16 wide.
    """
    wide, table = Type("bf16", (batch, 5, 8 * 16)), Type("f32", angles)
    with function("f", x=wide, other=wide, c=table, s=table, d=table) as (f, [x, other, c, s, d]):
        qkv, second = ops.neg(x), ops.neg(other)
        heads = 5 if change == "columns left out" else 6
        v = ops.slice_(second if change == "other values" else qkv, axis=-1, start=7 * 16)
        q = ops.reshape(ops.slice_(qkv, axis=-1, stop=heads * 16), shape=(batch, 5, heads, 16))
        k = ops.reshape(ops.slice_(qkv, axis=-1, start=6 * 16, stop=7 * 16), shape=(batch, 5, 1, 16))
        q, k = ops.rope(q, c, s), ops.rope(k, d if change == "other angles" else c, s)
        returns(q=q, k=k, v=v, second=second)
    return Module({"f": f})


def rotated(module: Module, without: frozenset[str] = frozenset()) -> list[str]:
    text = Program(module, plan_buffers(module), without).text()
    body = text[text.index("def f(self)") :]
    return [line.split("(")[0].strip() for line in body.splitlines() if "rope" in line]


def test_rotations_and_the_move_to_the_cache_are_one_launch() -> None:
    assert rotated(rotations()) == ["rope_and_cache"]
    assert rotated(rotations(), frozenset({"joined"})) == ["rope", "rope"]


@pytest.mark.parametrize("angles", [(1, 5, 8), (3, 5, 8)])
def test_rotations_of_a_batch_are_one_launch(angles: tuple[int, ...]) -> None:
    assert rotated(rotations(batch=3, angles=angles)) == ["rope_and_cache"]
    assert rotated(rotations(batch=3, angles=angles), frozenset({"joined"})) == ["rope", "rope"]


def attending(change: str = "", batch: int = 1) -> Module:
    """Queries, keys and values of one product, and their attention to a cache; `change`: what is not as it must be."""
    rows, table, cache = 40, Type("f32", (1, 40, 128)), Type("bf16", (batch, 99, 1, 256))
    given = {"x": Type("bf16", (batch, rows, 1024)), "c": table, "s": table, "k": cache, "v": cache}
    with function("f", **given, m=Type("bool", (1, 1, 99 + rows))) as (f, [x, c, s, k, v, m]):
        qkv = ops.matmul(x, ops.weight(key="w", type=Type("bf16", (1024, 2560))))
        if change == "angles made behind the product":
            c = ops.neg(c)
        parts = [ops.slice_(qkv, axis=-1, start=a, stop=b) for a, b in ((0, 2048), (2048, 2304), (2304, 2560))]
        if change == "other values":
            parts[2] = ops.neg(parts[2])
        own = [ops.reshape(p, shape=(batch, rows, p.type.shape[-1] // 256, 256)) for p in parts]
        y = fused.rotated_attention_segments(own[0], k, v, *own[1:], c, s, m, scale=0.1, causal=False)
        returns(y=y, **({"q": ops.neg(own[0])} if change == "read elsewhere" else {}))
    return Module({"f": f})


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "change", ["", "joined", "read elsewhere", "other values", "angles made behind the product", "another card"]
)
def test_a_product_rotates_what_attention_alone_reads(change: str, batch: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(segment_attention, "_has_warpgroups", lambda: change != "another card")
    module, without = attending(change, batch), frozenset({"joined"} if change == "joined" else ())
    text = Program(module, plan_buffers(module), without).text()
    lines = [
        line for line in text[text.index("def f(self)") :].splitlines() if "warpgroup(" in line or "attention(" in line
    ]
    assert ["rotated=2304" in lines[0], "rotated=True" in lines[-1]] == [not change, not change]


def run_on_cpu(module: Module) -> None:
    """A plan without a kernel of ours, but for small ops, runs anywhere: to the interpreter's bits."""
    layout = Layout(module)
    scope: dict = {"__name__": "plan"}
    exec(layout.text, scope)
    scope["pointwise"] = by_torch
    arena = torch.full((layout.bytes["arena"],), 0xA5, dtype=torch.uint8)
    policy = scope["Policy"]({}, arena, *[(torch.empty(0), torch.ones(1))] * len(layout.scratches))
    generator = torch.Generator().manual_seed(0)
    given = {
        n: (torch.randn(t.shape, generator=generator) * 2).to(TORCH_DTYPES[t.dtype]) for n, t in module.inputs.items()
    }
    for name, value in module.funcs["f"].args.items():
        getattr(policy, layout.places[value]).copy_(given[name])
    policy.f()
    wanted = run_module(module, given, {})
    for name, value in module.funcs["f"].results.items():
        assert torch.equal(getattr(policy, layout.places[value]), wanted[name]), name


def test_chains_that_meet_late_run_side_by_side() -> None:
    """The first of them on a second stream, over a scratch of its own."""
    matrix = Type("f32", (3, 4))
    with function("f", x=matrix, y=matrix) as (f, [x, y]):
        chains = []
        for v in (x, y):
            chains.append(v)
            for _ in range(20):
                chains[-1] = ops.sub(ops.sin(chains[-1]), v)
        returns(z=ops.concat(*chains, axis=0))
    module = Module({"f": f})
    run_on_cpu(module)
    layout = Layout(module)
    body = layout.text[layout.text.index("def f(self)") :].splitlines()
    inside = [line for line in body if line.startswith(" " * 12)]
    assert layout.scratches == (SCRATCH, SCRATCH)
    assert len(inside) == 40 and body[2:4] == ["        with beside(self):", inside[0]]
    assert body.index("        join(self)") == len(body) - 3
    alone = Layout(module, frozenset({"branches"}))
    assert alone.scratches == (SCRATCH,) and "beside(self)" not in alone.text


@pytest.mark.parametrize(("kind", "state"), [(VLAModelType.PI05, []), (VLAModelType.PI0, ["thin"])])
def test_what_reads_only_inputs_is_launched_in_front(kind: VLAModelType, state: list[str]) -> None:
    """As methods of their own; the stages begin with what needs the stages before."""
    module, _ = lower(create_model(WIDE.with_(model_type=kind)), dtype="bf16", target="triton")
    layout = Layout(stages_of(module))
    assert layout.early == {f"transformer_{part}": f"early_transformer_{part}" for part in ("encoder", "decoder")}
    assert layout.scratches == (SCRATCH, 0)
    prompt, positions = ["embed", "pointwise"], ["pointwise", "copy", "pointwise", "embed", "embed"]
    assert launched(layout, "early_transformer_encoder") == [*prompt, "copy", "torch.cat", *positions]
    assert launched(layout, "early_transformer_decoder") == [*state, *positions, "torch.cat"]
    assert launched(layout, "transformer_encoder")[:3] == ["epilogue", "epilogue", "rms_norm"]
    assert launched(layout, "transformer_decoder")[:3] == ["copy", "for step in range", "thin"]
    off = Layout(stages_of(module), frozenset({"early"}))
    assert not off.early and off.scratches == (SCRATCH,) and "def early_" not in off.text
    whole = [launched(off, f"transformer_{part}") for part in ("encoder", "decoder")]
    assert whole[0][: len(prompt)] == prompt and whole[1][: len(state + positions)] == state + positions


def launched(layout: Layout, method: str) -> list[str]:
    """What every line of a method calls, behind its first one."""
    first, *lines = layout.text.split(f"def {method}(self) -> None:\n")[1].split("        return None")[0].splitlines()
    assert first == "        settle(self.scratch)", "what was launched before has ended"
    return ["copy" if ".copy_(" in line else line.strip().split("(")[0] for line in lines]


def test_parts_of_results_beside_have_a_scratch_of_their_own() -> None:
    """An early product whose k is split over programs."""
    rows, wide = Type("bf16", (1, 40, 2048)), Type("bf16", (1, 40, 1024))
    with function("first", x=wide) as (first, [x]):
        returns(h=ops.neg(x))
    with function("second", h=wide, y=rows) as (second, [h, y]):
        w = ops.weight(key="w", type=Type("bf16", (2048, 1024)))
        returns(z=ops.add(h, ops.matmul(y, w)))
    layout = Layout(Module({"first": first, "second": second}))
    assert launched(layout, "early_second") == ["warpgroup.warpgroup", "warpgroup.combine"]
    assert layout.scratches == (SCRATCH, SCRATCH)


@pytest.mark.parametrize("angles", [(3, 1, 8), (5, 8), (1, 8)])
def test_angles_that_are_no_table_of_the_tokens_are_left_to_the_library(angles: tuple[int, ...]) -> None:
    run_on_cpu(rotations(batch=3, angles=angles))


def test_small_ops_write_to_their_places() -> None:
    """Whole numbers, marks, every second entry, results over operands, values that a loop carries and swaps."""
    number, mark = Type("i32", (3, 4)), Type("bool", (3, 4))
    with function("f", x=number, y=number, m=mark) as (f, [x, y, m]):
        low, same = ops.lt(x, y), ops.eq(x, ops.scalar(1, "i32"))
        either = ops.not_(ops.or_(ops.and_(low, m), same))
        chosen = ops.where(either, ops.max_(x, y), ops.min_(ops.mul(x, y), ops.scalar(0, "i32")))
        wide = ops.concat(ops.sub(chosen, y), ops.mul(x, x), axis=1)
        half = ops.cast(ops.slice_(wide, axis=-1, step=2), dtype="f32")

        def step(i: Value, a: Value, b: Value, c: Value, d: Value) -> list[Value]:
            return [ops.add(b, c), a, ops.where(ops.lt(b, c), c, b), ops.add(d, ops.scalar(1, "i32"))]

        zero = ops.const(value=(0,) * 12, dtype="i32", shape=(3, 4))
        a, b, c, d = ops.loop([ops.sub(y, x), zero, ops.add(x, y), zero], 3, step)
        returns(either=either, wide=wide, half=half, a=a, b=b, c=c, d=d)
    module = Module({"f": f})
    run_on_cpu(module)
    text = Program(module, plan_buffers(module)).text()
    lines = text[text.index("def f(self)") :]
    assert "(torch." not in lines.replace("torch._foreach_copy_", ""), "no result is copied"
    assert lines.count("pointwise(") < 10, "ops one behind the other are one launch"


def summed(read_by: str, without: frozenset[str] = frozenset()) -> tuple[Module, list[str]]:
    """A residual sum of 50 rows and what is launched for it; `read_by`: what comes behind."""
    rows = Type("bf16", (50, 1024))
    with function("f", x=rows, r=rows) as (f, [x, r]):
        y = fused.matmul_residual(r, x, ops.weight(key="w", type=Type("bf16", (1024, 1024))))
        if read_by == "something between":
            r = ops.exp(r)
        normed = ops.neg(r) if read_by == "a norm of another" else y
        n = ops.layer_norm(normed, eps=1e-6) if read_by == "another norm" else ops.rms_norm(normed, eps=1e-6)
        returns(y=y, n=n, **({"r": r} if read_by == "something between" else {}))
    module = Module({"f": f})
    text = Program(module, plan_buffers(module), without).text()
    first, *lines = (line.strip() for line in text[text.index("def f(self)") :].splitlines()[1:-1])
    assert first == "settle(self.scratch)", "a stage begins when those before it have ended"
    return module, lines


@pytest.mark.parametrize(("gate", "settled"), [("weight", False), ("computed", True)])
@pytest.mark.parametrize("rows", [10, 50])
def test_what_a_kernel_reads_before_it_waits_is_there(rows: int, gate: str, settled: bool) -> None:
    """A gate that the launch before computes is not: the plan waits for it."""
    wide = Type("bf16", (rows, 1024))
    with function("f", x=wide, r=wide, c=Type("bf16", (1, 1024))) as (f, [x, r, c]):
        g = ops.weight(key="g", type=Type("bf16", (1024,))) if gate == "weight" else ops.act(c, kind="silu")
        w = ops.weight(key="w", type=Type("bf16", (1024, 1024)))
        returns(y=fused.matmul_gated_residual(r, x, w, g))
    module = Module({"f": f})
    text = Program(module, plan_buffers(module)).text()
    lines = [line.split("(")[0].strip() for line in text[text.index("def f(self)") :].splitlines()[2:-1]]
    assert ("settle" in lines) == settled
    assert not settled or lines.index("settle") == lines.index("epilogue") + 1


def test_a_norm_comes_with_the_sum_that_it_reads() -> None:
    _, lines = summed("a norm")
    assert [line.split("(")[0] for line in lines] == ["warpgroup.warpgroup", "warpgroup.combine"]
    assert "normed=" in lines[1] and "eps=1e-06" in lines[1]
    _, lines = summed("a norm", frozenset({"joined"}))
    assert [line.split("(")[0] for line in lines] == ["warpgroup.warpgroup", "warpgroup.combine", "rms_norm"]


@pytest.mark.parametrize("read_by", ["another norm", "a norm of another", "something between"])
def test_other_ops_behind_a_sum_are_launched_apart(read_by: str) -> None:
    _, lines = summed(read_by)
    combine = next(line for line in lines if line.startswith("warpgroup.combine"))
    assert "normed=" not in combine
    assert any(re.match("(rms|layer)_norm", line) for line in lines)


def product_of(rows: int, k: int, n: int, what: str = "matmul_residual") -> list[str]:
    """What is launched for one product; `what`: matmul, matmul_residual, or matmul_glu (n: outputs)."""
    wide = 2 * n if what == "matmul_glu" else n
    given = {"x": Type("bf16", (rows, k)), "r": Type("bf16", (rows, n))}
    with function("f", **given) as (f, [x, r]):
        w = ops.weight(key="w", type=Type("bf16", (k, wide)))
        y = {
            "matmul": lambda: ops.matmul(x, w),
            "matmul_residual": lambda: fused.matmul_residual(r, x, w),
            "matmul_glu": lambda: fused.matmul_glu(x, w, kind="silu", width=n),
        }[what]()
        returns(y=y, r=ops.neg(r))
    module = Module({"f": f})
    text = Program(module, plan_buffers(module)).text()
    return [line.split("(")[0].strip() for line in text[text.index("def f(self)") :].splitlines()[2:-1]]


@pytest.mark.parametrize(
    ("rows", "k", "n", "what", "kernel"),
    [
        (16, 2048, 1024, "matmul_residual", "streaming.streaming"),
        (16, 8192, 1024, "matmul_residual", "streaming.streaming"),
        (16, 16384, 1024, "matmul_residual", "product.product"),  # a program's weights: more than shared memory holds
        (16, 3072, 1024, "matmul_residual", "product.product"),  # not a power of two
        (1, 4096, 11008, "matmul_glu", "product.product"),
        (17, 2048, 1024, "matmul_residual", "warpgroup.combine"),
        (128, 2048, 1024, "matmul_residual", "warpgroup.combine"),
        (129, 2048, 1024, "matmul_residual", "torch.addmm"),
        (50, 2048, 1152, "matmul_residual", "torch.addmm"),  # sums are added up over rows of a power of two
        (50, 2048, 1152, "matmul", "torch.mm"),
        (50, 2048, 2304, "matmul", "warpgroup.warpgroup"),  # not split
        (50, 1152, 2304, "matmul", "torch.mm"),  # k is not in whole chunks
        (50, 1024, 4096, "matmul_glu", "warpgroup.warpgroup"),
        (50, 32768, 4096, "matmul_glu", "product.product"),
        (129, 1024, 4096, "matmul_glu", "glu"),
        (320, 4096, 11008, "matmul_glu", "glu"),
        (560, 2048, 16384, "matmul_glu", "product.product"),
    ],
)  # fmt: skip
def test_a_product_goes_to_a_kernel_that_it_suits(rows: int, k: int, n: int, what: str, kernel: str) -> None:
    assert kernel in product_of(rows, k, n, what)


def test_a_norm_onto_what_the_sum_reads_is_launched_apart() -> None:
    """The product's input may be overwritten only when all of the product is done."""
    module, _ = summed("a norm")
    plan = plan_buffers(module)
    product = next(op for op in module.funcs["f"].block.ops if op.name == "fused.matmul_residual")
    norm = next(op for op in module.funcs["f"].block.ops if op.name == "rms_norm")
    assert not plan.meet(norm.out, product.inputs[0])
    plan.offsets[norm.out] = plan.offsets[product.inputs[0]]
    assert plan.meet(norm.out, product.inputs[0])
    lines = Program(module, plan).text()
    assert "normed=" not in lines and "        rms_norm(" in lines


@pytest.mark.parametrize("chunk", [10, 50])
@pytest.mark.parametrize("kind", [VLAModelType.PI05, VLAModelType.PI0])
def test_every_buffer_lies_in_the_arena(kind: VLAModelType, chunk: int) -> None:
    text, peak = plan_text(ModelConfig(model_type=kind), prompt=48, chunk=chunk)
    scope: dict = {}
    exec("import torch\n" + text[text.index("BUFFERS = {") : text.index("\nclass Policy")], scope)
    for offset, dtype, shape, strides in scope["BUFFERS"].values():
        last = sum((d - 1) * s for d, s in zip(shape, strides, strict=True)) + 1
        assert offset >= 0 and offset + last * dtype.itemsize <= peak


def test_a_cpu_is_refused_by_name() -> None:
    with pytest.raises(TargetError, match=r"NVIDIA GPU.*device='cuda'.*'torch' or 'onnx'"):
        build(Module(), {}, torch.device("cpu"))
    assert find_target("triton").name == "triton"


def test_a_norm_sees_whole_rows_and_tiles_fit_the_card() -> None:
    """Splitting k would norm each part alone; a tile beyond the shared memory would not launch."""
    assert skinny_config(1024, 4096, glu=False, norm=False) == (16, 4, 4, 4)
    norms = [skinny_config(1024, k, glu, True) for k in (256, 1024, 2048, 4096) for glu in (False, True)]
    assert all(c is None or c[1] == 1 for c in norms)
    assert skinny_config(1024, 4096, glu=True, norm=True) is None


def test_early_stop_is_refused() -> None:
    with function("f", x=Type("f32", (4,))) as (f, [x]):
        (y,) = ops.loop([x], 3, lambda i, c: [ops.scalar(True, "bool"), c], early_stop=True)
        returns(y=y)
    module = Module({"f": f})
    with pytest.raises(TargetError, match="cannot stop a loop early"):
        Program(module, plan_buffers(module)).text()


def strided() -> Module:
    """Ops of ours that read every second column, a column as a matrix, columns of a table, every second entry."""
    with function("f", x=Type("f32", (4, 16)), y=Type("f32", (4, 1)), s=Type("f32", (1, 16))) as (f, [x, y, s]):
        x, y, s = (ops.neg(v) for v in (x, y, s))
        half = ops.slice_(x, axis=-1, step=2)
        angles = ops.reshape(ops.slice_(x, axis=-1, start=5, stop=8), shape=(1, 4, 3))
        turned = ops.rope(ops.slice_(ops.reshape(x, shape=(1, 4, 2, 8)), axis=-1, stop=6), angles, angles)
        n = ops.add(ops.rms_norm(half, eps=1e-6), ops.broadcast_to(y, shape=(4, 8)))
        n = ops.add(n, ops.slice_(s, axis=-1, step=2))
        both = ops.concat(ops.reshape(half, shape=(1, 4, 8)), ops.reshape(n, shape=(1, 4, 8)), axis=1)
        returns(n=n, both=both, turned=turned)
    return Module({"f": f})


def test_kernels_are_given_dense_rows() -> None:
    """A kernel steps from entry to entry of a row by one: what the plan lays out otherwise is copied before."""
    module = strided()
    text = Program(module, plan_buffers(module)).text()
    body = text[text.index("def f(self)") :]
    scope: dict = {}
    exec("import torch\n" + text[text.index("BUFFERS = {") : text.index("\nclass Policy")], scope)
    read = [line for line in body.splitlines() if re.match(r" +(rms_norm|epilogue|rope)\(", line)]
    assert len(read) == 4
    for line in read:
        for name, dense in re.findall(r"self\.(b\d+)(\.contiguous\(\))?", line):
            assert dense or scope["BUFFERS"][name][3][-1] == 1, line
    (rope,) = (line for line in read if "rope(" in line)
    assert rope.count(".contiguous()") == 2, "angles are dense from row to row"


def test_a_token_behind_two_caches_takes_eight_launches_a_layer() -> None:
    """And reads the weights of the prefill: none is there in a second form."""
    text, _ = plan_text(ModelConfig.released(VLAModelType.OPENVLA), prompt=21)
    layer = ["rms_norm", "product.product", "rope_and_cache", "token_attention", "product.product"]
    layer += ["rms_norm", "product.product", "product.product"]
    for i in range(32):
        found = launches(text, "transformer_decoder", f"decode.layers.{i}")
        assert found == layer, i
        found = launches(text, "transformer_encoder", f"prefill.layers.{i}")
        assert found[2:4] == ["rope_and_cache", "prefill_attention.attention"]
    keys = re.findall(r"^    'w\d+\w?': \('(.*)', '\w+'\),$", text, re.M)
    assert len(keys) == len(set(keys))


# ---- on a GPU ---------------------------------------------------------------------------------------

BATCHES = [b for folder in case_folders() for b in batches(folder)]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: f"{b.case.name}-{b.name}")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_cases(batch: Batch, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    compiled = cortexflow.compile(batch.case, "triton", device="cuda", dtype=dtype, batch=batch.size, progress=False)
    actions, wanted = compiled(**batch.inputs).cpu(), batch.outputs["actions"]
    if dtype == "float32":
        assert distance(actions, wanted) < 1e-3
    else:
        assert torch.cosine_similarity(actions.double().flatten(), wanted.double().flatten(), 0) > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
def test_token_ids_are_those_of_the_published_code(
    dtype: str, together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly in float32, and in bfloat16, where these requests' likeliest tokens stand clear of the next."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    checkpoint, slots = write_checkpoint(tmp_path / "tiny"), max(r.tokens.shape[1] for r in requests())
    size = len(requests()) if together else 1
    compiled = cortexflow.compile(
        checkpoint, "triton", device="cuda", dtype=dtype, batch=size, prompt=slots, progress=False
    )
    groups = [list(requests())] if together else [[r] for r in requests()]
    for group in groups:
        found = compiled(**batch_of(group, slots))
        for i, request in enumerate(group):
            ids = found["token_ids"][i].cpu().flatten().long()
            assert torch.equal(ids, request.outputs["generated_ids"].flatten().long())


def observation(compiled: cortexflow.Compiled, seed: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(t.shape, generator=generator).clamp(-1, 1) for n, t in compiled.inputs.items()}
    made["tokens"] = torch.randint(3, 500, compiled.inputs["tokens"].shape, generator=generator)
    made["token_mask"] = (torch.arange(made["tokens"].shape[1]) < length).expand(made["tokens"].shape)
    made["image_mask"] = torch.ones(compiled.inputs["image_mask"].shape, dtype=torch.bool)
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [VLAModelType.PI05, VLAModelType.PI0])
@pytest.mark.parametrize("chunk", [10, 50])
def test_full_width(kind: VLAModelType, chunk: int) -> None:
    """No farther from float32 than 1.5 times eager bfloat16; runtime lengths and masks; the same bits every time."""
    config = WIDE.with_(model_type=kind, chunk_size=chunk)
    model = create_model(config)
    weights = random_weights(model.build(Signature.of(config)))
    triton, exact, eager = (
        cortexflow.compile(model, target, weights=weights, device="cuda", dtype=dtype, progress=False)
        for target, dtype in (("triton", "bfloat16"), ("torch", "float32"), ("torch", "bfloat16"))
    )
    for seed, length in ((0, 48), (1, 7), (2, 30)):
        given = observation(triton, seed, length)
        if seed == 2:
            given["image_mask"][:, 1] = False
        ours, wanted, theirs = (c(**given).double() for c in (triton, exact, eager))
        far, limit = (float((x - wanted).norm() / wanted.norm()) for x in (ours, theirs))
        assert far < 1.5 * limit and torch.cosine_similarity(ours.flatten(), wanted.flatten(), 0) > 0.999
        assert all(torch.equal(triton(**given).double(), ours) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [VLAModelType.PI05, VLAModelType.PI0])
def test_early_functions_change_no_bit(kind: VLAModelType) -> None:
    """In a whole call, in stages called one by one, and without a graph; whatever the arena held before."""
    model = create_model(WIDE.with_(model_type=kind, chunk_size=10))
    weights = random_weights(model.build(Signature.of(model.config)))
    switched: list[tuple[str, ...]] = [("early",), (), ("cuda_graph",), ("overlap",)]
    plain, *others = (
        cortexflow.compile(
            model, "triton", weights=weights, device="cuda", dtype="bfloat16", without=without, progress=False
        )
        for without in switched
    )
    for seed, length in ((0, 48), (1, 7)):
        given = observation(plain, seed, length)
        wanted = plain(**given)
        for compiled in others:
            for fill in (0xFF, 0x7F, 0x00):  # NaN and -1, large numbers, zeros
                poison(compiled, fill)
                assert all(torch.equal(compiled(**given), wanted) for _ in range(10))
            values = {name: torch.as_tensor(x) for name, x in given.items()}
            for stage in compiled.module.stages:
                poison(compiled, 0xFF)
                values |= compiled.run_stage(stage.name, values)
            assert torch.equal(values["actions"], wanted)


def poison(compiled: cortexflow.Compiled, fill: int) -> None:
    """Fill every buffer of the arena."""
    executable = compiled.executable
    assert isinstance(executable, TritonExecutable)
    for name, place in vars(executable._policy).items():
        if re.fullmatch(r"b\d+", name):
            extent = 1 + sum((n - 1) * s for n, s in zip(place.shape, place.stride(), strict=True))
            place.as_strided((extent,), (1,)).view(torch.uint8).fill_(fill)


@pytest.mark.gpu
def test_strided_values_on_a_gpu() -> None:
    module, device = strided(), torch.device("cuda")
    inputs = {n: torch.randn(t.shape) for n, t in module.inputs.items()}
    wanted = run_module(module, inputs, {})
    for name, found in build(module, {}, device).run(inputs).items():
        torch.testing.assert_close(found.cpu(), wanted[name], rtol=1e-5, atol=1e-5)
