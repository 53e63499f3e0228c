"""The door of a compiled policy: every input is checked, and what was found is named beside what was expected.

Inputs are checked by name. `images`, `tokens` and the masks have rules of their own; any other input
must have the declared shape and an acceptable dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cortexflow.errors import InputError
from cortexflow.ir import Type
from cortexflow.ir.core import FLOATS, INTEGERS
from cortexflow.ir.dtypes import TORCH_DTYPES

Given = Mapping[str, Any]


def check_inputs(
    inputs: Mapping[str, Type], given: Given, vocabulary: int | None = None, gapless: bool = False
) -> dict[str, Tensor]:
    """The inputs of a module as tensors of their declared types; raises `InputError`.

    May be left out: `image_mask` (every camera is there), `token_mask` (every token given counts).
    Prompts shorter than the bucket are padded. `vocabulary` bounds the token ids. `gapless`: the policy knows a
    prompt's length alone, so that its mask must be true, then false.
    """
    if unknown := sorted(set(given) - set(inputs)):
        raise InputError(f"unknown input {', '.join(unknown)}; this policy takes {_listing(inputs)}")
    given = {n: v for n, v in given.items() if v is not None}
    found: dict[str, Tensor] = {}
    for name, t in inputs.items():
        if name not in given:
            if name not in _DEFAULTS:
                raise InputError(f"missing input {name!r} ({t}); this policy takes {_listing(inputs)}")
            found[name] = _DEFAULTS[name](t, found, given)
            continue
        x = _tensor(name, given[name])
        found[name] = _RULES.get(name, _plain)(name, x, t)
    if vocabulary is not None and "tokens" in found:
        _check_vocabulary(found["tokens"], vocabulary)
    if "tokens" in given and "token_mask" in given:
        _same_length(given["tokens"], given["token_mask"])
    if gapless and "token_mask" in found:
        _check_gapless(found["token_mask"])
    return found


def _listing(inputs: Mapping[str, Type]) -> str:
    return ", ".join(f"{n}: {t}" for n, t in inputs.items())


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    try:
        array = np.asarray(value)  # torch reads neither negative strides nor, without a warning, what is read-only
        return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())
    except (TypeError, ValueError, RuntimeError) as e:
        raise InputError(f"{name}: expected a tensor or array, found {type(value).__name__} ({e})") from None


def _plain(name: str, x: Tensor, t: Type) -> Tensor:
    _shape(name, x, t)
    if t.dtype in FLOATS:
        if not x.is_floating_point():
            raise InputError(f"{name}: expected {t.dtype} numbers, found {x.dtype}; convert it first")
        x = x.to(TORCH_DTYPES[t.dtype])
        _finite(name, x)
        return x
    return _integers(name, x, t) if t.dtype in INTEGERS else _mask(name, x, t)


def _batched(name: str, x: Tensor, t: Type) -> Tensor:
    """A plain input whose first axis is the batch: a batch of one may be left out."""
    return _plain(name, x.unsqueeze(0) if t.shape == (1, *x.shape) else x, t)


def _integers(name: str, x: Tensor, t: Type, what: str = "integers") -> Tensor:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise InputError(f"{name}: expected {what}, found {x.dtype}")
    limits, given = torch.iinfo(TORCH_DTYPES[t.dtype]), torch.iinfo(x.dtype)
    if given.min < limits.min or given.max > limits.max:
        low, high = _extremes(x)
        if low < limits.min or high > limits.max:
            raise InputError(f"{name}: expected {what} that fit {t.dtype}, found {low} to {high}")
    return x.to(TORCH_DTYPES[t.dtype])


def _shape(name: str, x: Tensor, t: Type, hint: str = "") -> None:
    if tuple(x.shape) != t.shape:
        raise InputError(f"{name}: expected shape {t.shape}, found {tuple(x.shape)}{hint}")


def _extremes(x: Tensor) -> tuple[Any, Any]:
    """The smallest and the largest entry, NaN where there is one: a single wait for a GPU."""
    if not x.numel():
        return 0, 0
    if x.device.type == "cpu" and x.dtype != torch.bfloat16:  # by this thread, which is quicker
        array = x.numpy()
        return array.min().item(), array.max().item()
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64):
        x = x.to(torch.int64)
    low, high = torch.stack(x.aminmax()).tolist()
    return low, high


def _finite(name: str, x: Tensor) -> None:
    if not all(map(math.isfinite, _extremes(x))):
        raise InputError(f"{name}: expected finite numbers, found {int((~torch.isfinite(x)).sum())} NaN or infinite")


def _images(name: str, x: Tensor, t: Type) -> Tensor:
    """float [batch, views, height, width, 3], RGB in [-1, 1]."""
    b, views, height, width, channels = t.shape
    if x.shape == (views, height, width, channels) and b == 1:
        x = x.unsqueeze(0)
    if tuple(x.shape) != t.shape:
        raise InputError(f"{name}: expected {_layout(t)}, found shape {tuple(x.shape)}{_image_hint(x, t)}")
    if not x.is_floating_point():
        raise InputError(
            f"{name}: expected float RGB in [-1, 1], found {x.dtype}; scale 8-bit pixels with x / 255 * 2 - 1"
        )
    low, high = _extremes(x)
    if not (math.isfinite(low) and math.isfinite(high)):
        _finite(name, x)
    if low < -1.001 or high > 1.001:
        raise InputError(
            f"{name}: expected RGB in [-1, 1], found values from {low:.4g} to {high:.4g}; "
            "scale 8-bit pixels with x / 255 * 2 - 1"
        )
    return x.to(TORCH_DTYPES[t.dtype])


def _layout(t: Type) -> str:
    return f"[batch, views, height, width, rgb] = {t.shape}"


def _image_hint(x: Tensor, t: Type) -> str:
    b, views, height, width, channels = t.shape
    shape = tuple(x.shape)
    if len(shape) >= 3 and shape[-3] == channels != shape[-1]:
        return "; this is channels first: move the channels behind with x.movedim(-3, -1)"
    if len(shape) == 5 and shape[1] != views and shape[2:] == t.shape[2:]:
        return f"; it holds {shape[1]} views and this policy was compiled for {views}: compile with views={shape[1]}"
    if len(shape) == 4 and shape[1:] == t.shape[2:]:
        return f"; the batch axis is missing and {shape[0]} is not the {views} views that were compiled"
    if len(shape) == 5 and shape[:2] == (b, views) and shape[-1] == channels:
        return f"; resize the pictures to {height} x {width}"
    if shape[-1:] == (4,):
        return "; drop the alpha channel"
    return ""


def _mask(name: str, x: Tensor, t: Type) -> Tensor:
    if x.ndim == len(t.shape) - 1 and t.shape[0] == 1:
        x = x.unsqueeze(0)
    _shape(name, x, t)
    if x.dtype != torch.bool:
        if x.is_floating_point() or x.is_complex():
            raise InputError(f"{name}: expected bool (true: there), found {x.dtype}")
        if not bool(((x == 0) | (x == 1)).all()):
            raise InputError(f"{name}: expected bool (true: there), found {x.dtype} other than 0 and 1")
        x = x.bool()
    return x


def _prompt_bucket(name: str, x: Tensor, t: Type) -> Tensor:
    """Tokens, or their mask, padded at the end to the bucket."""
    batch, slots = t.shape
    if x.ndim == 1 and batch == 1:
        x = x.unsqueeze(0)
    if x.ndim != 2 or x.shape[0] != batch:
        raise InputError(f"{name}: expected shape {t.shape}, found {tuple(x.shape)}")
    if x.shape[1] > slots:
        raise InputError(
            f"{name}: expected at most {slots} tokens, the prompt bucket of this compilation, found {x.shape[1]}; "
            f"shorten the prompt or compile with prompt={x.shape[1]}"
        )
    given = Type(t.dtype, (batch, x.shape[1]))
    x = _mask(name, x, given) if t.dtype == "bool" else _integers(name, x, given, "integer token ids")
    return torch.nn.functional.pad(x, (0, slots - x.shape[1]))


def _same_length(tokens: Any, mask: Any) -> None:
    tokens, mask = (_tensor(n, v).shape[-1] for n, v in (("tokens", tokens), ("token_mask", mask)))
    if tokens != mask:
        raise InputError(f"token_mask: expected one entry for each of the {tokens} tokens, found {mask}")


def _check_vocabulary(tokens: Tensor, vocabulary: int) -> None:
    low, high = _extremes(tokens)
    if low < 0 or high >= vocabulary:
        raise InputError(
            f"tokens: expected ids from 0 to {vocabulary - 1}, found {low} to {high}; is this the model's tokenizer?"
        )


def _check_gapless(mask: Tensor) -> None:
    bad = ~mask[:, 0] | (mask[:, 1:] & ~mask[:, :-1]).any(dim=1)
    if bool(bad.any()):
        raise InputError(
            "token_mask: expected true for the prompt and false for the padding behind it, found another order in "
            f"episode {int(bad.nonzero()[0])}; move the padding to the end"
        )


def _default_token_mask(t: Type, _: Mapping[str, Tensor], given: Given) -> Tensor:
    slots = torch.arange(t.shape[1])
    length = int(_tensor("tokens", given["tokens"]).shape[-1]) if "tokens" in given else 0
    return (slots < length).expand(t.shape).contiguous()


_RULES: dict[str, Callable[[str, Tensor, Type], Tensor]] = {
    "images": _images,
    "pixel_values": _batched,
    "image_mask": _mask,
    "tokens": _prompt_bucket,
    "token_mask": _prompt_bucket,
    "state": _batched,
    "noise": _batched,
}
_DEFAULTS: dict[str, Callable[[Type, Mapping[str, Tensor], Given], Tensor]] = {
    "image_mask": lambda t, found, given: torch.ones(t.shape, dtype=torch.bool),
    "token_mask": _default_token_mask,
}
