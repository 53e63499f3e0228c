"""Microseconds that each kernel of a decoder layer takes, alone and in the chain, on a GPU.

The decoder of a flow is a chain of kernels under programmatic dependent launch, each bound by the latency
after its wait or by the bytes of its weights: a kernel's own time says little. Here a layer's products
(without its attention) run for 18 layers of distinct weights; the same with one layer's weights, which the
cache then holds, shows what is latency alone. Times are medians of CUDA graph replays, for 10 rows by the kernels of
`kernels/cuda` (`resident`) and of `kernels/gluon` (`streaming`), and for 51 (`warpgroup`); also of a whole layer,
with its attention to a prefix.

Which config of a kernel is best depends on its neighbours: what registers and shared memory they leave decides whose
weights are fetched before their turn. `--sweep` measures other configs in the whole layer, one kernel after the other.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks._gpu import by_events
from benchmarks._record import save
from cortexflow.codegen.triton.placement import FORMS, fill

LAYERS, ROUNDS = 18, 2
ROWS = {"resident": 10, "streaming": 10, "warpgroup": 51}
PREFIXES = {10: (560,), 51: (532, 968)}  # rows: keys of π0.5 with two views; of π0 with two, of π0.5 with three
WIDTH, HEADS, HIDDEN = 1024, 2048, 4096
# name: (columns, depth, gated unit); sizes of the released action experts
PRODUCTS = {
    "norm, qkv": (2560, WIDTH, False),
    "o": (WIDTH, HEADS, False),
    "norm, gate and up": (HIDDEN, WIDTH, True),
    "down": (WIDTH, HIDDEN, False),
}
# What else a kernel's config may be, for `--sweep`.
OTHERS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "resident": {
        "norm, qkv": [{"window": 2}, {"held": True}, {"registers": 80}],
        "o": [{"held": False}, {"window": 2}, {"registers": 80}],
        "norm, gate and up": [{"window": 2}, {"window": 4}, {"registers": 255}, {"registers": 96}],
        "down": [{"ahead": 1}, {"window": 1}, {"window": 3}, {"columns": 32, "cluster": 4, "chunks": 1, "ahead": 1}],
    },
    "streaming": {
        "norm, gate and up": [{"columns": 32}, {"columns": 32, "registers": 0}],
        "down": [{"slices": 16}, {"chunks": 4}, {"columns": 16, "chunks": 4}, {"registers": 128}],
        "o": [{"shared": True, "registers": 0}, {"registers": 0}],
        "norm, qkv": [{"columns": 16}, {"registers": 112}],
    },
    "warpgroup": {
        "norm, qkv": [{"ahead": 2}, {"chunk": 128, "ahead": 3}, {"columns": 32}, {"columns": 32, "chunk": 128}],
        "norm, gate and up": [{"chunk": 256, "ahead": 1}, {"ahead": 3}],
        "down": [{"chunk": 128, "ahead": 4}, {"chunk": 128, "ahead": 2}, {"columns": 32, "split": 4}],
        "o": [{"columns": 64, "split": 8, "chunk": 128}, {"chunk": 128}, {"columns": 64}],
    },
}


class Chain:
    """The products of a layer on some rows, with weights for each layer."""

    def __init__(self, kernels: str) -> None:
        from cortexflow.kernels.cuda import streaming as resident
        from cortexflow.kernels.gluon import streaming, warpgroup

        self.kernels, rows = kernels, ROWS[kernels]

        def config(name: str, c: int, k: int, unit: bool) -> Any:
            norm = name.startswith("norm")
            if kernels == "resident":
                return resident.default(c, k, unit, norm, norm)
            return streaming.default(c, k, unit, norm) if kernels == "streaming" else warpgroup.default(c, k, unit)

        self.configs: dict[str, Any] = {name: config(name, *size) for name, size in PRODUCTS.items()}
        self.squares = torch.rand(16, 128, device="cuda") * 16  # sums of eight of a row
        self.hidden, self.normed = _random(rows, WIDTH), _random(rows, WIDTH)
        self.qkv, self.middle = _random(rows, 2560), _random(rows, HIDDEN)
        self.scale, self.shift, self.gate = (_random(WIDTH) for _ in range(3))
        self.parts = torch.empty(8 * 64 * WIDTH, device="cuda")
        self.out, self.angles = _random(rows, HEADS), torch.rand(2, 1, rows, 128, device="cuda")
        self.scratch = torch.empty(1 << 22, device="cuda"), torch.zeros(1, device="cuda", dtype=torch.int32)
        form = "interleaved" if kernels == "warpgroup" else "rows"
        self.weights = {n: [_weight(form, k, c * (1 + g)) for _ in range(LAYERS)] for n, (c, k, g) in PRODUCTS.items()}

    def launch(self, name: str, layer: int) -> None:
        """One product of one layer, with its norm, gate and residual."""
        from cortexflow.kernels.cuda import streaming as resident
        from cortexflow.kernels.gluon import streaming, warpgroup

        w, config, unit = self.weights[name][layer], self.configs[name], PRODUCTS[name][2]
        x, out = {
            "norm, qkv": (self.hidden, self.qkv),
            "o": (self.out, self.hidden),
            "norm, gate and up": (self.hidden, self.middle),
            "down": (self.middle, self.hidden),
        }[name]
        norm = {"eps": 1e-6, "scale": self.scale, "shift": self.shift}
        ends = {"residual": self.hidden, "gate": self.gate}
        gated: dict[str, Any] = {"glu": True, "act": "gelu_tanh"} if unit else {}
        given = gated | (norm if name.startswith("norm") else ends)
        if self.kernels == "streaming":
            streaming.streaming(x, w, out, config=config, **given)
            return
        if self.kernels == "resident":
            given |= {"squares" if name.startswith("norm") else "new_squares": self.squares}
            turned = {"angles": tuple(self.angles), "rotated": HEADS + 256} if name == "norm, qkv" else {}
            resident.streaming(x, w, out, config=config, **given, **turned)
            return
        if name == "norm, qkv":
            warpgroup.warpgroup(self.normed, w, out, angles=tuple(self.angles), rotated=HEADS + 256, config=config)
        elif name.startswith("norm"):
            warpgroup.warpgroup(self.normed, w, out, config=config, **gated)
        else:
            warpgroup.warpgroup(x, w, self.parts.view(-1, WIDTH), config=config)
            warpgroup.combine(self.parts, out, config.split, **ends, normed=self.normed, **norm)

    def attend(self, cache: tuple[Tensor, Tensor], mask: Tensor) -> None:
        """Attention of the rows to a cache and to themselves; but for `streaming` the product has rotated them."""
        from cortexflow.kernels.cuda import segment_attention as resident
        from cortexflow.kernels.triton import segment_attention as kernel

        parts = self.qkv[None].split([HEADS, 256, 256], dim=-1)
        q, k, v = (x.unflatten(-1, (-1, 256)) for x in parts)
        out, rotated = self.out.view(1, -1, HEADS // 256, 256), self.kernels == "warpgroup"
        if self.kernels == "resident":
            resident.segment_attention(q, k, v, *cache, mask, out, 256**-0.5, self.scratch[0])
            return
        config = kernel.default(1, len(self.qkv), HEADS // 256, 256, cache[0].shape[1])
        kernel.segment_attention(q, k, v, *cache, *self.angles, mask, out, 256**-0.5, self.scratch, config, rotated)

    def time(self, names: Sequence[str], layers: int = LAYERS, prefix: int = 0) -> float:
        """Microseconds a layer for some of its products, over this many layers' weights; with attention to a prefix."""
        for values in (self.hidden, self.normed, self.qkv, self.middle, self.out):
            values.normal_()
        caches = [(_random(1, prefix, 1, 256), _random(1, prefix, 1, 256)) for _ in range(layers if prefix else 0)]
        mask = torch.ones(1, 1, prefix + len(self.qkv), device="cuda", dtype=torch.bool)

        def run() -> None:
            for layer in range(ROUNDS * LAYERS):
                for name in names:
                    self.launch(name, layer % layers)
                    if prefix and name == "norm, qkv":
                        self.attend(caches[layer % layers], mask)

        return statistics.median(by_events(_captured(run).replay, 15)) * 1e3 / (ROUNDS * LAYERS)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").to(torch.bfloat16)


def _weight(form: str, depth: int, columns: int) -> Tensor:
    w = _random(depth, columns) * depth**-0.5
    place = torch.empty(w.shape[::-1] if FORMS[form][0] else w.shape, device="cuda", dtype=torch.bfloat16)
    fill(place, form, w)
    return place


def _captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def sweep(chain: Chain) -> list[dict[str, Any]]:
    """Every config measured, in turn; each kernel keeps its best for those that follow, and there are two turns."""
    found: list[dict[str, Any]] = []
    kernels, rows = chain.kernels, ROWS[chain.kernels]

    def measure(name: str, config: Any) -> float:
        chain.configs[name] = config
        try:
            took = [chain.time(tuple(PRODUCTS), prefix=n) for n in PREFIXES[rows]]
        except Exception as e:  # a config that does not fit
            found.append(
                {
                    "kernels": kernels,
                    "kernel": name,
                    "config": str(tuple(config)),
                    "us": f"{type(e).__name__}: {e}"[:99],
                }
            )
            return float("inf")
        took_us = [round(t, 2) for t in took]
        found.append({"kernels": kernels, "kernel": name, "config": str(tuple(config)), "us": took_us})
        print(found[-1])
        return sum(took)

    for _ in range(2):
        for name, others in OTHERS[kernels].items():
            first = chain.configs[name]
            times = {config: measure(name, config) for config in (first, *(first._replace(**o) for o in others))}
            chain.configs[name] = min(times, key=times.__getitem__)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="other configs of each kernel, in the whole layer")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("decoder_chain: needs an NVIDIA GPU, and PyTorch finds none here")
        return
    if arguments.sweep:
        save("decoder_sweep", [row for kernels in ROWS for row in sweep(Chain(kernels))])
        return
    rows = []
    for kernels, m in ROWS.items():
        chain = Chain(kernels)
        for names in (*[(n,) for n in PRODUCTS], tuple(PRODUCTS)):
            what = names[0] if len(names) == 1 else "the chain of all"
            times = {"18 layers us": round(chain.time(names), 2), "in cache us": round(chain.time(names, 1), 2)}
            rows.append({"kernels": kernels, "rows": m, "kernel": what} | times)
            print(rows[-1])
        for prefix in PREFIXES[m]:
            times = {"18 layers us": round(chain.time(tuple(PRODUCTS), prefix=prefix), 2)}
            times["in cache us"] = round(chain.time(tuple(PRODUCTS), 1, prefix), 2)
            rows.append({"kernels": kernels, "rows": m, "kernel": f"the layer, {prefix} keys"} | times)
            print(rows[-1])
    save("decoder_chain", rows)


if __name__ == "__main__":
    main()
