# SPDX-License-Identifier: Apache-2.0
"""Batches, datasets, samplers and loaders as people have them."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, default_collate

from cases import TRAIN, Case, Plain, loaders, quiet_trainer
from datasets import KEPT, OPTIONS, Wrapped, noisy_collate
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import (
    ReplayMismatchError,
    SampleIdError,
    SGDInfluenceWarning,
    UnsupportedTrainingError,
)
from lightning_sgdclean.trajectory.store import Trajectory
from reference import assert_influence_is_the_derivative, influences, ranked


class Parts(NamedTuple):
    x: Any
    y: Any
    index: Any


@dataclass
class Record:
    x: Any
    y: Any
    index: Any


def as_dict(x, y, i):
    return {"x": x, "labels": {"y": y, "name": [str(j) for j in i.tolist()]}, "index": i, "size": len(i)}


SHAPES = {
    "list": (lambda *columns: list(columns), lambda b: b),
    "dict": (as_dict, lambda b: [b["x"], b["labels"]["y"], b["index"]]),
    "named tuple": (Parts, lambda b: [b.x, b.y, b.index]),
    "dataclass": (Record, lambda b: [b.x, b.y, b.index]),
    "object": (lambda x, y, i: SimpleNamespace(x=x.double(), y=y, i=i), lambda b: [b.x, b.y, b.i]),
    "list of samples": (
        lambda x, y, i: [{"x": x[j], "y": y[j], "i": i[j]} for j in range(len(x))],
        lambda b: [torch.stack([item[key] for item in b]) for key in "xyi"],
    ),
}


@pytest.fixture(scope="module")
def as_list(tmp_path_factory):
    """The influences where batches are lists, as the default collate function makes them."""
    return influences(
        ranked(Case("list", OPTIONS), keep_batches=False, dirpath=tmp_path_factory.mktemp("list") / "run")
    )


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_batches_of_any_shape_are_followed_whether_kept_or_fetched_again(as_list, name, keep):
    make, take = SHAPES[name]

    class Shaped(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(take(batch), batch_idx)

    shaped = Case(name, OPTIONS, loader={"collate_fn": lambda items: make(*default_collate(items))}, make=Shaped)
    callback = ranked(shaped, keep_batches=keep)
    assert np.array_equal(influences(callback), as_list)
    assert callback.summary["batches"]["kept"] == (15 if keep else 0)


def test_batches_that_training_step_writes_to_are_replayed_from_what_they_were():
    class Writing(Plain):
        def training_step(self, batch, batch_idx):
            x = batch.pop("x")
            x.mul_(0.5)
            return super().training_step([x, batch["labels"].pop("y"), batch["index"]], batch_idx)

    case = Case("writing", OPTIONS, {"accumulate_grad_batches": 2}, {"collate_fn": _dict_collate}, make=Writing)
    for options in ({"keep_batches": True}, {"keep_batches": False}, {"keep_batches": True, "curvature": "finite"}):
        callback = ranked(case, **options)
        assert callback.summary["replay"]["batches_bit_for_bit"] == 15


def _dict_collate(items):
    return as_dict(*default_collate(items))


def test_a_class_of_batches_that_cannot_be_kept_is_fetched_again_or_refused_by_name():
    def collate(items):
        return [*default_collate(items), (letter for letter in "ab")]

    def noisy(items):
        return [*noisy_collate(items), (letter for letter in "ab")]

    class Taking(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:3], batch_idx)

    callback = SGDInfluence("val_loss")
    quiet_trainer([callback]).fit(Taking(), *loaders(collate_fn=collate))
    assert len(callback.ranking) == 23
    trainer = quiet_trainer([SGDInfluence("val_loss", keep_batches=True)])
    with pytest.raises(UnsupportedTrainingError, match=r"builtins\.generator.*without pickle"):
        trainer.fit(Taking(), *loaders(collate_fn=collate))
    assert trainer.global_step == 0
    with (
        pytest.warns(SGDInfluenceWarning, match=r"would have to be kept.*but cannot be: .*builtins\.generator"),
        pytest.raises(ReplayMismatchError, match="hold other data"),
    ):
        quiet_trainer([SGDInfluence("val_loss")]).fit(Taking(), *loaders(collate_fn=noisy))


class Words(Wrapped):
    """Sequences of different lengths."""

    def __getitem__(self, index):
        _, y, i = self.inner[index]
        return torch.randint(1, 6, (2 + index % 4,), generator=torch.Generator().manual_seed(index)), y, i


class Noised(Words):
    def __getitem__(self, index):
        words, y, i = super().__getitem__(index)
        return torch.where(torch.rand(len(words)) < 0.3, torch.tensor(7), words), y, i


def padded(items):
    words = torch.nn.utils.rnn.pad_sequence([item[0] for item in items], batch_first=True)
    return [words, *default_collate([item[1:] for item in items])]


class Reader(Plain):
    def __init__(self, **options):
        super().__init__(**options)
        self.embed = torch.nn.Embedding(8, 5, padding_idx=0)

    def read(self, batch):
        words, y, i = batch
        return [self.embed(words).sum(1) / (words != 0).sum(1, keepdim=True), y, i]

    def training_step(self, batch, batch_idx):
        return super().training_step(self.read(batch), batch_idx)


def test_padded_sequences_are_not_taken_for_random_ones():
    case = Case("words", {"options": {"momentum": 0.9}}, {}, {"collate_fn": padded}, make=Reader, train=Words())
    assert assert_influence_is_the_derivative(case).summary["batches"]["why"] == ""


def test_random_padded_sequences_are_found_and_followed():
    case = Case("noised", {"options": {"momentum": 0.9}}, {}, {"collate_fn": padded}, make=Reader, train=Noised())
    with pytest.warns(SGDInfluenceWarning, match=KEPT):
        assert_influence_is_the_derivative(case)


def test_collate_that_gives_none_for_a_batch_is_passed_over():
    def sometimes(items):
        batch = default_collate(items)
        return None if 3 in batch[2] else batch

    callback = SGDInfluence("val_loss", epochs="all")
    with pytest.warns(UserWarning, match="yielded None"):
        quiet_trainer([callback]).fit(Plain(), *loaders(collate_fn=sometimes))
    steps = Trajectory(callback.run_dir / "trajectory").steps
    assert len(steps) == 12
    assert all(3 not in step.micro[0].ids for step in steps)


def test_subsets_and_concatenations_are_followed_however_nested():
    nested = Subset(ConcatDataset([Subset(TRAIN, range(20, 10, -1)), ConcatDataset([TRAIN, TRAIN])]), range(3, 26))
    numbered = Numbered(nested)
    callback = assert_influence_is_the_derivative(Case("nested", OPTIONS, train=numbered))
    assert sorted(callback.ranking.sample_id) == list(range(23))


class Numbered(Wrapped):
    """The inner dataset, its last column the position in this one."""

    def __getitem__(self, index):
        return *self.inner[index][:2], index


class ByName(Dataset):
    """A map whose keys are strings."""

    def __getitem__(self, name):
        return TRAIN[int(name.removeprefix("row "))]

    def __len__(self):
        return 23


def test_keys_that_are_strings_name_the_samples():
    names = [f"row {i}" for i in range(23)]
    callback = SGDInfluence("val_loss")
    quiet_trainer([callback]).fit(Plain(), DataLoader(ByName(), batch_size=5, sampler=names), loaders()[1])
    assert sorted(callback.ranking.sample_id) == sorted(names)


class Weighted(torch.utils.data.Sampler):
    """With a state of its own that outlives an epoch, and draws for every sample."""

    def __init__(self):
        self.rng, self.num_epochs = np.random.default_rng(2), 0

    def __iter__(self):
        self.num_epochs += 1
        for _ in range(18):
            yield int(self.rng.choice(23, p=np.arange(23) / 253))

    def __len__(self):
        return 18

    def state_dict(self):
        return {"num_epochs": self.num_epochs}

    def load_state_dict(self, state):
        self.num_epochs = state["num_epochs"]


SAMPLERS = {
    "weighted": lambda: {"sampler": torch.utils.data.WeightedRandomSampler(torch.arange(23.0), 30)},
    "with a state": lambda: {"sampler": Weighted(), "drop_last": True},
    "with a state, augmented": lambda: {"sampler": Weighted(), "collate_fn": noisy_collate},
    "drop last": lambda: {"shuffle": True, "drop_last": True, "batch_size": 4},
    "random with replacement": lambda: {"sampler": torch.utils.data.RandomSampler(TRAIN, replacement=True)},
}


@pytest.mark.filterwarnings(f"ignore:{KEPT}")
@pytest.mark.parametrize("name", SAMPLERS)
def test_influence_is_the_derivative_of_the_fit_with_any_sampler(name):
    class Fresh(Case):
        """A sampler with a state is made anew for each fit."""

        @property
        def loader(self):
            return {"shuffle": False, **SAMPLERS[name]()}

        @loader.setter
        def loader(self, _):
            pass

    assert_influence_is_the_derivative(Fresh(name, OPTIONS))


class Tensors(torch.utils.data.Sampler):
    def __iter__(self):
        return iter(torch.randperm(20).split(5))


class Arrays(Tensors):
    def __iter__(self):
        return iter(np.random.default_rng(0).permutation(20).reshape(4, 5))


@pytest.mark.parametrize("sampler", [Tensors, Arrays])
def test_batch_samplers_of_tensors_and_arrays_are_followed(sampler):
    callback = SGDInfluence("val_loss")
    quiet_trainer([callback]).fit(Plain(), DataLoader(TRAIN, batch_sampler=sampler()), loaders()[1])
    assert sorted(callback.ranking.sample_id) == list(range(20))


def test_positions_that_are_no_ids_are_refused_before_training():
    class Pairs(Wrapped):
        def __getitem__(self, key):
            return TRAIN[key[0]]

    trainer = quiet_trainer([SGDInfluence("val_loss")])
    keys = [(i, "large") for i in range(10)]
    with pytest.raises(SampleIdError, match=r"drew \(0, 'large'\) of type tuple.*int or a str"):
        trainer.fit(Plain(), DataLoader(Pairs(), batch_size=5, sampler=keys), loaders()[1])
    assert trainer.global_step == 0


def test_a_batch_sampler_of_iterators_is_refused_before_they_are_used_up():
    sampler = SimpleBatches([iter(range(5)), iter(range(5, 10))])
    with pytest.raises(SampleIdError, match="can be read only once"):
        quiet_trainer([SGDInfluence("val_loss")]).fit(Plain(), DataLoader(TRAIN, batch_sampler=sampler), loaders()[1])


class SimpleBatches(list):
    """A batch sampler written down."""


class AtOnce(Wrapped):
    """A dataset that makes whole batches from lists of positions."""

    def __getitem__(self, index):
        return [column[index] for column in TRAIN.tensors]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.filterwarnings("ignore:.*batch_size")
def test_loaders_without_batching_hand_lists_of_positions_to_the_dataset(keep):
    batches = torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(TRAIN), 5, drop_last=False)
    callback = SGDInfluence("val_loss", keep_batches=keep)
    torch.manual_seed(0)
    quiet_trainer([callback]).fit(Plain(), DataLoader(AtOnce(), batch_size=None, sampler=batches), loaders()[1])
    plain = SGDInfluence("val_loss")
    quiet_trainer([plain]).fit(Plain(), *loaders(shuffle=False))
    assert np.array_equal(influences(callback), influences(plain))


def test_one_loader_in_a_dict_is_followed():
    class InDict(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    for keep in (True, False):
        callback = SGDInfluence("val_loss", keep_batches=keep)
        quiet_trainer([callback]).fit(InDict(), {"a": loaders()[0]}, loaders()[1])
        assert len(callback.ranking) == 23


class Stream(IterableDataset):
    def __iter__(self):
        return iter([TRAIN[i] for i in range(20)])


@pytest.mark.parametrize("workers", [0, 1])
def test_streams_are_followed_by_sample_ids_of_dict_batches(workers):
    class InDict(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step([batch["x"], batch["labels"]["y"], batch["index"]], batch_idx)

    def run(train, **options):
        pl.seed_everything(0, verbose=False)
        callback = SGDInfluence("val_loss", epochs="all", **options)
        quiet_trainer([callback]).fit(InDict(), train, loaders()[1])
        return callback

    options = {"batch_size": 5, "collate_fn": _dict_collate, "num_workers": workers}
    stream = run(DataLoader(Stream(), **options), sample_ids=lambda batch: batch["index"])
    table = run(DataLoader(Subset(TRAIN, range(20)), **options))
    assert np.array_equal(influences(stream), influences(table))
    assert stream.summary["batches"]["why"] == "they cannot be fetched again"


def test_a_stream_must_be_kept():
    trainer = quiet_trainer([SGDInfluence("val_loss", sample_ids=lambda batch: batch[2], keep_batches=False)])
    with pytest.raises(SampleIdError, match=r"Stream.*keep_batches=False"):
        trainer.fit(Plain(), DataLoader(Stream(), batch_size=5), loaders()[1])
    assert trainer.global_step == 0


class Souring(IterableDataset):
    def __iter__(self):
        return iter([(*TRAIN[i], i) for i in range(20)])


def test_a_stream_whose_later_batch_cannot_be_kept_ends_the_recording_but_not_the_training():
    def collate(items):
        batch = default_collate(items)
        return [*batch[:3], iter("a") if 15 in batch[3] else "sound"]

    class Taking(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:3], batch_idx)

    trainer = quiet_trainer([SGDInfluence("val_loss", sample_ids=lambda batch: batch[2])])
    train = DataLoader(Souring(), batch_size=5, collate_fn=collate)
    with (
        pytest.warns(SGDInfluenceWarning, match="Recording stopped at step 3, training goes on"),
        pytest.raises(UnsupportedTrainingError, match=r"holds a builtins\.str_ascii_iterator"),
    ):
        trainer.fit(Taking(), train, loaders()[1])
    assert trainer.global_step == 12
