# SPDX-License-Identifier: Apache-2.0
"""Data as people have them: random, counted, nested, padded, streamed; kept where they cannot be fetched again."""

import random
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, default_collate

from cases import TRAIN, Case, Plain, fit, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.errors import (
    ReplayMismatchError,
    RunDirectoryError,
    SampleIdError,
    SGDInfluenceWarning,
    UnsupportedTrainingError,
)
from lightning_sgdclean.store import Trajectory
from reference import assert_influence_is_the_derivative, influences, ranked

KEPT = "Training batches are kept as they were trained on"
LOST = "gone already"


class Wrapped(Dataset):
    def __init__(self, inner=TRAIN):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return self.inner[index]


class Augmented(Wrapped):
    """Noise from all three global generators."""

    def __getitem__(self, index):
        x, y, i = self.inner[index]
        return x + 0.3 * torch.randn(5) + 0.1 * random.random() + 0.1 * float(np.random.rand()), y, i


class OwnGenerator(Wrapped):
    """Noise from a generator that nobody can see or set."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def __getitem__(self, index):
        x, y, i = self.inner[index]
        return x + 0.3 * torch.randn(5, generator=self.generator), y, i


def noisy_collate(items):
    x, y, i = default_collate(items)
    return [x * (1 + 0.2 * torch.randn(len(x), 1)), y, i]


class Hooked(Plain):
    """Augments on the device, as the whole batch."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not self.trainer.training:
            return batch
        x, y, i = batch
        return [x + 0.2 * torch.randn_like(x), y, i]


AUGMENTED = {
    "dataset": {"train": Augmented()},
    "collate": {"loader": {"collate_fn": noisy_collate}},
    "hook": {"make": Hooked},
    "everywhere": {"train": Augmented(), "loader": {"collate_fn": noisy_collate}, "make": Hooked},
}
OPTIONS = {"options": {"momentum": 0.9}, "dropout": 0.2, "norm": True}


def augmented(name, workers):
    given = AUGMENTED[name]
    return Case(name, OPTIONS, **{**given, "loader": {**given.get("loader", {}), "num_workers": workers}})


@pytest.mark.filterwarnings(f"ignore:{KEPT}")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", AUGMENTED)
def test_influence_is_the_derivative_of_the_fit_with_random_augmentation(name, workers):
    """Declared, since the window is the whole training and workers' draws show only in the second epoch."""
    assert_influence_is_the_derivative(augmented(name, workers), keep_batches=True)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", AUGMENTED)
def test_random_augmentation_is_found_and_kept_by_the_second_epoch_and_replayed_to_the_last_bit(name, workers):
    callback = SGDInfluence("val_loss", epochs=2)  # of three
    with pytest.warns(SGDInfluenceWarning, match=rf"{KEPT}, since .*: \d+ B a batch times \d+ batches of the window"):
        fit(augmented(name, workers), callback)
    assert callback.summary["replay"]["batches"] == callback.summary["replay"]["batches_bit_for_bit"] == 10
    assert callback.summary["batches"]["kept"] >= 10
    declared = SGDInfluence("val_loss", epochs=2, keep_batches=True)
    fit(augmented(name, workers), declared)
    assert declared.summary["batches"] == {"kept": 15, "why": "keep_batches=True", "bytes": 15 * 280 - 3 * 2 * 56}
    assert np.array_equal(influences(callback), influences(declared))


@pytest.mark.parametrize("make", [{"train": Augmented()}, {"loader": {"collate_fn": noisy_collate}}, {"make": Hooked}])
def test_draws_in_this_process_are_known_at_the_second_batch_so_that_nothing_is_lost(make):
    callback = SGDInfluence("val_loss", epochs="all")
    with pytest.warns(SGDInfluenceWarning, match=f"{KEPT}, since random numbers were drawn") as warned:
        fit(Case("all", OPTIONS, {"max_epochs": 1}, **make), callback)
    assert not any(LOST in str(w.message) for w in warned)
    assert callback.summary["replay"]["batches_bit_for_bit"] == 5


def test_an_epoch_that_the_window_reaches_but_whose_batches_are_gone_is_said_at_once_and_refused_after_fit():
    seen = []

    class Noting(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(trainer.current_epoch)

    callback = SGDInfluence("val_loss", epochs="all")
    with (
        pytest.warns(
            SGDInfluenceWarning, match=f"in epoch 1 .*epoch 0, which the window reaches, are {LOST}.*start it"
        ),
        pytest.raises(ReplayMismatchError, match=r"epoch 0.*hold other data.*keep_batches=True"),
    ):
        quiet_trainer([callback, Noting()]).fit(Plain(), *loaders(OwnGenerator()))
    assert len(seen) == 15


def test_one_epoch_of_data_made_random_in_workers_is_refused_after_fit_unless_declared():
    case = Case("one", OPTIONS, {"max_epochs": 1}, {"num_workers": 2}, train=Augmented())
    with pytest.raises(ReplayMismatchError, match=r"Step 4 .epoch 0.*hold other data.*keep_batches=True"):
        fit(case, SGDInfluence("val_loss"))
    declared = SGDInfluence("val_loss", keep_batches=True)
    fit(case, declared)
    assert declared.summary["replay"]["batches_bit_for_bit"] == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_kept_and_refetched_batches_give_the_same_influences(workers):
    case = Case("fixed", OPTIONS, loader={"num_workers": workers})
    kept, fetched = ranked(case, keep_batches=True), ranked(case, keep_batches=False)
    assert np.array_equal(influences(kept), influences(fetched))
    assert (kept.summary["batches"]["kept"], fetched.summary["batches"]["kept"]) == (15, 0)


def test_deterministic_data_are_not_kept_beyond_the_batches_before_which_that_is_unknown():
    train = torch.utils.data.TensorDataset(*(column.repeat(20, *[1] * (column.ndim - 1)) for column in TRAIN.tensors))
    callback = SGDInfluence("val_loss", epochs="all")
    quiet_trainer([callback]).fit(Plain(), DataLoader(train, batch_size=20, shuffle=True), loaders()[1])
    steps = Trajectory(callback.run_dir / "trajectory").steps
    stored = [step.index for step in steps if step.micro[0].batch is not None]
    assert stored == [0, *range(23, 23 + 12)]  # 256 samples were seen again by then
    assert callback.summary["batches"] == {"kept": 0, "why": "", "bytes": 0}


def test_a_sampler_that_draws_for_each_batch_is_not_taken_for_augmentation_for_long():
    class Drawing:
        def __iter__(self):
            return ([random.randrange(23) for _ in range(64)] for _ in range(10))

        def __len__(self):
            return 10

    callback = SGDInfluence("val_loss")
    with pytest.warns(SGDInfluenceWarning, match="random numbers were drawn while a batch was loaded"):
        quiet_trainer([callback]).fit(Plain(), DataLoader(TRAIN, batch_sampler=Drawing()), loaders()[1])
    assert callback.summary["batches"]["kept"] < 8
    assert [step.micro[0].batch for step in Trajectory(callback.run_dir / "trajectory").steps] == [None] * 10


# Nothing is fetched during fit ------------------------------------------------------------------


class Counted(Wrapped):
    def __init__(self):
        super().__init__()
        self.fetched = []

    def __getitem__(self, index):
        self.fetched.append(index)
        return self.inner[index]


@pytest.mark.parametrize("options", [{}, {"keep_batches": True}, {"epochs": "all"}])
def test_nothing_is_fetched_from_the_dataset_while_training_lasts(options):
    def count(callback):
        train, at_end = Counted(), []

        class Ending(pl.Callback):
            def on_train_end(self, *_):
                at_end.append(list(train.fetched))

        torch.manual_seed(4)
        quiet_trainer([callback, Ending()] if callback else [Ending()]).fit(Plain(), *loaders(train))
        return at_end

    assert count(SGDInfluence("val_loss", **options)) == count(None)


class Once(Wrapped):
    """Hands out each epoch's samples from a generator, which cannot be asked again."""

    def __init__(self, num_epochs):
        super().__init__()
        self.source = (self.inner[i] for _ in range(num_epochs) for i in range(len(self.inner)))

    def __getitem__(self, index):
        return next(self.source)


def test_a_dataset_that_can_be_read_only_once_is_ranked_from_kept_batches_and_says_what_was_not_probed():
    callback = SGDInfluence("val_loss", keep_batches=True, epochs="all")
    with pytest.warns(SGDInfluenceWarning, match="keeps the samples in their order could not be found out.*StopIter"):
        quiet_trainer([callback]).fit(Plain(), *loaders(Once(3), shuffle=False))
    assert callback.summary["replay"]["batches_bit_for_bit"] == 15
    with pytest.raises(ReplayMismatchError, match=r"The dataset, asked again after training.*keep_batches=True"):
        quiet_trainer([SGDInfluence("val_loss", keep_batches=False)]).fit(Plain(), *loaders(Once(3), shuffle=False))


def test_collate_that_draws_from_a_generator_of_its_own_cannot_be_probed_and_says_so():
    own = torch.Generator().manual_seed(3)

    def collate(items):
        x, y, i = default_collate(items)
        return [x + torch.randn(x.shape, generator=own), y, i]

    with pytest.warns(SGDInfluenceWarning, match="Collated twice from the same random state"):
        quiet_trainer([SGDInfluence("val_loss", keep_batches=True)]).fit(Plain(), *loaders(collate_fn=collate))


# Shapes of batches ------------------------------------------------------------------------------


class Parts(NamedTuple):
    x: Any
    y: Any
    index: Any


def as_dict(x, y, i):
    return {"x": x, "labels": {"y": y, "name": [str(j) for j in i.tolist()]}, "index": i, "size": len(i)}


SHAPES = {
    "list": (lambda *columns: list(columns), lambda b: b),
    "dict": (as_dict, lambda b: [b["x"], b["labels"]["y"], b["index"]]),
    "named tuple": (Parts, lambda b: [b.x, b.y, b.index]),
}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_batches_of_any_shape_are_followed_whether_kept_or_fetched_again(name, keep):
    make, take = SHAPES[name]

    class Shaped(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(take(batch), batch_idx)

    shaped = Case(name, OPTIONS, loader={"collate_fn": lambda items: make(*default_collate(items))}, make=Shaped)
    found = ranked(shaped, keep_batches=keep)
    assert np.array_equal(influences(found), influences(ranked(Case("list", OPTIONS), keep_batches=keep)))


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


# Datasets, samplers, loaders ----------------------------------------------------------------------


def test_subsets_and_concatenations_are_followed_however_nested():
    nested = Subset(ConcatDataset([Subset(TRAIN, range(20, 10, -1)), ConcatDataset([TRAIN, TRAIN])]), range(3, 26))
    numbered = Numbered(nested)
    assert_influence_is_the_derivative(Case("nested", OPTIONS, train=numbered))
    callback = SGDInfluence("val_loss")
    fit(Case("nested", OPTIONS, train=numbered), callback)
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


def test_one_loader_in_a_dict_is_followed_and_several_are_refused_before_training():
    class InDict(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    for keep in (True, False):
        callback = SGDInfluence("val_loss", keep_batches=keep)
        quiet_trainer([callback]).fit(InDict(), {"a": loaders()[0]}, loaders()[1])
        assert len(callback.ranking) == 23
    trainer = quiet_trainer([SGDInfluence("val_loss", sample_ids=lambda batch: batch["a"][2])])
    with pytest.raises(UnsupportedTrainingError, match=r"2 training loaders.*one loader.*dataset.*pairs"):
        trainer.fit(InDict(), {"a": loaders()[0], "b": loaders()[0]}, loaders()[1])
    assert trainer.global_step == 0


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


# Budget ---------------------------------------------------------------------------------------------


def test_batches_that_would_not_fit_the_disk_are_refused_with_the_numbers(monkeypatch):
    usage = SimpleNamespace(total=10**6, used=10**6 - 3000, free=3000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    trainer = quiet_trainer([SGDInfluence("val_loss", keep_batches=True, epochs="all")])
    with pytest.raises(
        RunDirectoryError,
        match=r"would have to be kept.*280 B a batch times 15 batches of the window, 4\.2 kB, of 3 kB free",
    ):
        trainer.fit(Plain(), *loaders())
    assert trainer.global_step == 0
    with (
        pytest.warns(SGDInfluenceWarning, match=r"4\.2 kB, of 3 kB free\. So they are not kept"),
        pytest.raises(ReplayMismatchError, match="hold other data"),
    ):
        quiet_trainer([SGDInfluence("val_loss", epochs="all")]).fit(Plain(), *loaders(Augmented()))


def test_a_nonsensical_choice_is_refused_at_once():
    with pytest.raises(ValueError, match="keep_batches must be True, False"):
        SGDInfluence("val_loss", keep_batches="always")
