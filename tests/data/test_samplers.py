# SPDX-License-Identifier: Apache-2.0
"""The ids of every batch, against a dataset that returns its own index."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, WeightedRandomSampler

from cases import TRAIN, Case, Plain, Remembering, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.data.samplers import NotingSampler, note_samples, stop_noting
from lightning_sgdclean.trajectory.store import Trajectory
from reference import ranked

LOADERS = {
    "shuffled": lambda: DataLoader(TRAIN, batch_size=5, shuffle=True),
    "two workers": lambda: DataLoader(TRAIN, batch_size=5, shuffle=True, num_workers=2),
    "persistent": lambda: DataLoader(TRAIN, batch_size=5, shuffle=True, num_workers=2, persistent_workers=True),
    "weighted": lambda: DataLoader(TRAIN, batch_size=4, sampler=WeightedRandomSampler(torch.rand(23), 30)),
    "drop last": lambda: DataLoader(TRAIN, batch_size=4, shuffle=True, drop_last=True),
}


@pytest.mark.parametrize("name", LOADERS)
def test_recorded_ids_are_those_of_the_samples_trained_on(name):
    module, callback = Remembering(), SGDInfluence("val_loss", epochs="all")
    quiet_trainer([callback], val_check_interval=2).fit(module, LOADERS[name](), loaders()[1])
    steps = Trajectory(callback.run_dir / "trajectory").steps
    assert [step.micro[0].ids for step in steps] == module.order


def test_reloaded_loaders_are_followed():
    class Reloading(Remembering):
        def train_dataloader(self):
            return DataLoader(TRAIN, batch_size=5, shuffle=True)

        def val_dataloader(self):
            return loaders()[1]

    module, callback = Reloading(), SGDInfluence("val_loss", epochs="all")
    quiet_trainer([callback], reload_dataloaders_every_n_epochs=1).fit(module)
    assert [step.micro[0].ids for step in Trajectory(callback.run_dir / "trajectory").steps] == module.order


def test_ids_of_a_subset_are_positions_in_the_subset_that_was_given():
    subset = Subset(ConcatDataset([TRAIN, TRAIN]), list(range(40, 28, -1)))
    callback = SGDInfluence("val_loss")
    quiet_trainer([callback]).fit(Plain(), DataLoader(subset, batch_size=4), loaders()[1])
    assert sorted(callback.ranking.sample_id) == list(range(12))
    kept = callback.ranking.keep(subset, drop=3)
    assert len(kept) == 9


def test_a_sampler_that_draws_in_iter_draws_as_it_would_alone():
    torch.manual_seed(0)
    loader = DataLoader(TRAIN, batch_size=5, shuffle=True)
    plain = [batch[2].tolist() for batch in loader]
    torch.manual_seed(0)
    noting = note_samples(loader)
    assert note_samples(loader) is noting
    assert [batch[2].tolist() for batch in loader] == plain
    assert [noting.next_positions() for _ in plain] == plain
    assert len(loader) == 5
    stop_noting(loader)
    assert not isinstance(loader.batch_sampler, NotingSampler)


class LookingAround(pl.Callback):
    """Goes through the training loader while it is in use, as a callback that plots samples may."""

    def __init__(self, hook, whole):
        def look(trainer, *_):
            state = torch.get_rng_state()
            for _ in trainer.train_dataloader:
                if not whole:
                    break
            torch.set_rng_state(state)

        setattr(self, hook, look)


LOADERS_LOOKED_AT = {"even": {"drop_last": True}, "worker": {"num_workers": 1}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The rankings where nobody else goes through the loader."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {
        name: ranked(Case("alone", {}, {"max_epochs": 2}, loader), dirpath=folder / name).ranking
        for name, loader in LOADERS_LOOKED_AT.items()
    }


@pytest.mark.parametrize(
    ("hook", "whole", "loader"),
    [
        ("on_train_start", False, "even"),
        ("on_train_start", True, "worker"),
        ("on_train_batch_end", False, "worker"),
        ("on_train_batch_end", True, "even"),
        ("on_train_epoch_start", False, "even"),
        ("on_train_epoch_start", True, "worker"),
    ],
)
def test_somebody_else_who_goes_through_the_loader_changes_no_ids(undisturbed, hook, whole, loader):
    callbacks = {"callbacks": lambda: [LookingAround(hook, whole)]}
    looked = ranked(Case("watched", {}, {"max_epochs": 2}, LOADERS_LOOKED_AT[loader], **callbacks))
    assert looked.ranking == undisturbed[loader]
