# SPDX-License-Identifier: Apache-2.0
"""What a sample is shown as: pictures with the right pixels, text, values, and what cannot be shown."""

import base64
import collections
import dataclasses
import io
import sys
import time

import numpy as np
import pytest
import torch

from lightning_sgdclean.report.appearance import MAX_SIDE, appearances_of, parts_of, thumbnail_of

PIL = pytest.importorskip("PIL.Image")
RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (12, 10, 3), dtype=np.uint8)  # height, width, channels
GREY = RANDOM.integers(0, 256, (28, 28), dtype=np.uint8)


def pixels(appearance):
    kind, _, data = appearance.picture.partition(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return np.asarray(PIL.open(io.BytesIO(base64.b64decode(data))))


def shown(*samples):
    return appearances_of([*map(parts_of, samples)])[0]


# --- pictures


@pytest.mark.parametrize(
    ("value", "truth"),
    [
        (torch.from_numpy(COLOUR).permute(2, 0, 1), COLOUR),
        (torch.from_numpy(COLOUR), COLOUR),
        (COLOUR, COLOUR),
        (PIL.fromarray(COLOUR), COLOUR),
        (torch.from_numpy(COLOUR).permute(2, 0, 1) / 255, COLOUR),
        (torch.from_numpy(COLOUR).permute(2, 0, 1).double(), COLOUR),
        (torch.from_numpy(GREY), GREY),
        (torch.from_numpy(GREY)[None] / 255, GREY),
        (PIL.fromarray(GREY), GREY),
        (torch.from_numpy(GREY > 99), (GREY > 99) * np.uint8(255)),
        (torch.from_numpy(GREY).long(), GREY),
    ],
    ids=["CHW", "HWC", "array", "PIL", "0 to 1", "0 to 255", "HW", "1HW", "PIL grey", "bool", "int64"],
)
def test_a_picture_comes_out_with_its_pixels(value, truth):
    (appearance,) = shown(value)
    assert np.array_equal(pixels(appearance), truth)
    assert appearance.size == truth.shape[1::-1]


def test_normalised_digits_come_out_as_they_were():
    digits = RANDOM.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    digits[:, 0, 0], digits[:, 0, 1] = 0, 255  # as in any digit there is black and white
    normalised = (torch.from_numpy(digits)[:, None] / 255 - 0.1307) / 0.3081
    for appearance, truth in zip(shown(*normalised), digits, strict=True):
        assert np.array_equal(pixels(appearance), truth)


def test_colours_normalised_by_channel_come_out_as_they_were():
    photos = RANDOM.integers(0, 256, (50, 3, 32, 32), dtype=np.uint8)
    mean, deviation = torch.tensor([0.49, 0.48, 0.45])[:, None, None], torch.tensor([0.25, 0.24, 0.26])[:, None, None]
    normalised = (torch.from_numpy(photos) / 255 - mean) / deviation
    for appearance, truth in zip(shown(*normalised), photos, strict=True):
        difference = pixels(appearance).astype(int) - truth.transpose(1, 2, 0)
        assert np.abs(difference).max() <= 2  # the extremes of 50 pictures are black and white only nearly


def test_one_wild_picture_does_not_darken_the_others():
    pictures = [torch.linspace(-1, 1, 64).reshape(1, 8, 8) for _ in range(40)]
    pictures[7] = pictures[7] * 1000
    ordinary = pixels(shown(*pictures)[0])
    assert (ordinary.min(), ordinary.max()) == (0, 255)


def test_large_pictures_are_reduced_and_say_how_large_they_were():
    photo = torch.from_numpy(np.repeat(np.repeat(COLOUR, 40, 0), 40, 1)).permute(2, 0, 1)
    (appearance,) = shown(photo)
    assert appearance.size == (400, 480)
    assert max(pixels(appearance).shape) == MAX_SIDE
    assert appearance.picture.startswith("data:image/jpeg")


def test_reducing_takes_the_mean_of_what_falls_together():
    checkers = np.indices((2 * MAX_SIDE, 2 * MAX_SIDE)).sum(0) % 2
    picture = thumbnail_of(torch.from_numpy(checkers).float()[None])
    assert np.allclose(picture.pixels, 0.5)


def test_transparency_stays():
    glass = np.dstack([COLOUR, np.full((12, 10), 7, np.uint8)])
    assert np.array_equal(pixels(shown(PIL.fromarray(glass))[0]), glass)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_do_not_spoil_a_picture(bad):
    value = torch.from_numpy(GREY)[None] / 255
    value[0, 5, 5] = bad
    result = pixels(shown(value)[0])
    assert np.array_equal(np.delete(result.reshape(-1), 5 * 28 + 5), np.delete(GREY.reshape(-1), 5 * 28 + 5))


def test_the_samples_themselves_are_left_alone():
    value, image = torch.randn(3, 300, 300), PIL.fromarray(COLOUR)
    before = value.clone()
    shown(value, image)
    assert torch.equal(value, before)
    assert image.size == (10, 12)


@pytest.mark.parametrize(
    "value",
    [torch.randn(3, 12), torch.randn(30), torch.zeros(3, 0, 5), torch.randn(2, 3, 4, 5), torch.tensor(1.0)],
    ids=lambda value: str(tuple(value.shape)),
)
def test_arrays_that_are_no_pictures_are_not_shown_as_one(value):
    assert thumbnail_of(value) is None


@pytest.mark.filterwarnings("ignore:.*quantiz.*", "ignore:.*torch.ao.*", "ignore:.*deprecated.*")
def test_sparse_and_complex_arrays_do_no_harm():
    appearances = shown(torch.eye(20).to_sparse(), torch.zeros(20, 20, dtype=torch.complex64))
    assert [appearance.picture for appearance in appearances] == ["", ""]


def test_without_pillow_there_is_one_complaint_and_no_picture(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    appearances, complaints = appearances_of([*map(parts_of, (torch.from_numpy(GREY), torch.from_numpy(GREY), "text"))])
    assert complaints == ["pictures need Pillow: pip install lightning-sgdclean[page]"]
    assert [(appearance.picture, appearance.text) for appearance in appearances] == [("", ""), ("", ""), ("", "text")]
    assert appearances[0].note == complaints[0]


# --- text and values


def test_text_is_shown_as_it_is():
    assert shown("<b>bold</b>\n second line")[0].text == "<b>bold</b>\n second line"


def test_long_text_is_cut_and_says_so():
    (appearance,) = shown("x" * 5000)
    assert len(appearance.text) == 2000
    assert appearance.note == "the first 2,000 of 5,000 characters"


def test_a_vector_is_shown_value_by_value():
    assert shown(torch.tensor([0.5, -1.25]))[0].features == (("feature 0", "0.5"), ("feature 1", "-1.25"))


def test_long_vectors_say_how_many_are_left_out():
    features = shown(torch.zeros(100))[0].features
    assert len(features) == 25
    assert features[-1] == ("…", "76 more")


def test_tokens_stand_in_one_row():
    assert shown({"input_ids": torch.tensor([101, 7, 102])})[0].features == (("input_ids", "101 7 102"),)


def test_a_dict_shows_its_entries_by_name():
    (appearance,) = shown({"age": 39, "work": "State-gov", "hours": 40.5, "none": None})
    assert appearance.features == (("age", "39"), ("work", "State-gov"), ("hours", "40.5"))


def test_long_texts_of_a_dict_are_text_with_names():
    (appearance,) = shown({"question": "why " * 30, "answer": "because " * 30})
    assert appearance.text == f"question: {'why ' * 30}\n\nanswer: {'because ' * 30}"


def test_a_picture_with_words_shows_both():
    (appearance,) = shown({"image": torch.from_numpy(GREY), "caption": "seven " * 20})
    assert np.array_equal(pixels(appearance), GREY)
    assert appearance.text == "seven " * 20


def test_of_two_pictures_the_second_is_named():
    (appearance,) = shown([torch.from_numpy(GREY), torch.from_numpy(COLOUR)])
    assert np.array_equal(pixels(appearance), GREY)
    assert appearance.features == (("item 1", "another picture, 10 x 12"),)


def test_named_tuples_and_dataclasses_are_opened():
    point = collections.namedtuple("point", "x y")
    record = dataclasses.make_dataclass("record", [("height", float), ("width", float)])
    assert shown(point(1, 2.5))[0].features == (("x", "1"), ("y", "2.5"))
    assert shown(record(0.5, 2.0))[0].features == (("height", "0.5"), ("width", "2"))


def test_a_larger_array_is_told_by_its_range():
    (appearance,) = shown(torch.arange(24.0).reshape(2, 3, 4, 1))
    assert appearance.features == (("value", "2 x 3 x 4 x 1 numbers, from 0 to 23, mean 11.5"),)


def test_what_cannot_be_shown_says_what_to_do():
    assert shown(None)[0].note == "nothing to show of a NoneType; render= says how to show it"
    assert shown(object())[0].features == (("value", "object"),)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.float32])
def test_the_spread_of_an_array_is_that_of_its_numbers(dtype):
    values = (torch.arange(24).reshape(2, 3, 4, 1) - 7).to(dtype)
    truth = "2 x 3 x 4 x 1 numbers, from -7 to 16, mean 4.5"
    found = [shown(values)[0].features[0][1]]
    if dtype != torch.bfloat16:
        found.append(shown(values.numpy())[0].features[0][1])
    assert set(found) == {truth}


def test_arrays_of_numbers_with_gaps_of_truths_and_of_text_are_told():
    gaps = torch.full((2, 3, 4, 1), float("nan"))
    assert shown(gaps)[0].features[0][1] == "2 x 3 x 4 x 1 numbers, from nan to nan, mean nan"
    assert shown(gaps == gaps)[0].features[0][1] == "2 x 3 x 4 x 1 numbers"
    assert shown(np.array(["a", "b"]))[0].features == (("feature 0", "a"), ("feature 1", "b"))
    assert shown(torch.zeros(0, 3, 1, 1))[0].features[0][1] == "0 x 3 x 1 x 1 numbers"


def test_a_long_vector_costs_what_is_shown_of_it():
    counts, numbers = torch.arange(5_000_000), torch.arange(5_000_000) / 2
    began = time.perf_counter()
    (tokens, values) = shown(counts, numbers)
    # As a Python list these take about 3 s.
    assert time.perf_counter() - began < 1
    assert tokens.features[0][1].startswith("0 1 2 3 ")
    assert tokens.features[0][1].endswith("58 59 … (5000000 in all)")
    assert values.features[1] == ("feature 1", "0.5")
    assert values.features[-1] == ("…", "4999976 more")


def test_a_large_array_costs_little():
    array = torch.rand(5, 1_000_000, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    (appearance,) = shown(array[:, None, None])
    # As a Python list it takes about 2 s.
    assert time.perf_counter() - began < 1
    truth = f"from {array.min():.5g} to {array.max():.5g}, mean {array.double().mean():.5g}"
    assert appearance.features[0][1] == f"5 x 1 x 1 x 1000000 numbers, {truth}"
