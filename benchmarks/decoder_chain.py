"""Microseconds that each kernel of a decoder layer takes, alone and in the chain, on a GPU.

The decoder of a flow is a chain of kernels under programmatic dependent launch, each bound by the latency
after its wait or by the bytes of its weights: a kernel's own time says little. Here a layer's products
(without its attention) run for 18 layers of distinct weights; the same with one layer's weights, which the
cache then holds, shows what is latency alone. Times are medians of CUDA graph replays, for 10 and for 51 rows; also of
a whole layer, with its attention to a prefix.

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
PREFIXES = {10: (560,), 51: (532, 968)}  # rows: keys of π0.5 with two views; of π0 with two, of π0.5 with three
WIDTH, HEADS, HIDDEN = 1024, 2048, 4096
# name: (columns, depth, gated unit); sizes of the released action experts
PRODUCTS = {
    "norm, qkv": (2560, WIDTH, False),
    "o": (WIDTH, HEADS, False),
    "norm, gate and up": (HIDDEN, WIDTH, True),
    "down": (WIDTH, HIDDEN, False),
}
# By rows: what else a kernel's config may be, for `--sweep`.
OTHERS: dict[int, dict[str, list[dict[str, Any]]]] = {
    10: {
        "norm, gate and up": [{"columns": 32}, {"columns": 32, "registers": 0}],
        "down": [{"slices": 16}, {"chunks": 4}, {"columns": 16, "chunks": 4}, {"registers": 128}],
        "o": [{"shared": True, "registers": 0}, {"registers": 0}],
        "norm, qkv": [{"columns": 16}, {"registers": 112}],
    },
    51: {
        "norm, qkv": [{"ahead": 2}, {"chunk": 128, "ahead": 3}, {"columns": 32}, {"columns": 32, "chunk": 128}],
        "norm, gate and up": [{"chunk": 256, "ahead": 1}, {"ahead": 3}],
        "down": [{"chunk": 128, "ahead": 4}, {"chunk": 128, "ahead": 2}, {"columns": 32, "split": 4}],
        "o": [{"columns": 64, "split": 8, "chunk": 128}, {"chunk": 128}, {"columns": 64}],
    },
}


class Chain:
    """The products of a layer on some rows, with weights for each layer."""

    def __init__(self, rows: int) -> None:
        from cortexflow.kernels.gluon import streaming, warpgroup

        self.few = rows <= 16
        self.configs: dict[str, Any] = {
            name: streaming.default(c, k, g, name.startswith("norm")) if self.few else warpgroup.default(c, k, g)
            for name, (c, k, g) in PRODUCTS.items()
        }
        self.hidden, self.normed = _random(rows, WIDTH), _random(rows, WIDTH)
        self.qkv, self.middle = _random(rows, 2560), _random(rows, HIDDEN)
        self.scale, self.shift, self.gate = (_random(WIDTH) for _ in range(3))
        self.parts = torch.empty(8 * 64 * WIDTH, device="cuda")
        self.out, self.angles = _random(rows, HEADS), torch.rand(2, 1, rows, 128, device="cuda")
        self.scratch = torch.empty(1 << 22, device="cuda"), torch.zeros(1, device="cuda", dtype=torch.int32)
        form = "rows" if self.few else "interleaved"
        self.weights = {n: [_weight(form, k, c * (1 + g)) for _ in range(LAYERS)] for n, (c, k, g) in PRODUCTS.items()}

    def launch(self, name: str, layer: int) -> None:
        """One product of one layer, with its norm, gate and residual."""
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
        if self.few:
            streaming.streaming(x, w, out, config=config, **gated, **(norm if name.startswith("norm") else ends))
            return
        if name == "norm, qkv":
            warpgroup.warpgroup(self.normed, w, out, angles=tuple(self.angles), rotated=HEADS + 256, config=config)
        elif name.startswith("norm"):
            warpgroup.warpgroup(self.normed, w, out, config=config, **gated)
        else:
            warpgroup.warpgroup(x, w, self.parts.view(-1, WIDTH), config=config)
            warpgroup.combine(self.parts, out, config.split, **ends, normed=self.normed, **norm)

    def attend(self, cache: tuple[Tensor, Tensor], mask: Tensor) -> None:
        """Attention of the rows to a cache and to themselves; the product of 51 rows has rotated them."""
        from cortexflow.kernels.triton import segment_attention as kernel

        parts = self.qkv[None].split([HEADS, 256, 256], dim=-1)
        q, k, v = (x.unflatten(-1, (-1, 256)) for x in parts)
        config = kernel.default(1, len(self.qkv), HEADS // 256, 256, cache[0].shape[1])
        out, rotated = self.out.view(1, -1, HEADS // 256, 256), not self.few
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


def sweep(chain: Chain, rows: int) -> list[dict[str, Any]]:
    """Every config measured, in turn; each kernel keeps its best for those that follow, and there are two turns."""
    found: list[dict[str, Any]] = []

    def measure(name: str, config: Any) -> float:
        chain.configs[name] = config
        try:
            took = [chain.time(tuple(PRODUCTS), prefix=n) for n in PREFIXES[rows]]
        except Exception as e:  # a config that does not fit
            found.append(
                {"rows": rows, "kernel": name, "config": str(tuple(config)), "us": f"{type(e).__name__}: {e}"[:99]}
            )
            return float("inf")
        found.append({"rows": rows, "kernel": name, "config": str(tuple(config)), "us": [round(t, 2) for t in took]})
        print(found[-1])
        return sum(took)

    for _ in range(2):
        for name, others in OTHERS[rows].items():
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
        save("decoder_sweep", [row for m in PREFIXES for row in sweep(Chain(m), m)])
        return
    rows = []
    for m, prefixes in PREFIXES.items():
        chain = Chain(m)
        for names in (*[(n,) for n in PRODUCTS], tuple(PRODUCTS)):
            what = names[0] if len(names) == 1 else "the chain of all"
            times = {"18 layers us": round(chain.time(names), 2), "in cache us": round(chain.time(names, 1), 2)}
            rows.append({"rows": m, "kernel": what} | times)
            print(rows[-1])
        for prefix in prefixes:
            times = {"18 layers us": round(chain.time(tuple(PRODUCTS), prefix=prefix), 2)}
            times["in cache us"] = round(chain.time(tuple(PRODUCTS), 1, prefix), 2)
            rows.append({"rows": m, "kernel": f"the layer, {prefix} keys"} | times)
            print(rows[-1])
    save("decoder_chain", rows)


if __name__ == "__main__":
    main()
