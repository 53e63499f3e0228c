"""CortexFlow compiles Vision-Language-Action policies: a checkpoint in, the fastest correct actions out.

`compile(checkpoint, target="torch")` is the way in; `cortexflow.ir`, `cortexflow.passes` and
`cortexflow.codegen` are the compiler.
"""

from cortexflow.compiler import Compiled, compile, load_model
from cortexflow.errors import (
    CheckpointError,
    ConfigError,
    CortexFlowError,
    InputError,
    ParseError,
    TargetError,
    VerifyError,
)
from cortexflow.models import ModelConfig, Signature, VLAModel, VLAModelType, register_model

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Compiled",
    "ConfigError",
    "CortexFlowError",
    "InputError",
    "ModelConfig",
    "ParseError",
    "Signature",
    "TargetError",
    "VLAModel",
    "VLAModelType",
    "VerifyError",
    "compile",
    "load_model",
    "register_model",
]
