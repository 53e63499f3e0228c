"""Where buffers lie in an arena, given how many bytes each has and when it is live.

Placing intervals in memory is dynamic storage allocation, NP-hard in general. Several greedy orders, each buffer into
the lowest gap that fits, tried again with the buffer that came to lie too high in front; the best counts. Source for
the orders by size and by breadth: Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference",
arXiv 2001.03288.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def offsets(sizes: np.ndarray, spans: np.ndarray, live: np.ndarray) -> np.ndarray:
    """An offset [n] for every buffer: the best of some greedy orders, or the first that meets the bound.

    `sizes` [n] in bytes, `spans` [n, 2] the first and last position at which each is live, `live` the bytes that are
    live at every position.
    """
    length = spans[:, 1] - spans[:, 0] + 1
    breadth = np.array([live[a : b + 1].max() for a, b in spans], np.int64)
    orders = [
        np.lexsort((spans[:, 0], -sizes, -breadth)),  # by the fullest position that a buffer is part of
        np.lexsort((spans[:, 0], -sizes * length)),
        np.lexsort((-sizes, -length)),
        np.lexsort((spans[:, 0], -sizes)),
        np.lexsort((-sizes, spans[:, 0])),
    ]
    best, peak = np.zeros(len(sizes), np.int64), np.iinfo(np.int64).max
    for order in (o.tolist() for o in orders):
        for _ in range(min(8, 1 + 10_000 // (len(sizes) + 1))):
            found, high = _first_fit(order, sizes, spans, peak)
            if high is None:
                best, peak = found, int((found + sizes).max(initial=0))
                if peak <= live.max(initial=0):
                    return best
                high = int((found + sizes).argmax())
            order = [high, *(i for i in order if i != high)]  # what came to lie too high goes first next time
    return best


def _first_fit(order: Sequence[int], sizes: np.ndarray, spans: np.ndarray, limit: int) -> tuple[np.ndarray, int | None]:
    """Place buffers in this order, each into the lowest gap that fits.

    Gives up at the buffer that would end at `limit` or above, and names it.
    """
    found = np.zeros(len(sizes), np.int64)
    lo, hi, first, last = (np.zeros(len(sizes), np.int64) for _ in range(4))  # of those placed so far
    for n, i in enumerate(order):
        size, (a, b) = sizes[i], spans[i]
        meets = np.flatnonzero((first[:n] <= b) & (last[:n] >= a))
        meets = meets[np.argsort(lo[meets])]
        begins = np.zeros(len(meets) + 1, np.int64)
        np.maximum.accumulate(hi[meets], out=begins[1:])
        at = begins[np.append(lo[meets] - begins[:-1] >= size, True).argmax()]
        if at + size >= limit:
            return found, i
        found[i] = lo[n] = at
        hi[n], first[n], last[n] = at + size, a, b
    return found, None
