"""Pictures: both resizes against their references, any size, and every form that must be refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexflow.errors import ConfigError, InputError
from cortexflow.processing.images import METHODS, as_model_images, read_image, resize_with_pad, to_bytes, to_unit


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


# ---- the pixels of the two clients -----------------------------------------------------------------


def pattern(rows: int, columns: int) -> np.ndarray:
    """A picture of every frequency, from whole numbers alone."""
    i, j, c = np.arange(rows)[:, None, None], np.arange(columns)[None, :, None], np.arange(3)
    return ((i * i * 7 + j * j * 13 + i * j * (c + 3) + c * 71) % 256).astype(np.uint8)


# Size → the first half of the SHA-256 of openpi-client 0.1.2's image_tools.resize_with_pad(pattern, 224, 224).
OPENPI_CLIENT = {
    (480, 640): "e28e2850aadcdb48",
    (720, 1280): "73459d5569df508a",
    (360, 640): "057ba61564308de0",
    (240, 320): "0ab766c4cfed364e",
    (224, 224): "feb7288cd45d76ef",
    (256, 256): "7191defc170b5697",
    (84, 84): "2f5f9ad1948a500a",
    (100, 224): "f74b7050f36d46b0",
    (223, 225): "a6f8c8c8b2109c54",
    (61, 40): "3a38b762dfaeeb56",
    (40, 120): "2359eb278bf7018b",
    (17, 1000): "ded6bbe81690c6d3",
    (1000, 17): "22aab496f18a0a85",
    (1, 1): "f6d1ca6a47ca7b08",
}


@pytest.mark.parametrize("size", OPENPI_CLIENT)
def test_pixels_equal_those_recorded_of_openpi_client(size: tuple[int, int]) -> None:
    found = resize_with_pad(pattern(*size), 224, 224, method="pil")
    levels = np.rint((found.astype(np.float64) + 1) * 127.5).astype(np.uint8)
    assert hashlib.sha256(levels.tobytes()).hexdigest()[:16] == OPENPI_CLIENT[size]
    np.testing.assert_array_equal(found, levels.astype(np.float32) / 255 * 2 - 1)


@pytest.mark.parametrize("size", [*OPENPI_CLIENT, (50, 51), (333, 777), (2, 300)])
def test_pixels_equal_openpi_client(size: tuple[int, int]) -> None:
    tools = pytest.importorskip("openpi_client.image_tools")
    image = pattern(*size)
    expected = tools.resize_with_pad(image, 224, 224)
    found = resize_with_pad(image, 224, 224, method="pil")
    np.testing.assert_array_equal(found, expected.astype(np.float32) / 255 * 2 - 1)
    floats = np.random.default_rng(0).random(image.shape)
    np.testing.assert_array_equal(to_bytes(floats), tools.convert_to_uint8(floats))


@pytest.mark.parametrize("size", [*OPENPI_CLIENT, (50, 51), (333, 777)])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_pixels_equal_lerobots_formula(size: tuple[int, int], dtype: str) -> None:
    """lerobot src/lerobot/policies/common/vla_utils.py (resize_with_pad_torch), then `* 2 - 1`."""
    image = pattern(*size)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None].float().contiguous() / 255
    if size != (224, 224):
        ratio = max(size[1] / 224, size[0] / 224)
        inner = int(size[0] / ratio), int(size[1] / ratio)
        batch = F.interpolate(batch, size=inner, mode="bilinear", align_corners=False).clamp(0.0, 1.0)
        (top, odd_row), (left, odd_column) = (divmod(224 - side, 2) for side in inner)
        batch = F.pad(batch, (left, left + odd_column, top, top + odd_row), value=0.0)
    expected = (batch * 2.0 - 1.0)[0].permute(1, 2, 0).numpy()
    given = image if dtype == "uint8" else torch.from_numpy(image).float() / 255
    np.testing.assert_array_equal(resize_with_pad(given, 224, 224, method="lerobot", low=0.0), expected)


def test_floats_of_a_camera_are_cut_to_bytes_by_pil_alone() -> None:
    image = np.random.default_rng(1).random((8, 8, 3))
    for dtype in (np.float16, np.float32, np.float64):
        floats = image.astype(dtype)
        cut = (255 * floats).astype(np.uint8)
        found = resize_with_pad(floats, 8, 8, method="pil", low=0.0)
        np.testing.assert_array_equal(found, resize_with_pad(cut, 8, 8, method="pil"))
    kept = resize_with_pad(image, 8, 8, method="lerobot", low=0.0)
    np.testing.assert_array_equal(kept, image.astype(np.float32) * 2 - 1)
    with pytest.raises(InputError, match=r"expected float32 pixels in \[0, 1\], found \[-1, -1\]"):
        resize_with_pad(np.full((8, 8, 3), -1.0), 8, 8, method="lerobot", low=0.0)


def test_huge_and_unreadable_pictures() -> None:
    with pytest.raises(InputError, match="expected at most 100,000,000 pixels"):
        resize_with_pad(np.broadcast_to(np.uint8(0), (10**5, 10**4, 3)), 8, 8, method="pil")
    with pytest.raises(InputError, match="image: expected pixels in memory, found Tensor"):
        resize_with_pad(torch.zeros(8, 8, 3, device="meta"), 8, 8, method="pil")
