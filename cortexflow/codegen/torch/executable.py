"""Running generated source: the module that it defines, with its weights on a device."""

from __future__ import annotations

import linecache
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cortexflow.codegen.torch.save import save_policy
from cortexflow.codegen.torch.source import emit_source, method_names
from cortexflow.errors import TargetError
from cortexflow.ir.core import Module
from cortexflow.ir.dtypes import TORCH_DTYPES


class TorchExecutable:
    """The generated module with its weights on a device."""

    def __init__(self, module: Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
        methods = method_names(module)
        self._stages = {s.name: (methods[s.name], list(s.args), list(s.results)) for s in module.stages}
        self._outputs = list(module.outputs)
        self._device = device
        self._module = module
        self._text = emit_source(module)
        self.policy = load_source(self._text, weights).to(device)

    def run_stage(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one stage on named inputs."""
        method, args, results = self._stages[name]
        with torch.inference_mode():
            values = getattr(self.policy, method)(*[inputs[n].to(self._device) for n in args])
        return dict(zip(results, values, strict=True))

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run all stages. The results are the caller's own: none is a view of an input, a weight or another result."""
        values = dict(inputs)
        for name in self._stages:
            values |= self.run_stage(name, values)
        return {n: values[n].clone(memory_format=torch.contiguous_format) for n in self._outputs}

    def source(self) -> str:
        """The generated source."""
        return self._text

    def save(self, folder: Path) -> list[Path]:
        """Write `policy.py`, which runs alone, and `weights.safetensors`."""
        weights = dict(zip(self._module.weight_types(), self.policy.state_dict().values(), strict=True))
        return save_policy(folder, self._text, self._module, weights)


def load_source(text: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """The module that generated source defines; tracebacks show its lines."""
    name = f"<cortexflow torch {abs(hash(text)):x}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"__name__": name}
    exec(compile(text, name, "exec"), scope)
    policy: nn.Module = scope["Policy"](dict(weights))
    return policy.eval()


def build(
    module: Module,
    weights: Mapping[str, Tensor],
    device: torch.device,
    forms: Mapping[str, dict[str, Tensor]] | None = None,
) -> TorchExecutable:
    """Build a legalised module for a device that PyTorch has; `forms` as `Target` says."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TargetError("target 'torch' on device 'cuda': PyTorch finds no CUDA GPU here; use device='cpu'")
    if forms is not None:
        for key, t in module.weight_types().items():
            if not forms[key]:
                there = torch.empty(t.shape, dtype=TORCH_DTYPES[t.dtype], device=device)
                forms[key]["there"] = there.copy_(weights[key].to(device))
        weights = {key: forms[key]["there"] for key in module.weight_types()}
    return TorchExecutable(module, weights, device)
