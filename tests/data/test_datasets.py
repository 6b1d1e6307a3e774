# SPDX-License-Identifier: Apache-2.0
"""Which parts of a sample are pictures, and that their pixels are the sample's."""

from collections import namedtuple

import numpy as np
import pytest
import torch

from lightning_sgdclean.data.datasets import picture_of

GREY = np.arange(30, dtype=np.uint8).reshape(5, 6)
COLOUR = np.arange(90, dtype=np.uint8).reshape(5, 6, 3)
Pair = namedtuple("Pair", ["label", "image"])


@pytest.mark.parametrize(
    ("sample", "pixels"),
    [
        (torch.from_numpy(GREY), GREY),
        (torch.from_numpy(GREY)[None], GREY),
        (torch.from_numpy(COLOUR).permute(2, 0, 1), COLOUR),
        (COLOUR, COLOUR),
        (torch.from_numpy(GREY)[None] / 255, GREY),  # as ToTensor gives it
        (torch.from_numpy(COLOUR).permute(2, 0, 1).to(torch.float16) / 255, COLOUR),
        (GREY.astype(np.int64), GREY),
        (np.dstack([COLOUR, GREY]), COLOUR),  # with transparency
        (GREY > 7, 255 * (GREY > 7)),
    ],
)
def test_pixels_are_those_of_the_array(sample, pixels):
    found = picture_of(sample)
    assert found.dtype == np.uint8
    assert np.array_equal(found, pixels)


def test_pil_images_are_read(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(COLOUR).save(tmp_path / "picture.png")
    with image.open(tmp_path / "picture.png") as opened:
        assert np.array_equal(picture_of((opened, 3)), COLOUR)
    assert np.array_equal(picture_of(image.fromarray(GREY)), GREY)
    assert picture_of(image.fromarray(GREY > 7)).max() == 255
    deep = image.fromarray(GREY.astype(np.uint16) * 1000)
    assert np.array_equal(picture_of(deep), (GREY / 29 * 255).round())


def test_the_first_picture_is_found_wherever_it_lies():
    image = torch.from_numpy(GREY)
    for sample in [(3, image), {"y": 3, "x": {"pixels": [image]}}, [[], image, image + 1], Pair("cat", image)]:
        assert np.array_equal(picture_of(sample), GREY)


def test_normalised_images_are_stretched():
    found = picture_of(torch.linspace(-2.0, 2.0, 25).reshape(1, 5, 5))
    assert found[0, 0] == 0
    assert found[-1, -1] == 255
    assert found[2, 2] in (127, 128)
    assert picture_of(torch.full((1, 5, 5), -3.0)).max() == 0
    assert picture_of(torch.tensor([[float("nan")] * 5] * 5)).max() == 0


@pytest.mark.parametrize(
    "sample",
    [
        None,
        "cat.png",
        3,
        torch.randn(20),
        torch.randn(3, 20),  # views of a vector
        torch.randn(2, 8, 8),  # neither grey nor colours
        torch.randn(8, 3, 16, 16),  # a film
        torch.randn(8, 8, dtype=torch.complex64),
        np.array([["a"] * 8] * 8),
        (torch.randn(5), {"y": torch.tensor(1)}),
        [],
    ],
)
def test_what_is_no_picture_is_not_shown_as_one(sample):
    assert picture_of(sample) is None
