"""openpi's JAX checkpoints: layouts, strictness, LoRA, damage; a directory that orbax itself wrote."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import cortexflow
from cortexflow.checkpoints import match, open_checkpoint
from cortexflow.checkpoints.orbax import MARK, RULES, find_params
from cortexflow.errors import CheckpointError
from cortexflow.models import VLAModelType, create_model
from cortexflow.models.config import ModelConfig
from tests.checkpoints.jax_tree import LLM, to_jax, write_orbax

tensorstore = pytest.importorskip("tensorstore")

Golden = Callable[[str], tuple[dict, dict[str, torch.Tensor]]]
Tree = dict[str, np.ndarray]
KERNEL = "PaliGemma/llm/layers/attn/q_einsum/w"


def tree_of(golden: Golden, case: str) -> tuple[dict, Tree]:
    config, stored = golden(case)
    return config, to_jax({name: value.numpy() for name, value in stored.items()}, config)


def opened(place: Path, config: dict) -> cortexflow.checkpoints.Checkpoint:
    """A step's directory, with what no JAX checkpoint tells in a config.json beside it."""
    (place.parent / "config.json").write_text(json.dumps(config))
    return open_checkpoint(place)


@pytest.fixture
def tree(golden: Golden) -> Tree:
    return tree_of(golden, "p0_kv2")[1]


def refused(place: Path, *words: str) -> str:
    """Opening, matching or reading all of it ends in one explained error."""
    with pytest.raises(CheckpointError) as error:
        checkpoint = open_checkpoint(place)
        match(checkpoint, create_model(checkpoint.config).get_weight_shapes())
        for name in checkpoint.tensors:
            checkpoint.load_checked(name)
    for word in words:
        assert word in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", ["pi05_tiny", "pi0_tiny", "p0_kv2", "p05_onepatch", "p0_minimal"])
def test_tensors_and_configuration_are_those_of_the_pytorch_form(
    case: str, golden: Golden, data: Path, tmp_path: Path
) -> None:
    config, arrays = tree_of(golden, case)
    checkpoint = opened(write_orbax(tmp_path / "params", arrays), config)
    original = open_checkpoint(data / case)
    assert checkpoint.format == "openpi-jax" and checkpoint.path == tmp_path
    assert checkpoint.config == original.config
    assert set(checkpoint.tensors) == set(original.tensors)
    for name, tensor in checkpoint.tensors.items():
        value = checkpoint.load_checked(name)
        assert torch.equal(value, original.load_checked(name)), name
        assert value.is_contiguous() and tensor.shape == value.shape
        assert value.untyped_storage().nbytes() == value.nbytes, f"{name} keeps its stack in memory"
    again = next(iter(checkpoint.tensors))
    assert torch.equal(checkpoint.load_checked(again), original.load_checked(again)), "a second reading"


@pytest.mark.parametrize("case", ["p05_onepatch", "p0_minimal"])
def test_actions_are_those_of_the_pytorch_form(case: str, golden: Golden, data: Path, tmp_path: Path) -> None:
    config, arrays = tree_of(golden, case)
    checkpoint = opened(write_orbax(tmp_path / "params", arrays), config)
    actions = []
    for source in (checkpoint, data / case):
        policy = cortexflow.compile(source, progress=False)
        generator = torch.Generator().manual_seed(1)
        inputs = {
            name: torch.randint(0, 20, t.shape, generator=generator, dtype=torch.int32)
            if t.dtype == "i32"
            else torch.rand(t.shape, generator=generator)
            for name, t in policy.inputs.items()
            if t.dtype != "bool"
        }
        actions.append(policy(**inputs))
    assert (actions[0] - actions[1]).abs().max() <= 1e-6


def test_a_directory_that_orbax_itself_wrote(golden: Golden, data: Path) -> None:
    """data/pi/orbax: p0_minimal saved by orbax-checkpoint 0.12.8, heads and dimensions told by its shapes alone."""
    config, _ = golden("p0_minimal")
    original = open_checkpoint(data / "p0_minimal")
    for place in (data / "orbax", data / "orbax" / "params"):
        checkpoint = open_checkpoint(place)
        assert checkpoint.path == data / "orbax" and checkpoint.format == "openpi-jax"
        match(checkpoint, create_model(checkpoint.config).get_weight_shapes())
        for name in original.tensors:
            assert torch.equal(checkpoint.load_checked(name), original.load_checked(name))
        c = checkpoint.config
        assert (c.num_heads, c.num_kv_heads, c.head_dim, c.vision_num_heads) == (
            config["vlm"]["num_heads"],
            config["vlm"]["num_kv_heads"],
            config["vlm"]["head_dim"],
            config["vision"]["num_heads"],
        )
        assert "action horizon" in checkpoint.notes[-1]


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_full_size_from_shapes_alone(
    family: str, key_list: Callable[[str], dict[str, torch.Tensor]], expected_shapes: Callable
) -> None:
    checkpoint = open_checkpoint(key_list(f"openpi_jax_{family}"))
    tokens = 200 if family == "pi05" else 48
    assert checkpoint.config == ModelConfig().with_(model_type=VLAModelType(family), max_token_len=tokens)
    assert checkpoint.format == "openpi-jax"
    match(checkpoint, expected_shapes(checkpoint.config))
    assert checkpoint.sizes()["total"].params == (3353433872 if family == "pi05" else 3238048528)


@pytest.mark.parametrize(("driver", "ocdbt"), [("zarr", False), ("zarr3", True)])
def test_the_other_two_storage_forms(tree: Tree, tmp_path: Path, driver: str, ocdbt: bool) -> None:
    checkpoint = open_checkpoint(write_orbax(tmp_path / "params", tree, driver=driver, ocdbt=ocdbt))
    bias = checkpoint.load_checked("action_in_proj.bias")
    assert np.array_equal(bias.numpy(), tree["action_in_proj/bias"])


def test_bfloat16(tree: Tree, tmp_path: Path) -> None:
    halves = {path: torch.from_numpy(value.copy()).bfloat16() for path, value in tree.items()}
    stored = {path: value.view(torch.uint16).numpy() for path, value in halves.items()}
    checkpoint = open_checkpoint(write_orbax(tmp_path / "params", stored))
    assert {t.dtype for t in checkpoint.tensors.values()} == {torch.bfloat16}
    kernel = checkpoint.load_checked("action_in_proj.weight")
    assert torch.equal(kernel, halves["action_in_proj/kernel"].t())


def test_everything_that_does_not_fit_is_in_one_error(tree: Tree, tmp_path: Path) -> None:
    del tree["state_proj/bias"]
    tree["PaliGemma/llm/more/w"] = np.ones(3, np.float32)
    tree["action_out_proj/bias"] = np.ones(99, np.float32)
    text = refused(write_orbax(tmp_path / "params", tree))
    assert "missing (1):\n  state_proj.bias" in text
    assert "unknown (1):\n  PaliGemma/llm/more/w" in text
    assert "misshapen (1):\n  action_out_proj.bias" in text


@pytest.mark.parametrize("path", [KERNEL, "PaliGemma/llm/layers/mlp/gating_einsum", "PaliGemma/img/head/kernel"])
def test_an_array_of_another_rank(tree: Tree, tmp_path: Path, path: str) -> None:
    refused(write_orbax(tmp_path / "params", tree | {path: tree[path][0]}), path, "dimensions")


def test_a_configuration_that_contradicts_the_heads(golden: Golden, tmp_path: Path) -> None:
    config, arrays = tree_of(golden, "p0_minimal")
    config["vision"]["num_heads"] *= 2
    place = write_orbax(tmp_path / "params", arrays)
    with pytest.raises(CheckpointError, match=r"vision_num_heads: .*config\.json.* says .*query/kernel"):
        opened(place, config)


# ---- LoRA ------------------------------------------------------------------------------------------


def lora_outputs(eqn: str, x: np.ndarray, w: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """openpi's lora.Einsum with alpha = rank and axes (-2, -1): two einsums whose labels it derives from the first."""
    left, out = eqn.split("->")
    lhs, rhs = left.split(",")
    a_label, b_label = rhs[-2], rhs[-1]
    middle = out.replace(b_label, "L")
    low = np.einsum(f"{lhs},{rhs.replace(b_label, 'L')}->{middle}", x, a)
    return np.einsum(eqn, x, w) + np.einsum(f"{middle},{rhs.replace(a_label, 'L')}->{out}", low, b)


def with_lora(tree: Tree) -> tuple[Tree, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Deltas on every weight that openpi's LoRA variants have them on."""
    rng, made, found = np.random.default_rng(0), dict(tree), {}
    for path, value in tree.items():
        if "PaliGemma/llm/layers/" not in path or "norm" in path:
            continue
        rank = 32 if "_1" in path else 16
        a = rng.normal(size=(*value.shape[:-1], rank)).astype(np.float32)
        b = rng.normal(size=(*value.shape[:-2], rank, value.shape[-1])).astype(np.float32)
        stem = path.removesuffix("w") if path.endswith("/w") else path + "_"
        made[stem + "lora_a"], made[stem + "lora_b"], found[path] = a, b, (a, b)
    return made, found


def test_lora_is_merged_by_openpis_arithmetic(tree: Tree, tmp_path: Path) -> None:
    arrays, deltas = with_lora(tree)
    checkpoint = open_checkpoint(write_orbax(tmp_path / "params", arrays))
    match(checkpoint, create_model(checkpoint.config).get_weight_shapes())
    assert f"LoRA: {len(deltas)} deltas merged" in checkpoint.notes[0]
    rng, layer = np.random.default_rng(1), f"{LLM}layers.0."

    def weight(name: str) -> np.ndarray:
        return checkpoint.load_checked(layer + name).numpy().astype(np.float64)

    def given(path: str) -> list[np.ndarray]:
        return [x[0].astype(np.float64) for x in (tree[path], *deltas[path])]

    w, a, b = given(KERNEL)
    x = rng.normal(size=(1, 3, w.shape[1]))
    q = lora_outputs("BTD,NDH->BTNH", x, w, a, b).reshape(1, 3, -1)
    assert np.allclose(x @ weight("self_attn.q_proj.weight").T, q, rtol=1e-4, atol=1e-4)
    w, a, b = given("PaliGemma/llm/layers/attn/kv_einsum/w")
    k, v = (lora_outputs("BSD,KDH->BSKH", x, w[i], a[i], b[i]).reshape(1, 3, -1) for i in (0, 1))
    assert np.allclose(x @ weight("self_attn.k_proj.weight").T, k, rtol=1e-4, atol=1e-4)
    assert np.allclose(x @ weight("self_attn.v_proj.weight").T, v, rtol=1e-4, atol=1e-4)
    w, a, b = given("PaliGemma/llm/layers/attn/attn_vec_einsum/w")
    encoded = rng.normal(size=(1, 3, *w.shape[:2]))
    o = lora_outputs("BTNH,NHD->BTD", encoded, w, a, b)
    assert np.allclose(encoded.reshape(1, 3, -1) @ weight("self_attn.o_proj.weight").T, o, rtol=1e-4, atol=1e-3)
    w, a, b = given("PaliGemma/llm/layers/mlp/gating_einsum")
    assert np.allclose(x @ weight("mlp.up_proj.weight").T, x @ w[1] + x @ a[1] @ b[1], rtol=1e-4, atol=1e-4)
    w, a, b = given("PaliGemma/llm/layers/mlp/linear")
    hidden = rng.normal(size=(2, w.shape[0]))
    assert np.allclose(hidden @ weight("mlp.down_proj.weight").T, hidden @ w + hidden @ a @ b, rtol=1e-4, atol=1e-4)


def test_lora_that_cannot_be_merged_is_refused_by_name(tree: Tree, tmp_path: Path) -> None:
    arrays, _ = with_lora(tree)
    a, b = (f"PaliGemma/llm/layers/attn/q_einsum/lora_{side}" for side in "ab")
    other = arrays | {a: arrays[a][..., :8].copy(), b: arrays[b][..., :8, :].copy()}
    refused(write_orbax(tmp_path / "rank", other), a, "rank 8", "rank 16", "alpha")
    refused(write_orbax(tmp_path / "alone", {k: v for k, v in arrays.items() if k != b}), a, b, "not there")
    refused(write_orbax(tmp_path / "shape", arrays | {b: arrays[b][..., :-1].copy()}), a, b, "factors")
    stray = "PaliGemma/img/head/lora_a"
    refused(write_orbax(tmp_path / "stray", tree | {stray: np.ones((2, 2), np.float32)}), stray, "unknown")


# ---- damage ----------------------------------------------------------------------------------------


@pytest.fixture
def written(data: Path, tmp_path: Path) -> Path:
    shutil.copytree(data / "orbax", tmp_path / "7000")
    return tmp_path / "7000"


def test_every_file_damaged_in_turn(written: Path, data: Path) -> None:
    """Emptied, cut short, overwritten or gone: an explained error, or the values as they were (unused files)."""
    original = open_checkpoint(data / "p0_minimal")
    outcomes = {}
    for file in sorted(p for p in (written / "params").rglob("*") if p.is_file()):
        whole = file.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], b"\xff" * len(whole), None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            try:
                checkpoint = open_checkpoint(written)
                match(checkpoint, create_model(checkpoint.config).get_weight_shapes())
                same = all(torch.equal(checkpoint.load_checked(n), original.load_checked(n)) for n in original.tensors)
                assert same, f"{file.name} was damaged and other values were read"
            except CheckpointError as error:
                assert str(written) in str(error)
                outcomes[file.name] = "refused"
            file.write_bytes(whole)
    assert outcomes["manifest.ocdbt"] == outcomes["_METADATA"] == "refused" and len(outcomes) >= 4
    largest = max((written / "params").rglob("d/*"), key=lambda p: p.stat().st_size)
    assert outcomes[largest.name] == "refused", "the file with the values"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tree_metadata": {"x": 1}}', "[" * 5000])
def test_damaged_metadata(written: Path, text: str) -> None:
    (written / "params" / "_METADATA").write_text(text)
    refused(written, "_METADATA")


def test_arrays_that_metadata_lists_and_nobody_stored(tree: Tree, tmp_path: Path) -> None:
    place = write_orbax(tmp_path / "params", tree, ocdbt=False)
    shutil.rmtree(place / "params.state_proj.bias.value")
    refused(place, "state_proj/bias", "incomplete")


def test_a_chunk_that_is_gone_is_not_read_as_zeros(tree: Tree, tmp_path: Path) -> None:
    place = write_orbax(tmp_path / "params", tree, ocdbt=False)
    (place / "params.state_proj.bias.value" / "0").unlink()
    refused(place, "state_proj/bias")


def test_headers_that_lie(tree: Tree, tmp_path: Path) -> None:
    place = write_orbax(tmp_path / "params", tree, ocdbt=False)
    file = place / "params.state_proj.bias.value" / ".zarray"
    header = json.loads(file.read_text())
    for change in (
        {"dtype": "<c8"},
        {"dtype": ["<f4"]},
        {"shape": [-1]},
        {"shape": "many"},
        {"shape": [10**15]},
        {"shape": [10**30]},
        {"compressor": {"id": "unheard"}},
        {"dtype": "<f8"},
    ):
        file.write_text(json.dumps(header | change))
        refused(place)
    file.write_text("not json")
    refused(place, "state_proj.bias")


def test_a_stack_of_absurdly_many_layers(tree: Tree, tmp_path: Path) -> None:
    place = write_orbax(tmp_path / "params", tree, ocdbt=False)
    path = "PaliGemma/llm/layers/mlp/linear"
    file = place / f"params.{path.replace('/', '.')}.value" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": [10**9, 8, 8]}))
    refused(place, path, "layers")


def test_directories_that_are_not_quite_it(written: Path, tree: Tree) -> None:
    refused(written.parent, str(written))  # the folder of all steps
    shutil.rmtree(written / "params")
    (written / "params").mkdir()
    refused(written, "incomplete")
    write_orbax(written / "params.orbax-checkpoint-tmp-3", tree)
    refused(written / "params.orbax-checkpoint-tmp-3", "not finished")
    assert find_params(written) is None


def test_nan_is_found(tree: Tree, tmp_path: Path) -> None:
    value = tree["PaliGemma/llm/layers/mlp_1/linear"].copy()
    value[1, 0, 0] = np.nan
    place = write_orbax(tmp_path / "params", tree | {"PaliGemma/llm/layers/mlp_1/linear": value})
    refused(place, "gemma_expert.model.layers.1.mlp.down_proj.weight", "1 NaN")


def test_without_the_library(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    refused(written, "pip install tensorstore")


def test_statistics_beside_params_are_found(written: Path) -> None:
    from cortexflow.observation import directory

    assert directory(open_checkpoint(written / "params")) == written
    assert all(rule.names for rule in RULES.values()) and any(path.startswith(MARK) for path in RULES)
