"""Rewrites of modules: one idea a file, and the pipeline that names them all in order."""

from cortexflow.passes.expose import expose
from cortexflow.passes.fuse import fuse, nearest_misses
from cortexflow.passes.legalize import legalize
from cortexflow.passes.pipeline import PIPELINE, Step, report, run_passes
from cortexflow.passes.rewrite import rewrite

__all__ = ["PIPELINE", "Step", "expose", "fuse", "legalize", "nearest_misses", "report", "rewrite", "run_passes"]
