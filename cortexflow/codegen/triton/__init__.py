"""The `triton` target: a launch plan over one arena, captured as one CUDA graph.

The source names every buffer with its offset, then one method a stage: a line a launch. Products with
few rows stream their weights through kernels that overlap (`kernels/triton/skinny.py`), large ones go to
cuBLAS with an epilogue kernel behind; ops off the hot path are copied from the torch target's rules.
"""

from cortexflow.codegen.target import Target
from cortexflow.codegen.triton.claims import CLAIMS, claims
from cortexflow.codegen.triton.executable import build

TARGET = Target("triton", frozenset(CLAIMS), build, claims, frozenset({"patches"}))

__all__ = ["TARGET", "build"]
