"""The triton target's products: forms of the library's weights, parts of k, float32, casts beside small ones."""

from __future__ import annotations

from typing import Any

import pytest

from cortexflow.ir import Module, Type, function, fused, ops, returns
from cortexflow.passes.plan_buffers import plan_buffers

pytest.importorskip("triton")

from cortexflow.codegen.triton import configs, products
from cortexflow.codegen.triton.program import Program
from cortexflow.kernels.cuda.product import Tile
from cortexflow.kernels.triton.product import Config

M, K, N = 560, 4096, 1152
TILES = Config(128, 0, 128, split=3)


def lines_of(module: Module, without: frozenset[str] = frozenset()) -> tuple[list[str], Program]:
    """What the one function of a module launches."""
    program = Program(module, plan_buffers(module), without)
    text = program.text()
    return [line.strip() for line in text[text.index("def f(self)") :].splitlines()[2:-1]], program


def product_of(what: str, norm: str = "", stored: bool = True) -> Module:
    """One product of 560 rows by its op's name, and the norm behind it."""
    vector = Type("bf16", (N,))
    given = {"x": Type("bf16", (M, K)), "r": Type("bf16", (M, N)), "v": Type("bf16", (K, N))}
    with function("f", **given) as (f, [x, r, v]):
        w = ops.weight(key="w", type=v.type) if stored else v
        b, scale, shift = (ops.weight(key=key, type=vector) for key in ("b", "scale", "shift"))
        y = {
            "linear": lambda: fused.linear(x, w, b),
            "linear_act": lambda: fused.linear_act(x, w, b, kind="gelu_tanh"),
            "linear_residual": lambda: fused.linear_residual(r, x, w, b),
            "matmul_residual": lambda: fused.matmul_residual(r, x, w),
            "matmul": lambda: ops.matmul(x, w),
        }[what]()
        n = {
            "": lambda: ops.neg(y),
            "rms_norm": lambda: ops.rms_norm(y, eps=1e-6),
            "layer_norm": lambda: ops.layer_norm(y, scale, shift, eps=1e-6),
        }[norm]()
        returns(y=y, n=n)
    return Module({"f": f})


def choose(monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    monkeypatch.setattr(products, "multiplying", lambda *_: config)


@pytest.mark.parametrize(
    ("what", "norm", "call"),
    [
        ("linear", "", "torch.addmm("),
        ("linear_act", "", "torch._addmm_activation("),
        ("linear_residual", "layer_norm", "torch.addmm("),
    ],
)
def test_the_library_may_have_its_weights_as_rows(what: str, norm: str, call: str, monkeypatch: Any) -> None:
    for config, form in ((configs.LIBRARY, "plain"), (configs.LIBRARY_ROWS, "rows")):
        choose(monkeypatch, config)
        lines, program = lines_of(product_of(what, norm))
        assert lines[0].startswith(call) and (".t()," in lines[0]) == (form == "rows")
        assert program.weights.keys() & {("w", "plain"), ("w", "rows")} == {("w", form)}


@pytest.mark.parametrize(("what", "norm"), [("matmul_residual", "rms_norm"), ("linear_residual", "layer_norm")])
@pytest.mark.parametrize("config", [configs.LIBRARY_PARTS, TILES])
def test_a_norm_adds_the_parts_of_a_sum(what: str, norm: str, config: Any, monkeypatch: Any) -> None:
    choose(monkeypatch, config)
    (line, *rest), _ = lines_of(product_of(what, norm))
    made = "product.parted(" if config == configs.LIBRARY_PARTS else "product.product("
    assert line.startswith(f"summed_norm({made}") and not any("norm(" in other for other in rest)
    assert f"parts={config[1] if config == configs.LIBRARY_PARTS else TILES.split}" in line and "residual=" in line
    assert ("bias=" in line) == ("centred=True" in line) == ("shift=" in line) == (norm == "layer_norm")
    assert ("finish=False" in line) == (config == TILES)


@pytest.mark.parametrize("without", [frozenset(), frozenset({"joined"})])
def test_parts_that_no_norm_adds_are_added_by_their_product(without: frozenset[str], monkeypatch: Any) -> None:
    module = product_of("matmul_residual", "rms_norm" if without else "")
    choose(monkeypatch, configs.LIBRARY_PARTS)
    assert lines_of(module, without)[0][0].startswith("torch.addmm(")
    choose(monkeypatch, TILES)
    (line, *_), _ = lines_of(module, without)
    assert line.startswith("product.product(") and "finish=False" not in line and "scratch=" in line


def test_only_stored_weights_of_products_with_a_bias_are_offered_as_rows(monkeypatch: Any) -> None:
    """Plans for prompts of other lengths share a prefix' weights: in two forms they would be held twice."""
    seen: dict[str, list[Any]] = {}

    def chosen(_: str, key: tuple[Any, ...], offered: list[Any], default: Any, *measure: None) -> Any:
        seen[key[4]] = offered
        return default

    monkeypatch.setattr(configs, "choose", chosen)
    for what, stored in (("linear", True), ("linear_act", False), ("matmul", True), ("matmul_residual", True)):
        lines_of(product_of(what, stored=stored))
    assert {what: configs.LIBRARY_ROWS in offered for what, offered in seen.items()} == {
        "linear": True, "linear_act": False, "matmul": False, "matmul_residual": False,
    }  # fmt: skip
    assert [what for what, offered in seen.items() if configs.LIBRARY_PARTS in offered] == ["matmul_residual"]


@pytest.mark.parametrize(("measured", "rows"), [(M // 8, True), (M // 8 + 1, False)])
def test_a_batch_reads_weights_in_the_form_of_a_sample(measured: int, rows: bool, monkeypatch: Any) -> None:
    """Else plans for batches of several sizes would hold them twice."""

    def chosen(_: str, key: tuple[Any, ...], offered: list[Any], default: Any, *measure: None) -> Any:
        return configs.LIBRARY_ROWS if key[1] == measured else default

    monkeypatch.setattr(configs, "choose", chosen)
    _, program = lines_of(product_of("linear"))
    assert (("w", "rows") in program.weights) == rows == (("w", "plain") not in program.weights)


@pytest.mark.parametrize(
    ("m", "n", "k", "call", "split"),
    [
        (50, 1024, 1024, "product.product(", "split=4"),
        (512, 1152, 588, "product.product(", "split=1"),
        (64, 64, 256, "thin(", ""),
        (2048, 4096, 4096, "torch.mm(", ""),
    ],
)
def test_float32_in_kernels_of_ours(m: int, n: int, k: int, call: str, split: str) -> None:
    """Unless it is large: that was not measured."""
    given = {"x": Type("f32", (m, k))}
    with function("f", **given) as (f, [x]):
        returns(y=ops.matmul(x, ops.weight(key="w", type=Type("f32", (k, n)))))
    (line, *_), _ = lines_of(Module({"f": f}))
    assert line.startswith(call) and split in line


def small(order: str, reads_too: bool = False) -> Module:
    """A small product in float32 and a cast: `before` it or `behind`, or behind matrices that are `stacked`.

    All arguments are read once more at the end, so that nothing takes their places before.
    """
    given = {"x": Type("bf16", (1, 50, 32)), "y": Type("f32", (1, 50, 32)), "z": Type("f32", (1, 1, 32))}
    with function("f", **given) as (f, [x, y, z]):
        w = ops.weight(key="w", type=Type("f32", (32, 64)))
        if order == "before":
            made = ops.cast(x, dtype="f32")
            out = ops.matmul(made, w)
        else:
            made = ops.matmul(y, w) if order == "behind" else ops.concat(z, y, axis=1)
            out = ops.cast(made, dtype="bf16")
        kept = [ops.softmax(v) for v in (x, y, z, *([made] if reads_too else []))]
        returns(out=out, **{f"kept{i}": v for i, v in enumerate(kept)})
    return Module({"f": f})


def launched(module: Module, without: frozenset[str] = frozenset()) -> list[str]:
    """Of what is launched: casts, small products and copies of stacked matrices."""
    names = [line.split("(")[0] for line in lines_of(module, without)[0]]
    return [name for name in names if name in ("thin", "epilogue", "pointwise")]


@pytest.mark.parametrize(
    ("order", "names"), [("before", ["thin"]), ("behind", ["thin"]), ("stacked", ["epilogue"] * 2)]
)
def test_a_cast_beside_a_small_product_has_no_launch(order: str, names: list[str]) -> None:
    assert launched(small(order)) == names
    assert sorted(launched(small(order, reads_too=True))) == sorted([*names, "pointwise"])
    assert sorted(launched(small(order), frozenset({"joined"}))) == sorted([*names, "pointwise"])


def test_a_cast_onto_what_its_product_reads_is_launched_apart() -> None:
    """One program would store where another one has yet to read."""
    module = small("behind")
    plan, func = plan_buffers(module), module.funcs["f"]
    cast = next(op for op in func.block.ops if op.name == "cast")
    plan.offsets[cast.out] = plan.offsets[func.args["y"]]
    assert "pointwise(" in Program(module, plan).text()


def tower(norm: str = "plain", reads: int = 1, later: bool = True) -> Module:
    """Two products with the norm between them, and what reads the first one's sum later."""
    width, wide = Type("bf16", (N,)), Type("bf16", (K,))
    with function("f", x=Type("bf16", (512, N)), r=Type("bf16", (512, N))) as (f, [x, r]):
        w, v = (ops.weight(key=key, type=Type("bf16", shape)) for key, shape in (("w", (N, N)), ("v", (N, K))))
        b, scale, shift = (ops.weight(key=key, type=width) for key in ("b", "scale", "shift"))
        y = fused.linear_residual(r, x, w, b)
        n = ops.layer_norm(y, *(() if norm == "plain" else (scale, shift)), eps=1e-6)
        h = fused.linear_act(n, v, ops.weight(key="c", type=wide), kind="gelu_tanh")
        returns(h=h, more=ops.neg(n) if reads > 1 else ops.neg(h), last=ops.add(y, x) if later else ops.neg(x))
    return Module({"f": f})


def test_a_norm_between_two_products_has_no_launch(monkeypatch: Any) -> None:
    choose(monkeypatch, Tile(rows=64, columns=72))
    (first, second, *rest), program = lines_of(tower())
    size = 2 * 512 * 16
    assert (
        first.startswith("tiled.product(") and f"new_stats=self.scratch[0][:{size}]" in first and "residual=" in first
    )
    assert second.startswith("tiled.product(") and f"normed=(self.scratch[0][:{size}], self.s0, 1e-06)" in second
    assert first.split(", ")[2] == f"rows({second.split('flat(')[1].split(')')[0]})", "the second reads the sum"
    assert not any("norm" in line for line in rest)
    assert program.sums == {program.weights["v", "rows"]: "s0"}
    assert "'s0': " in program.text() and program.weights.keys() & {("v", "plain"), ("w", "plain")} == set()


@pytest.mark.parametrize(
    ("module", "without"),
    [
        (tower("scaled"), frozenset()),
        (tower(reads=2), frozenset()),
        (tower(later=False), frozenset()),
        (tower(), frozenset({"joined"})),
    ],
    ids=["scaled", "read twice", "its sum is not kept", "joined off"],
)
def test_a_norm_that_is_launched(module: Module, without: frozenset[str], monkeypatch: Any) -> None:
    choose(monkeypatch, Tile(rows=64, columns=72))
    lines, program = lines_of(module, without)
    assert any(line.startswith("layer_norm(") for line in lines) and not program.sums
    assert not any("stats" in line or "normed=" in line for line in lines)


def test_a_norm_ahead_of_another_kernel_is_launched(monkeypatch: Any) -> None:
    tile = Tile(rows=64, columns=72)
    monkeypatch.setattr(products, "multiplying", lambda *given: tile if given[3] == N else configs.LIBRARY)
    lines, _ = lines_of(tower())
    assert [line.split("(")[0] for line in lines[:3]] == ["tiled.product", "layer_norm", "torch._addmm_activation"]


def test_parts_of_a_tile_go_to_the_norm_or_it_is_the_librarys_product(monkeypatch: Any) -> None:
    choose(monkeypatch, Tile(split=3))
    (line, *_), _ = lines_of(product_of("linear_residual", "layer_norm"))
    assert line.startswith("summed_norm(tiled.product(") and "parts=3, centred=True, scale=" in line
    assert ", bias=" not in line.split("tiled.Tile(")[0], "the norm adds the bias"
    (line, *_), _ = lines_of(product_of("linear_residual"))
    assert line.startswith("torch.addmm(") and ".t()," in line


def test_tiles_are_offered_where_their_kernels_run(monkeypatch: Any) -> None:
    offered: list[Any] = []

    def chosen(kernel: str, key: Any, found: Any, default: Any, measure: Any = None) -> Any:
        offered.extend(found)
        return default

    monkeypatch.setattr(configs, "choose", chosen)
    monkeypatch.setattr(configs, "hand_written", lambda stage, switch="tiles": switch not in stage.program.without)
    lines_of(tower())
    assert {c.rows for c in offered if c[:1] == configs.TILED} == {64, 128, 192}
    offered.clear()
    lines_of(tower(), frozenset({"tiles"}))
    assert offered and not any(c[:1] == configs.TILED for c in offered)
