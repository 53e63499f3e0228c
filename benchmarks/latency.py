"""Milliseconds of one prediction on a GPU, stage by stage, beside the floor of the work and other implementations.

Full-size graphs in bfloat16, batch 1, weights drawn on the card from a seed. A stage and the whole are timed
as replays of their CUDA graph by device events; the whole also as its caller sees it, by the host's clock from
inputs on the host to actions on the host. The floor of a stage is the larger of its operations over the card's
measured matrix rate and its weights' bytes over the measured copy bandwidth (weights of the flow are read once
a step). Peers run in the same process: this package's torch target (an ordinary PyTorch program with the same
folds), eager and, with --compile, through torch.compile; realtime-vla with --realtime-vla FOLDER.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._gpu import CASES, Case, build, by_clock, by_events, case_of, ceilings, floor, inputs_for, label, p99
from benchmarks._peers import Act, Captured, realtime_vla, realtime_vla_variants
from benchmarks._record import RESULTS, markdown, save, saved
from benchmarks._tokens_peer import openvla
from cortexflow.compiler import switches
from cortexflow.ir import Module
from cortexflow.models import ModelConfig, VLAModelType

Rows = list[dict[str, Any]]
STAGES = ("vision_encoder", "transformer_encoder", "transformer_decoder")
OURS = "cortexflow"
GRAPH, CALL = "graph", "call"  # how a time was taken: replays by device events, calls by the host's clock
STAGE_RUNS, PEER_RUNS, EAGER_RUNS = 200, 200, 20

# What is to hold on one H100, in milliseconds of graph replays and GB; against the peer: at most half of its time.
LIMITS: dict[tuple[Case, str], float] = {
    (CASES[0], "whole"): 8.5,
    (CASES[0], "vision_encoder"): 1.3,
    (CASES[0], "transformer_encoder"): 4.2,
    (CASES[0], "transformer_decoder"): 3.5,
    (CASES[3], "whole"): 40.0,
}
MEMORY_LIMIT = (CASES[0], 5.6)
SPREAD_LIMIT = 1.03  # p99 over the median


# ---- measuring ------------------------------------------------------------------------------------


def measure(case: Case, arguments: argparse.Namespace, card: tuple[float, float]) -> tuple[Rows, Rows]:
    """(times, memory) of one case: ours, then every peer that is asked for and works here."""
    kind, signature = case
    config = ModelConfig.released(kind)
    release()
    module, policy = build(config, signature, "triton", "bf16", without=arguments.without, tune=arguments.tune)
    release()  # before the inputs: one would keep a corner of what the weights were made in
    given = inputs_for(module)
    host = {name: x.cpu() for name, x in given.items()}
    times, memory = ours(case, module, policy, given, host, arguments.runs, card)
    del policy
    for name, make in peers(config, case, arguments):
        release()
        try:
            more, held = peer(case, name, make, host, arguments)
        except Exception as e:  # what fails here must not cost the others' figures
            more, held = [], [{"case": label(case), "policy": name, "failed": f"{type(e).__name__}: {e}"[:300]}]
            print(f"{label(case)}: {name} failed: {type(e).__name__}: {e}", file=sys.stderr)
        times += more
        memory += held
    return times, memory


def ours(
    case: Case,
    module: Module,
    policy: Any,
    given: Mapping[str, Tensor],
    host: Mapping[str, Tensor],
    runs: int,
    card: tuple[float, float],
) -> tuple[Rows, Rows]:
    """A row for each stage and two for the whole; then what memory the whole took, and whether bits repeat."""

    def act() -> Tensor:
        actions: Tensor = policy.run(host)["actions"]
        return actions.cpu()

    release()
    held = torch.cuda.memory_allocated()
    replays(policy, given, STAGES, 1)  # the first one captures: what follows is to need no more memory
    act()
    before = used()
    lowest = sum(floor(module.funcs[stage], *card) for stage in STAGES)
    whole = [row(case, OURS, "whole", GRAPH, replays(policy, given, STAGES, runs), lowest)]
    took, same = by_clock(act, runs)
    whole.append(row(case, OURS, "whole", CALL, took, lowest))
    after = used()
    memory = memory_row(case, OURS, held) | {"runs": 2 * runs, "same bits": f"{same} of {runs}"}
    memory |= {f"{name} growth, bytes": after[name] - before[name] for name in before}
    values, times = dict(given), []
    for stage in STAGES:
        took = replays(policy, dict(values), (stage,), min(runs, STAGE_RUNS))
        times.append(row(case, OURS, stage, GRAPH, took, floor(module.funcs[stage], *card)))
        values |= policy.run_stage(stage, values)
    return times + whole, [memory]


def replays(policy: Any, given: Mapping[str, Tensor], stages: Sequence[str], runs: int) -> list[float]:
    """Times of the graph of some stages; its inputs are written before each replay, untimed."""
    policy.replay(given, *stages)
    try:
        replay = policy.graph(*stages).replay
    except KeyError:  # graphs are switched off: every kernel is launched from here
        replay = partial(policy.replay, given, *stages)
    return by_events(replay, runs, partial(policy.write, given, *stages))


def peer(
    case: Case,
    name: str,
    make: Callable[[], Act | Captured],
    host: Mapping[str, Tensor],
    arguments: argparse.Namespace,
) -> tuple[Rows, Rows]:
    """Rows of one peer: calls and, where it captured one, replays of its graph."""
    start = time.perf_counter()
    made = make()
    captured = made if isinstance(made, Captured) else None
    act = made.act if isinstance(made, Captured) else made
    actions = act(host)
    if not bool(torch.isfinite(actions).all()):
        raise ValueError("its actions are not finite")
    ready = time.perf_counter() - start
    release()
    held = torch.cuda.memory_allocated()
    runs = arguments.peer_runs if captured or name == "torch.compile" else min(arguments.peer_runs, EAGER_RUNS)
    times = []
    if captured:
        times.append(row(case, name, "whole", GRAPH, by_events(captured.replay, runs, lambda: captured.write(host))))
    took, same = by_clock(lambda: act(host).cpu(), runs)
    times.append(row(case, name, "whole", CALL, took))
    return times, [memory_row(case, name, held) | {"same bits": f"{same} of {runs}", "ready s": round(ready, 1)}]


def peers(
    config: ModelConfig, case: Case, arguments: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], Act | Captured]]]:
    """The peers that are asked for, by name, each to be built when its turn comes."""
    _, signature = case
    if arguments.realtime_vla:
        for variant in realtime_vla_variants(arguments.realtime_vla, config.model_type):
            if arguments.autotuned or not variant.endswith("autotuned"):
                yield variant, partial(realtime_vla, arguments.realtime_vla, config, signature, variant)
    if arguments.eager and config.model_type == VLAModelType.OPENVLA and all(map(find_spec, ("timm", "transformers"))):
        yield "transformers and timm, eager", partial(transformers, config)
    elif arguments.eager:
        yield "eager PyTorch", partial(eager, config, case)
    if arguments.compile:
        yield "torch.compile", partial(compiled, config, case)


def transformers(config: ModelConfig) -> Act:
    """OpenVLA's own road, on random weights."""
    answer = openvla(config, {})
    return lambda inputs: answer(inputs).token_ids.float()


def eager(config: ModelConfig, case: Case) -> Act:
    """The torch target in bfloat16 as it is."""
    _, policy = build(config, case[1], "torch", "bf16")
    return lambda inputs: policy.run(inputs)["actions"]


def compiled(config: ModelConfig, case: Case, device: str = "cuda", **options: Any) -> Act:
    """The torch target's module in bfloat16 through torch.compile: minutes until the first action."""
    module, policy = build(config, case[1], "torch", "bf16", device=device)
    network: Any = policy.policy  # type: ignore[attr-defined]
    run = torch.compile(network, **(options or {"mode": "reduce-overhead"}))

    def act(inputs: Mapping[str, Tensor]) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            actions: Tensor = run(*[inputs[name].to(device) for name in module.inputs])["actions"]
        return actions

    return act


def row(case: Case, policy: str, part: str, timed: str, took: Sequence[float], lowest: float | None = None) -> Any:
    """One line of the table of times."""
    middle, high = statistics.median(took), p99(took)
    found = {"case": label(case), "policy": policy, "part": part, "timed": timed, "runs": len(took)}
    found |= {"median ms": round(middle, 4), "p99 ms": round(high, 4), "p99/median": round(high / middle, 4)}
    share = {} if lowest is None else {"floor ms": round(lowest, 3), "share of floor": round(lowest / middle, 3)}
    return found | share


# ---- memory ---------------------------------------------------------------------------------------


def release() -> None:
    """Let go of what nothing holds, and count peaks from here."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def used() -> dict[str, int]:
    """Bytes in use: PyTorch's tensors and blocks, the whole card, this process on the host."""
    free, total = torch.cuda.mem_get_info()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "card": total - free,
        "host": pages * 4096,
    }


def memory_row(case: Case, policy: str, held: int) -> dict[str, Any]:
    """What a policy holds between predictions, and the most while it ran (not while it was built)."""
    found = {"held GB": held, "peak GB": torch.cuda.max_memory_allocated()}
    found["reserved GB"] = torch.cuda.max_memory_reserved()
    return {"case": label(case), "policy": policy} | {name: round(x / 1e9, 3) for name, x in found.items()}


# ---- reporting ------------------------------------------------------------------------------------


def report(content: Mapping[str, Any]) -> str:
    """The tables of a saved run, in Markdown, and what holds of the limits."""
    machine, times = content["machine"], with_ratios(content["rows"])
    names = {"gpu": "One {}", "driver": "driver {}", "cuda": "CUDA {}", "torch": "PyTorch {}", "triton": "Triton {}"}
    head = ", ".join(text.format(machine[key]) for key, text in names.items() if key in machine)
    card = f"Ceilings in the same run: copy {content['copy_TB_s']:.2f} TB/s, bf16 {content['bf16_TFLOP_s']:.0f} TFLOP/s"
    parts = [f"{head}, {content['date']}. {card}.\n`{content['command']}`", markdown(times)]
    parts.append(markdown([memory_cells(r) for r in content["memory"]]))
    parts.append("\n".join(f"- {line}" for line in verdicts(content)))
    return "\n\n".join(parts)


def with_ratios(rows: Rows) -> Rows:
    """Times as cells, those of others with how many times ours they are."""
    base = {(r["case"], r["timed"]): r["median ms"] for r in rows if r["policy"] == OURS and r["part"] == "whole"}
    cells = []
    for r in rows:
        times = "" if r["policy"] == OURS else f"{r['median ms'] / base[r['case'], r['timed']]:.2f}"
        share = f"{r['share of floor']:.0%}" if "share of floor" in r else ""
        part = r["part"] if r["part"] != "whole" else f"**whole**, {r['timed']}"
        found = {"case": r["case"], "policy": r["policy"], "part": part, "median": f"{r['median ms']:.3f} ms"}
        found |= {"p99": f"{r['p99 ms']:.3f} ms", "p99 / median": f"{r['p99/median']:.3f}", "runs": r["runs"]}
        floor_text = f"{r['floor ms']:.2f} ms" if "floor ms" in r else ""
        cells.append(found | {"floor": floor_text, "share of floor": share, "times ours": times})
    return cells


def memory_cells(r: Mapping[str, Any]) -> dict[str, Any]:
    """One policy's memory as cells."""
    growth = [f"{name} {r[f'{name} growth, bytes']}" for name in ("card", "host") if f"{name} growth, bytes" in r]
    sizes = {k: f"{r[k]:.2f} GB" if k in r else "" for k in ("held GB", "peak GB", "reserved GB")}
    shown = {k.removesuffix(" GB"): text for k, text in sizes.items()}
    more = {"growth, bytes": ", ".join(growth), "same bits": r.get("same bits", r.get("failed", ""))}
    return {"case": r["case"], "policy": r["policy"]} | shown | more


def verdicts(content: Mapping[str, Any]) -> list[str]:
    """Every limit that this run has figures for: what it is, what was found, whether it holds."""
    found = {(r["case"], r["policy"], r["part"], r["timed"]): r for r in content["rows"]}
    lines = []

    def say(what: str, value: float, limit: float) -> None:
        lines.append(f"{'holds' if value <= limit else 'MISSED'}: {what}: {value:.4g}, at most {limit:.4g}")

    for (case, part), limit in LIMITS.items():
        if r := found.get((label(case), OURS, part, GRAPH)):
            say(f"{label(case)}, {part}, ms", r["median ms"], limit)
    for (name, policy, part, timed), r in found.items():
        others = [o["median ms"] for (c, p, _, t), o in found.items() if c == name and t == timed and "realtime" in p]
        if policy == OURS and part == "whole":
            if others:
                say(f"{name}, {timed}, against half of the fastest realtime-vla, ms", r["median ms"], min(others) / 2)
            say(f"{name}, {timed}, p99 over median", r["p99/median"], SPREAD_LIMIT)
    for r in content["memory"]:
        if r["policy"] != OURS:
            continue
        same, runs = map(int, r["same bits"].split(" of "))
        say(f"{r['case']}, runs of {runs} with other bits", runs - same, 0)
        say(f"{r['case']}, growth of the card's memory in {r['runs']} runs, bytes", r["card growth, bytes"], 0)
        if r["case"] == label(MEMORY_LIMIT[0]):
            say(f"{r['case']}, peak memory, GB", max(r["peak GB"], r["reserved GB"]), MEMORY_LIMIT[1])
    return lines


# ---- ablation -------------------------------------------------------------------------------------


def ablation(case: Case, runs: int, names: Sequence[str], folder: Path) -> Rows:
    """The whole without each switch, beside the whole with everything, measured first and again at the end."""
    rows: Rows = []
    everything: list[float] = []
    known = switches("triton")
    for name in ("", *names, ""):
        release()
        try:
            module, policy = build(
                ModelConfig.released(case[0]), case[1], "triton", "bf16", without=[name] if name else []
            )
            took = statistics.median(replays(policy, inputs_for(module), STAGES, runs))
            del policy
        except Exception as e:  # the other switches are still of interest
            print(f"without {name or 'nothing'}: {type(e).__name__}: {e}", file=sys.stderr)
            continue
        if name:
            rows.append({"switch": name, "what it is": known.get(name, ""), "without it ms": round(took, 3)})
        else:
            everything.append(round(took, 3))
        best = min(everything, default=float("nan"))
        rows = [r | {"with everything ms": best, "saves ms": round(r["without it ms"] - best, 3)} for r in rows]
        if rows:
            save("ablation", rows, folder, case=label(case), runs=runs, everything=everything)
    return rows


# ---- the command ----------------------------------------------------------------------------------


def arguments_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", type=int, default=2000, help="consecutive predictions of the whole; a stage takes at most 200")
    add("--peer-runs", type=int, default=PEER_RUNS, help="predictions of a peer (eager ones: at most 20)")
    add("--cases", nargs="+", type=case_of, default=CASES, metavar="FAMILY:VIEWS:CHUNK:PROMPT")
    add("--realtime-vla", type=Path, metavar="FOLDER", help="a folder with realtime-vla's files")
    add("--autotuned", action=argparse.BooleanOptionalAction, default=True, help="also its autotuned fork, if there")
    add("--eager", action=argparse.BooleanOptionalAction, default=True, help="the torch target, eager")
    add("--compile", action="store_true", help="the torch target through torch.compile (minutes)")
    add("--without", action="append", default=[], metavar="SWITCH", help="leave an optimisation out; repeatable")
    add("--tune", action="store_true", help="measure kernels first where this card has no results")
    add("--ablation", nargs="*", metavar="SWITCH", help="the first case without each switch (all, or these)")
    add("--table", action="store_true", help="print the tables of the saved run again")
    add("--out", type=Path, default=RESULTS, help="where results are written")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, save after each case, print."""
    arguments = arguments_of(argv)
    if arguments.table:
        print(report(saved("latency", arguments.out)))
        return
    if not torch.cuda.is_available():
        print("latency: needs an NVIDIA GPU, and PyTorch finds none here")
        return
    if arguments.ablation is not None:
        names = arguments.ablation or list(switches("triton"))
        print(markdown(ablation(arguments.cases[0], min(arguments.runs, STAGE_RUNS), names, arguments.out)))
        return
    card = ceilings()
    times: Rows = []
    memory: Rows = []
    for case in arguments.cases:
        start = time.perf_counter()
        more, held = measure(case, arguments, card)
        times += more
        memory += held
        rates = {"copy_TB_s": card[0] / 1e9, "bf16_TFLOP_s": card[1] / 1e9}
        save("latency", times, arguments.out, **rates, without=arguments.without, memory=memory)
        print(f"{label(case)}: measured in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(report(saved("latency", arguments.out)))


if __name__ == "__main__":
    main()
