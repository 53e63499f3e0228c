"""The measurements, as far as they go without a GPU: arguments, floors, tables, and the processes they start."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import _gpu, _record, agreement, batches, cold_start, kernels, latency, replicas
from benchmarks._peers import REALTIME_VLA, Captured, realtime_vla_variants
from benchmarks.decoder_chain import OTHERS, sweep
from cortexflow import compiler
from cortexflow.codegen import find_target
from cortexflow.compiler import lower
from cortexflow.ir import Type, function, ops, returns
from cortexflow.models import ModelConfig, Signature, VLAModelType, create_model

TINY = Path(__file__).parent / "data" / "pi" / "pi05_tiny"
FIRST, OTHER = _gpu.CASES[:2]
SMALL = {
    "vision_encoder_dim": 32,
    "vision_num_layers": 1,
    "vision_num_heads": 2,
    "vision_mlp_dim": 48,
    "encoder_dim": 64,
    "encoder_mlp_dim": 96,
    "decoder_dim": 32,
    "decoder_mlp_dim": 64,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "head_dim": 16,
    "vocab_size": 1024,
    "image_size": 28,
}
SMALL_CASE = (VLAModelType.PI05, Signature(views=2, prompt=6, chunk=4, steps=2))


# ---- arguments ------------------------------------------------------------------------------------


def test_cases_are_read_as_they_are_written() -> None:
    assert latency.arguments_of([]).cases == _gpu.CASES
    found = latency.arguments_of(["--cases", "pi05:2:10:48", "pi0:3:50:20"]).cases
    assert found == [FIRST, (VLAModelType.PI0, Signature(views=3, prompt=20, chunk=50))]
    assert _gpu.label(FIRST) == "pi05, 2 views, chunk 10, prompt 48"
    with pytest.raises(SystemExit):
        latency.arguments_of(["--cases", "pi05:2:10"])


def test_peers_are_those_asked_for(tmp_path: Path) -> None:
    def names(*argv: str, case: _gpu.Case = FIRST) -> list[str]:
        return [n for n, _ in latency.peers(ModelConfig(model_type=case[0]), case, latency.arguments_of(argv))]

    assert names() == ["eager PyTorch"]
    assert names("--no-eager", "--compile") == ["torch.compile"]
    for files in REALTIME_VLA.values():
        for file, _ in files.values():
            (tmp_path / f"{file}.py").touch()
    assert names("--no-eager", "--realtime-vla", str(tmp_path)) == ["realtime-vla", "realtime-vla, autotuned"]
    assert names("--no-eager", "--no-autotuned", "--realtime-vla", str(tmp_path)) == ["realtime-vla"]
    assert realtime_vla_variants(tmp_path, VLAModelType.PI0) == ["realtime-vla"]


def test_switches_reach_passes_and_target(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    torch_target = find_target("torch")

    def build(module: Any, weights: Any, device: Any, **options: Any) -> Any:
        seen.append(
            options | {"fused": any(op.name.startswith("fused.") for s in module.stages for op in s.block.walk())}
        )

    own = replace(torch_target, build=build, switches={"overlap": ""}, options=frozenset({"tune"}))
    monkeypatch.setattr(_gpu, "find_target", lambda name: own)
    monkeypatch.setattr(compiler, "find_target", lambda name: own)
    config = ModelConfig(model_type=SMALL_CASE[0]).with_(**SMALL)
    _gpu.build(config, SMALL_CASE[1], "own", "f32", device="cpu")
    _gpu.build(config, SMALL_CASE[1], "own", "f32", without=["fuse", "overlap"], tune=True, device="cpu")
    assert seen == [
        {"without": frozenset(), "tune": False, "fused": True},
        {"without": frozenset({"overlap"}), "tune": True, "fused": False},
    ]


# ---- figures --------------------------------------------------------------------------------------


def test_the_floor_counts_weights_of_a_loop_once_a_trip() -> None:
    with function("stage", x=Type("f32", (4, 8))) as (func, [x]):

        def step(i: Any, y: Any) -> list[Any]:
            table = ops.weight(key="table", type=Type("f32", (3, 8)))
            return [ops.add(ops.matmul(y, ops.weight(key="w", type=Type("f32", (8, 8)))), ops.gather(table, i))]

        (y,) = ops.loop([x], 3, step)
        returns(y=ops.matmul(y, ops.weight(key="head", type=Type("f32", (8, 2)))))
    read = 3 * (8 * 8 + 8) * 4 + 8 * 2 * 4
    assert _gpu.weight_traffic(func.block) == read
    assert _gpu.floor(func, bandwidth=10.0, rate=1e9) == read / 10
    assert _gpu.floor(func, bandwidth=1e9, rate=1.0) >= 3 * 2 * 4 * 8 * 8


def test_the_full_size_floor_is_that_of_the_work() -> None:
    """π0.5, 2 views, chunk 10: 3.7 GB of prefix weights once, 0.62 GB of the expert's ten times."""
    module, _ = lower(create_model(ModelConfig()), FIRST[1], "bf16", "torch")
    read = {s.name: _gpu.weight_traffic(s.block) / 1e9 for s in module.stages}
    assert read == pytest.approx(
        {"vision_encoder": 0.82, "transformer_encoder": 3.7, "transformer_decoder": 6.2}, rel=0.03
    )


def test_the_99th_percentile() -> None:
    assert _gpu.p99(range(1, 2001)) == 1980
    assert _gpu.p99(range(200, 0, -1)) == 198
    assert _gpu.p99([3.0]) == 3.0


def test_calls_by_the_clock_are_compared_bit_by_bit() -> None:
    results = iter([torch.zeros(2)] * 8 + [torch.ones(2)] * 2)
    times, same = _gpu.by_clock(lambda: next(results), 10 - _gpu.WARM_UP)
    assert (len(times), same) == (7, 5)


def test_drawn_weights_depend_on_their_name_alone() -> None:
    shapes = {"a": (3, 4), "b": (4,), "c": (4,)}
    one, two = _gpu.drawn(shapes, "cpu"), _gpu.drawn(dict(reversed(shapes.items())), "cpu")
    assert all(torch.equal(one[k], two[k]) and one[k].shape == shapes[k] for k in shapes)
    assert not torch.equal(one["b"], one["c"])
    assert _gpu.drawn(shapes, "cpu", torch.bfloat16)["a"].dtype == torch.bfloat16


# ---- tables ---------------------------------------------------------------------------------------


def content() -> dict[str, Any]:
    """A run as it is saved: two stages' worth of our rows, one peer of each kind, one that failed."""
    rows = [
        latency.row(FIRST, latency.OURS, "transformer_decoder", "graph", [3.4] * 10, 2.1),
        latency.row(FIRST, latency.OURS, "whole", "graph", [7.0] * 98 + [7.1, 9.0], 5.4),
        latency.row(FIRST, latency.OURS, "whole", "call", [7.5] * 100, 5.4),
        latency.row(FIRST, "realtime-vla", "whole", "graph", [20.0] * 9),
        latency.row(FIRST, "realtime-vla, autotuned", "whole", "graph", [18.0] * 9),
        latency.row(FIRST, "realtime-vla", "whole", "call", [14.0] * 9),
    ]
    ours = {"case": _gpu.label(FIRST), "policy": latency.OURS, "held GB": 5.2, "peak GB": 5.3, "reserved GB": 5.7}
    growth = {f"{n} growth, bytes": 0 for n in ("allocated", "reserved", "card", "host")}
    memory = [ours | growth | {"runs": 200, "same bits": "99 of 100"}]
    memory.append({"case": _gpu.label(FIRST), "policy": "torch.compile", "failed": "RuntimeError: no"})
    return {"rows": rows, "memory": memory, "copy_TB_s": 3.0, "bf16_TFLOP_s": 771.0}


def test_the_table_is_printed_again_from_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _record.save("latency", folder=tmp_path / "new", **content())
    latency.main(["--table", "--out", str(tmp_path / "new")])
    text = capsys.readouterr().out
    assert "copy 3.00 TB/s, bf16 771 TFLOP/s" in text
    case = "pi05, 2 views, chunk 10, prompt 48"
    assert (
        f"| {case} | cortexflow | transformer_decoder | 3.400 ms | 3.400 ms | 1.000 | 10 | 2.10 ms | 62% |  |" in text
    )
    assert "|  | cortexflow | **whole**, graph | 7.000 ms | 7.100 ms | 1.014 | 100 | 5.40 ms | 77% |  |" in text
    assert "|  | realtime-vla, autotuned | **whole**, graph | 18.000 ms | 18.000 ms | 1.000 | 9 |  |  | 2.57 |" in text
    assert f"| {case} | cortexflow | 5.20 GB | 5.30 GB | 5.70 GB | card 0, host 0 | 99 of 100 |" in text
    assert "|  | torch.compile |  |  |  |  | RuntimeError: no |" in text


def test_limits_are_judged_on_the_figures_there_are() -> None:
    lines = latency.verdicts(content())
    missed = [line for line in lines if line.startswith("MISSED")]
    assert [line.split(", ", 4)[-1] for line in missed] == [
        "call, against half of the fastest realtime-vla, ms: 7.5, at most 7",
        "runs of 100 with other bits: 1, at most 0",
        "peak memory, GB: 5.7, at most 5.6",
    ]
    assert "holds: pi05, 2 views, chunk 10, prompt 48, transformer_decoder, ms: 3.4, at most 3.5" in lines
    assert sum("realtime-vla" in line for line in lines) == 2
    assert not any("vision_encoder" in line for line in lines)


def test_kernels_share_out_the_whole() -> None:
    """Each lasts until the next one starts, however long it is resident."""
    grid = {"grid": [4, 2, 1]}
    events = [{"name": n, "ts": t, "dur": 30, "args": grid} for n, t in (("a", 0), ("b", 10), ("a", 14), ("c", 34))]
    rows = kernels.rows_of("case", events[::-1])
    assert [(r["kernel"], r["grid"], r["launches"], r["µs each"]) for r in rows] == [
        *[("a", "4 x 2 x 1", 2, 15.0), ("c", "4 x 2 x 1", 1, 30.0), ("b", "4 x 2 x 1", 1, 4.0)]
    ]
    assert sum(r["ms in all"] for r in rows) == pytest.approx(0.064)
    kind, signature = kernels.batched("pi05:2:10:48@8")
    assert (kind, signature.batch, signature.prompt) == (VLAModelType.PI05, 8, 48)


@pytest.mark.parametrize(
    "command", [latency.main, agreement.main, cold_start.main, batches.main, replicas.main, kernels.main]
)
def test_without_a_card_a_command_says_so(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    command([])
    assert "needs an NVIDIA GPU" in capsys.readouterr().out


# ---- whole measurements, small and on the CPU -----------------------------------------------------


class Sized:
    """In place of a chain on a card: a layer takes what its kernels' registers come to."""

    def __init__(self) -> None:
        from cortexflow.kernels.gluon import streaming

        self.kernels = "streaming"
        self.configs: dict[str, Any] = {name: streaming.Config(32, 8, 8, 1, True, 128) for name in OTHERS["streaming"]}

    def time(self, names: Sequence[str], prefix: int) -> float:
        if any(config.chunks > 1 for config in self.configs.values()):
            raise ValueError("does not fit")
        return float(sum(config.registers for config in self.configs.values()))


def test_a_sweep_goes_on_with_the_best_of_each_kernel() -> None:
    pytest.importorskip("triton")
    chain = Sized()
    rows = sweep(chain)  # type: ignore[arg-type]
    assert len(rows) == 2 * sum(1 + len(others) for others in OTHERS["streaming"].values())
    assert {name: config.registers for name, config in chain.configs.items()} == {
        "norm, gate and up": 0, "o": 0, "norm, qkv": 112, "down": 128,
    }  # fmt: skip
    assert sum("does not fit" in str(row["us"]) for row in rows) == 4


def test_agreement_measures_the_distance_from_the_interpreter() -> None:
    rows = agreement.measure(
        SMALL_CASE, {n: p for n, p in agreement.POLICIES.items() if p[0] == "torch"}, "cpu", **SMALL
    )
    far = {r["policy"]: r["relative distance"] for r in rows}
    assert far["torch target, f32"] < 1e-5 < 1e-4 < far[agreement.EAGER] < 0.1
    assert all(r["holds"] == "yes" for r in rows)


def test_replicas_give_the_bits_of_one() -> None:
    options = {"backend": "torch", "device": "cpu", "dtype": torch.float32, "progress": False}
    *_, rows = replicas.measure(ModelConfig(**SMALL), ["cpu", "cpu"], 4, 2, "cpu", **options)
    assert [r["devices"] for r in rows] == ["cpu", "cpu, cpu"] and rows[0]["times one"] == 1.0
    assert all(r["bits of one"] and r["same bits"] == "2 of 2" and r["episodes a second"] > 0 for r in rows)


def test_a_policy_that_is_too_far_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def run(self, inputs: Any) -> dict[str, Tensor]:
            return {"actions": torch.ones_like(inputs["noise"])}

    found = agreement.build
    monkeypatch.setattr(
        agreement, "build", lambda c, s, t, d, device: (None, Wrong()) if t == "x" else found(c, s, t, d, device=device)
    )
    rows = agreement.measure(SMALL_CASE, {agreement.EAGER: ("torch", "bf16"), "wrong": ("x", "bf16")}, "cpu", **SMALL)
    assert [r["holds"] for r in rows] == ["yes", "NO"]


def test_a_cold_start_is_taken_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(cold_start.CONFIG, **SMALL)
    folder = cold_start.write(tmp_path / "random", config, "cpu")
    assert cold_start.read(folder) == sum(p.stat().st_size for p in folder.iterdir())
    first = cold_start.start(folder, tmp_path / "caches", "torch", device="cpu", dtype="bfloat16")
    assert first["finite"] and first["same bits"]
    assert 0 < first["from the import"] < first["total"]
    spans = first["spans"]
    assert sum(spans.values()) < first["total"]
    parts = {"import torch", "open the checkpoint", "passes", "prepare weights", "read and check tensors", "build"}
    assert all(spans[part] > 0 for part in parts)
    parts = [r["part"] for r in cold_start.rows_of(first, first)]
    assert parts[0] == "start of Python" and "**total**" in parts


class Replayed:
    """What latency asks of the triton target, on top of the torch target."""

    def __init__(self, policy: Any, module: Any, graphs: bool = True) -> None:
        self.run, self.run_stage, self.module, self.graphs = policy.run, policy.run_stage, module, graphs
        self.written: dict[str, Tensor] = {}

    def write(self, inputs: Any, *stages: str) -> None:
        self.written = dict(inputs)

    def replay(self, inputs: Any, *stages: str) -> None:
        self.write(inputs, *stages)
        for stage in stages:
            self.written |= self.run_stage(stage, self.written)

    def graph(self, *stages: str) -> Any:
        if not self.graphs:
            raise KeyError(stages)
        return types.SimpleNamespace(replay=lambda: self.replay(self.written, *stages))


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency's measurement without a card: a small model, the torch target in the place of triton's."""

    def build(config: Any, signature: Any, target: str, dtype: str, without: Any = (), **_: Any) -> Any:
        if "broken" in without:
            raise RuntimeError("no such kernel")
        module, policy = _gpu.build(config.with_(**SMALL), signature, "torch", dtype, device="cpu")
        return module, Replayed(policy, module, "cuda_graph" not in without) if target == "triton" else policy

    def by_events(call: Any, runs: int, before: Any = lambda: None) -> list[float]:
        before()
        call()
        return [1.0 + i for i in range(runs)]

    monkeypatch.setattr(latency, "build", build)
    monkeypatch.setattr(latency, "by_events", by_events)
    monkeypatch.setattr(latency, "inputs_for", lambda module: _gpu.inputs_for(module, device="cpu"))
    monkeypatch.setattr(latency, "release", lambda: None)
    monkeypatch.setattr(latency, "used", lambda: dict.fromkeys(("allocated", "reserved", "card", "host"), 7))
    monkeypatch.setattr(latency, "ceilings", lambda: (1e6, 1e9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_record, "machine", lambda: {"gpu": "no card"})


@pytest.mark.usefixtures("on_the_cpu")
def test_latency_measures_every_part_and_every_peer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def captured(path: Path, config: Any, signature: Any, variant: str) -> Captured:
        if "autotuned" in variant:
            raise RuntimeError("does not work here")
        return Captured(lambda inputs: inputs["noise"][0], lambda: None, lambda inputs: None)

    monkeypatch.setattr(latency, "realtime_vla", captured)
    monkeypatch.setattr(latency, "realtime_vla_variants", lambda path, kind: list(REALTIME_VLA))
    cases = ["pi05:2:4:6", "pi0:1:4:6"]
    latency.main(
        ["--cases", *cases, "--runs", "5", "--peer-runs", "3", "--realtime-vla", str(tmp_path), "--out", str(tmp_path)]
    )
    found = _record.saved("latency", tmp_path)
    rows, memory = found["rows"], found["memory"]
    shape = [(r["policy"], r["part"], r["timed"], r["runs"]) for r in rows]
    assert (
        shape[: len(shape) // 2]
        == shape[len(shape) // 2 :]
        == [
            *[("cortexflow", stage, "graph", 5) for stage in latency.STAGES],
            ("cortexflow", "whole", "graph", 5),
            ("cortexflow", "whole", "call", 5),
            ("realtime-vla", "whole", "graph", 3),
            ("realtime-vla", "whole", "call", 3),
            ("eager PyTorch", "whole", "call", 3),
        ]
    )
    assert [m.get("same bits", m.get("failed")) for m in memory[:4]] == [
        "5 of 5",
        "3 of 3",
        "RuntimeError: does not work here",
        "3 of 3",
    ]
    assert memory[0]["card growth, bytes"] == 0 and memory[0]["runs"] == 10
    assert "**whole**, call" in capsys.readouterr().out


@pytest.mark.usefixtures("on_the_cpu")
def test_an_ablation_leaves_one_switch_out_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latency.main(["--ablation", "overlap", "broken", "cuda_graph", "--runs", "3", "--out", str(tmp_path)])
    rows = _record.saved("ablation", tmp_path)["rows"]
    assert [r["switch"] for r in rows] == ["overlap", "cuda_graph"]
    assert rows[0] == {
        "switch": "overlap",
        "what it is": latency.switches("triton")["overlap"],
        "without it ms": 2.0,
        "with everything ms": 2.0,
        "saves ms": 0.0,
    }
    told = capsys.readouterr()
    assert " | 2 | 2 | 0 |" in told.out and "without broken: RuntimeError: no such kernel" in told.err


def test_torch_compile_takes_the_torch_target_as_one_graph() -> None:
    """What --compile measures on a GPU traces without a break."""
    config = ModelConfig(model_type=SMALL_CASE[0]).with_(**SMALL)
    act = latency.compiled(config, SMALL_CASE, "cpu", backend="eager", fullgraph=True)
    module, policy = _gpu.build(config, SMALL_CASE[1], "torch", "bf16", device="cpu")
    inputs = _gpu.inputs_for(module, device="cpu")
    assert torch.equal(act(inputs), policy.run(inputs)["actions"])
