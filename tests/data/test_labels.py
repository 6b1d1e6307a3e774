# SPDX-License-Identifier: Apache-2.0
"""Where labels stand in samples, and other labels in their place."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from lightning_sgdclean.data.labels import converted_label, place_of_label
from lightning_sgdclean.data.relabelling import RelabelledDataset, with_label

Point = namedtuple("Point", "x target")
PAIRS = TensorDataset(torch.zeros(23, 5), torch.arange(23) % 3)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ((1.0, 2), (1.0, 0)),
        ([1.0, 2, "rest"], [1.0, 0, "rest"]),
        (Point(1.0, 2), Point(1.0, 0)),
        ({"x": 1.0, "label": 2}, {"x": 1.0, "label": 0}),
        ({"pixels": 1.0, "y": True}, {"pixels": 1.0, "y": False}),
        ((1.0, torch.tensor(2)), (1.0, torch.tensor(0))),
        ((1.0, torch.tensor([2.0])), (1.0, torch.tensor([0.0]))),
        ((1.0, np.int64(2)), (1.0, np.int64(0))),
        ((1.0, np.array([2])), (1.0, np.array([0]))),
    ],
    ids=str,
)
def test_labels_are_replaced_in_their_own_type(sample, expected):
    found = with_label(sample, 0)
    assert found == expected
    assert type(found) is type(sample)
    value, old = (list(s.values() if isinstance(s, dict) else s)[1] for s in (found, sample))
    assert type(value) is type(old)
    assert getattr(value, "dtype", None) == getattr(old, "dtype", None)


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        (3.0, "found float"),
        ((3.0,), "found tuple"),
        ({"x": 1.0}, "found entries x"),
        ({"label": 1, "target": 2}, "found entries label, target"),
        ((3.0, "cat"), "one number, found a str"),
        ((3.0, torch.tensor([1, 2])), "one number, found a Tensor"),
    ],
    ids=str,
)
def test_labels_that_are_not_plain_are_refused(sample, says):
    with pytest.raises(TypeError, match=f"{says}.*set_label="):
        with_label(sample, 0)


class ManyAtOnce(Dataset):
    name = "many"

    def __len__(self):
        return 4

    def __getitem__(self, position):
        raise AssertionError

    def __getitems__(self, positions):
        return [(float(position), position) for position in positions]


def test_datasets_that_are_asked_for_many_samples_at_once_are_relabelled_too():
    dataset = RelabelledDataset(ManyAtOnce(), {1: 3}, None)
    assert dataset.name == "many"
    assert [batch[1].tolist() for batch in DataLoader(dataset, batch_size=2)] == [[0, 3], [2, 3]]
    union = RelabelledDataset(
        ConcatDataset([PAIRS, PAIRS]), {len(PAIRS) + 1: 2}, lambda sample, label: (*sample, label)
    )
    assert len(union[len(PAIRS) + 1]) == 3
    assert len(union[1]) == 2
    with pytest.raises(IndexError, match="Sample id 4 is no position"):
        RelabelledDataset(ManyAtOnce(), {4: 0}, None)


@pytest.mark.parametrize(
    "old",
    [torch.tensor(1), torch.tensor([1]), torch.tensor(1, dtype=torch.uint8), np.int16(1), np.array(1), np.float32(1)],
    ids=repr,
)
def test_a_new_label_has_the_type_of_the_old_one(old):
    before = old.item()
    new = converted_label("2", old)
    assert type(new) is type(old)
    assert (new.dtype, new.shape, new.item()) == (old.dtype, old.shape, 2)
    assert old.item() == before


def test_truth_values_stay_truth_values():
    assert converted_label("0", True) is False
    assert converted_label("True", False) is True


def test_the_rule_for_the_place_of_a_label():
    assert place_of_label(("a", 1)) == 1
    assert place_of_label({"target": 1, "x": 0}) == "target"
    for unclear in [("a", 1, 2), {"label": 1, "y": 2}, {"x": 1}, "ab", torch.zeros(2)]:
        assert place_of_label(unclear) is None


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not fit into"):
        converted_label("300", torch.tensor(1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="does not fit into"):
        converted_label("300", np.uint8(1))
    with pytest.raises(ValueError, match="expected a finite number"):
        converted_label("nan", 1.0)
    with pytest.raises(ValueError, match="expected True or False"):
        converted_label("maybe", True)
