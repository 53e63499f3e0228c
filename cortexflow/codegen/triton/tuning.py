"""Which variant of a kernel a card runs fastest: looked up, or measured when that was asked for.

A result belongs to a card, a version of Triton, a kernel and a key (dtype, shape). The user's own results are in
`~/.cache/cortexflow/tuned/CARD.json`, those that come with the package in `tuned/CARD.json` beside this file, and
`python -m cortexflow.codegen.triton.tuning --export FILE` writes both as one such file. A result counts as long as
its variant is still a candidate.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

Config = TypeVar("Config", bound=tuple)
Results = dict[str, dict[str, Any]]  # entry → {"config": [...], "us": microseconds, "skipped": {variant: reason}}

SHIPPED = Path(__file__).parent / "tuned"
_LAUNCHES = 20  # in a graph that is timed
_REPLAYS = 15  # of which the median counts
_measured: dict[str, Results] = {}  # by card, in this process: the cache may be one that cannot be written


def choose(
    kernel: str,
    key: tuple[Any, ...],
    candidates: Sequence[Config],
    default: Config,
    measure: Callable[[Config], float] | None = None,
    card: str | None = None,
) -> Config:
    """The variant of a kernel that is known to be the fastest on the card for a key, else `default`.

    `measure(config)` gives the microseconds of a launch: where it is given and nothing is known, every candidate is
    measured, and the best is kept in the user's cache. One that raises is skipped, and the reason kept as well.
    Variants and keys are tuples of numbers, strings and booleans. `card`: its name; that of the current one is found.
    """
    card = card or card_name()
    if card is None:
        return default
    offered = list(dict.fromkeys([default, *candidates]))
    entry = json.dumps([kernel, triton_version(), *key])
    for results in (_measured.get(card, {}), _own(card), _shipped(card)):
        known = results.get(entry, {}).get("config")
        found = next((c for c in offered if _data(c) == known), None)
        if found is not None:
            return found
    if measure is None:
        return default
    times: dict[Config, float] = {}
    skipped: dict[str, str] = {}
    for config in tqdm(offered, desc=f"measuring {kernel}", unit="variant", delay=1.0, leave=False):
        try:
            times[config] = measure(config)
        except Exception as e:  # a variant that this card or this compiler cannot do
            skipped[json.dumps(_data(config))] = f"{type(e).__name__}: {e}"[:300]
    if not times:
        warnings.warn(f"no variant of {kernel} {key} ran on {card}: {skipped}", stacklevel=2)
        return default
    best = min(times, key=times.__getitem__)
    result = {"config": _data(best), "us": round(times[best], 3)}
    _keep(card, {entry: result | ({"skipped": skipped} if skipped else {})})
    return best


def timed(launch: Callable[[Config], None], candidates: Sequence[Config]) -> Callable[[Config], float]:
    """A `measure` for `choose`: microseconds of `launch(config)`, the median over replays of a CUDA graph of launches.

    Launch on random data, and on other buffers from call to call where a kernel streams more than the card's cache
    holds between two of its launches in a policy. All candidates are compiled at once, at the first measurement.
    """

    @cache
    def compile_all() -> None:
        from cortexflow.kernels.triton.warmup import compiling

        def each() -> None:
            for config in candidates:
                with contextlib.suppress(Exception):  # it is raised again where the variant is measured
                    launch(config)

        with compiling(each, progress=True, strict=False):
            pass

    def measure(config: Config) -> float:
        compile_all()
        for _ in range(_LAUNCHES):  # over all data: what a launch keeps of it must be there before a graph is recorded
            launch(config)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # the default is one of the GPU that captured first
            for _ in range(_LAUNCHES):
                launch(config)
        graph.replay()
        spans = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_REPLAYS)]
        for start, end in spans:
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in spans) * 1e3 / _LAUNCHES

    return measure


def card_name() -> str | None:
    """The current card's name; None where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@cache
def triton_version() -> str:
    """Major and minor version of Triton, on which its code depends."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def user_file(card: str) -> Path:
    """Where the user's own results for a card are."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cortexflow" / "tuned" / _file_name(card)


def export(path: Path, card: str) -> int:
    """Write all results for a card, the user's own before those of the package, to a file to ship; returns how many."""
    results = {k: {"config": r["config"], "us": r["us"]} for k, r in {**_shipped(card), **_own(card)}.items()}
    _write(path, card, results)
    return len(results)


def _file_name(card: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".json"


def _data(config: Any) -> Any:
    """A variant as JSON gives it back."""
    return [_data(x) for x in config] if isinstance(config, (tuple, list)) else config


def _own(card: str) -> Results:
    return _read(user_file(card))


def _shipped(card: str) -> Results:
    return _read(SHIPPED / _file_name(card))


@cache
def _read(path: Path) -> Results:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        for result in results.values():
            result["config"], float(result["us"])
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        warnings.warn(
            f"{path}: expected results of measurements, found {type(e).__name__}: {e}; ignored, delete the file",
            stacklevel=2,
        )
        return {}
    found: Results = results
    return found


def _keep(card: str, new: Results) -> None:
    """Add results to the user's file, whoever else is adding to it."""
    _measured.setdefault(card, {}).update(new)
    path = user_file(card)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _read.cache_clear()
            _write(path, card, {**_read(path), **new})
        _read.cache_clear()
    except OSError as e:
        warnings.warn(f"{path}: results of measurements cannot be kept for the next time: {e}", stacklevel=2)


def _write(path: Path, card: str, results: Results) -> None:
    """All of the file or nothing."""
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(results[k])}" for k in sorted(results))
    text = f'{{\n "card": {json.dumps(card)},\n "results": {{\n{lines}\n }}\n}}\n'
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as f:
        f.write(text)
    os.replace(f.name, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `--export FILE`, and `--card NAME` where that card is not there."""
    parser = argparse.ArgumentParser(prog="python -m cortexflow.codegen.triton.tuning", description=main.__doc__)
    parser.add_argument("--export", type=Path, metavar="FILE", required=True)
    parser.add_argument("--card", default=card_name(), help="its name as PyTorch tells it")
    args = parser.parse_args(arguments)
    if args.card is None:
        parser.error("there is no card here: name one with --card")
    print(f"{args.export}: {export(args.export, args.card)} results for {args.card}")


if __name__ == "__main__":
    main()
