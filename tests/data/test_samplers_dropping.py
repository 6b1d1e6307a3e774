# SPDX-License-Identifier: Apache-2.0
"""Loaders that draw as they would over the rest of the data."""

from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data import Subset as TorchSubset

from lightning_sgdclean.base.errors import UnsupportedTrainingError
from lightning_sgdclean.cleansing.cleansed import Cleansed
from lightning_sgdclean.data.samplers import without_samples

SIZE, DROP = 23, (0, 4, 5, 17, 22)
KEPT = [position for position in range(SIZE) if position not in DROP]
WAY_OUT = "Leave the samples out yourself"


def numbers(size=SIZE):
    return TensorDataset(torch.arange(size))


def delivered(loader, seed=0, epochs=2):
    torch.manual_seed(seed)
    return [batch[0].reshape(-1).tolist() for _ in range(epochs) for batch in loader]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4},
        {"batch_size": 4, "shuffle": True},
        {"batch_size": 4, "shuffle": True, "drop_last": True},
        {"batch_size": 4, "shuffle": True, "num_workers": 2},
        {"batch_size": 4, "shuffle": True, "num_workers": 1, "persistent_workers": True},
        {"batch_size": None, "shuffle": True},
    ],
    ids=str,
)
def test_a_loader_draws_as_one_over_the_rest(options):
    by_hand = delivered(DataLoader(TorchSubset(numbers(), KEPT), **options))
    loader = DataLoader(numbers(), **options)
    delivered(loader)  # has workers by now, if they persist
    assert delivered(without_samples(loader, DROP)) == by_hand
    assert len(without_samples(loader, DROP)) == len(by_hand) / 2
    assert delivered(without_samples(loader, ())) == delivered(DataLoader(numbers(), **options))


def test_own_generators_and_draws_with_replacement_are_followed():
    def sampler(over):
        return RandomSampler(over, replacement=True, num_samples=50, generator=torch.Generator().manual_seed(7))

    loader = DataLoader(numbers(), batch_size=4, sampler=sampler(range(SIZE)))
    by_hand = DataLoader(TorchSubset(numbers(), KEPT), batch_size=4, sampler=sampler(KEPT))
    assert delivered(without_samples(loader, DROP)) == delivered(by_hand)


def test_a_subset_sampler_keeps_to_its_subset():
    loader = DataLoader(numbers(), batch_size=2, sampler=SubsetRandomSampler([3, 4, 5, 9, 22, 1]))
    by_hand = DataLoader(numbers(), batch_size=2, sampler=SubsetRandomSampler([3, 9, 1]))
    assert delivered(without_samples(loader, DROP)) == delivered(by_hand)


def test_a_list_of_positions_is_filtered():
    loader = DataLoader(numbers(), batch_size=2, sampler=[3, 4, 4, 9, 9])
    assert delivered(without_samples(loader, DROP), epochs=1) == [[3, 9], [9]]


@pytest.mark.parametrize("replacement", [True, False])
def test_weights_keep_their_proportions(replacement):
    weights = [1.0 + (i % 3) for i in range(SIZE)]
    loader = DataLoader(numbers(), sampler=WeightedRandomSampler(weights, SIZE, replacement))
    changed = without_samples(loader, DROP)
    assert len(changed) == (SIZE if replacement else len(KEPT))
    drawn = np.bincount(np.concatenate(delivered(changed, epochs=400)), minlength=SIZE)
    assert drawn[list(DROP)].sum() == 0
    expected = np.array([weights[i] for i in KEPT]) if replacement else np.ones(len(KEPT))
    assert drawn[KEPT] / drawn.sum() == pytest.approx(expected / expected.sum(), rel=0.15)
    with pytest.raises(UnsupportedTrainingError, match="positive weight"):
        without_samples(DataLoader(numbers(3), sampler=WeightedRandomSampler([1.0, 0.0, 0.0], 3)), [0])


class EvenFirst:
    """A sampler of one's own that draws each sample once; its epoch can be set."""

    def __init__(self, size, also=()):
        self.size, self.also, self.epoch = size, also, 0

    def __iter__(self):
        yield from (torch.tensor(i) for i in sorted(range(self.size), key=lambda i: (i % 2, i)))
        yield from self.also

    def __len__(self):
        return self.size

    def set_epoch(self, epoch):
        self.epoch = epoch


def test_own_samplers_are_followed_where_they_draw_each_sample_once():
    own = EvenFirst(SIZE)
    changed = without_samples(DataLoader(numbers(), batch_size=6, sampler=own), DROP)
    assert delivered(changed, epochs=1) == [[2, 6, 8, 10, 12, 14], [16, 18, 20, 1, 3, 7], [9, 11, 13, 15, 19, 21]]
    changed.sampler.set_epoch(3)
    assert own.epoch == 3
    one_process = DistributedSampler(range(SIZE), num_replicas=1, rank=0)
    changed = without_samples(DataLoader(numbers(), batch_size=6, sampler=one_process), DROP)
    assert sorted(chain(*delivered(changed, epochs=1))) == KEPT
    with pytest.raises(UnsupportedTrainingError, match="EvenFirst drew 20 of the samples that remain, expected"):
        delivered(without_samples(DataLoader(numbers(), sampler=EvenFirst(SIZE, also=(1, 2))), DROP))
    with pytest.raises(UnsupportedTrainingError, match="EvenFirst that does not draw each of the 23"):
        without_samples(DataLoader(numbers(), sampler=EvenFirst(7)), DROP)


class Reversed(BatchSampler):
    def __iter__(self):
        return reversed(list(super().__iter__()))


class Fixed:
    sampler = None

    def __init__(self, with_sampler):
        if with_sampler:
            self.sampler = EvenFirst(SIZE)

    def __iter__(self):
        return iter([[1, 2], [3, 4]])

    def __len__(self):
        return 2


def test_own_batch_samplers_are_followed_where_they_ask_their_sampler():
    loader = DataLoader(numbers(), batch_sampler=Reversed(RandomSampler(range(SIZE)), 5, drop_last=False))
    by_hand = DataLoader(TorchSubset(numbers(), KEPT), batch_sampler=Reversed(RandomSampler(KEPT), 5, drop_last=False))
    assert delivered(without_samples(loader, DROP)) == delivered(by_hand)
    with pytest.raises(UnsupportedTrainingError, match=f"Fixed draws samples that are to be left out. {WAY_OUT}"):
        delivered(without_samples(DataLoader(numbers(), batch_sampler=Fixed(True)), DROP))
    with pytest.raises(UnsupportedTrainingError, match="NoneType that does not draw"):
        without_samples(DataLoader(numbers(), batch_sampler=Fixed(False)), DROP)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_what_has_no_positions_or_no_batch_left_is_refused():
    with pytest.raises(UnsupportedTrainingError, match="Stream, whose samples have no positions"):
        without_samples(DataLoader(Stream()), [0])
    with pytest.raises(UnsupportedTrainingError, match="are a list, whose samples"):
        without_samples([1, 2], [0])
    with pytest.raises(IndexError, match="Sample id 23 is no position in the training loader's dataset of 23"):
        without_samples(DataLoader(numbers()), [23])
    with pytest.raises(UnsupportedTrainingError, match="no batch left"):
        without_samples(DataLoader(numbers(), batch_size=4, shuffle=True, drop_last=True), range(20))
    with pytest.raises(UnsupportedTrainingError, match="no batch left"):
        without_samples(DataLoader(numbers()), range(SIZE))


@pytest.mark.parametrize("position", ["3", 3.0, True, np.bool_(True)], ids=repr)
def test_only_whole_numbers_are_positions(position):
    assert Cleansed(drop=[np.int64(3), torch.tensor(4)]).drop == {3, 4}
    for options in ({"drop": [position]}, {"labels": {position: 1}}, {"expected": {position: 1}}):
        with pytest.raises(TypeError, match="Expected positions in the training loader's dataset"):
            Cleansed(**options)
