"""The ONNX target: one model of the whole policy in the standard opset, run by onnxruntime.

`emitter.py` writes a graph, `rules.py` has one rule an op, `session.py` runs and saves the result.
"""

from cortexflow.codegen.onnx.emitter import OPSET, Model, export
from cortexflow.codegen.onnx.rules import RULES
from cortexflow.codegen.onnx.session import OnnxExecutable, build
from cortexflow.codegen.target import Target

__all__ = ["OPSET", "RULES", "TARGET", "Model", "OnnxExecutable", "build", "export"]

# No fused op has an operator in the standard: onnxruntime does its own fusions on the plain ops.
TARGET = Target("onnx", claims=frozenset(), build=build)
