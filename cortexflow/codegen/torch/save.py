"""A torch policy on disk: source that says how to call it, and its weights in safetensors beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from cortexflow.codegen.target import interface_text
from cortexflow.ir.core import Module, Type
from cortexflow.ir.dtypes import TORCH_DTYPES
from cortexflow.kernels.torch.standalone import ENDING


def save_policy(folder: Path, source: str, module: Module, weights: Mapping[str, Tensor]) -> list[Path]:
    """Write `policy.py` and `weights.safetensors`; returns both."""
    folder.mkdir(parents=True, exist_ok=True)
    code, tensors = folder / "policy.py", folder / "weights.safetensors"
    save_file(separate(weights), tensors)
    ending = ENDING.format(
        arguments=", ".join(f"{n}={n}" for n in module.inputs),
        types=interface_text(module, "# "),
        inputs="\n".join(f"        {n!r}: {_random(t)}," for n, t in module.inputs.items()),
    )
    code.write_text(source + ending, encoding="utf-8")
    return [code, tensors]


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the host, each in memory of its own: safetensors takes no tensors that share it."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def _random(t: Type) -> str:
    """An expression for a harmless input of a type."""
    made = {"bool": "ones", "i32": "zeros", "i64": "zeros", "u8": "zeros"}.get(t.dtype)
    if made:
        return f"torch.{made}({t.shape}, dtype={TORCH_DTYPES[t.dtype]}, device=device)"
    return f"(torch.rand({t.shape}, device=device) * 2 - 1).to({TORCH_DTYPES[t.dtype]})"
