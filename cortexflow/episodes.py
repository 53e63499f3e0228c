"""What `predict` takes of one episode, and `predict_batch` of several: checked, and as the network reads it.

Pixels, state, token ids and noise come as numpy or torch of several kinds and leave as tensors of batch 1. Every
function raises `InputError`, naming the argument, what was expected, what was found, what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexflow.configuration import InferenceConfig
from cortexflow.errors import InputError
from cortexflow.processing import pad_to, state_bins
from cortexflow.processing.arrays import to_numpy
from cortexflow.processing.images import to_levels
from cortexflow.processing.prompts import as_bins, prompt_format
from cortexflow.processing.towers import Tower, pixel_values


def batch_columns(
    images: Any, prompts: Any, state_tokens: Any, noise: Any, states: Any, seed: Any
) -> dict[str, Sequence[Any]]:
    """The arguments of `predict_batch` with one entry per episode each, in the order of `predict`'s.

    Raises `InputError` for one that has another number of entries than `images`.
    """
    count = _length(images, "batch_images", "[B, views, size, size, 3]")
    columns = {
        "batch_images": images,
        "batch_prompts": [prompts] * count if prompts is None or isinstance(prompts, str) else prompts,
        "batch_state_tokens": [None] * count if state_tokens is None else state_tokens,
        "noise": [None] * count if noise is None else noise,
        "batch_states": [None] * count if states is None else states,
        "seed": [seed] * count if isinstance(seed, (int, np.integer)) else seed,
    }
    for name, column in columns.items():
        if (found := _length(column, name, "one entry per episode")) != count:
            raise InputError(f"{name}: expected {count} entries, one for each episode, found {found}")
    return columns


def _length(column: Any, name: str, what: str) -> int:
    is_array = isinstance(column, (Tensor, np.ndarray)) and column.ndim > 0
    if not is_array and (not isinstance(column, Sequence) or isinstance(column, (str, bytes))):
        raise InputError(f"{name}: expected {what}, found {type(column).__name__}")
    return len(column)


def read_images(images: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Images of one episode as (float32 [1, views, size, size, 3] in [-1, 1], bool [1, views])."""
    views, size = shape[0], shape[1]
    expected = f"observation_images: expected {views} views of {size} x {size} RGB pixels, shape {shape}"
    if isinstance(images, (Tensor, np.ndarray)):
        if tuple(images.shape) != shape:
            raise InputError(f"{expected}, found shape {tuple(images.shape)}{_hint(tuple(images.shape), shape)}")
        return _unit(images, "observation_images")[None], torch.ones((1, views), dtype=torch.bool)
    if not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
        raise InputError(f"{expected}, or a list of {views} pictures, found {type(images).__name__}")
    if len(images) != views:
        raise InputError(f"{expected}, found a list of {len(images)}; write None for an absent camera")
    if all(picture is None for picture in images):
        raise InputError(f"observation_images: all {views} views are None; give the picture of at least one camera")
    pictures = []
    for i, picture in enumerate(images):
        if picture is None:
            pictures.append(torch.full(shape[1:], -1.0))
            continue
        if not isinstance(picture, (Tensor, np.ndarray)) or tuple(picture.shape) != shape[1:]:
            found = tuple(picture.shape) if hasattr(picture, "shape") else type(picture).__name__
            hint = _hint((views, *found), shape) if isinstance(found, tuple) else ""
            raise InputError(f"observation_images[{i}]: expected a picture {shape[1:]}, found {found}{hint}")
        pictures.append(_unit(picture, f"observation_images[{i}]"))
    mask = torch.tensor([[picture is not None for picture in images]])
    place = next(x.device for x, there in zip(pictures, mask[0].tolist(), strict=True) if there)
    return join([x.to(place)[None] for x in pictures])[None], mask


def join(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one device along their first axis; on the host by this thread."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].device.type != "cpu":
        return torch.cat(list(parts))
    return torch.from_numpy(np.concatenate([x.numpy() for x in parts]))


def read_pixel_values(images: Any, shape: tuple[int, ...], towers: Sequence[Tower]) -> Tensor:
    """Images of one episode, as `read_images` takes them, scaled for each tower: float32 [1, channels, size, size].

    8-bit pixels are scaled as bytes, exactly as the image processor of the checkpoint does it.
    """
    unit = read_images(images, shape)[0][0].cpu().numpy()
    given = [images] if isinstance(images, (Tensor, np.ndarray)) else images
    if any(picture is None for picture in given):
        raise InputError("observation_images: this policy cannot do without a camera, found None among the views")
    if all(str(picture.dtype).endswith("uint8") for picture in given):
        unit = to_levels(unit)
    elif not np.abs(unit).max() <= 1.001:  # NaN is not
        raise InputError(
            f"observation_images: expected RGB in [-1, 1], found values from {unit.min():.4g} to {unit.max():.4g}; "
            "scale 8-bit pixels with x / 255 * 2 - 1, or give them as uint8"
        )
    return torch.from_numpy(pixel_values(list(unit), towers))[None]


def _unit(picture: Tensor | NDArray[Any], name: str) -> Tensor:
    """8-bit pixels as `x / 255 * 2 - 1`; float pixels as float32 (their range is checked with the other inputs)."""
    if isinstance(picture, Tensor) and picture.dtype == torch.uint8 and picture.device.type == "cpu":
        picture = picture.numpy()
    if isinstance(picture, np.ndarray):
        if picture.dtype.kind not in "fu" or (picture.dtype.kind == "u" and picture.dtype != np.uint8):
            raise _wrong_dtype(name, picture.dtype)
        unit = np.array(picture, np.float32)  # a copy: torch reads neither negative strides nor what is read-only
        if picture.dtype == np.uint8:  # in place: fresh memory takes longer than the work, and so does waking others
            unit /= np.float32(127.5)  # the bits of x / 255 * 2, as doubling is exact
            unit -= np.float32(1)
        return torch.from_numpy(unit)
    if picture.dtype == torch.uint8:
        return picture.to(torch.float32).div_(255).mul_(2).sub_(1)
    if not picture.is_floating_point():
        raise _wrong_dtype(name, picture.dtype)
    return picture.detach().to(torch.float32)


def _wrong_dtype(name: str, dtype: Any) -> InputError:
    return InputError(
        f"{name}: expected uint8 in 0..255 or float in [-1, 1], found {dtype}; 8-bit pixels in another type: "
        "images.astype(np.uint8) (torch: images.to(torch.uint8))"
    )


def _hint(found: tuple[int, ...], shape: tuple[int, ...]) -> str:
    if len(found) == 5:
        return "; several episodes go to predict_batch"
    if len(found) == 3:
        return "; one picture is images[None]"
    if len(found) == 4 and found[1] == 3 != found[3]:
        return "; this is channels first: images.transpose(0, 2, 3, 1) (torch: images.permute(0, 2, 3, 1))"
    if len(found) == 4 and found[3] == 4:
        return "; drop the alpha channel with images[..., :3]"
    if len(found) == 4 and found[1:] == shape[1:]:
        return f"; make the engine with num_views={found[0]}, or write None for an absent camera"
    if len(found) == 4 and found[3] == 3:
        return "; resize them (cortexflow.processing.resize_with_pad, for example in engine.preprocessor)"
    return ""


def network_state(vector: NDArray[np.float64] | None, size: int) -> Tensor:
    """A normalised state [1, size], padded with zeros."""
    if vector is None:
        raise InputError(
            f"state: expected the normalised state of up to {size} values, found None; this network reads it"
        )
    return torch.from_numpy(pad_to(vector, size, "state").astype(np.float32))[None]


def why_no_state(config: InferenceConfig, prompt_name: str | None) -> str | None:
    """Why the prompt has no place for a discretised state; None: it has one."""
    if not config.discrete_state_input:
        return "discrete_state_input=False"
    if prompt_name and prompt_format(prompt_name).with_state:
        return None
    return f"the prompt format {prompt_name!r} has no place for it"


def read_bins(state_tokens: Any, vector: NDArray[np.float64] | None, no_state: str | None) -> NDArray[np.int64] | None:
    """The discretised state [n] that goes into the prompt, of bins or of a normalised state; None without either."""
    if vector is None and state_tokens is None:
        return None
    which = "state_tokens" if state_tokens is not None else "state"
    if state_tokens is not None and vector is not None:
        raise InputError("state_tokens: expected these or state, found both; they say the same")
    if no_state is not None:
        raise InputError(f"{which}: expected None ({no_state}), found a state; leave it out")
    return as_bins(state_tokens) if vector is None else state_bins(vector)


def read_ids(prompt: Any) -> list[int]:
    """Token ids given in place of text: whole numbers [n]."""
    if prompt is None:
        raise InputError("task_prompt: expected the instruction, found None")
    try:
        ids = to_numpy(prompt)
    except (TypeError, ValueError) as error:
        raise InputError(f"task_prompt: expected text or token ids, found {type(prompt).__name__}") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(
            f"task_prompt: expected text or token ids [n], found {type(prompt).__name__} of dtype {ids.dtype} and "
            f"shape {ids.shape}"
        )
    return [int(i) for i in ids]


def read_noise(noise: Any, seed: Any, shape: tuple[int, ...]) -> Tensor:
    """Noise float [1, chunk, action_dim]: what is given, of `shape` (chunk, action_dim), or drawn from `seed`."""
    if noise is None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not -(1 << 63) <= seed < 1 << 63:
            raise InputError(f"seed: expected an integer of 64 bits, found {seed!r}")
        generator = torch.Generator().manual_seed(int(seed))
        return torch.randn((1, *shape), generator=generator)
    if isinstance(noise, Tensor):
        x = noise.detach()
    else:
        try:
            array = to_numpy(noise)
        except (TypeError, ValueError) as error:
            raise InputError(f"noise: expected shape {shape}, found {type(noise).__name__}") from error
        if array.dtype.kind != "f":
            raise InputError(f"noise: expected float numbers, found {array.dtype}")
        x = torch.from_numpy(np.array(array, np.float32))
    if tuple(x.shape) != shape:
        raise InputError(f"noise: expected shape {shape}, found {tuple(x.shape)}")
    return x[None]
