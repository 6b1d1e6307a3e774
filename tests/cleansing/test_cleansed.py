# SPDX-License-Identifier: Apache-2.0
"""Trainings without some samples or with other labels, against trainings on data that were changed by hand."""

import importlib
from collections import namedtuple
from itertools import chain

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data import Subset as TorchSubset

from cases import quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import UnsupportedTrainingError
from lightning_sgdclean.cleansing.cleansed import Cleansed
from lightning_sgdclean.data.relabelling import RelabelledDataset, with_label
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


# In a Trainer ------------------------------------------------------------------------------------------

X, Y = torch.randn(SIZE, 5, generator=torch.Generator().manual_seed(1)), torch.arange(SIZE) % 3
TRAIN, VAL = TensorDataset(X, Y), TensorDataset(X[:6], Y[:6])


def classes_of(name):
    """Module and DataModule of one of the two packages."""
    package = importlib.import_module(name)

    class Net(package.LightningModule):
        def __init__(self, train=None):
            super().__init__()
            torch.manual_seed(3)
            self.layer = torch.nn.Linear(5, 3)
            self.train_data = train
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen += batch[0][:, 0].tolist()
            return F.cross_entropy(self.layer(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self.layer(batch[0]), batch[1]))

        def train_dataloader(self):
            return DataLoader(self.train_data, batch_size=4, shuffle=True)

        def configure_optimizers(self):
            self.num_steps = self.trainer.estimated_stepping_batches
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Data(package.LightningDataModule):
        def __init__(self, train):
            super().__init__()
            self.train_data = train

        def train_dataloader(self):
            return DataLoader(self.train_data, batch_size=4, shuffle=True)

    return package, Net, Data


def trained(name, source, train, callbacks=(), **options):
    package, net, data = classes_of(name)
    module = net(train if source == "module" else None)
    trainer = quiet_trainer(callbacks, package, precision="32-true", reload_dataloaders_every_n_epochs=1, **options)
    torch.manual_seed(5)
    if source == "fit":
        trainer.fit(module, DataLoader(train, batch_size=4, shuffle=True), DataLoader(VAL, batch_size=4))
    else:
        trainer.fit(module, datamodule=data(train) if source == "datamodule" else None)
    assert "process_dataloader" not in vars(trainer.strategy)
    return module


@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("source", ["fit", "module", "datamodule"])
def test_fit_is_that_on_the_rest_of_the_data(name, source):
    found = trained(name, source, TRAIN, [Cleansed(drop=DROP)])
    by_hand = trained(name, source, TorchSubset(TRAIN, KEPT))
    assert found.seen == by_hand.seen
    assert found.num_steps == by_hand.num_steps
    assert torch.equal(found.layer.weight, by_hand.layer.weight)


@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
def test_fit_is_that_on_the_data_with_other_labels(name):
    labels = {0: 2, 7: 0, 22: 0}
    others = Y.clone()
    others[list(labels)] = torch.tensor(list(labels.values()))
    found = trained(name, "fit", TRAIN, [Cleansed(labels=labels)])
    by_hand = trained(name, "fit", TensorDataset(X, others))
    assert torch.equal(found.layer.weight, by_hand.layer.weight)
    assert not torch.equal(found.layer.weight, trained(name, "fit", TRAIN).layer.weight)


def test_a_ranking_of_the_rest_names_samples_as_in_the_whole(tmp_path):
    influence = SGDInfluence(epochs="all", dirpath=tmp_path / "run")
    found = trained("pytorch_lightning", "fit", TRAIN, [influence, Cleansed(drop=DROP)])
    assert sorted(influence.ranking.sample_id.tolist()) == KEPT
    by_hand = SGDInfluence(epochs="all", dirpath=tmp_path / "by hand")
    trained("pytorch_lightning", "fit", TorchSubset(TRAIN, KEPT), [by_hand])
    assert found.seen
    assert influence.ranking.influence == pytest.approx(by_hand.ranking.influence)
    with pytest.raises(ValueError, match="List Cleansed behind SGDInfluence"):
        trained("pytorch_lightning", "fit", TRAIN, [Cleansed(drop=DROP), SGDInfluence()])


class Own(DataLoader):
    def __iter__(self):
        return iter([[X[:4], Y[:4]]] * len(self))


def test_loaders_that_do_not_ask_their_sampler_are_refused():
    package, net, _ = classes_of("pytorch_lightning")
    with pytest.raises(UnsupportedTrainingError, match="Own delivers batches that its sampler did not draw"):
        quiet_trainer([Cleansed(drop=[1])], package, precision="32-true").fit(net(), Own(TRAIN, batch_size=4))


# Labels ------------------------------------------------------------------------------------------------

Point = namedtuple("Point", "x target")


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
    union = RelabelledDataset(ConcatDataset([TRAIN, TRAIN]), {SIZE + 1: 2}, lambda sample, label: (*sample, label))
    assert len(union[SIZE + 1]) == 3
    assert len(union[1]) == 2
    with pytest.raises(IndexError, match="Sample id 4 is no position"):
        RelabelledDataset(ManyAtOnce(), {4: 0}, None)
