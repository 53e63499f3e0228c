"""Camera pictures become what the image tower reads: float32 [views, size, size, 3], RGB, in [-1, 1].

Several resizes are in use and give different pixels for every picture that is not already of the right size, so
the method is always named:

| method | arithmetic |
|---|---|
| `pil` | openpi: PIL bilinear on uint8, low-pass filtered when shrinking; `x / 255 * 2 - 1` afterwards |
| `lerobot` | LeRobot: torch bilinear on [0, 1] without low-pass filter, clamped; `x * 2 - 1` afterwards |
| `openvla` | OpenVLA: PIL bicubic on uint8, low-pass filtered when shrinking |
| `openvla_crop` | OpenVLA trained with crops (LIBERO): the centre 90% of the area, TensorFlow's `crop_and_resize` |

The first two (`METHODS`) keep the aspect ratio, centre the picture and fill the rest with black (-1 after scaling);
OpenVLA's (`STRETCHING`) fill the size. How a network of several image towers scales is told in `towers`.

Float pixels lie in [low, 1]: `low` is -1 for pictures scaled for the network, 0 for those of a camera. From 0,
`pil` first makes 8 bits of them as openpi does, `floor(255 * x)`, also where nothing is to be resized. OpenVLA's
round them to the nearest of 256 levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from cortexflow.errors import ConfigError, InputError
from cortexflow.processing.arrays import to_numpy

Pixels = NDArray[np.float32]

MAX_PIXELS = 100_000_000  # of one picture: more is a mistake, and would fill the memory
CROP_AREA = 0.9  # of a picture, that `openvla_crop` keeps
TOLERANCE = 1e-5  # how far outside [-1, 1] a float picture may be (rounding of an earlier resize); it is clipped


def resize_with_pad(image: Any, height: int, width: int, *, method: str, low: float = -1.0) -> Pixels:
    """Fit one picture into `height` x `width` pixels: float32 [height, width, 3] in [-1, 1].

    `image` is [H, W, 3], numpy or torch, RGB: uint8 in 0..255 or float32 in [low, 1]. The larger of the ratios
    H/height and W/width gives the scale, the scaled sides are rounded down (never below one pixel), and an odd
    rest of the border goes below and right. A picture of the right size is only scaled to [-1, 1]. Method `pil`
    works on 8 bits: a float picture in [-1, 1] that has to be resized is first rounded to the nearest of 256 levels.

    Raises InputError if the picture has another form, ConfigError if `method` is not a key of `METHODS`.
    Source: openpi packages/openpi-client/src/openpi_client/image_tools.py (`pil`), lerobot
    src/lerobot/policies/common/vla_utils.py (`lerobot`).
    """
    if method not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, found {method!r}")
    pixels = check_picture(image, "image", low)
    for name, value in (("height", height), ("width", width)):
        if value < 1:
            raise InputError(f"{name}: expected a positive number of pixels, found {value}")
    return to_unit(_fit(pixels, height, width, method, low))


def as_model_images(
    images: Any, *, views: int, size: int, method: str, low: float = -1.0
) -> tuple[Pixels, NDArray[np.bool_]]:
    """The images of one observation: (float32 [views, size, size, 3] in [-1, 1], bool [views]).

    `images` is one array or tensor [views, H, W, 3], or a list with one entry per view, each [H, W, 3] or None.
    Pixels are RGB: uint8 in 0..255, or float32 in [low, 1] (any floats if low=0). None is an absent camera and becomes
    an image of -1 with mask False; it must be written, because the order of the views says which camera is which.

    Raises InputError for any other form, naming the view: channels first, four channels, a wrong number of views,
    other dtypes, floats outside [-1, 1], NaN, no camera at all. ConfigError if `method` is not one of `RESIZES`.
    Source: openpi src/openpi/models/model.py (scaling, camera slots), src/openpi/policies/libero_policy.py and
    lerobot src/lerobot/policies/pi05/modeling_pi05.py (absent cameras).
    """
    pictures = fit_pictures(images, views=views, size=size, method=method, low=low)
    return unit_pictures(pictures, size), np.array([picture is not None for picture in pictures])


def unit_pictures(pictures: Sequence[NDArray[Any] | None], size: int) -> Pixels:
    """What `fit_pictures` returned as float32 [views, size, size, 3] in [-1, 1], -1 for those that are absent."""
    absent = np.full((size, size, 3), -1.0, np.float32)
    return np.stack([absent if picture is None else to_unit(picture) for picture in pictures])


def fit_pictures(images: Any, *, views: int, size: int, method: str, low: float = -1.0) -> list[NDArray[Any] | None]:
    """The pictures of `as_model_images` before they are scaled: [size, size, 3], uint8 or float32 in [-1, 1]."""
    entries = _entries(images, views)
    if all(entry is None for entry in entries):
        raise InputError(f"images: all {views} views are None; give the picture of at least one camera")
    checked = [None if entry is None else check_picture(entry, f"images[{i}]", low) for i, entry in enumerate(entries)]
    several = sum(x is not None and x.shape[:2] != (size, size) for x in checked) > 1
    each: Callable[..., Iterator[Any]] = _threads().map if several else map
    return list(each(lambda x: None if x is None else _fit(x, size, size, method, low), checked))


@cache
def _threads() -> ThreadPoolExecutor:
    """A thread for each camera: resizing holds no lock, and takes a millisecond for a picture of 640 x 480."""
    return ThreadPoolExecutor(4, thread_name_prefix="pictures")


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """A picture file as uint8 [H, W, 3], RGB in 0..255. Grey and palette pictures are expanded, alpha is dropped.

    Raises InputError if the file is missing, is not a picture, or has more than 8 bits per channel.
    """
    try:
        with PIL.Image.open(path) as picture:
            if picture.mode[0] in "IF":
                raise InputError(
                    f"{path}: expected 8 bits per channel, found mode {picture.mode}; save it as 8-bit RGB"
                )
            return np.array(picture.convert("RGB"), np.uint8)
    except FileNotFoundError as reason:
        raise InputError(f"{path}: no such picture file") from reason
    except (OSError, PIL.Image.DecompressionBombError) as reason:
        raise InputError(f"{path}: cannot be read as a picture ({reason}); give a PNG or JPEG file") from reason


def to_unit(pixels: NDArray[Any], low: float = -1.0) -> Pixels:
    """uint8 pixels as `x / 255 * 2 - 1` in float32; float pixels as float32 clipped to [low, 1], then in [-1, 1]."""
    if pixels.dtype == np.uint8:
        x: Pixels = pixels.astype(np.float32)
        for step, number in ((np.divide, 255), (np.multiply, 2), (np.subtract, 1)):  # in place: fresh memory is slow
            step(x, np.float32(number), out=x)
        return x
    clipped: Pixels = np.clip(pixels.astype(np.float32), low, 1.0)
    return clipped if low < 0 else clipped * np.float32(2) - np.float32(1)


def to_bytes(pixels: NDArray[Any]) -> NDArray[Any]:
    """Float pixels in [0, 1] as openpi makes 8 bits of them, in their own precision: `floor(255 * x)`."""
    return np.asarray(255 * np.clip(pixels, 0, 1)).astype(np.uint8)


def to_levels(pixels: NDArray[Any], low: float = -1.0) -> NDArray[np.uint8]:
    """Pixels rounded to the nearest of 256 levels; uint8 as it is."""
    return pixels if pixels.dtype == np.uint8 else np.rint((to_unit(pixels, low) + 1) * 127.5).astype(np.uint8)


def _fit(pixels: NDArray[Any], height: int, width: int, method: str, low: float) -> NDArray[Any]:
    """One picture [height, width, 3]: uint8 where the method works on bytes, else float32 in [-1, 1]."""
    if method in STRETCHING:
        return STRETCHING[method](pixels, height, width, low)
    if method not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(RESIZES)}, found {method!r}")
    if method == "pil" and low >= 0 and pixels.dtype != np.uint8:
        pixels = to_bytes(pixels)
    if pixels.shape[:2] != (height, width):
        return METHODS[method](pixels, height, width, low)
    return pixels if pixels.dtype == np.uint8 else to_unit(pixels, low)


def _scaled_size(pixels: NDArray[Any], height: int, width: int) -> tuple[int, int]:
    rows, columns = pixels.shape[:2]
    ratio = max(columns / width, rows / height)
    return max(1, int(rows / ratio)), max(1, int(columns / ratio))


def _centred(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    rows, columns = pixels.shape[:2]
    top, left = (height - rows) // 2, (width - columns) // 2
    canvas = np.zeros((height, width, 3), pixels.dtype)
    canvas[top : top + rows, left : left + columns] = pixels
    return canvas


def _resize_pil(pixels: NDArray[Any], height: int, width: int, low: float) -> NDArray[np.uint8]:
    rows, columns = _scaled_size(pixels, height, width)
    levels = to_levels(pixels)  # floats in [-1, 1]: _fit has made bytes of the others
    return _centred(_pil(levels, rows, columns, PIL.Image.Resampling.BILINEAR), height, width)


def _pil(levels: NDArray[np.uint8], rows: int, columns: int, filter: PIL.Image.Resampling) -> NDArray[np.uint8]:
    picture = PIL.Image.fromarray(np.ascontiguousarray(levels))
    return np.asarray(picture.resize((columns, rows), filter))


def _resize_lerobot(pixels: NDArray[Any], height: int, width: int, low: float) -> Pixels:
    if pixels.dtype == np.uint8 or low >= 0:
        unit = pixels.astype(np.float32) / np.float32(255 if pixels.dtype == np.uint8 else 1)
    else:
        unit = (to_unit(pixels) + 1) / 2
    picture = torch.from_numpy(np.ascontiguousarray(unit)).permute(2, 0, 1)[None]
    resized = F.interpolate(picture, _scaled_size(pixels, height, width), mode="bilinear", align_corners=False)
    # The rest in numpy: each further torch op would wake all threads for a picture this small.
    return _centred(np.clip(resized[0].permute(1, 2, 0).numpy(), 0.0, 1.0), height, width) * 2 - 1


def _resize_openvla(pixels: NDArray[Any], height: int, width: int, low: float) -> NDArray[np.uint8]:
    """openvla prismatic/extern/hf/processing_prismatic.py (resize-naive)."""
    return _pil(to_levels(pixels, low), height, width, PIL.Image.Resampling.BICUBIC)


def _crop_openvla(pixels: NDArray[Any], height: int, width: int, low: float) -> NDArray[np.uint8]:
    """openvla experiments/robot/openvla_utils.py (center_crop), in the float32 steps of tf.image.

    The corners of the crop are corners of the result, and what lies between is interpolated from the four nearest
    pixels; back to bytes by truncating `255.5 * x`. The code goes to 224 pixels first, which is the networks' size.
    """
    levels = to_levels(pixels, low)
    top, bottom, down = _crop_lines(levels.shape[0], height)
    left, right, across = _crop_lines(levels.shape[1], width)

    def between(rows: NDArray[np.int64]) -> Pixels:
        one, other = (levels[np.ix_(rows, columns)] * np.float32(1 / 255) for columns in (left, right))
        return np.asarray(one + (other - one) * across[None, :, None], np.float32)

    upper, lower = between(top), between(bottom)
    cropped = np.clip(upper + (lower - upper) * down[:, None, None], np.float32(0), np.float32(1))
    return (cropped * np.float32(255.5)).astype(np.uint8)


def _crop_lines(lines: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Pixels]:
    """For each of `size` lines of the result: the two lines of the picture around it, and how far behind the first."""
    side = np.sqrt(np.float32(CROP_AREA))
    start = (np.float32(1) - side) / np.float32(2)
    end, last = start + side, np.float32(lines - 1)
    step = (end - start) * last / np.float32(max(size - 1, 1))
    at = start * last + np.arange(size, dtype=np.float32) * step
    first = np.floor(at)
    return first.astype(np.int64), np.ceil(at).astype(np.int64), at - first


METHODS: dict[str, Callable[[NDArray[Any], int, int, float], NDArray[Any]]] = {
    "pil": _resize_pil,
    "lerobot": _resize_lerobot,
}
STRETCHING: dict[str, Callable[[NDArray[Any], int, int, float], NDArray[np.uint8]]] = {
    "openvla": _resize_openvla,
    "openvla_crop": _crop_openvla,
}
RESIZES = (*METHODS, *STRETCHING)


def _entries(images: Any, views: int) -> list[Any]:
    """One entry per view, from a sequence or from the first axis of an array."""
    if isinstance(images, (np.ndarray, torch.Tensor)):
        if images.ndim != 4:
            fix = "; one picture is images[None]" if images.ndim == 3 else ""
            raise InputError(f"images: expected shape ({views}, H, W, 3), found {tuple(images.shape)}{fix}")
    elif not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
        raise InputError(
            f"images: expected an array ({views}, H, W, 3) or a list of {views} arrays (H, W, 3), "
            f"found {type(images).__name__}"
        )
    if len(images) != views:
        raise InputError(f"images: expected {views} views, found {len(images)}; write None for an absent camera")
    return list(images)


def check_picture(image: Any, name: str, low: float) -> NDArray[Any]:
    """`image` as numpy [H, W, 3], uint8 or float in [low, 1] (within `TOLERANCE`)."""
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise InputError(f"{name}: expected a numpy array or torch tensor (H, W, 3), found {type(image).__name__}")
    _check_layout(tuple(image.shape), name)
    dtype = str(image.dtype).removeprefix("torch.")
    floats = ("float32",) if low < 0 else ("float16", "bfloat16", "float32", "float64")
    if dtype not in ("uint8", *floats):
        fix = "pass image.astype(np.float32) (torch: image.float())" if "float" in dtype else "pass it as uint8"
        raise InputError(f"{name}: expected uint8 in 0..255 or float32 in [{low:g}, 1], found {dtype}; {fix}")
    try:
        pixels = to_numpy(image)
    except (TypeError, ValueError, RuntimeError) as reason:  # a sparse or a meta tensor
        raise InputError(f"{name}: expected pixels in memory, found {type(image).__name__} ({reason})") from reason
    if dtype != "uint8":
        _check_range(pixels, name, low)
    return pixels


def _check_layout(shape: tuple[int, ...], name: str) -> None:
    if len(shape) == 3 and shape[-1] == 3 and min(shape) > 0:
        if shape[0] * shape[1] > MAX_PIXELS:
            raise InputError(f"{name}: expected at most {MAX_PIXELS:,} pixels, found {shape}; make it smaller first")
        return
    found = f"{name}: expected shape (H, W, 3), found {shape}"
    if len(shape) == 3 and 0 not in shape:
        if shape[0] == 3:
            raise InputError(f"{found}: channels first; pass image.transpose(1, 2, 0) (torch: image.permute(1, 2, 0))")
        if shape[-1] == 4:
            raise InputError(f"{found}: four channels (RGBA?); drop the last one with image[..., :3]")
        if shape[-1] == 1:
            raise InputError(f"{found}: one channel; repeat grey with np.repeat(image, 3, axis=-1)")
    raise InputError(f"{found}; give one RGB picture, channels last, with at least one pixel")


def _check_range(pixels: NDArray[Any], name: str, low: float) -> None:
    if not np.isfinite(pixels).all():
        raise InputError(f"{name}: expected finite pixels, found NaN or infinity; check the camera or the preprocessor")
    least, most = float(pixels.min()), float(pixels.max())
    if least < low - TOLERANCE or most > 1 + TOLERANCE:
        fix = "it looks like 0..255: pass image.astype(np.uint8)" if least >= 0 and most > 2 else "scale it first"
        raise InputError(f"{name}: expected float32 pixels in [{low:g}, 1], found [{least:g}, {most:g}]; {fix}")
