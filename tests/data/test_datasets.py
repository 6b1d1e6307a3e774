# SPDX-License-Identifier: Apache-2.0
"""Which parts of a sample are pictures, what classes a dataset lists, and which labels."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_sgdclean.data.datasets import class_names_of, listed_labels, names_by_label, picture_of

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


class Listed(Dataset):
    classes = ("cat", "dog")

    def __init__(self, labels, targets=None):
        self.labels_, self.targets = labels, list(labels) if targets is None else targets

    def __len__(self):
        return len(self.labels_)

    def __getitem__(self, index):
        return f"text {index}", self.labels_[index]


def test_class_names_are_found_behind_subsets_and_unions():
    listed = Listed([0, 1])
    assert class_names_of(Subset(ConcatDataset([listed, Subset(listed, [0])]), [1])) == ["cat", "dog"]
    assert class_names_of(TensorDataset(torch.zeros(1))) == []


def test_names_are_taken_from_a_list_or_a_mapping():
    assert names_by_label(["a", "b"]) == {"0": "a", "1": "b"}
    assert names_by_label({torch.tensor(3): "three", "x": "ex"}) == {"3": "three", "x": "ex"}


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.zeros(6, 2), torch.arange(6)),
        TensorDataset(torch.zeros(6, 2), torch.arange(6), torch.arange(6) + 10),
        Listed(range(6)),
        Listed(torch.arange(6)),
        Subset(Listed([*range(9, -1, -1)]), [9, 8, 7, 6, 5, 4]),
        ConcatDataset([Listed([0, 1, 2]), TensorDataset(torch.zeros(3, 2), torch.arange(3, 6))]),
    ],
    ids=["tensors", "three tensors", "targets", "targets as a tensor", "subset", "union"],
)
def test_listed_labels_are_those_of_the_samples(dataset):
    assert listed_labels(dataset, [5, 0, 3]) == [5, 0, 3]


@pytest.mark.parametrize(
    "dataset",
    [
        [("text", 1), ("text", 0)],
        Listed([0, 1], targets=[1, 0]),
        Listed([0, 1], targets=[0]),
        TensorDataset(torch.zeros(2, 2), torch.zeros(2, 3)),
    ],
    ids=["no list", "list of others", "list of another length", "several values a sample"],
)
def test_labels_are_not_known_where_the_list_is_not_of_the_samples(dataset):
    assert listed_labels(dataset, [0, 1]) is None


def test_looking_at_labels_leaves_the_random_states_alone():
    class Drawing(Listed):
        def __getitem__(self, index):
            np.random.rand(), torch.rand(1)  # an augmentation, say
            return super().__getitem__(index)

    before = torch.get_rng_state(), np.random.get_state()[1].copy(), np.random.get_state()[2]
    assert listed_labels(Drawing([0, 1]), [1, 0]) == [1, 0]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert np.random.get_state()[2] == before[2]
