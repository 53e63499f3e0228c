"""What a compiled policy takes, in every accepted form, and what it says about everything else."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import cortexflow
from cortexflow.errors import InputError
from cortexflow.inputs import check_inputs
from cortexflow.ir import Type
from tests.models.cases import DATA, batches

VOCABULARY = 50
VIEWS, HEIGHT, WIDTH, SLOTS = 2, 6, 8, 5


def inputs(batch: int = 1) -> dict[str, Type]:
    return {
        "images": Type("f32", (batch, VIEWS, HEIGHT, WIDTH, 3)),
        "image_mask": Type("bool", (batch, VIEWS)),
        "tokens": Type("i32", (batch, SLOTS)),
        "token_mask": Type("bool", (batch, SLOTS)),
        "state": Type("f32", (batch, 4)),
        "noise": Type("f32", (batch, 3, 4)),
    }


def good(batch: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "images": torch.rand(batch, VIEWS, HEIGHT, WIDTH, 3, generator=generator) * 2 - 1,
        "image_mask": torch.tensor([[True, False]] * batch),
        "tokens": torch.arange(batch * SLOTS).reshape(batch, SLOTS),
        "token_mask": torch.tensor([[True] * 3 + [False] * 2] * batch),
        "state": torch.randn(batch, 4, generator=generator),
        "noise": torch.randn(batch, 3, 4, generator=generator),
    }


def check(batch: int = 1, **changes: Any) -> dict[str, torch.Tensor]:
    return check_inputs(inputs(batch), good(batch) | changes, VOCABULARY)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, t in wanted.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t), name


# ---- what is refused -------------------------------------------------------------------------------

IMAGES = good()["images"]
FIRST = IMAGES.movedim(-1, -3)
NAN, INFINITE = IMAGES.clone(), IMAGES.clone()
NAN[0, 1, 2, 3, 0], INFINITE[0, 0, 0, 0, 0] = torch.nan, torch.inf
LAYOUT = r"\[batch, views, height, width, rgb\] = \(1, 2, 6, 8, 3\)"
RANGE = r"RGB in \[-1, 1\]"
SCALE = r"scale 8-bit pixels with x / 255 \* 2 - 1"

# argument, value, what was expected, what was found (and, after it, what to do)
BAD: dict[str, tuple[str, Any, str, str]] = {
    "images channels first": ("images", FIRST, LAYOUT, r"\(1, 2, 3, 6, 8\).*channels first.*movedim\(-3, -1\)"),
    "images channels first, one sample": ("images", FIRST[0], LAYOUT, r"\(2, 3, 6, 8\).*channels first"),
    "images of one view": ("images", IMAGES[:, :1], LAYOUT, r"\(1, 1, 6, 8, 3\).*1 views.*compile with views=1"),
    "images of three views": ("images", torch.zeros(1, 3, 6, 8, 3), LAYOUT, "3 views.*compile with views=3"),
    "images of another batch": ("images", torch.zeros(2, 2, 6, 8, 3), LAYOUT, r"\(2, 2, 6, 8, 3\)"),
    "images without batch, wrong views": ("images", torch.zeros(3, 6, 8, 3), LAYOUT, r"\(3, 6, 8, 3\).*batch axis"),
    "one picture": ("images", torch.zeros(6, 8, 3), LAYOUT, r"\(6, 8, 3\)"),
    "images too small": ("images", torch.zeros(1, 2, 3, 4, 3), LAYOUT, r"\(1, 2, 3, 4, 3\).*resize.* 6 x 8"),
    "images turned": ("images", torch.zeros(1, 2, 8, 6, 3), LAYOUT, r"\(1, 2, 8, 6, 3\).*resize"),
    "images with alpha": ("images", torch.zeros(1, 2, 6, 8, 4), LAYOUT, r"\(1, 2, 6, 8, 4\).*alpha"),
    "images channels first, another size": ("images", torch.zeros(1, 2, 3, 24, 24), LAYOUT, "channels first"),
    "grey images": ("images", torch.zeros(1, 2, 6, 8, 1), LAYOUT, r"\(1, 2, 6, 8, 1\)"),
    "a number for images": ("images", 0.5, LAYOUT, r"\(\)"),
    "images uint8": ("images", torch.zeros(1, 2, 6, 8, 3, dtype=torch.uint8), RANGE, f"torch.uint8.*{SCALE}"),
    "images uint8 in numpy": ("images", np.zeros((1, 2, 6, 8, 3), np.uint8), RANGE, f"torch.uint8.*{SCALE}"),
    "images bool": ("images", torch.zeros(1, 2, 6, 8, 3, dtype=torch.bool), RANGE, "torch.bool"),
    "images 0 to 255": ("images", (IMAGES + 1) * 127.5, RANGE, rf"values from \d+.* to 25\d.*{SCALE}"),
    "images with NaN": ("images", NAN, "finite numbers", "1 NaN or infinite"),
    "images with infinity": ("images", INFINITE, "finite numbers", "1 NaN or infinite"),
    "images of text": ("images", "cat.png", "tensor or array", "str"),
    "ragged images": ("images", [[1.0], [1.0, 2.0]], "tensor or array", "list"),
    "an object for images": ("images", object(), "tensor or array", "object"),
    "image mask of three views": ("image_mask", torch.ones(1, 3, dtype=torch.bool), r"shape \(1, 2\)", r"\(1, 3\)"),
    "image mask for two samples": ("image_mask", torch.ones(2, 2, dtype=torch.bool), r"shape \(1, 2\)", r"\(2, 2\)"),
    "image mask of floats": ("image_mask", torch.ones(1, 2), "bool", "torch.float32"),
    "image mask of numbers": ("image_mask", torch.tensor([[1, 2]]), "bool", "torch.int64 other than 0 and 1"),
    "too many tokens": ("tokens", torch.ones(1, 9, dtype=torch.int64), "at most 5 tokens", "9; .*prompt=9"),
    "float tokens": ("tokens", torch.ones(1, 5), "integer token ids", "torch.float32"),
    "bool tokens": ("tokens", torch.ones(1, 5, dtype=torch.bool), "integer token ids", "torch.bool"),
    "complex tokens": ("tokens", torch.ones(1, 5, dtype=torch.complex64), "integer token ids", "torch.complex64"),
    "tokens out of the vocabulary": ("tokens", torch.tensor([[1, 2, 50]]), "ids from 0 to 49", "0 to 50.*tokenizer"),
    "negative tokens": ("tokens", torch.tensor([[1, 2, -1]]), "ids from 0 to 49", "-1 to 2"),
    "tokens beyond 32 bits": ("tokens", torch.tensor([[1, 2**32 + 5]]), "integer token ids that fit", "4294967301"),
    "tokens of two samples": ("tokens", torch.ones(2, 5, dtype=torch.int64), r"shape \(1, 5\)", r"\(2, 5\)"),
    "tokens of three axes": ("tokens", torch.ones(1, 1, 5, dtype=torch.int64), r"shape \(1, 5\)", r"\(1, 1, 5\)"),
    "text for tokens": ("tokens", "pick up the cube", "tensor or array", "str"),
    "too long a token mask": ("token_mask", torch.ones(1, 6, dtype=torch.bool), "at most 5 tokens", "6"),
    "token mask of floats": ("token_mask", torch.ones(1, 5), "bool", "torch.float32"),
    "token mask of numbers": ("token_mask", torch.full((1, 5), 3), "bool", "torch.int64 other than 0 and 1"),
    "token mask shorter than tokens": ("token_mask", torch.ones(1, 4, dtype=torch.bool), "each of the 5 tokens", "4"),
    "state too long": ("state", torch.zeros(1, 7), r"shape \(1, 4\)", r"\(1, 7\)"),
    "state of two samples": ("state", torch.zeros(2, 4), r"shape \(1, 4\)", r"\(2, 4\)"),
    "state with NaN": ("state", torch.full((1, 4), torch.nan), "finite numbers", "4 NaN or infinite"),
    "state beyond float32": ("state", np.full((1, 4), 1e300), "finite numbers", "4 NaN or infinite"),
    "state of integers": ("state", torch.zeros(1, 4, dtype=torch.int64), "f32 numbers", "torch.int64.*convert"),
    "complex state": ("state", torch.zeros(1, 4, dtype=torch.complex64), "f32 numbers", "torch.complex64"),
    "noise of another chunk": ("noise", torch.zeros(1, 2, 4), r"shape \(1, 3, 4\)", r"\(1, 2, 4\)"),
    "noise of another action size": ("noise", torch.zeros(1, 3, 5), r"shape \(1, 3, 4\)", r"\(1, 3, 5\)"),
    "noise with infinity": ("noise", torch.full((1, 3, 4), -torch.inf), "finite numbers", "12 NaN or infinite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    """The message names the argument, then what was expected, then what was found."""
    name, value, expected, found = BAD[case]
    with pytest.raises(InputError, match=re.compile(f"^{name}: expected .*{expected}.* found .*{found}", re.DOTALL)):
        check(**{name: value})


@pytest.mark.parametrize("name", ["images", "tokens", "state", "noise"])
@pytest.mark.parametrize("given", ["left out", "None"])
def test_missing_input(name: str, given: str) -> None:
    values = good() | {name: None}
    if given == "left out":
        del values[name]
    with pytest.raises(InputError, match=f"missing input '{name}'.*this policy takes images: f32.*noise: f32"):
        check_inputs(inputs(), values)


def test_unknown_input() -> None:
    with pytest.raises(InputError, match=r"unknown input image, prompt; this policy takes images: f32.*tokens: i32"):
        check(prompt="pick", image=IMAGES)


def test_integers_of_other_inputs() -> None:
    """Inputs that no rule knows: the declared shape, and numbers that fit."""
    declared = {"n": Type("i32", (2,)), "b": Type("u8", ()), "x": Type("bf16", (2,)), "flag": Type("bool", ())}
    found = check_inputs(declared, {"n": [1, 2], "b": 7, "x": [0.5, 1.0], "flag": True})
    assert [str(t.dtype) for t in found.values()] == ["torch.int32", "torch.uint8", "torch.bfloat16", "torch.bool"]
    assert found["b"].shape == found["flag"].shape == ()
    with pytest.raises(InputError, match=r"^n: expected integers, found torch\.float64"):
        check_inputs(declared, {"n": [1.0, 2.0], "b": 7, "x": [0.5, 1.0], "flag": True})
    with pytest.raises(InputError, match=r"^b: expected integers that fit u8, found 300 to 300"):
        check_inputs(declared, {"n": [1, 2], "b": 300, "x": [0.5, 1.0], "flag": True})
    with pytest.raises(InputError, match=r"^flag: expected shape \(\), found \(1,\)"):
        check_inputs(declared, {"n": [1, 2], "b": 3, "x": [0.5, 1.0], "flag": [True]})


def test_a_compiled_policy_checks_at_its_door() -> None:
    compiled = cortexflow.compile(DATA / "pi0_tiny2", progress=False)
    given = batches(DATA / "pi0_tiny2")[0].inputs
    for name, (bad, message) in {
        "images": (given["images"][:, :1], "^images: .*compile with views=1"),
        "tokens": (given["tokens"] + 512, "^tokens: expected ids from 0 to 511"),
        "state": (given["state"] * torch.nan, "^state: .*NaN"),
    }.items():
        for call in (compiled, compiled.stage_times, lambda **values: compiled.check(values)):
            with pytest.raises(InputError, match=message):
                call(**given | {name: bad})


# ---- what is accepted ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_tensors_arrays_and_lists(batch: int) -> None:
    wanted = check(batch)
    assert {
        n: Type({"f": "f32", "b": "bool", "i": "i32"}[str(t.dtype)[6]], tuple(t.shape)) for n, t in wanted.items()
    } == (inputs(batch))
    arrays = {n: t.numpy() for n, t in good(batch).items()}
    lists = {n: t.tolist() for n, t in good(batch).items()}
    doubles = {n: t.double() if t.is_floating_point() else t for n, t in good(batch).items()}
    pieces = {n: list(t) for n, t in good(batch).items()}
    for form in (arrays, lists, doubles, pieces):
        same(check_inputs(inputs(batch), form, VOCABULARY), wanted)


@pytest.mark.parametrize("form", ["strided", "reversed", "read-only", "16 bits"])
def test_arrays_of_every_kind(form: str) -> None:
    array = good()["images"].numpy()
    if form == "strided":
        array = np.ascontiguousarray(array.swapaxes(2, 4)).swapaxes(2, 4)
    elif form == "reversed":
        array = np.ascontiguousarray(array[..., ::-1])[..., ::-1]
    elif form == "16 bits":
        array = array.astype(np.float16)
    else:
        array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = check(images=array)["images"]
    torch.testing.assert_close(found, good()["images"], rtol=0, atol=1e-3 if form == "16 bits" else 0)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_tokens_of_every_integer_type(dtype: str) -> None:
    same(check(tokens=good()["tokens"].numpy().astype(dtype)), check())


def test_one_sample_needs_no_batch_axis() -> None:
    same(check_inputs(inputs(), {n: t[0] for n, t in good().items()}, VOCABULARY), check())
    with pytest.raises(InputError, match=r"^tokens: expected shape \(2, 5\), found \(5,\)"):
        check(2, tokens=torch.ones(5, dtype=torch.int64))


def test_a_short_prompt_is_padded_to_its_bucket() -> None:
    tokens = torch.tensor([[3, 4, 5]])
    padded = check(tokens=torch.tensor([[3, 4, 5, 0, 0]]), token_mask=torch.tensor([[True, True, True, False, False]]))
    same(check(tokens=tokens, token_mask=None), padded)
    same(check(tokens=[3, 4, 5], token_mask=None), padded)
    same(check(tokens=tokens, token_mask=torch.tensor([[1, 1, 1]])), padded)
    holes = torch.tensor([[True, False, True]])
    assert check(tokens=tokens, token_mask=holes)["token_mask"].tolist() == [[True, False, True, False, False]]


def test_masks_may_be_left_out() -> None:
    values = {n: v for n, v in good(2).items() if "mask" not in n}
    found = check_inputs(inputs(2), values, VOCABULARY)
    assert found["image_mask"].tolist() == [[True, True]] * 2
    assert found["token_mask"].tolist() == [[True] * 5] * 2
    assert list(found) == list(inputs())


def test_masks_may_be_zeros_and_ones() -> None:
    same(check(image_mask=[[1, 0]], token_mask=np.array([[1, 1, 1, 0, 0]], np.uint8)), check())


def test_pixels_may_overshoot_by_rounding_alone() -> None:
    check(images=IMAGES.clamp(-1, 1) * 1.0005)
    with pytest.raises(InputError, match=r"^images: .*found values from"):
        check(images=torch.full_like(IMAGES, 1.01))


def test_gradients_are_left_behind() -> None:
    found = check(state=torch.zeros(1, 4, requires_grad=True))
    assert not found["state"].requires_grad


def test_the_callers_values_are_not_changed() -> None:
    values = good()
    before = {n: t.clone() for n, t in values.items()}
    check_inputs(inputs(), values, VOCABULARY)
    same(values, before)


@pytest.mark.parametrize("case", ["pi05_tiny", "pi0_tiny"])
def test_every_form_gives_the_same_actions(case: str) -> None:
    compiled = cortexflow.compile(DATA / case, progress=False)
    given = batches(DATA / case)[0].inputs
    wanted = compiled(**given)
    assert torch.equal(compiled(**{n: t[0].numpy() for n, t in given.items()}), wanted)
    length = int(given["token_mask"].sum())
    short = given | {"tokens": given["tokens"][0, :length].tolist(), "token_mask": None}
    assert torch.equal(compiled(**short), wanted)
    if bool(given["image_mask"].all()):
        assert torch.equal(compiled(**given | {"image_mask": None}), wanted)
