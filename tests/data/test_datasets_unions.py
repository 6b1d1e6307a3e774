# SPDX-License-Identifier: Apache-2.0
"""The way through subsets and unions, against the samples that it leads to; labels that datasets list."""

import random

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_sgdclean.data.datasets import (
    class_names_of,
    innermost_datasets,
    innermost_parts,
    listed_labels,
    source_of,
)
from lightning_sgdclean.data.fetching import share_samples
from lightning_sgdclean.data.labels import RelabelledDataset


class Labelled(Dataset):
    def __init__(self, labels, classes=("cat", "dog")):
        self.targets, self.classes = list(labels), classes

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, position):
        return f"text {position}", self.targets[position]


def nested(draw, depth=4):
    """Some dataset of 12 samples, wrapped at random."""
    kind = draw.choice(["subset", "union", "tensors", "labelled"]) if depth else "labelled"
    if kind == "subset":
        indices = [draw.randrange(12) for _ in range(12)]
        kinds = [list, tuple, torch.tensor, lambda found: [torch.tensor(i) for i in found]]
        return Subset(nested(draw, depth - 1), draw.choice(kinds)(indices))
    if kind == "union":
        picks = [Subset(nested(draw, depth - 1), range(start, start + 4)) for start in (0, 4, 8)]
        return ConcatDataset(picks)
    labels = [draw.randrange(100) for _ in range(12)]
    return TensorDataset(torch.zeros(12), torch.tensor(labels)) if kind == "tensors" else Labelled(labels)


@pytest.mark.parametrize("seed", range(40))
def test_the_way_leads_to_the_samples(seed):
    draw = random.Random(seed)
    dataset = nested(draw)
    positions = [draw.randrange(-12, 12) for _ in range(20)]
    found = {}
    for part in innermost_parts(dataset, positions):
        assert len(part.rows) == len(part.positions) > 0
        found |= {row: part.dataset[position] for row, position in zip(part.rows, part.positions, strict=True)}
    assert [found[row] for row in range(20)] == [dataset[position] for position in positions]
    assert listed_labels(dataset, positions) == [int(dataset[position][1]) for position in positions]
    reached = {id(part.dataset) for part in innermost_parts(dataset)}
    assert reached <= {id(inner) for inner in innermost_datasets(dataset)}
    for position in range(12):
        (part,) = innermost_parts(dataset, [position])
        names = ["dataset"] + [".".join(map(str, part.path))] * bool(part.path)
        assert source_of(dataset, position) == f"{' '.join(names)}[{part.positions[0]}]"


def test_a_whole_dataset_is_not_counted_out():
    whole = Labelled(range(3))
    union = ConcatDataset([whole, Subset(whole, [2, 0])])
    assert [(part.path, part.positions) for part in innermost_parts(whole)] == [((), None)]
    assert [(part.path, part.positions) for part in innermost_parts(union)] == [((0,), None), ((1,), [2, 0])]


@pytest.mark.parametrize("position", [4, -5, "b", None])
def test_there_is_no_way_to_a_position_that_is_none(position):
    dataset = Subset(ConcatDataset([Labelled(range(2)), Labelled(range(2))]), range(4))
    assert source_of(dataset, position) is None
    assert listed_labels(dataset, [position]) is None


def test_keys_instead_of_positions_cost_no_names():
    class Keyed(Labelled):
        def __getitem__(self, key):
            return f"text {key}", "ab".index(key)

    dataset = Subset(Keyed([0, 1]), ["a", "b"])
    assert class_names_of(dataset) == ["cat", "dog"]
    assert source_of(dataset, 1) is None


def test_class_names_have_to_agree_in_all_parts():
    cats, cars = Labelled([0, 1]), Labelled([0, 1], ("car", "bus"))
    assert class_names_of(ConcatDataset([cats, Subset(cats, [])])) == ["cat", "dog"]
    assert class_names_of(ConcatDataset([cats, cars])) == []
    assert class_names_of(ConcatDataset([cats, ConcatDataset([cats, cars])])) == []


def test_labels_are_listed_where_all_parts_list_them():
    listed, unlisted = Labelled([0, 1]), [("text", 0), ("text", 1)]
    assert listed_labels(ConcatDataset([listed, unlisted]), [0, 1]) is None
    assert listed_labels(ConcatDataset([listed, listed]), [3, 0, -1]) == [1, 0, 1]


def test_the_old_labels_of_a_relabelled_dataset_are_not_listed():
    relabelled = RelabelledDataset(Labelled([0] * 1000), {7: 1})
    assert listed_labels(relabelled, range(1000)) is None
    assert listed_labels(Subset(relabelled, range(1000)), range(1000)) is None
    assert listed_labels(ConcatDataset([Labelled([0]), relabelled]), [0, 1]) is None


def test_samples_are_shared_across_unions():
    one, other = Labelled(range(10)), Labelled(range(10))
    union = ConcatDataset([one, other])

    def share(first, second):
        found = share_samples(DataLoader(first), {"a": [DataLoader(second)]})
        assert found == share_samples(DataLoader(second), DataLoader(first))
        return found

    assert share(union, one)
    assert share(union, Subset(other, [3]))
    assert share(Subset(union, [13]), Subset(other, [3]))
    assert share(ConcatDataset([one, one]), ConcatDataset([other, Subset(one, [2])]))
    assert share(Subset(ConcatDataset([one, one]), [2]), Subset(ConcatDataset([one, one]), [12]))
    assert not share(one, other)
    assert not share(Subset(union, [13]), one)
    assert not share(Subset(union, [13]), Subset(union, [3]))
    assert not share(Subset(union, [13]), Subset(other, [4]))
    assert not share(ConcatDataset([one, Subset(other, [1])]), Subset(other, [0, 2]))
