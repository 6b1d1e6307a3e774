# SPDX-License-Identifier: Apache-2.0
"""Random data: found, kept and followed, or refused; nothing is fetched from the dataset meanwhile."""

import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, default_collate

from cases import TRAIN, Case, Plain, fit, loaders, quiet_trainer
from datasets import KEPT, LOST, OPTIONS, Augmented, Hooked, OwnGenerator, Wrapped, noisy_collate
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import BudgetError, LossSplitError, ReplayMismatchError, SGDInfluenceWarning
from lightning_sgdclean.trajectory.store import Trajectory
from reference import assert_influence_is_the_derivative, influences, ranked

AUGMENTED = {
    "dataset": {"train": Augmented()},
    "collate": {"loader": {"collate_fn": noisy_collate}},
    "hook": {"make": Hooked},
    "everywhere": {"train": Augmented(), "loader": {"collate_fn": noisy_collate}, "make": Hooked},
}


def augmented(name, workers):
    given = AUGMENTED[name]
    return Case(name, OPTIONS, **{**given, "loader": {**given.get("loader", {}), "num_workers": workers}})


@pytest.mark.filterwarnings(f"ignore:{KEPT}")
@pytest.mark.parametrize(("name", "workers"), [("dataset", 0), ("collate", 2), ("hook", 0), ("everywhere", 2)])
def test_influence_is_the_derivative_of_the_fit_with_random_augmentation(name, workers):
    """Declared, since the window is the whole training and workers' draws show only in the second epoch."""
    assert_influence_is_the_derivative(augmented(name, workers), keep_batches=True)


@pytest.mark.parametrize(("name", "workers"), [("dataset", 2), ("collate", 0), ("hook", 2), ("everywhere", 0)])
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


def test_kept_and_refetched_batches_give_the_same_influences():
    """In workers; tests/fits/test_data.py has the same without them."""
    case = Case("fixed", OPTIONS, loader={"num_workers": 2})
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

        class FitEnd(pl.Callback):
            def on_train_end(self, *_):
                at_end.append(list(train.fetched))

        torch.manual_seed(4)
        quiet_trainer([callback, FitEnd()] if callback else [FitEnd()]).fit(Plain(), *loaders(train))
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


def test_collate_that_reorders_random_data_is_found_all_the_same():
    def by_first_feature(items):
        return noisy_collate(sorted(items, key=lambda item: float(item[0][0])))

    callback = SGDInfluence("val_loss", keep_batches=True)
    with pytest.raises(LossSplitError, match="collating swapped samples"):
        quiet_trainer([callback]).fit(Plain(), *loaders(Augmented(), collate_fn=by_first_feature))


def test_collate_that_sorts_pairs_is_found_though_half_of_them_come_sorted():
    def by_first_feature(items):
        return default_collate(sorted(items, key=lambda item: float(item[0][0])))

    callback = SGDInfluence("val_loss", keep_batches=True)
    with pytest.raises(LossSplitError, match="collating swapped samples"):
        quiet_trainer([callback]).fit(Plain(), *loaders(batch_size=2, collate_fn=by_first_feature))


@pytest.mark.parametrize("snapshots", ["sqrt", 2])
def test_kept_batches_serve_between_snapshots(snapshots):
    case = augmented("everywhere", 0)
    every, few = ranked(case, keep_batches=True), ranked(case, keep_batches=True, snapshots=snapshots)
    assert np.array_equal(influences(every), influences(few))


class Mirrored(Wrapped):
    """Flips by a coin, so that two fetches may agree."""

    def __getitem__(self, index):
        x, y, i = self.inner[index]
        return x.flip(0) if torch.rand(()) < 0.5 else x, y, i


def test_flips_by_a_coin_are_followed_where_loaders_are_made_anew():
    class Reloading(Plain):
        def train_dataloader(self):
            return DataLoader(Mirrored(), batch_size=5, shuffle=True)

        def val_dataloader(self):
            return loaders()[1]

    callback = SGDInfluence("val_loss", epochs="all")
    with pytest.warns(SGDInfluenceWarning, match=KEPT):
        quiet_trainer([callback], reload_dataloaders_every_n_epochs=1).fit(Reloading())
    assert callback.summary["replay"]["batches_bit_for_bit"] == 15


def test_collate_that_draws_from_a_generator_of_its_own_cannot_be_probed_and_says_so():
    own = torch.Generator().manual_seed(3)

    def collate(items):
        x, y, i = default_collate(items)
        return [x + torch.randn(x.shape, generator=own), y, i]

    with pytest.warns(SGDInfluenceWarning, match="Collated twice from the same random state"):
        quiet_trainer([SGDInfluence("val_loss", keep_batches=True)]).fit(Plain(), *loaders(collate_fn=collate))


def equip(worker):
    info = torch.utils.data.get_worker_info()
    info.dataset.rng = np.random.default_rng([info.seed % 1000, worker])


class Equipped(Wrapped):
    """Works in workers only, with generators of their own."""

    rng = None

    def __getitem__(self, index):
        x, y, i = self.inner[index]
        return x + 0.3 * torch.from_numpy(self.rng.standard_normal(5)), y, i


def test_what_only_workers_can_make_is_ranked_from_kept_batches():
    case = Case("own", OPTIONS, {}, {"num_workers": 2, "worker_init_fn": equip}, train=Equipped())
    with pytest.warns(SGDInfluenceWarning, match="order could not be found out.*NoneType.*standard_normal"):
        assert_influence_is_the_derivative(case, keep_batches=True)
    with (
        pytest.warns(SGDInfluenceWarning, match=f"in epoch 1 than.*{LOST}"),
        pytest.raises(ReplayMismatchError, match=r"The dataset, asked again.*keep_batches=True"),
    ):
        ranked(case)


def test_a_batch_changed_between_its_keeping_and_its_training_is_found_early_and_named():
    class Mixing(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            batch[0].add_(torch.randn_like(batch[0]))

    trainer = quiet_trainer([SGDInfluence("val_loss", keep_batches=True)])
    with pytest.raises(ReplayMismatchError, match=r"Step 0.*the batch .*: Mixing.on_train_batch_start"):
        trainer.fit(Mixing(), *loaders())
    assert trainer.global_step <= 2


def test_batches_that_would_not_fit_the_disk_are_refused_with_the_numbers(monkeypatch):
    def disk_fills_up():
        """There was room for the trajectory when it was planned, 132,480 bytes, but not for batches besides."""
        free = iter([10**9])
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free, 132_480 + 3000)))

    disk_fills_up()
    trainer = quiet_trainer([SGDInfluence("val_loss", keep_batches=True, epochs="all")])
    with pytest.raises(
        BudgetError,
        match=r"have to be kept.*280 B a batch times 15 batches of the window, 4\.2 kB, of 3 kB that may be taken",
    ):
        trainer.fit(Plain(), *loaders())
    assert trainer.global_step == 0
    disk_fills_up()
    with (
        pytest.warns(SGDInfluenceWarning, match=r"4\.2 kB, of 3 kB that may be taken\. So they are not kept"),
        pytest.raises(ReplayMismatchError, match="hold other data"),
    ):
        quiet_trainer([SGDInfluence("val_loss", epochs="all")]).fit(Plain(), *loaders(Augmented()))


def test_a_nonsensical_choice_is_refused_at_once():
    with pytest.raises(ValueError, match="keep_batches must be True, False"):
        SGDInfluence("val_loss", keep_batches="always")
