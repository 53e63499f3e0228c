"""What stands around the kernels: where weights live, how inputs arrive, what is compiled ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

import pytest
import torch

from cortexflow.codegen import find_target
from cortexflow.compiler import Shared, build_one, lower, switches
from cortexflow.errors import InputError
from cortexflow.ir import Module, Type, function, ops, returns, run, run_module
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.models import ModelConfig, Signature, VLAModelType, create_model
from cortexflow.weights import Weights, random_weights, stages_of

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from cortexflow.codegen.triton.executable import Layout, TritonExecutable
from cortexflow.codegen.triton.placement import (
    ALIGNMENT,
    FORMS,
    Forms,
    Staging,
    allot,
    fill,
    fill_new,
    host_weights,
    plain,
)
from cortexflow.kernels.triton.warmup import compiling

CPU = torch.device("cpu")


@cache
def stages(**signature: int) -> Module:
    config = ModelConfig()
    module, _ = lower(create_model(config), Signature.of(config, **signature), "bf16", target="triton")
    return stages_of(module)


# ---- where weights live ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{"prompt": 48}, {"prompt": 200, "chunk": 50, "views": 3}], ids=str)
def test_the_released_size_fits_its_memory(shape: dict[str, int]) -> None:
    """π0.5 on the card: every weight once, the token embedding on the host or not read by a kernel of ours yet."""
    module = stages(**shape)
    layout, types = Layout(module), module.weight_types()
    assert len({key for key, _ in layout.weights}) == len(layout.weights), "a weight is stored in two forms"
    assert {key for key, _ in layout.weights} == set(types)
    (table,) = host_weights(module)
    assert types[table] == Type("bf16", (257152, 2048))
    size = layout.bytes
    assert size["weights"] + size["host"] == sum(t.nbytes for t in types.values())
    on_card = sum(t.nbytes for key, t in types.items() if key != table) + size["arena"] + size["scratch"]
    largest = max(t.nbytes for key, t in types.items() if key != table)  # one matrix on its way to its transpose
    assert on_card + largest <= 5.6e9
    if layout.host:
        assert layout.host == {table} and size["weights"] + size["arena"] + size["scratch"] == on_card
    assert Layout(module, frozenset({"host_tables"})).host == frozenset()


@pytest.mark.parametrize("kind", [VLAModelType.PI05, VLAModelType.PI0])
def test_a_plan_can_be_made_without_any_optimisation(kind: VLAModelType) -> None:
    """Each alone, and all at once; the GPU tests run some of these."""
    small = {"vision_num_layers": 1, "num_encoder_layers": 2, "num_decoder_layers": 2, "vocab_size": 512}
    model = create_model(ModelConfig(model_type=kind).with_(**small))
    for without in (*((n,) for n in switches("triton")), tuple(switches("triton"))):
        module, _ = lower(model, dtype="bf16", target="triton", without=without)
        layout = Layout(stages_of(module), frozenset(without))
        scope: dict = {}
        exec(compile(layout.text[layout.text.index("class Policy") :], "plan", "exec"), {"Tensor": None}, scope)
        assert {s.name for s in module.stages} <= vars(scope["Policy"]).keys()


def test_only_tables_read_by_rows_stay_on_the_host() -> None:
    large, small = Type("f32", (1 << 15, 1 << 10)), Type("f32", (8, 1 << 10))
    with function("f", i=Type("i32", (3,)), x=Type("f32", (3, 1 << 10))) as (f, [i, x]):
        rows, both, step, few = (ops.weight(key=k, type=large if k != "few" else small) for k in ("r", "b", "s", "few"))
        found = ops.add(ops.gather(rows, i), ops.gather(both, i))
        found = ops.add(found, ops.gather(few, i))
        found = ops.matmul(ops.matmul(found, ops.transpose(both, perm=(1, 0))), both)
        (found,) = ops.loop([found], 2, lambda n, y: [ops.add(y, ops.gather(step, n))])
        returns(y=ops.add(found, x))
    assert host_weights(Module({"f": f})) == {"r"}


def test_room_for_weights() -> None:
    """One allocation, nothing overlaps, every form is filled as it should, other buckets get the same tensors."""
    types = {"a": Type("bf16", (3, 5)), "b": Type("f32", (7,)), "c": Type("f32", (2, 4)), "d": Type("f16", (32, 6))}
    values = {key: torch.randn(t.shape).to(TORCH_DTYPES[t.dtype]) for key, t in types.items()}
    wanted = {("a", "rows"): "w0r", ("b", "plain"): "w1", ("c", "rows"): "w2r", ("c", "plain"): "w3"}
    wanted |= {("c", "pairs"): "w4p", ("d", "interleaved"): "w5i"}
    forms: dict[str, dict[str, torch.Tensor]] = {k: {} for k in types}
    named, empty, work = allot(wanted, types, CPU, ("b",), forms, 1000)
    assert [(key, form) for key, form, _ in empty] == list(wanted)
    assert not any(forms.values()), "a place counts when it is filled: builds fail"
    fill_new(empty, values, forms)
    assert torch.equal(named["w0r"], values["a"].t()) and named["w0r"].is_contiguous()
    assert torch.equal(named["w1"], values["b"])
    assert torch.equal(named["w2r"], values["c"].t()) and torch.equal(named["w3"], values["c"])
    assert torch.equal(named["w4p"], values["c"][:, [0, 2, 1, 3]]) and named["w5i"].shape == (6, 32)
    on_card = [named[n] for n in ("w0r", "w2r", "w3", "w4p", "w5i")]
    storages = {t.untyped_storage().data_ptr() for t in on_card}
    work.fill_(255)
    assert torch.equal(named["w3"], values["c"]), "bytes for other use are apart"
    assert len(work) == 1000 and storages == {work.untyped_storage().data_ptr()}
    assert len(storages) == 1 and named["w1"].untyped_storage().data_ptr() not in storages
    assert all(t.storage_offset() * t.itemsize % ALIGNMENT == 0 for t in named.values())
    again, left, _ = allot({("a", "rows"): "x", ("b", "rows"): "y"}, types | {"b": Type("f32", (7, 1))}, CPU, (), forms)
    assert again["x"] is named["w0r"] and [(key, form) for key, form, _ in left] == [("b", "rows")]
    alike: dict[str, torch.Tensor] = {}  # two weights that are made alike
    both, left, _ = allot(
        {("a", "plain"): "x", ("d", "plain"): "y"}, types | {"d": types["a"]}, CPU, (), {"a": alike, "d": alike}
    )
    assert both["x"] is both["y"] and len(left) == 1


UNDO: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # what a form holds, as [k, n] again
    "plain": lambda made: made,
    "rows": lambda made: made.t(),
    "interleaved": lambda made: made[:, interleaving(made.shape[1])].t(),
    "pairs": lambda made: torch.cat([made[:, ::2], made[:, 1::2]], dim=1),
}


def interleaving(k: int) -> torch.Tensor:
    """Where entry 8 t + 4 i + 2 h + e of each block of 32 is stored: at 16 i + 8 h + 2 t + e."""
    places = torch.empty(32, dtype=torch.int64)
    for t, i, h, e in product(range(4), range(2), range(2), range(2)):
        places[8 * t + 4 * i + 2 * h + e] = 16 * i + 8 * h + 2 * t + e
    return (torch.arange(0, k, 32)[:, None] + places).flatten()


# Shapes that a form allows: [k, n] with whole blocks of k, or two halves of n.
SHAPES = {
    "plain": [(3, 5), (1, 7), (64, 10)],
    "rows": [(3, 5), (1, 7), (7, 1), (64, 10)],
    "interleaved": [(32, 1), (32, 7), (96, 5), (1024, 48)],
    "pairs": [(1, 2), (3, 6), (7, 10), (64, 10)],
}


@pytest.mark.parametrize(("form", "shape"), [(f, s) for f, shapes in SHAPES.items() for s in shapes], ids=str)
def test_a_form_only_moves_entries(form: str, shape: tuple[int, int]) -> None:
    """Every entry is where the kernels look for it, the place was filled whole, and the weight can be had back."""
    w = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)
    made = torch.full(shape[::-1] if FORMS[form][0] else shape, torch.nan)
    fill(made, form, w)
    assert torch.equal(UNDO[form](made), w) and torch.equal(plain(form, made), w)
    assert FORMS.keys() == UNDO.keys() == SHAPES.keys()
    again = torch.full_like(made, torch.nan)
    fill(again, form, w.t().contiguous().t())  # a weight whose rows are columns of what a checkpoint holds
    assert torch.equal(again, made)


def test_each_form_follows_from_each() -> None:
    w = torch.randn(96, 10).to(torch.bfloat16)
    wanted = {("w", form): form for form in FORMS}
    for first in FORMS:
        forms: dict[str, dict[str, torch.Tensor]] = {"w": {}}
        _, empty, _ = allot({("w", first): "first"}, {"w": Type("bf16", (96, 10))}, CPU, (), forms)
        fill_new(empty, {"w": w}, forms)
        named, empty, _ = allot(wanted, {"w": Type("bf16", (96, 10))}, CPU, ("w",), forms)
        fill_new(empty, {}, forms)  # there is nothing to read
        assert all(torch.equal(UNDO[form](named[form]), w) for form in FORMS)


def test_what_was_not_filled_is_not_there() -> None:
    """A build that fails half way leaves nothing unfilled to the next one."""
    types = {"a": Type("f32", (2, 4)), "b": Type("f32", (3, 5))}
    forms: dict[str, dict[str, torch.Tensor]] = {"a": {}, "b": {}}
    wanted = {("a", "pairs"): "a", ("b", "rows"): "b"}
    _, empty, _ = allot(wanted, types, CPU, (), forms)
    with pytest.raises(KeyError, match="b"):
        fill_new(empty, {"a": torch.ones(2, 4)}, forms)
    named, empty, _ = allot(wanted, types, CPU, (), forms)
    assert named["a"] is forms["a"]["pairs"] and [key for key, _, _ in empty] == ["b"]


# ---- builds over what earlier ones placed ---------------------------------------------------------

TINY = ModelConfig(
    vision_encoder_dim=64,
    vision_num_heads=2,
    vision_num_layers=1,
    vision_mlp_dim=128,
    encoder_dim=128,
    encoder_mlp_dim=256,
    num_encoder_layers=2,
    decoder_dim=128,
    decoder_mlp_dim=256,
    num_decoder_layers=2,
    num_heads=4,
    head_dim=64,
    vocab_size=96,
    image_size=28,
    max_token_len=8,
    num_views=1,
    chunk_size=10,
    num_diffusion_steps=2,
)


class Placed:
    """Weights in the forms that the launch plan asks for; what is in them runs in the interpreter."""

    def __init__(
        self, module: Module, weights: Mapping[str, torch.Tensor], device: torch.device, *, forms: Forms, **_: object
    ) -> None:
        self.module, self.wanted = module, Layout(module).weights
        self.named, empty, _ = allot(self.wanted, module.weight_types(), device, (), forms)
        self.new, self.asked = [(key, form) for key, form, _ in empty], list[str]()
        fill_new(empty, Weights(list(weights), lambda key: (self.asked.append(key), weights[key])[1]), forms)

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return run_module(
            self.module, inputs, {key: plain(form, self.named[name]) for (key, form), name in self.wanted.items()}
        )


def test_a_build_prepares_what_no_other_has_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another batch wants other forms: they come from those that are there. Actions are those of a build alone."""
    model, target = create_model(TINY), replace(find_target("triton"), build=Placed)
    tensors = random_weights(model.build(Signature.of(TINY), "f32"))
    reads: list[str] = []
    source = Weights(list(tensors), lambda key: (reads.append(key), tensors[key])[1])
    ran: list[str] = []
    counted = partial(run, watch=lambda op, results: ran.append(op.name))
    monkeypatch.setattr("cortexflow.weights.run", counted)

    def build(shared: Shared, **shape: int) -> Placed:
        signature, options = Signature.of(TINY, **shape), {"dtype": "bf16", "tune": False, "progress": False}
        made = build_one(model, signature, target, source, CPU, shared=shared, **options).executable
        assert isinstance(made, Placed)
        return made

    shared = Shared()
    first = build(shared)
    whole = len(ran)
    assert len(first.new) == len(first.wanted) == len(first.asked)
    assert len(reads) == len(set(reads)), "a tensor is read twice"
    assert not shared.known, "weights on a device need no copy on the host"
    for shape, forms, keys in (({"prompt": 12}, 2, 2), ({"batch": 2}, 7, 1), ({"batch": 8}, 1, 1)):
        reads.clear()
        ran.clear()
        other = build(shared, **shape)
        assert (len(other.new), len(other.asked)) == (forms, keys)
        assert not reads and 0 < len(ran) < whole / 20
        found, wanted = (policy.run(given_to(policy.module)) for policy in (other, build(Shared(), **shape)))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def given_to(module: Module) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(t.shape, generator=random)
        if t.dtype == "f32"
        else torch.ones(t.shape).to(TORCH_DTYPES[t.dtype])
        for name, t in module.inputs.items()
    }


# ---- calls -----------------------------------------------------------------------------------------


def small_ops() -> Module:
    """Two stages of ops that PyTorch runs: a plan that a CPU can follow."""
    with function("first", x=Type("f32", (2, 3)), n=Type("i32", (2,))) as (first, [x, n]):
        h = ops.cumsum(ops.div(x, ops.weight(key="w", type=Type("f32", (2, 3)))), axis=1)
        rows = ops.gather(ops.weight(key="table", type=Type("f32", (3, 9))), n, axis=1)  # of columns: no kernel of ours
        returns(h=ops.div(h, ops.transpose(rows, perm=(1, 0))))
    with function("second", h=Type("f32", (2, 3)), z=Type("f32", (2, 3))) as (second, [h, z]):
        returns(y=ops.div(ops.cumsum(h, axis=1), z))
    return Module({"first": first, "second": second})


@pytest.fixture
def executable() -> tuple[TritonExecutable, dict[str, torch.Tensor]]:
    weights = {"w": torch.randn(2, 3), "table": torch.randn(3, 9)}
    return TritonExecutable(small_ops(), weights, CPU, without=frozenset({"cuda_graph"})), weights


def given() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 3), "n": torch.tensor([8, 2], dtype=torch.int32), "z": torch.randn(2, 3)}


def test_runs_its_plan(executable: tuple[TritonExecutable, dict[str, torch.Tensor]]) -> None:
    policy, weights = executable
    for _ in range(3):
        inputs = given()
        wanted = run_module(small_ops(), inputs, weights)
        found = policy.run(inputs)
        assert list(found) == ["y"]
        torch.testing.assert_close(found["y"], wanted["y"])
        h = policy.run_stage("first", inputs)["h"]
        torch.testing.assert_close(h, wanted["h"])
        torch.testing.assert_close(policy.run_stage("second", inputs | {"h": h})["y"], wanted["y"])
    first, second = policy.run(inputs)["y"], policy.run(inputs)["y"]
    assert first.data_ptr() != second.data_ptr()
    assert policy.memory_report().startswith(f"on the card: weights {4 * (6 + 27):,}, arena ")


def three_stages() -> Module:
    """The second and the third compute something from inputs alone, the third also from what the second so made."""
    square = Type("f32", (3, 3))
    with function("first", x=square) as (first, [x]):
        returns(h=ops.div(ops.cumsum(ops.cumsum(ops.cumsum(x, axis=0), axis=1), axis=0), x))
    with function("second", h=square, y=square) as (second, [h, y]):
        made = ops.cumsum(ops.div(y, ops.cumsum(y, axis=1)), axis=0)
        returns(g=ops.div(ops.cumsum(h, axis=1), made), made=made)
    with function("third", g=square, made=square, z=square) as (third, [g, made, z]):
        returns(last=ops.div(ops.cumsum(g, axis=0), ops.div(ops.cumsum(made, axis=1), ops.cumsum(z, axis=0))))
    return Module({"first": first, "second": second, "third": third})


def test_what_reads_only_inputs_runs_beside_the_first_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    module = three_stages()
    policy = TritonExecutable(module, {}, CPU, without=frozenset({"cuda_graph"}))
    assert policy.layout.early == {"second": "early_second", "third": "early_third"}
    methods, ran = type(policy._policy), list[str]()

    def watch(name: str, original: Callable[[Any], None]) -> Callable[[Any], None]:
        def method(self: Any) -> None:
            assert (self.scratch is self.other) == (name.startswith("early") and beside), "whose scratch"
            ran.append(name)
            original(self)

        return method

    for name in ("first", "second", "third", "early_second", "early_third"):
        monkeypatch.setattr(methods, name, watch(name, getattr(methods, name)))
    for _ in range(3):
        inputs = {name: torch.rand(3, 3) + 0.5 for name in module.inputs}
        wanted = run_module(module, inputs, {})
        beside = True
        assert torch.equal(policy.run(inputs)["last"], wanted["last"])
        assert ran == ["early_second", "early_third", "first", "second", "third"]
        beside = False
        for i, stage in enumerate(module.stages):
            ran.clear()
            found = policy.run_stage(stage.name, inputs | wanted)
            assert ran == ["early_" + stage.name] * (i > 0) + [stage.name]
            assert found.keys() == stage.results.keys() and all(torch.equal(x, wanted[n]) for n, x in found.items())
        ran.clear()
        policy.replay(inputs | wanted, "second", "third")
        assert ran == ["early_second", "second", "early_third", "third"]
        assert torch.equal(policy._outputs["last"], wanted["last"])
        ran.clear()
    off = TritonExecutable(module, {}, CPU, without=frozenset({"cuda_graph", "early"}))
    assert torch.equal(off.run(inputs)["last"], wanted["last"]) and len(off.layout.scratches) == 1


def test_a_missing_input_is_named(executable: tuple[TritonExecutable, dict[str, torch.Tensor]]) -> None:
    inputs = given()
    del inputs["n"]
    with pytest.raises(InputError, match=r"@first: missing input 'n' \(2,\)"):
        executable[0].run(inputs)
    with pytest.raises(InputError, match=r"@second: missing input 'h'"):
        executable[0].run_stage("second", inputs)


@pytest.mark.gpu
def test_inputs_pass_through_pinned_buffers() -> None:
    place = torch.empty(1 << 20, device="cuda")
    staging = Staging({"x": Type("f32", (1 << 20,))}, torch.device("cuda"))
    assert staging.pinned["x"].is_pinned()
    kept = []
    for i in range(50):  # a buffer that was overwritten on its way would show
        staging.write([("x", place)], {"x": torch.full((1 << 20,), float(i))}, "@f")
        kept.append(place[::1024].clone())
    assert all(bool((k == i).all()) for i, k in enumerate(kept))


# ---- compiling ahead -------------------------------------------------------------------------------


@triton.jit
def twice_kernel(x, out, N: tl.constexpr, SCALE: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) * SCALE)


class Card:
    """A driver for a card that is not there: kernels can be compiled for it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def card(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before, after = driver._active, Card()
    driver.set_active(after)
    twice_kernel.device_caches.clear()
    yield
    driver._active = before
    twice_kernel.device_caches.clear()


def test_kernels_are_compiled_and_nothing_runs(card: None) -> None:
    x, out, scales = torch.randn(64), torch.full((64,), torch.nan), (2.0, 3.0, 2.0)
    seen: list[torch.Tensor] = []

    def launch() -> None:
        for scale in scales:
            twice_kernel[(1,)](x, out, N=64, SCALE=scale)
        y = torch.mm(x.view(8, 8), x.view(8, 8).t())
        seen.append(y.to(torch.bfloat16).reshape(-1))
        torch.add(seen[0], 1, out=out)
        out[3:5].copy_(x[3:5])
        torch._foreach_copy_([out[:4], out[8:12]], [x[:4], x[4:8]])  # writes, and returns nothing
        torch.nn.functional.embedding(torch.tensor([10**6]), x.view(8, 8))  # for real this would fail

    with compiling(launch, False):
        pass
    kept, *_ = twice_kernel.device_caches[0]
    assert len(kept) == 2 and all(len(k.asm["cubin"]) > 500 for k in kept.values())
    assert bool(out.isnan().all()) and (seen[0].shape, seen[0].dtype) == ((64,), torch.bfloat16)
    before = [*kept.values()]
    with compiling(launch, False):  # a kernel that is there is not launched either
        pass
    assert [*kept.values()] == before
    assert bool(out.isnan().all())


def test_launches_of_other_threads_are_left_alone(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    modes: list[bool] = []
    original = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **meta: modes.append(warmup))

    def launch() -> None:
        other = threading.Thread(target=lambda: twice_kernel[(1,)](None, None, N=64, SCALE=1.0))
        other.start()
        other.join()
        twice_kernel[(1,)](None, None, N=64, SCALE=1.0)

    with compiling(launch, False):
        pass
    twice_kernel[(1,)](None, None, N=64, SCALE=1.0)
    assert modes == [False, True, False]
    monkeypatch.undo()
    assert JITFunction.run is original


def test_errors_come_through(card: None) -> None:
    x = torch.randn(48)
    with pytest.raises(triton.CompilationError), compiling(lambda: twice_kernel[(1,)](x, x, N=48, SCALE=1.0), False):
        pass
    with pytest.raises(ZeroDivisionError), compiling(lambda: twice_kernel[(1,)](x, x, N=64, SCALE=1.0), False):
        raise ZeroDivisionError
