"""The `triton` target: a launch plan over one arena, captured as one CUDA graph.

The source names every buffer with its offset, then one method a stage: a line a launch. Products with
few rows stream their weights through kernels that overlap (`kernels/gluon`), large ones go to cuBLAS or to
`kernels/triton/product.py`, whichever was measured to be faster; ops off the hot path are copied from the torch
target's rules.
"""

from cortexflow.codegen.target import Target
from cortexflow.codegen.triton.claims import CLAIMS, claims
from cortexflow.codegen.triton.executable import SWITCHES, build, planned

TARGET = Target(
    "triton",
    claims=frozenset(CLAIMS),
    build=build,
    accepts=claims,
    wants=frozenset({"layout", "predicate"}),  # patches as products; a captured loop cannot end early
    switches=SWITCHES,
    plan=lambda module, without: planned(module, without)[1],
    needs=frozenset({"hoist"}),  # stages have no launches for what depends on weights or a loop's step alone
    options=frozenset({"forms", "tune", "progress"}),
)

__all__ = ["TARGET", "build"]
