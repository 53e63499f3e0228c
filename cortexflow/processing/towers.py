"""A picture as the image towers of one network read it: each has a mean and a standard deviation of its own.

The constants are those that `preprocessor_config.json` holds under `tvf_normalize_params`: OpenVLA's are rounded to
bfloat16, and they, not the decimal ones beside them under `means` and `stds`, are what the networks were released with.
Source: openvla prismatic/extern/hf/processing_prismatic.py (PrismaticImageProcessor).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cortexflow.errors import CheckpointError, InputError
from cortexflow.processing.images import Pixels
from cortexflow.processing.stats import read_json

PREPROCESSOR_CONFIG = "preprocessor_config.json"
RGB = 3
BICUBIC = (3, "bicubic")  # as PIL numbers it, and by name


class Tower(NamedTuple):
    """What one tower expects: `(x - mean) / std` for each channel of RGB in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


DINO_SIGLIP = (  # of the released OpenVLA
    Tower((0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)),
    Tower((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
)


def pixel_values(pictures: Sequence[NDArray[Any] | None], towers: Sequence[Tower]) -> Pixels:
    """Pictures as channels: float32 [views * towers * 3, H, W], of the first picture the first tower's RGB first.

    Each picture is [H, W, 3], uint8 or floats in [-1, 1]. Raises InputError for one that is absent (None): such
    networks have no mask.
    """
    channels = []
    for i, picture in enumerate(pictures):
        if picture is None:
            raise InputError(f"images[{i}]: this network cannot do without a camera, found None; give its picture")
        low, width = (0, 255) if picture.dtype == np.uint8 else (-1, 2)
        unit = (picture.astype(np.float32) - np.float32(low)) / np.float32(width)
        for mean, std in towers:
            scaled = (unit - np.array(mean, np.float32)) / np.array(std, np.float32)
            channels.append(scaled.transpose(2, 0, 1))
    return np.ascontiguousarray(np.concatenate(channels))


def load_towers(directory: str | Path) -> tuple[int, tuple[Tower, ...]]:
    """(size in pixels, the towers) that a checkpoint's `preprocessor_config.json` describes.

    Raises CheckpointError if the file is missing or damaged, or asks for arithmetic that is not offered: another
    resize than `resize-naive` in bicubic, sizes that differ, a crop behind the resize.
    """
    file = Path(directory) / PREPROCESSOR_CONFIG
    if not file.is_file():
        raise CheckpointError(f"{file}: expected the settings of the image processor, found no such file; copy it here")
    content = read_json(file)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: expected an object of settings, found {content!r:.80}; copy it again")
    _check(file, "image_resize_strategy", content.get("image_resize_strategy"), "resize-naive")
    _check(file, "tvf_do_letterbox", content.get("tvf_do_letterbox", False), False)
    for kind in _items(file, content, "interpolations", ["bicubic"]):
        _check(file, "interpolations", kind, *BICUBIC)
    sizes = [_square(file, "input_sizes", shape, RGB) for shape in _items(file, content, "input_sizes", [])]
    for step in _steps(file, content, "tvf_resize_params"):
        _check(file, "tvf_resize_params: interpolation", step.get("interpolation", 3), *BICUBIC)
        _check(file, "tvf_resize_params: antialias", step.get("antialias", True), True)
        sizes.append(_square(file, "tvf_resize_params: size", step.get("size")))
    for step in _steps(file, content, "tvf_crop_params"):
        sizes.append(_square(file, "tvf_crop_params: output_size", step.get("output_size")))
    if len(set(sizes)) != 1:
        raise CheckpointError(f"{file}: expected one size of pictures for all, found {sizes or 'none'}; copy it again")
    return sizes[0], _towers(file, content)


def _towers(file: Path, content: Mapping[str, Any]) -> tuple[Tower, ...]:
    """Of the normalisation steps; a file without them leaves their computation to `means` and `stds`."""
    steps = _steps(file, content, "tvf_normalize_params")
    pairs = [(step.get("mean"), step.get("std")) for step in steps]
    if not steps:
        means, stds = (_items(file, content, key, []) for key in ("means", "stds"))
        if len(means) != len(stds):
            raise CheckpointError(f"{file}: expected as many stds as means, found {len(stds)} and {len(means)}")
        pairs = list(zip(means, stds, strict=True))
    if not pairs:
        raise CheckpointError(f"{file}: expected tvf_normalize_params, found no mean and std of any tower")
    towers = tuple(Tower(_rgb(file, "mean", mean), _rgb(file, "std", std)) for mean, std in pairs)
    if lowest := [t.std for t in towers if min(t.std) <= 0]:
        raise CheckpointError(f"{file}: expected every std above 0, found {list(lowest[0])}; copy it again")
    return towers


def _check(file: Path, key: str, found: Any, *expected: Any) -> None:
    if not any(type(found) is type(value) and found == value for value in expected):
        raise CheckpointError(
            f"{file}: expected {key} to be {expected[-1]!r}, found {found!r:.80}; no other is offered"
        )


def _items(file: Path, content: Mapping[str, Any], key: str, default: list[Any]) -> list[Any]:
    value = content.get(key, default)
    if not isinstance(value, list):
        raise CheckpointError(f"{file}: expected {key} to be a list, found {value!r:.80}; copy it again")
    return value


def _steps(file: Path, content: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    steps = _items(file, content, key, [])
    if not all(isinstance(step, Mapping) for step in steps):
        raise CheckpointError(f"{file}: expected {key} to hold one object for each tower, found {steps!r:.80}")
    return steps


def _square(file: Path, key: str, value: Any, *lead: int) -> int:
    """The side of a square, written [*lead, side, side]."""
    side = value[-1] if isinstance(value, list) and value else None
    if isinstance(side, bool) or not isinstance(side, int) or side < 1 or value != [*lead, side, side]:
        raise CheckpointError(f"{file}: expected {key} to be a square {[*lead, 'n', 'n']}, found {value!r:.80}")
    return side


def _rgb(file: Path, key: str, value: Any) -> tuple[float, float, float]:
    numbers = value if isinstance(value, list) else []
    fits = [x for x in numbers if isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e6]
    if len(numbers) != RGB or len(fits) != RGB or not all(map(math.isfinite, fits)):
        raise CheckpointError(f"{file}: expected {key} to be three numbers, found {value!r:.80}; copy it again")
    red, green, blue = map(float, fits)
    return red, green, blue
