"""Model families as graphs: one file per family, one per block that families share."""

from cortexflow.models import openvla, pi0, pi05
from cortexflow.models.base import MODELS, VLAModel, create_model, register_model
from cortexflow.models.config import ModelConfig, Signature, VLAModelType

__all__ = [
    "MODELS",
    "ModelConfig",
    "Signature",
    "VLAModel",
    "VLAModelType",
    "create_model",
    "openvla",
    "pi0",
    "pi05",
    "register_model",
]
