"""CortexFlow compiles Vision-Language-Action policies: a checkpoint in, the fastest correct actions out.

`create_inference(family, checkpoint, ...)` gives an engine that acts, `compile(checkpoint, target="torch")` what
it is made of; `cortexflow.ir`, `cortexflow.passes` and `cortexflow.codegen` are the compiler.
"""

from cortexflow.backends import ComputeBackend, register_backend
from cortexflow.compiled import Compiled
from cortexflow.compiler import compile, load_model
from cortexflow.configuration import BackendType, InferenceConfig
from cortexflow.engine import (
    VLAInferenceEngine,
    create_inference,
    create_openvla_inference,
    create_pi0_inference,
    create_pi05_inference,
)
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
from cortexflow.policy import Policy
from cortexflow.replicas import ReplicaError, ReplicatedEngine

__version__ = "0.1.0"

__all__ = [
    "BackendType",
    "CheckpointError",
    "Compiled",
    "ComputeBackend",
    "ConfigError",
    "CortexFlowError",
    "InferenceConfig",
    "InputError",
    "ModelConfig",
    "ParseError",
    "Policy",
    "ReplicaError",
    "ReplicatedEngine",
    "Signature",
    "TargetError",
    "VLAInferenceEngine",
    "VLAModel",
    "VLAModelType",
    "VerifyError",
    "compile",
    "create_inference",
    "create_openvla_inference",
    "create_pi0_inference",
    "create_pi05_inference",
    "load_model",
    "register_backend",
    "register_model",
]
