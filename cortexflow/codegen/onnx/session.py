"""Runs exported models with onnxruntime, and saves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from cortexflow.codegen.onnx.emitter import ONNX_DTYPES, Model, export, raw_bytes
from cortexflow.errors import InputError, TargetError
from cortexflow.ir import Module
from cortexflow.ir.dtypes import TORCH_DTYPES

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
EXTERNAL_OVER = 1_900_000_000  # a protobuf file holds less than 2 GiB
_NAMES = {t: n for n, t in TORCH_DTYPES.items()}


def build(module: Module, weights: Mapping[str, Tensor], device: torch.device) -> OnnxExecutable:
    """The module as one ONNX model, ready to run on the device. Raises `TargetError` where it cannot."""
    return OnnxExecutable(module, weights, torch.device(device))


class OnnxExecutable:
    """A policy in onnxruntime: the whole as one session, each stage as another once somebody runs it.

    Sessions read the weights where they are; inputs and results are torch tensors on the device.
    """

    def __init__(self, module: Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
        _require_provider(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.module, self.device = module, device
        self._weights = _host_weights(module, weights)
        self.model = export(module, module.stages, self._weights)
        self._policy = _Session(self.model, device, "the policy")
        self._stages: dict[str, _Session] = {}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run all stages; returns the module's outputs by name."""
        return self._policy.run(inputs)

    def run_stage(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one stage on named inputs. The first call of a stage builds its session."""
        if name not in self._stages:
            known = {s.name: s for s in self.module.stages}
            if name not in known:
                raise InputError(f"unknown stage {name!r}; there are {', '.join(known)}")
            model = export(self.module, [known[name]], self._weights)
            self._stages[name] = _Session(model, self.device, f"@{name}")
        return self._stages[name].run(inputs)

    def source(self) -> str:
        """The graph as text, weights by name, dtype and shape."""
        return self.model.text()

    def save(self, folder: Path) -> list[Path]:
        """Write `policy.onnx`, with `policy.onnx.data` beside it where the weights are large."""
        folder.mkdir(parents=True, exist_ok=True)
        return self.write(folder / "policy.onnx")

    def write(self, path: str | Path, external_over: int = EXTERNAL_OVER) -> list[Path]:
        """Write the model to one file for any ONNX runtime; returns the files written.

        Weights of more than `external_over` bytes go into `<path>.data` beside it, tensor by tensor.
        """
        path = Path(path)
        proto = onnx.ModelProto()
        proto.CopyFrom(self.model.proto)
        elsewhere = [t for t in proto.graph.initializer if t.name in self.model.tensors]
        if self.model.nbytes <= external_over:
            for t in elsewhere:
                t.ClearField("data_location")
                del t.external_data[:]
                t.raw_data = raw_bytes(self.model.tensors[t.name]).tobytes()
            path.write_bytes(proto.SerializeToString())
            return [path]
        data = path.with_name(path.name + ".data")
        with data.open("wb") as f:
            for t in elsewhere:
                content = raw_bytes(self.model.tensors[t.name])
                align = 1 << 16 if content.nbytes >= 1 << 20 else 64  # large ones can be memory-mapped
                f.seek(-(-f.tell() // align) * align)
                del t.external_data[:]
                for key, value in (("location", data.name), ("offset", f.tell()), ("length", content.nbytes)):
                    t.external_data.add(key=key, value=str(value))
                f.write(content)
        path.write_bytes(proto.SerializeToString())
        return [path, data]


class _Session:
    """One onnxruntime session over a model whose weights are shared with it."""

    def __init__(self, model: Model, device: torch.device, what: str) -> None:
        self.model, self.device, self.what = model, device, what
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Waiting threads may spin during a run, and not between runs, when others want the cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._shared = [_ort_value(t) for t in model.tensors.values()]
        if model.tensors:
            options.add_external_initializers(list(model.tensors), self._shared)
        provider = PROVIDERS[device.type]
        try:
            self._session = ort.InferenceSession(
                model.proto.SerializeToString(),
                options,
                providers=[(provider, _provider_options(device))],
                enable_fallback=0,  # to another provider, silently
            )
        except Exception as e:
            raise TargetError(_refusal(model, provider, e)) from e
        if provider not in self._session.get_providers():
            raise TargetError(
                f"onnxruntime {ort.__version__} did not start {provider} for device {device} (a CUDA or cuDNN library "
                f"is missing or does not match); it offers {', '.join(self._session.get_providers())}"
            )

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        binding = self._session.io_binding()
        alive: list[Tensor] = []  # bound by address: they must outlive the run

        def bind(put: Any, name: str, dtype: str, x: Tensor) -> None:
            alive.append(x)
            device = self.device
            put(name, device.type, device.index or 0, ONNX_DTYPES[dtype], tuple(x.shape), x.data_ptr())

        if missing := [n for n in self.model.inputs if n not in inputs]:
            raise InputError(f"{self.what} needs {', '.join(self.model.inputs)}; missing {', '.join(missing)}")
        for name, t in self.model.inputs.items():
            x = torch.as_tensor(inputs[name])
            if tuple(x.shape) != t.shape:
                raise InputError(f"{self.what}: input {name!r}: expected {t}, found shape {tuple(x.shape)}")
            x = x.detach().to(self.device, TORCH_DTYPES[t.dtype]).contiguous()
            bind(binding.bind_input, name, t.dtype, x)
        results: dict[str, Tensor] = {}
        for result, (name, t) in self.model.outputs.items():
            results[result] = torch.empty(t.shape, dtype=TORCH_DTYPES[t.dtype], device=self.device)
            bind(binding.bind_output, name, t.dtype, results[result])
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as e:  # such as an index outside its table
            raise TargetError(f"onnxruntime {ort.__version__} failed in {self.what}: {_first_line(e)}") from e
        return results


def _require_provider(device: torch.device) -> None:
    provider = PROVIDERS.get(device.type)
    if provider is None:
        raise TargetError(f"target 'onnx' runs on {', '.join(PROVIDERS)}, not on device {device}")
    if provider not in ort.get_available_providers():
        raise TargetError(
            f"device {device} needs onnxruntime's {provider}; onnxruntime {ort.__version__} here has "
            f"{', '.join(ort.get_available_providers())}. Install onnxruntime-gpu, or compile for the device 'cpu'"
        )
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise TargetError(f"device {device}: torch finds no CUDA GPU here; compile for the device 'cpu'")
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # the CUDA libraries that torch brought along


def _provider_options(device: torch.device) -> dict[str, Any]:
    # TF32 would round float32 products to 10 bits.
    return {"device_id": device.index or 0, "use_tf32": "0"} if device.type == "cuda" else {}


def _refusal(model: Model, provider: str, error: Exception) -> str:
    """Why onnxruntime refused a model, and what to do."""
    bf16 = "bf16" in model.dtypes
    advice = ". Compile it in f32 or f16, or for a CUDA device" if bf16 and provider.startswith("CPU") else ""
    dtype = " in bf16" if bf16 else ""
    return f"onnxruntime {ort.__version__}: {provider} cannot run this model{dtype}: {_first_line(error)}{advice}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _host_weights(module: Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that the module reads, on the host, dense, as declared; copied only where they differ."""
    found: dict[str, Tensor] = {}
    for key, t in module.weight_types().items():
        if key not in weights:
            raise InputError(f"weight {key!r} ({t}) is not among the {len(weights)} weights given")
        if tuple(weights[key].shape) != t.shape:
            raise InputError(f"weight {key!r}: expected {t}, found shape {tuple(weights[key].shape)}")
        found[key] = weights[key].detach().to("cpu", TORCH_DTYPES[t.dtype]).contiguous()
    return found


def _ort_value(t: Tensor) -> ort.OrtValue:
    """The tensor as onnxruntime's, sharing its memory; numpy has no bfloat16, so that one goes by its bits."""
    bits = t.view(torch.int16) if t.dtype == torch.bfloat16 else t
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits.numpy(), ONNX_DTYPES[_NAMES[t.dtype]])
