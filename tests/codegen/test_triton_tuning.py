"""The choice of a kernel's variant: what is known, what is measured, what is kept, and whom it survives."""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from cortexflow.codegen.triton import configs, tuning
from cortexflow.codegen.triton.tuning import choose, export, main, user_file
from cortexflow.kernels.triton import product
from cortexflow.kernels.triton.common import shared_memory

CARD = "NVIDIA Imaginary 9000 (PCIe)"


class Tile(NamedTuple):
    rows: int
    mode: str = "plain"
    late: bool = False


DEFAULT, TILES = Tile(16), [Tile(32), Tile(64, "tma"), Tile(64, "tma", late=True)]
KEY = ("bf16", 560, 2048)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the user's, an empty folder of what is shipped."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning, "_measured", {})
    tuning._read.cache_clear()
    (tmp_path / "shipped").mkdir()
    yield tmp_path / "cache" / "cortexflow" / "tuned" / "nvidia-imaginary-9000-pcie.json"
    tuning._read.cache_clear()


def forget() -> None:
    """As a new process would start."""
    tuning._measured.clear()
    tuning._read.cache_clear()


def measure(config: Tile) -> float:
    return {16: 9.0, 32: 7.5, 64: 3.25 + config.late}[config.rows]


def never(config: Any) -> float:
    raise AssertionError("measured again")


def write(path: Path, **results: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = json.dumps(["product", tuning.triton_version(), *KEY])
    path.write_text(json.dumps({"card": CARD, "results": {entry: results}}))
    forget()


# ---- what is chosen --------------------------------------------------------------------------------


def test_without_results_the_default_runs(cache: Path) -> None:
    assert choose("product", KEY, TILES, DEFAULT, card=CARD) is DEFAULT
    assert not cache.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_card_nothing_is_measured() -> None:
    assert choose("product", KEY, TILES, DEFAULT, never) is DEFAULT


def test_the_fastest_is_measured_once_and_kept(cache: Path) -> None:
    assert choose("product", KEY, TILES, DEFAULT, measure, CARD) == Tile(64, "tma")
    assert user_file(CARD) == cache
    for _ in range(2):
        found = choose("product", KEY, TILES, DEFAULT, never, CARD)
        assert found == Tile(64, "tma") and isinstance(found, Tile)
        assert choose("product", KEY, TILES, DEFAULT, card=CARD) == found
        forget()
    stored = json.loads(cache.read_text())
    assert stored["card"] == CARD
    assert list(stored["results"].values()) == [{"config": [64, "tma", False], "us": 3.25}]


def test_a_result_is_of_one_kernel_key_card_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    choose("product", KEY, TILES, DEFAULT, measure, CARD)
    others = [("attention", KEY, CARD), ("product", (*KEY, 1), CARD), ("product", ("f16", *KEY[1:]), CARD)]
    for kernel, key, card in (*others, ("product", KEY, "NVIDIA Other")):
        assert choose(kernel, key, TILES, DEFAULT, card=card) is DEFAULT
    monkeypatch.setattr(tuning, "triton_version", lambda: "2.1")
    assert choose("product", KEY, TILES, DEFAULT, card=CARD) is DEFAULT


def test_the_users_results_go_before_those_that_are_shipped(cache: Path) -> None:
    write(tuning.SHIPPED / cache.name, config=[32, "plain", False], us=5.0)
    assert choose("product", KEY, TILES, DEFAULT, never, CARD) == Tile(32)
    write(cache, config=[64, "tma", True], us=4.0)
    assert choose("product", KEY, TILES, DEFAULT, never, CARD) == Tile(64, "tma", late=True)


@pytest.mark.parametrize("stale", [[128, "plain", False], [64, "tma"], [], None, "tma", {"rows": 64}])
def test_what_is_no_candidate_any_more_does_not_count(cache: Path, stale: Any) -> None:
    write(cache, config=stale, us=1.0)
    assert choose("product", KEY, TILES, DEFAULT, card=CARD) is DEFAULT
    assert choose("product", KEY, TILES, DEFAULT, measure, CARD) == Tile(64, "tma")


def test_nested_variants_come_back_as_they_are() -> None:
    variants = [((16, 32), ("a", True)), ((16, 64), ("a", False))]
    for _ in range(2):
        assert choose("k", (), variants, variants[0], lambda c: float(c[0][1] == 32), CARD) is variants[1]
        forget()


def test_variants_that_fail_are_skipped_and_say_why(cache: Path) -> None:
    def fails(config: Tile) -> float:
        if config.mode == "tma":
            raise RuntimeError("out of resource: shared memory")
        return measure(config)

    assert choose("product", KEY, TILES, DEFAULT, fails, CARD) == Tile(32)
    (result,) = json.loads(cache.read_text())["results"].values()
    reason = "RuntimeError: out of resource: shared memory"
    assert result["skipped"] == {'[64, "tma", false]': reason, '[64, "tma", true]': reason}


def test_where_every_variant_fails_the_default_stays(cache: Path) -> None:
    def fails(config: Tile) -> float:
        raise ValueError("no")

    with pytest.warns(UserWarning, match=r"no variant of product .* ran on NVIDIA Imaginary.*ValueError: no"):
        assert choose("product", KEY, TILES, DEFAULT, fails, CARD) is DEFAULT
    assert not cache.exists()


# ---- the file --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"results": 3}', '{"results": {"a": 1}}', '{"results": {"a": {}}}', "\0"]
)
def test_a_broken_file_is_named_and_ignored(cache: Path, text: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    with pytest.warns(UserWarning, match=r"imaginary-9000-pcie\.json: expected results .*; ignored, delete the file"):
        assert choose("product", KEY, TILES, DEFAULT, card=CARD) is DEFAULT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        choose("product", KEY, TILES, DEFAULT, measure, CARD)
    forget()
    assert choose("product", KEY, TILES, DEFAULT, never, CARD) == Tile(64, "tma")


def test_a_cache_that_cannot_be_written_costs_only_the_next_time(cache: Path) -> None:
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be kept for the next time"):
        assert choose("product", KEY, TILES, DEFAULT, measure, CARD) == Tile(64, "tma")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert choose("product", KEY, TILES, DEFAULT, never, CARD) == Tile(64, "tma")


def _keep_many(first: int) -> None:
    for i in range(first, first + 20):
        choose("product", (i,), TILES, DEFAULT, measure, CARD)


def test_processes_do_not_lose_each_others_results(cache: Path) -> None:
    spawn = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = [spawn.Process(target=_keep_many, args=(20 * n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(json.loads(cache.read_text())["results"]) == 80
    assert {f.suffix for f in cache.parent.iterdir()} == {".json", ".lock"}


def test_results_are_exported_to_be_shipped(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tuning.SHIPPED / cache.name, config=[32, "plain", False], us=5.0)
    choose("product", (1,), TILES, DEFAULT, lambda c: 1 / c.rows if c.rows < 64 else never(c), CARD)
    main(["--export", str(tmp_path / "out.json"), "--card", CARD])
    assert capsys.readouterr().out.endswith(f"out.json: 2 results for {CARD}\n")
    stored = json.loads((tmp_path / "out.json").read_text())["results"]
    assert all(set(result) == {"config", "us"} for result in stored.values())
    cache.unlink()
    (tmp_path / "out.json").replace(tuning.SHIPPED / cache.name)
    forget()
    assert choose("product", (1,), TILES, DEFAULT, never, CARD) == Tile(32)
    assert export(tmp_path / "again.json", CARD) == 2


def test_what_is_shipped_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    files = list((Path(tuning.__file__).parent / "tuned").glob("*.json"))
    assert files
    for file in files:
        stored = json.loads(file.read_text())
        assert tuning._file_name(stored["card"]) == file.name
        for entry, result in stored["results"].items():
            kernel, version, *_ = json.loads(entry)
            assert isinstance(kernel, str) and version.count(".") == 1
            assert isinstance(result["config"], list) and result["us"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [64, 600])
def test_gated_units_are_measured_whatever_their_size(rows: int) -> None:
    """600 rows are more than the scratch holds for the library's product, which is then no candidate."""
    offered = [*([configs.LIBRARY] if rows == 64 else []), product.default(rows, 16384, 256, True, shared_memory())]
    times = configs._measure_product(offered, torch.bfloat16, rows, 16384, 256, "pairs", "bf16")
    assert all(0 < times(config) < 1e5 for config in offered)


@pytest.mark.gpu
def test_times_come_from_the_card() -> None:
    small, large = torch.randn(1 << 10, device="cuda"), torch.randn(1 << 26, device="cuda")
    times = tuning.timed(lambda c: (small, large)[c[0]].mul_(1.0), [(0,), (1,)])
    assert 0 < times((0,)) < times((1,)) < 1e4
    assert choose("mul", (), [(0,), (1,)], (1,), times, CARD) == (0,)
