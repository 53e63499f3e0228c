"""`compile` from everything that it takes, what can be seen of the result, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cortexflow
from cortexflow import CheckpointError, ConfigError, InputError, TargetError
from cortexflow.checkpoints import open_checkpoint
from cortexflow.codegen import TARGETS, Target, register_target
from cortexflow.compiler import DTYPES, lower, switches
from cortexflow.ir import Module, Type, dump, function, named, ops, parse, returns, run_module
from cortexflow.models import MODELS, ModelConfig, Signature, VLAModel, create_model, register_model
from cortexflow.passes import PIPELINE
from cortexflow.passes.pipeline import pipeline
from cortexflow.weights import Weights
from tests.checkpoints.test_realtime_vla import to_realtime_vla
from tests.models.cases import DATA, Batch, batches, distance

CASE = DATA / "pi0_tiny2"
ACTIONS = 1e-4


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def batch() -> Batch:
    return batches(CASE)[0]


@pytest.fixture(scope="module")
def compiled() -> cortexflow.Compiled:
    return cortexflow.compile(CASE, progress=False)


def actions(compiled: cortexflow.Compiled, inputs: Mapping[str, Tensor]) -> Tensor:
    found = compiled(**inputs)
    assert isinstance(found, Tensor)
    return found


def graph(dtype: str = "f32") -> tuple[Module, Mapping[str, Tensor]]:
    model, weights = cortexflow.load_model(CASE)
    return model.build(Signature.of(model.config), dtype), weights


# ---- what it takes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [str, Path, lambda path: path / "model.safetensors", open_checkpoint])
def test_from_a_checkpoint(form: Any, batch: Batch) -> None:
    compiled = cortexflow.compile(form(CASE), progress=False)
    assert distance(actions(compiled, batch.inputs), batch.outputs["actions"]) < ACTIONS


@pytest.mark.parametrize("case", ["pi05_tiny", "pi05_tiny2"])
def test_from_a_realtime_vla_dictionary(case: str) -> None:
    original, config = open_checkpoint(DATA / case), json.loads((DATA / case / "config.json").read_text())
    stored = to_realtime_vla({name: original.load_checked(name) for name in original.tensors}, config)
    told = {"vision_num_heads": config["vision"]["num_heads"], "num_views": config["num_views"]}
    told |= {"num_diffusion_steps": config["num_steps"], "max_token_len": config["max_token_len"]}
    told |= {"chunk_size": config["action_horizon"]}
    given = batches(DATA / case)[0]
    compiled = cortexflow.compile(open_checkpoint(stored, config_overrides=told), progress=False)
    assert distance(actions(compiled, given.inputs), given.outputs["actions"]) < ACTIONS


def test_from_a_model_and_weights(batch: Batch) -> None:
    model, weights = cortexflow.load_model(CASE)
    for found in (
        cortexflow.compile(model, progress=False),
        cortexflow.compile(model, weights=dict(weights), progress=False),
        cortexflow.compile(type(model)(model.config), weights=weights, progress=False),
    ):
        assert distance(actions(found, batch.inputs), batch.outputs["actions"]) < ACTIONS
    with pytest.raises(ConfigError, match="PI0 has no weights: give weights=, or compile a checkpoint path"):
        cortexflow.compile(type(model)(model.config))


def test_from_a_module(batch: Batch) -> None:
    module, weights = graph()
    with_weights = Module(module.funcs, weights, module.meta)
    for found in (
        cortexflow.compile(module, weights=weights, progress=False),
        cortexflow.compile(with_weights, progress=False),
        cortexflow.compile(with_weights, dtype="f32", progress=False),
    ):
        assert distance(actions(found, batch.inputs), batch.outputs["actions"]) < ACTIONS


def test_a_module_of_ones_own() -> None:
    """No model, no checkpoint: two functions and a weight, with inputs of any name."""
    with function("first", x=Type("f32", (2, 3))) as (first, [x]):
        returns(h=ops.matmul(x, ops.weight(key="w", type=Type("f32", (3, 4)))))
    with function("second", h=Type("f32", (2, 4)), n=Type("i32", ())) as (second, [h, n]):
        returns(y=ops.mul(h, ops.cast(n, dtype="f32")), z=ops.neg(h))
    w, x = torch.randn(3, 4), torch.randn(2, 3)
    found = cortexflow.compile(Module({"first": first, "second": second}, {"w": w}), progress=False)(x=x, n=3)
    assert isinstance(found, dict) and list(found) == ["y", "z"]
    torch.testing.assert_close(found["y"], x @ w * 3)
    torch.testing.assert_close(found["z"], -(x @ w))


def test_the_module_given_stays_as_it_is() -> None:
    module, weights = graph()
    funcs, before, meta = list(module.funcs.values()), dump(module), dict(module.meta)
    cortexflow.compile(module, weights=weights, expose=("x_t",), progress=False)
    assert list(module.funcs.values()) == funcs and dump(module) == before
    assert module.meta == meta and module.weights == {}


def test_what_is_compiled_does_not_follow_the_module() -> None:
    module, weights = graph()
    compiled = cortexflow.compile(module, weights=weights, progress=False)
    before = compiled.dump_ir("input")
    module.funcs.clear()
    assert compiled.dump_ir("input") == before


@pytest.mark.parametrize("case", ["pi05_tiny", "pi05_tiny2", "pi0_tiny", "pi0_tiny2"])
def test_the_signature_comes_from_the_checkpoint(case: str) -> None:
    config = json.loads((DATA / case / "config.json").read_text())
    found = cortexflow.compile(DATA / case, progress=False)
    size = config["vision"]["image_size"]
    assert found.inputs["images"] == Type("f32", (1, config["num_views"], size, size, 3))
    assert found.inputs["tokens"] == Type("i32", (1, config["max_token_len"]))
    assert found.outputs == {"actions": Type("f32", (1, config["action_horizon"], config["action_dim"]))}
    assert found.module.meta["steps"] == config["num_steps"]


def test_the_signature_may_be_another() -> None:
    found = cortexflow.compile(CASE, batch=2, views=1, prompt=5, chunk=3, steps=2, progress=False)
    assert found.inputs["images"].shape == (2, 1, 56, 56, 3) and found.inputs["tokens"].shape == (2, 5)
    assert found.inputs["noise"].shape == found.outputs["actions"].shape == (2, 3, 7)
    assert "range(2)" in found.source()


# ---- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_names_of_dtypes(dtype: Any) -> None:
    found = cortexflow.compile(CASE, dtype=dtype, steps=1, chunk=1, views=1, progress=False)
    assert found.module.meta["dtype"] == DTYPES[dtype]
    assert found.module.funcs["vision_encoder"].results["image_tokens"].type.dtype == DTYPES[dtype]
    assert found.outputs["actions"].dtype == found.inputs["noise"].dtype == "f32"


# How far openpi's PyTorch model in its bfloat16 mode is from float32 on the inputs of `shifted`: the largest difference
# of an input, as its mean over the inputs, and the root mean square of all differences. One input would not do: the
# order in which a host adds up rounds a few results in 100,000 the other way, which is enough to move the largest
# difference of one input by half, ours and openpi's alike. Made with openpi's commit 15a9616a, transformers 4.53.2
# and openpi's patched files, loaded as in `benchmarks/_peers.py` but with dtype="bfloat16", PyTorch 2.13.0, one thread,
# products by oneDNN with avx512_bf16. With PyTorch's own products, or avx2 kernels in either library, the means are
# up to 8 % and the root mean squares up to 5 % away from these.
EAGER_BF16 = {
    ("pi05_tiny", "b1"): (0.0375, 0.00940),
    ("pi05_tiny", "b3"): (0.0432, 0.00948),
    ("pi05_tiny2", "b1"): (0.0971, 0.03113),
    ("pi05_tiny2", "b3"): (0.1447, 0.03364),
    ("pi0_tiny", "b1"): (0.0343, 0.01024),
    ("pi0_tiny", "b3"): (0.0405, 0.01022),
    ("pi0_tiny2", "b1"): (0.0588, 0.02364),
    ("pi0_tiny2", "b3"): (0.0728, 0.02302),
}
SHIFTS = 32


def shifted(inputs: Mapping[str, Tensor], by: int) -> dict[str, Tensor]:
    """Other inputs of the same numbers, on every host the same: each sample's floats, moved on by some places."""
    moved = {n: t.flatten(1).roll(by, 1).reshape(t.shape) for n, t in inputs.items() if t.is_floating_point()}
    return {**inputs, **moved}


@cache
def acted(case: str, name: str, dtype: str) -> tuple[Batch, Tensor]:
    """A batch, and the actions in this precision for it (first) and for what it becomes when shifted."""
    (given,) = (b for b in batches(DATA / case) if b.name == name)
    compiled = cortexflow.compile(DATA / case, dtype=dtype, batch=given.size, progress=False)
    return given, torch.stack([actions(compiled, shifted(given.inputs, by)) for by in range(SHIFTS)])


@pytest.mark.parametrize(("case", "name"), EAGER_BF16)
def test_narrow_types_stay_as_near_as_eager_ones(case: str, name: str) -> None:
    given, wanted = acted(case, name, "float32")
    assert distance(wanted[0], given.outputs["actions"]) < ACTIONS
    largest, square = {}, {}
    for dtype in ("bfloat16", "float16"):
        found = acted(case, name, dtype)[1]
        assert found.dtype == torch.float32
        far = (found - wanted).abs()
        largest[dtype], square[dtype] = float(far.flatten(1).amax(1).mean()), float(far.square().mean().sqrt())
    for ours, eager, most in zip((largest, square), EAGER_BF16[case, name], (1.25, 1.1), strict=True):
        assert 0 < ours["bfloat16"] < most * eager
        assert 0 < ours["float16"] < ours["bfloat16"] / 2


def test_bfloat16_stays_near_the_reference_mode_that_keeps_vision_in_float32() -> None:
    """LeRobot's bfloat16 mode runs its image tower in float32, and so is nearer; over all cases, not by much."""
    ratios = []
    for case, name in EAGER_BF16:
        given, found = acted(case, name, "bfloat16")
        wanted = given.outputs["actions"]
        ratios.append(float((found[0] - wanted).norm() / (given.outputs["actions_bf16_mode"] - wanted).norm()))
    assert math.prod(ratios) ** (1 / len(ratios)) < 1.5, ratios


# ---- calls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["pi05_tiny", "pi0_tiny"])
def test_a_batch_equals_its_samples(case: str) -> None:
    given = next(b for b in batches(DATA / case) if b.size == 3)
    together = actions(cortexflow.compile(DATA / case, batch=3, progress=False), given.inputs)
    alone = cortexflow.compile(DATA / case, progress=False)
    for i in range(3):
        found = actions(alone, {n: t[i : i + 1] for n, t in given.inputs.items()})
        assert distance(found[0], together[i]) < 2e-5


def test_the_same_call_gives_the_same_bits(compiled: cortexflow.Compiled, batch: Batch) -> None:
    given = {n: t.clone() for n, t in batch.inputs.items()}
    first = actions(compiled, given)
    kept = first.clone()
    second = actions(compiled, given)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    second.zero_()
    assert torch.equal(first, kept) and torch.equal(actions(compiled, given), kept)
    assert all(torch.equal(given[n], t) for n, t in batch.inputs.items())


def test_stage_times(compiled: cortexflow.Compiled, batch: Batch) -> None:
    times = compiled.stage_times(1, **batch.inputs)
    assert list(times) == ["vision_encoder", "transformer_encoder", "transformer_decoder"]
    assert all(0 < t < 60_000 for t in times.values())


# ---- looking in ------------------------------------------------------------------------------------


def test_dump_ir(compiled: cortexflow.Compiled) -> None:
    came, fused, runs = compiled.dump_ir("input"), compiled.dump_ir("fuse"), compiled.dump_ir()
    assert dump(graph()[0]) == came
    assert "fused.norm_glu" in fused and "fused.norm_glu" not in came + runs
    assert "func @prepare" in fused and "func @prepare" not in runs
    for text in (came, fused, runs):
        assert dump(parse(text)) == text
    assert all(compiled.dump_ir(name) for name, _ in pipeline())
    with pytest.raises(ConfigError, match=r"no pass is named 'melt'; there are input, canonicalize, fold, .*legalize"):
        compiled.dump_ir("melt")


def test_reports(compiled: cortexflow.Compiled) -> None:
    rows = compiled.pass_report().splitlines()
    assert rows[0].split() == ["pass", "fired", "ms", "moved", "detail"]
    assert any(re.match(r"fuse +\d+ .*norm_glu 5", row) for row in rows)
    size = sum(t.nbytes for t in compiled.module.weight_types().values())
    memory = compiled.memory_report()
    assert memory.startswith(f"weights: {size:,} bytes\narena ") and "lower bound" in memory
    costs = compiled.cost_report().splitlines()
    assert [row.split()[0] for row in costs[1:4]] == ["vision_encoder", "transformer_encoder", "transformer_decoder"]
    assert "class Policy(nn.Module)" in compiled.source()


def test_expose(batch: Batch) -> None:
    found = cortexflow.compile(CASE, expose=("prefix_layer_*", "x_t", "siglip"), progress=False)(**batch.inputs)
    assert isinstance(found, dict)
    assert set(found) == {"actions", "prefix_layer_0", "prefix_layer_1", "prefix_layer_2", "x_t", "siglip"}
    assert distance(found["actions"], batch.outputs["actions"]) < ACTIONS
    assert distance(found["x_t"], batch.outputs["x_steps"]) < ACTIONS
    with pytest.raises(
        InputError, match=r"no value is named prefix_layer_9, y_t; named values are vision_embed, .*x_t"
    ):
        cortexflow.compile(CASE, expose=("x_t", "prefix_layer_9", "y_t"), progress=False)


def test_passes_in_place_of_the_targets_own(batch: Batch) -> None:
    seen: list[int] = []

    def count(module: Module) -> int:
        seen.append(sum(1 for f in module.stages for _ in f.block.walk()))
        return 0

    plain = cortexflow.compile(CASE, passes=(), progress=False)
    counted = cortexflow.compile(CASE, passes=[("count", count), *PIPELINE, ("count", count)], progress=False)
    assert "fused." not in plain.dump_ir()
    assert len(seen) == 2 and seen[1] < seen[0] / 2
    for found in (plain, counted):
        assert distance(actions(found, batch.inputs), batch.outputs["actions"]) < ACTIONS


def test_dumps_of_every_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEXFLOW_DUMP", str(tmp_path / "dumps"))
    compiled = cortexflow.compile(CASE, progress=False)
    files = sorted((tmp_path / "dumps").iterdir())
    names = ["input", *(n for n, _ in pipeline()), "legalize", "dce"]
    assert [f.name for f in files] == [
        *(f"{i:02d}_{n}.ir" for i, n in enumerate(names)),
        f"{len(names):02d}_torch_source.py",
    ]
    assert files[-1].read_text() == compiled.source()
    assert files[0].read_text() == compiled.dump_ir("input")


# ---- several prompt buckets ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def buckets() -> cortexflow.Compiled:
    return cortexflow.compile(CASE, prompt=(12, 4, 7, 4), progress=False)


def test_the_smallest_bucket_that_holds_the_prompt(buckets: cortexflow.Compiled, batch: Batch) -> None:
    assert list(buckets.buckets) == [4, 7, 12] and buckets.buckets[12] is buckets
    assert buckets.inputs["tokens"] == Type("i32", (1, 12))
    for tokens, slots in ((1, 4), (4, 4), (5, 7), (7, 7), (8, 12), (12, 12)):
        given = batch.inputs | {"tokens": batch.inputs["tokens"][:, :1].expand(1, tokens), "token_mask": None}
        assert buckets.bucket(given) is buckets.buckets[slots]
        assert buckets.bucket({"tokens": [3] * tokens}) is buckets.buckets[slots]
        alone = cortexflow.compile(CASE, prompt=slots, progress=False)
        assert torch.equal(actions(buckets, given), actions(alone, given))
        wide = cortexflow.compile(CASE, prompt=12, progress=False)
        assert distance(actions(buckets, given), actions(wide, given)) < 2e-5  # padding is seen by nobody
    padded = {"tokens": torch.zeros(1, 12, dtype=torch.int32), "token_mask": torch.arange(12)[None] < 3}
    assert buckets.bucket(padded) is buckets
    with pytest.raises(InputError, match=r"expected at most 12 tokens, .* found 13; .*compile with prompt=13"):
        buckets(**batch.inputs | {"tokens": [3] * 13, "token_mask": None})
    with pytest.raises(InputError, match="missing input 'tokens'"):
        buckets(**batch.inputs | {"tokens": None})
    assert list(buckets.stage_times(1, **batch.inputs)) == [s.name for s in buckets.module.stages]


def test_buckets_share_their_weights(buckets: cortexflow.Compiled, tmp_path: Path) -> None:
    """Read once, prepared once, one tensor; what depends on the prompt's length is each bucket's own."""
    model, weights = cortexflow.load_model(CASE)
    reads: list[str] = []
    counted = Weights(list(weights), lambda name: (reads.append(name), weights[name])[1])
    found = cortexflow.compile(model, weights=counted, prompt=(4, 12), progress=False)
    again = {name for name in reads if reads.count(name) > 1}
    assert not again, again
    held = [b.executable.policy.state_dict() for b in found.buckets.values()]  # type: ignore[attr-defined]
    places = [{t.untyped_storage().data_ptr(): t.nbytes for t in h.values()} for h in held]
    shared = sum(n for at, n in places[1].items() if at in places[0])
    assert shared > 0.95 * sum(places[1].values())
    assert found.weight_bytes == pytest.approx(sum((places[0] | places[1]).values()), rel=0.01)
    report = found.memory_report().splitlines()
    assert report[0] == f"weights: {found.weight_bytes:,} bytes" and report[1].startswith("prompts of 4: arena ")
    assert {f.parent.name for f in buckets.save(tmp_path)} == {"prompt_4", "prompt_7", "prompt_12"}


@pytest.mark.parametrize("prompt", [(), (4, 0), (4, -1), (4, 1.5), ("4", 5), (True, 4)])
def test_buckets_that_are_none(prompt: Any) -> None:
    with pytest.raises(ConfigError, match=r"prompt: expected"):
        cortexflow.compile(CASE, prompt=prompt, progress=False)


@pytest.mark.gpu
def test_buckets_share_their_weights_on_a_gpu(buckets: cortexflow.Compiled, batch: Batch) -> None:
    sizes = []
    for prompt in (12, (4, 7, 12)):
        before = torch.cuda.memory_allocated()
        found = cortexflow.compile(CASE, device="cuda", prompt=prompt, progress=False)
        sizes.append(torch.cuda.memory_allocated() - before)
    assert sizes[1] < 1.1 * sizes[0]
    assert distance(actions(found, batch.inputs).cpu(), actions(buckets, batch.inputs)) < ACTIONS


# ---- optimisations switched off --------------------------------------------------------------------


@pytest.mark.parametrize("case", ["pi05_tiny2", "pi0_tiny2"])
def test_every_switch_leaves_the_meaning(case: str) -> None:
    """Each alone, and all at once; here every fused op is claimed by nobody or by the target as it is."""
    given = batches(DATA / case)[0]
    names = [n for n in switches("torch") if not n.startswith("fuse.") or n in ("fuse.linear", "fuse.glu")]
    for without in ((), *((n,) for n in names), tuple(switches("torch"))):
        found = cortexflow.compile(DATA / case, without=without, progress=False)
        assert distance(actions(found, given.inputs), given.outputs["actions"]) < ACTIONS, without
        assert not {s.name for s in found.steps} & set(without)


@pytest.mark.parametrize("name", [n for n in switches() if not n.startswith("fuse.")])
def test_every_pass_can_be_left_out_for_onnx(name: str, batch: Batch) -> None:
    found = cortexflow.compile(CASE, "onnx", without=(name,), progress=False)
    assert distance(actions(found, batch.inputs), batch.outputs["actions"]) < ACTIONS


@pytest.mark.parametrize("name", [n for n in switches() if n.startswith("fuse.")])
def test_a_fused_op_can_be_left_out(name: str) -> None:
    """Neither found by fusion nor made by the expansion of a larger one."""
    config = ModelConfig(vision_num_layers=1, num_encoder_layers=2, num_decoder_layers=2, vocab_size=512)
    module, _ = lower(create_model(config), dtype="bf16", target="triton", without=(name,))
    assert not [op for f in module.stages for op in f.block.walk() if op.name == f"fused.{name[5:]}"]


def test_switches_are_listed_and_reach_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(line and not line.startswith(" ") for line in switches("triton").values())
    assert {"hoist", "merge", "fuse", "fuse.norm_glu"} <= switches().keys() == switches("torch").keys()
    assert {"cuda_graph", "overlap", "merge"} <= switches("triton").keys() and "hoist" not in switches("triton")
    with pytest.raises(ConfigError, match="unknown switch hoist; target 'triton': absorb"):
        lower(graph()[0], target="triton", without=("hoist",))
    with pytest.raises(
        ConfigError, match=r"without: unknown switch overlap, speed; target 'torch': absorb, .*fuse\.glu"
    ):
        cortexflow.compile(CASE, without=("speed", "fuse", "overlap"), progress=False)
    with pytest.raises(ConfigError, match="unknown switch speed; the passes: absorb"):
        lower(graph()[0], without="speed")
    with pytest.raises(ConfigError, match="tune=True: target 'torch' has no kernels of its own"):
        cortexflow.compile(CASE, tune=True)
    asked: list[Any] = []

    class Switched(Interpreted):
        def __init__(self, module: Module, weights: Mapping[str, Tensor], device: torch.device, **options: Any) -> None:
            super().__init__(module, weights, device)
            asked.append(options)

    monkeypatch.setitem(TARGETS, "switched", "")
    accepts = lambda op, without: "speed" not in without  # noqa: E731
    claims, known = frozenset({"fused.glu"}), {"speed": "goes faster", "comfort": "softer"}
    register_target(Target("switched", claims, Switched, accepts, switches=known, options=frozenset({"tune"})))
    for without, fused in (("speed",), False), (("comfort",), True), (("fuse.glu",), False):
        found = cortexflow.compile(CASE, "switched", without=without, tune=True, progress=False)
        assert asked.pop() == {"without": known.keys() & set(without), "tune": True}
        assert ("fused.glu" in found.dump_ir()) == fused


# ---- families and targets of one's own ------------------------------------------------------------


class Toy(VLAModel):
    """Adds the mean picture, through a weight, to the noise, at every step."""

    family = "toy"

    def build(self, signature: Signature, dtype: str = "f32") -> Module:
        c, s = self.config, signature
        picture, action = (s.batch, s.views, c.image_size, c.image_size, 3), (s.batch, s.chunk, c.action_dim)
        with function("vision_encoder", images=Type("f32", picture)) as (vision, [images]):
            returns(colour=ops.reduce_mean(images, axes=(1, 2, 3)))
        with function("transformer_encoder", colour=Type("f32", (s.batch, 3))) as (encoder, [colour]):
            w = ops.weight(key="to_action.weight", type=Type("f32", (3, c.action_dim)))
            returns(goal=named(ops.matmul(ops.cast(colour, dtype=dtype), ops.cast(w, dtype=dtype)), "goal"))
        goal_type = Type(dtype, (s.batch, c.action_dim))
        with function("transformer_decoder", goal=goal_type, noise=Type("f32", action)) as (decoder, [goal, noise]):
            goal = ops.reshape(ops.cast(goal, dtype="f32"), shape=(s.batch, 1, c.action_dim))
            (found,) = ops.loop([noise], s.steps, lambda _, x: [ops.add(x, goal)])
            returns(actions=found)
        return Module({f.name: f for f in (vision, encoder, decoder)}, {}, {"family": "toy", "dtype": dtype})


def test_a_family_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "toy", VLAModel)  # so that the name is taken back after the test
    register_model(Toy)
    config = ModelConfig(
        model_type="toy", image_size=28, num_views=2, action_dim=4, chunk_size=3, num_diffusion_steps=5
    )
    model = cortexflow.models.create_model(config)
    assert isinstance(model, Toy) and model.get_weight_shapes() == {"to_action.weight": (3, 4)}
    assert model.get_buffer_shapes(1, 2)["colour"] == (1, 3)
    w, images, noise = torch.randn(3, 4), torch.rand(1, 2, 28, 28, 3), torch.randn(1, 3, 4)
    compiled = cortexflow.compile(model, weights={"to_action.weight": w}, progress=False)
    wanted = noise + 5 * (images.mean((1, 2, 3)) @ w)[:, None]
    torch.testing.assert_close(compiled(images=images, noise=noise), wanted, rtol=0, atol=1e-5)
    assert compiled.inputs["images"].shape == (1, 2, 28, 28, 3)
    monkeypatch.delitem(MODELS, "toy")
    with pytest.raises(ConfigError, match="model family 'toy' is not registered; there are openvla, pi0, pi05"):
        cortexflow.models.create_model(config)


class Interpreted:
    """The module, run by the interpreter."""

    def __init__(self, module: Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self.module, self.weights = module, dict(weights)

    def run_stage(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stage = self.module.funcs[name]
        return run_module(Module({name: stage}), {n: inputs[n] for n in stage.args}, self.weights)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = run_module(self.module, inputs, self.weights)
        return {n: found[n] for n in self.module.outputs}

    def source(self) -> str:
        return "as it stands"


def test_a_target_of_ones_own(batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "interpreter", "")  # so that the name is taken back after the test
    register_target(Target("interpreter", frozenset({"fused.norm_glu"}), Interpreted))
    monkeypatch.setenv("CORTEXFLOW_DUMP", str(tmp_path))
    compiled = cortexflow.compile(CASE, "interpreter", progress=False)
    assert compiled.target == "interpreter" and compiled.source() == "as it stands"
    assert "fused.norm_glu" in compiled.dump_ir() and "fused.linear" not in compiled.dump_ir()
    assert distance(actions(compiled, batch.inputs), batch.outputs["actions"]) < ACTIONS
    assert len(compiled.stage_times(1, **batch.inputs)) == 3
    (source,) = tmp_path.glob("*_interpreter_source.txt")
    assert source.read_text() == "as it stands"


# ---- what it refuses -------------------------------------------------------------------------------

REFUSED: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "unknown target": (TargetError, {"target": "tpu"}, r"unknown target 'tpu'; there are .*onnx.*torch"),
    "unknown dtype": (ConfigError, {"dtype": "int8"}, r"dtype: expected float32, bfloat16 or float16, found 'int8'"),
    "another dtype": (ConfigError, {"dtype": torch.float64}, r"dtype: expected .*, found torch\.float64"),
    "no dtype": (ConfigError, {"dtype": ["f32"]}, r"dtype: expected .*, found \['f32'\]"),
    "unknown device": (ConfigError, {"device": "gpu"}, r"device: expected 'cpu', 'cuda' or 'cuda:N', found 'gpu'"),
    "no device": (ConfigError, {"device": 1.5}, r"device: expected .*, found 1\.5"),
    "device without values": (ConfigError, {"device": "meta"}, r"'meta' holds no values.*device='cpu'"),
    "no batch": (ConfigError, {"batch": 0}, r"Signature\.batch: expected a positive integer, found 0"),
    "negative steps": (ConfigError, {"steps": -1}, r"Signature\.steps: expected a positive integer, found -1"),
    "half a view": (ConfigError, {"views": 1.5}, r"Signature\.views: expected a positive integer, found 1\.5"),
    "nothing there": (CheckpointError, {"model": "/nowhere"}, r"/nowhere: expected a checkpoint .* nothing at this"),
    "no model": (InputError, {"model": 3}, r"model: expected a checkpoint path or dictionary, .* found int"),
    "another dictionary": (CheckpointError, {"model": {"w": torch.zeros(2)}}, r"expected a checkpoint of π0 or π0\.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    """With what was expected and what was found."""
    kind, arguments, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        cortexflow.compile(**{"model": CASE, "progress": False} | arguments)


@pytest.mark.parametrize("argument", ["batch", "views", "prompt", "chunk", "steps"])
def test_a_module_has_its_signature(argument: str) -> None:
    with pytest.raises(ConfigError, match=r"an ir\.Module has its shapes already"):
        cortexflow.compile(graph()[0], **{argument: 2})


def test_a_module_has_its_types(batch: Batch) -> None:
    with pytest.raises(ConfigError, match=r"an ir\.Module has its types already: dtype='bfloat16' does not apply"):
        cortexflow.compile(graph()[0], dtype="bfloat16")
    with pytest.raises(ConfigError, match="dtype: expected float32"):
        cortexflow.compile(graph()[0], dtype="int4")
    module, weights = graph("bf16")
    compiled = cortexflow.compile(module, dtype="bfloat16", weights=weights, progress=False)
    assert 1e-4 < distance(actions(compiled, batch.inputs), batch.outputs["actions"]) < 0.2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there() -> None:
    for device in ("cuda", "cuda:1", torch.device("cuda")):
        with pytest.raises(ConfigError, match=r"device 'cuda.*': PyTorch finds no CUDA GPU .*; use device='cpu'"):
            cortexflow.compile(CASE, device=device)


@pytest.mark.gpu
def test_one_gpu_too_far() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=f"device 'cuda:{count}': this machine has {count} CUDA GPUs"):
        cortexflow.compile(CASE, device=f"cuda:{count}")


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["torch", "triton"])
def test_each_gpu_whichever_is_current(target: str, batch: Batch) -> None:
    """Graphs are captured on one after the other, and called while another is the current one."""
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    made = [cortexflow.compile(CASE, target, device=device, progress=False) for device in devices]
    results = []
    for current in devices:
        with torch.cuda.device(current):
            results += [actions(found, batch.inputs) for found in made]
    assert [str(x.device) for x in results] == devices * len(devices)
    assert all(torch.equal(x.cpu(), results[0].cpu()) for x in results)
    assert distance(results[0].cpu(), batch.outputs["actions"]) < ACTIONS


def test_a_target_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far_target.py").write_text("import a_library_from_afar\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(TARGETS, "far", "far_target")
    with pytest.raises(TargetError, match="target 'far' needs the package 'a_library_from_afar': pip install"):
        cortexflow.compile(CASE, "far")


def test_a_folded_file_has_its_number_of_steps() -> None:
    config = json.loads((DATA / "pi0_tiny" / "config.json").read_text())
    original = open_checkpoint(DATA / "pi0_tiny")
    stored = to_realtime_vla({name: original.load_checked(name) for name in original.tensors}, config)
    opened = open_checkpoint(stored, config_overrides={"vision_num_heads": config["vision"]["num_heads"]})
    with pytest.raises(ConfigError, match="folded in for 10 steps, but 5 were asked for; compile with steps=10"):
        cortexflow.compile(opened, steps=5)
