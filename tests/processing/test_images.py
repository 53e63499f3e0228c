"""Pictures: both resizes against their references, any size, and every form that must be refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexflow.errors import ConfigError, InputError
from cortexflow.processing.images import METHODS, as_model_images, read_image, resize_with_pad, to_unit


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize(("method", "name"), [("pil", "openpi_client_pil"), ("lerobot", "lerobot")])
def test_resize_agrees_with_reference(golden_images: dict[str, np.ndarray], index: int, method: str, name: str) -> None:
    image, expected = golden_images[f"{index}.input_uint8"], golden_images[f"{index}.{name}_model_input"]
    found = resize_with_pad(image, 56, 56, method=method)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("index", range(4))
def test_pil_agrees_with_reference_in_uint8(golden_images: dict[str, np.ndarray], index: int) -> None:
    found = resize_with_pad(golden_images[f"{index}.input_uint8"], 56, 56, method="pil")
    levels = np.rint((found.astype(np.float64) + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(levels, golden_images[f"{index}.openpi_client_pil_uint8"])


def test_the_two_methods_differ(golden_images: dict[str, np.ndarray]) -> None:
    pil, lerobot = (resize_with_pad(golden_images["0.input_uint8"], 56, 56, method=m) for m in ("pil", "lerobot"))
    assert np.abs(pil - lerobot).max() > 0.01


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 90),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    method=st.sampled_from(sorted(METHODS)),
    floats=st.booleans(),
)
def test_any_size(rows: int, columns: int, height: int, width: int, method: str, floats: bool) -> None:
    image: Any = noise(rows, columns, 3)
    found = resize_with_pad(to_unit(image) if floats else image, height, width, method=method)
    assert found.shape == (height, width, 3)
    assert found.dtype == np.float32
    assert found.min() >= -1
    assert found.max() <= 1


@pytest.mark.parametrize("method", sorted(METHODS))
def test_padding_is_black_and_centred(method: str) -> None:
    found = resize_with_pad(np.full((10, 40, 3), 255, np.uint8), 21, 20, method=method)  # becomes 5 x 20
    np.testing.assert_array_equal(found[:8], -1)  # 16 rows to fill: 8 above, 8 below
    np.testing.assert_array_equal(found[8:13], 1)
    np.testing.assert_array_equal(found[13:], -1)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_right_size_is_only_scaled(method: str) -> None:
    image = noise(12, 12, 3)
    expected = image.astype(np.float64) / 255 * 2 - 1
    np.testing.assert_allclose(resize_with_pad(image, 12, 12, method=method), expected, rtol=0, atol=1e-6)
    ready = expected.astype(np.float32)
    np.testing.assert_array_equal(resize_with_pad(ready, 12, 12, method=method), ready)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_float_and_uint8_resize_alike(method: str) -> None:
    image = noise(30, 22, 3)
    found = resize_with_pad(to_unit(image), 16, 16, method=method)
    np.testing.assert_allclose(found, resize_with_pad(image, 16, 16, method=method), rtol=0, atol=1e-6)


def test_argument_is_not_changed() -> None:
    image = to_unit(noise(8, 8, 3))
    before = image.copy()
    resize_with_pad(image, 8, 8, method="pil")[:] = 0
    as_model_images([image], views=1, size=8, method="lerobot")[0][:] = 0
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    "convert", [lambda x: x, torch.from_numpy, list, tuple, lambda x: [torch.from_numpy(i) for i in x]]
)
def test_forms_of_the_same_images(convert: Any) -> None:
    images = noise(2, 9, 7, 3)
    found, mask = as_model_images(convert(images), views=2, size=8, method="pil")
    assert found.shape == (2, 8, 8, 3)
    assert mask.tolist() == [True, True]
    for view in range(2):
        np.testing.assert_array_equal(found[view], resize_with_pad(images[view], 8, 8, method="pil"))


def test_absent_camera() -> None:
    found, mask = as_model_images([noise(8, 8, 3), None, noise(8, 8, 3)], views=3, size=8, method="pil")
    assert mask.dtype == np.bool_
    assert mask.tolist() == [True, False, True]
    np.testing.assert_array_equal(found[1], -1)


def test_rounding_just_outside_is_clipped() -> None:
    image = np.full((4, 4, 3), 1 + 1e-6, np.float32)
    assert as_model_images(image[None], views=1, size=4, method="lerobot")[0].max() == 1


BAD_IMAGES: dict[str, tuple[Any, str]] = {
    "channels first": (noise(2, 3, 8, 8), r"images\[0\].*\(3, 8, 8\).*channels first.*transpose"),
    "channels first tensor": (torch.zeros(2, 3, 8, 8), r"channels first.*permute"),
    "four channels": (noise(2, 8, 8, 4), r"four channels.*\[\.\.\., :3\]"),
    "one channel": ([noise(8, 8, 1)] * 2, "one channel.*repeat"),
    "no channel": ([noise(8, 8)] * 2, r"expected shape \(H, W, 3\), found \(8, 8\)"),
    "one picture": (noise(8, 8, 3), r"expected shape \(2, H, W, 3\).*images\[None\]"),
    "too many views": (noise(3, 8, 8, 3), "expected 2 views, found 3"),
    "too few views": ([noise(8, 8, 3)], "expected 2 views, found 1; write None"),
    "floats 0..255": (noise(2, 8, 8, 3).astype(np.float32), r"\[-1, 1\], found \[0, 2..\].*0\.\.255.*uint8"),
    "floats beyond": (np.full((2, 8, 8, 3), -1.5, np.float32), "scale it first"),
    "NaN": (np.full((2, 8, 8, 3), np.nan, np.float32), "NaN"),
    "float64": (np.zeros((2, 8, 8, 3)), "found float64.*astype"),
    "bfloat16": (torch.zeros(2, 8, 8, 3, dtype=torch.bfloat16), "found bfloat16.*float"),
    "int64": (np.zeros((2, 8, 8, 3), np.int64), "found int64.*uint8"),
    "bool": (np.zeros((2, 8, 8, 3), bool), "found bool"),
    "empty": ([np.zeros((0, 8, 3), np.uint8)] * 2, r"found \(0, 8, 3\)"),
    "text": ("a.png", "found str"),
    "paths": (["a.png", "b.png"], r"images\[0\].*found str"),
    "nothing": (None, "found NoneType"),
    "no camera": ([None, None], "all 2 views are None"),
    "second view": ([noise(8, 8, 3), noise(8, 8, 4)], r"images\[1\].*four"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused(case: str) -> None:
    images, message = BAD_IMAGES[case]
    with pytest.raises(InputError, match=message):
        as_model_images(images, views=2, size=8, method="pil")


def test_unknown_method_and_size() -> None:
    with pytest.raises(ConfigError, match=r"pil, lerobot, found 'bicubic'"):
        resize_with_pad(noise(8, 8, 3), 4, 4, method="bicubic")
    with pytest.raises(InputError, match="height: expected a positive number"):
        resize_with_pad(noise(8, 8, 3), 0, 4, method="pil")


def test_read_image(tmp_path: Path) -> None:
    image = noise(5, 6, 3)
    PIL.Image.fromarray(image).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgb.png"), image)
    PIL.Image.fromarray(image).convert("RGBA").save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), image)
    PIL.Image.fromarray(image[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.repeat(image[..., :1], 3, -1))


def test_read_image_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such picture"):
        read_image(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        read_image(tmp_path / "text.png")
    PIL.Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="8 bits per channel"):
        read_image(tmp_path / "deep.png")
