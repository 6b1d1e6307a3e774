# SPDX-License-Identifier: Apache-2.0
"""Samples and datasets with other labels: in the type of the old ones, or refused."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    TensorDataset,
)

from lightning_sgdclean.data.labels import RelabelledDataset, with_label

SIZE, DROP = 23, (0, 4, 5, 17, 22)


# In a Trainer ------------------------------------------------------------------------------------------

X, Y = torch.randn(SIZE, 5, generator=torch.Generator().manual_seed(1)), torch.arange(SIZE) % 3


TRAIN, VAL = TensorDataset(X, Y), TensorDataset(X[:6], Y[:6])


# Labels ------------------------------------------------------------------------------------------------

Point = namedtuple("Point", "x target")


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ((1.0, 2), (1.0, 0)),
        ([1.0, 2], [1.0, 0]),
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
        ([1.0, 2, "rest"], "found list of 3 items"),
        ({"x": 1.0}, "found dict with the keys 'x'"),
        ({"label": 1, "target": 2}, "found dict with the keys 'label', 'target'"),
        ((torch.zeros(2), "cat"), "the new label is 0, but the dataset's is 'cat'"),
        ((3.0, torch.tensor([1, 2])), "the dataset's label is a Tensor, expected a single number"),
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
    union = RelabelledDataset(ConcatDataset([TRAIN, TRAIN]), {SIZE + 1: 2}, lambda sample, label: (*sample, label))
    assert len(union[SIZE + 1]) == 3
    assert len(union[1]) == 2
    with pytest.raises(IndexError, match="Sample id 4 is no position"):
        RelabelledDataset(ManyAtOnce(), {4: 0}, None)
