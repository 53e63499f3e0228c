"""The `torch` target: the source of an `nn.Module` with one method for each stage.

`rules.py` gives one expression an op, `source.py` writes the module, `executable.py` runs it and `save.py` puts it
on disk. The source is what runs: it needs torch, a dictionary of weights, and nothing of this package.
"""

from cortexflow.codegen.target import Target
from cortexflow.codegen.torch.executable import TorchExecutable, build, load_source
from cortexflow.codegen.torch.rules import CLAIMS, RULES
from cortexflow.codegen.torch.source import emit_source

__all__ = ["CLAIMS", "RULES", "TARGET", "TorchExecutable", "build", "emit_source", "load_source"]

TARGET = Target("torch", CLAIMS, build, options=frozenset({"forms"}))
