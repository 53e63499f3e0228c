"""Pictures of several image towers, against the published processor's own results, which must be met exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from cortexflow.errors import CheckpointError, InputError
from cortexflow.processing.images import as_model_images, fit_pictures, resize_with_pad, to_unit
from cortexflow.processing.towers import DINO_SIGLIP, Tower, load_towers, pixel_values

DATA = Path(__file__).parents[1] / "data" / "openvla"


def fitted(image: Any, size: int, method: str = "openvla", low: float = -1.0) -> np.ndarray:
    (picture,) = fit_pictures([image], views=1, size=size, method=method, low=low)
    assert picture is not None
    return picture


@pytest.mark.parametrize("index", range(2))
def test_agrees_with_the_published_processor(index: int) -> None:
    golden = load_file(DATA / "openvla_tiny" / "inputs.safetensors")
    size, towers = load_towers(DATA / "openvla_tiny")
    assert (size, towers) == (56, DINO_SIGLIP)
    found = pixel_values([fitted(golden[f"image_{index}"], size)], towers)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, golden[f"pixel_values_{index}"][0])


def test_agrees_at_the_real_size() -> None:
    golden = load_file(DATA / "preprocess_224.safetensors")
    picture = fitted(golden["image_2"], 224)
    np.testing.assert_array_equal(picture, golden["resized_u8_2"])
    found = pixel_values([picture], DINO_SIGLIP)
    np.testing.assert_array_equal(found[:, 100:102], golden["pixel_values_2_rows_100_101"])
    moments = [found.mean((1, 2)), found.std((1, 2), ddof=1)]
    np.testing.assert_allclose(moments, golden["pixel_values_2_mean_std"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("index", range(4))
def test_crop_agrees_with_tensorflow(index: int) -> None:
    golden = load_file(DATA / "crop.safetensors")
    found = fitted(golden[f"image_{index}"], 56, "openvla_crop")
    np.testing.assert_array_equal(found, golden[f"cropped_{index}"])


@pytest.mark.parametrize("method", ["openvla", "openvla_crop"])
def test_floats_are_the_bytes_they_came_from(method: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 22, 3), np.uint8)
    expected = fitted(image, 16, method)
    np.testing.assert_array_equal(fitted(to_unit(image), 16, method), expected)
    np.testing.assert_array_equal(fitted(image.astype(np.float32) / 255, 16, method, low=0.0), expected)
    unit, mask = as_model_images([image], views=1, size=16, method=method)  # for a network that scales by itself
    np.testing.assert_array_equal(unit[0], to_unit(expected))
    assert mask.tolist() == [True]


def test_any_resize_feeds_the_towers() -> None:
    """Another resize of a picture gives nearly the numbers of its bytes."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    for method in ("pil", "lerobot"):
        found = pixel_values([fitted(image, 16, method)], DINO_SIGLIP)
        np.testing.assert_allclose(found, pixel_values([image], DINO_SIGLIP), rtol=0, atol=1e-5)
    as_floats = pixel_values([resize_with_pad(image, 16, 16, method="pil")], DINO_SIGLIP)
    np.testing.assert_allclose(as_floats, pixel_values([image], DINO_SIGLIP), rtol=0, atol=1e-5)


def test_several_pictures() -> None:
    first, second = (np.full((2, 2, 3), level, np.uint8) for level in (0, 255))
    found = pixel_values([first, second], [Tower((0.5, 0.5, 0.5), (0.5, 0.25, 1.0))])
    assert found[:, 0, 0].tolist() == [-1.0, -2.0, -0.5, 1.0, 2.0, 0.5]
    with pytest.raises(InputError, match=r"images\[1\]: this network cannot do without a camera"):
        pixel_values([first, None], DINO_SIGLIP)


def change(place: Path, **changes: Any) -> None:
    content = json.loads((DATA / "openvla_tiny" / "preprocessor_config.json").read_text()) | changes
    kept = {key: value for key, value in content.items() if value is not ...}
    (place / "preprocessor_config.json").write_text(json.dumps(kept))


def test_without_rounded_constants_the_decimal_ones_hold(tmp_path: Path) -> None:
    change(tmp_path, tvf_normalize_params=...)
    first = load_towers(tmp_path)[1][0]
    assert first == Tower((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


SQUARE = {"size": [56, 56], "antialias": True, "interpolation": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_resize_strategy": "letterbox"}, "image_resize_strategy to be 'resize-naive', found 'letterbox'"),
        ({"tvf_do_letterbox": True}, "tvf_do_letterbox to be False, found True"),
        ({"interpolations": ["bicubic", "bilinear"]}, "interpolations to be 'bicubic', found 'bilinear'"),
        ({"tvf_resize_params": [SQUARE | {"interpolation": 2}]}, "interpolation to be 'bicubic', found 2"),
        ({"tvf_resize_params": [SQUARE | {"antialias": False}]}, "antialias to be True, found False"),
        ({"tvf_resize_params": [SQUARE | {"size": [56, 64]}]}, r"size to be a square .*found \[56, 64\]"),
        ({"tvf_crop_params": [{"output_size": [48, 48]}]}, r"expected one size of pictures for all, found \[56, 56"),
        ({"input_sizes": [[1, 56, 56]]}, "input_sizes to be a square"),
        (
            {"input_sizes": [], "tvf_resize_params": [], "tvf_crop_params": []},
            "one size of pictures for all, found none",
        ),
        ({"tvf_normalize_params": "x"}, "tvf_normalize_params to be a list, found 'x'"),
        ({"tvf_normalize_params": [1]}, "one object for each tower"),
        ({"tvf_normalize_params": [{"mean": [0.5] * 3, "std": [0.0] * 3}]}, "every std above 0"),
        ({"tvf_normalize_params": [{"mean": [0.5] * 2, "std": [0.5] * 3}]}, "mean to be three numbers"),
        ({"tvf_normalize_params": [{"mean": [0.5, 0.5, float("nan")], "std": [0.5] * 3}]}, "mean to be three numbers"),
        ({"tvf_normalize_params": ..., "stds": []}, "as many stds as means, found 0 and 2"),
        ({"tvf_normalize_params": ..., "means": [], "stds": []}, "found no mean and std of any tower"),
    ],
)
def test_settings_that_are_not_offered(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    change(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=f"preprocessor_config.json: .*{message}"):
        load_towers(tmp_path)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected the settings of the image processor, found no such file"):
        load_towers(tmp_path)
    for text, message in (("{", "expected a JSON file"), ("[]", "expected an object of settings")):
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_towers(tmp_path)
