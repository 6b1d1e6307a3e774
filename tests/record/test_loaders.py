# SPDX-License-Identifier: Apache-2.0
"""The training loader is the one that the fit loop draws from, whatever tuners prepare besides."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder
from pytorch_lightning.tuner import Tuner
from torch.utils.data import DataLoader

from cases import TRAIN, VAL, Plain, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.data.samplers import NotingSampler

NUM_TRAIN = len(TRAIN)


class Tuned(Plain):
    """Brings its own loaders, whose batches are as large as a tuner says."""

    def __init__(self):
        super().__init__(options={"momentum": 0.9})
        self.batch_size, self.lr, self.made = 2, 0.05, []

    def train_dataloader(self):
        self.made.append(DataLoader(TRAIN, self.batch_size, shuffle=True))
        return self.made[-1]

    def val_dataloader(self):
        self.made.append(DataLoader(VAL, 4))
        return self.made[-1]

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.param_groups[0]["lr"] = self.lr
        return optimizer


def size_finder(mode="power"):
    return BatchSizeFinder(mode=mode, init_val=2, max_trials=2, steps_per_trial=2)


def rate_finder():
    return LearningRateFinder(min_lr=1e-3, max_lr=0.1, num_training_steps=8)


def both():
    return [size_finder(), rate_finder()]


def trained(tuners, callback, is_first, tmp_path, tune=lambda trainer, module: None):
    pl.seed_everything(1, verbose=False)
    module = Tuned()
    own = [callback] if callback else []
    callbacks = [*own, *tuners()] if is_first else [*tuners(), *own]
    trainer = quiet_trainer(callbacks, default_root_dir=tmp_path, max_epochs=2)
    tune(trainer, module)
    trainer.fit(module)
    return module


TUNERS = {
    "batch size": lambda: [size_finder()],
    "binary search": lambda: [size_finder("binsearch")],
    "learning rate": lambda: [rate_finder()],
    "both": both,
}


def assert_ranked_as_trained(trained_with, callback, plain):
    assert all(torch.equal(a, b) for a, b in zip(trained_with.parameters(), plain.parameters(), strict=True))
    assert (trained_with.batch_size, trained_with.lr) == (plain.batch_size, plain.lr)
    assert sorted(callback.ranking.sample_id.tolist()) == list(range(NUM_TRAIN))
    assert callback.summary["window"]["num_steps"] == 2 * -(-NUM_TRAIN // plain.batch_size)
    assert [type(loader.dataset) for loader in callback._loaders.loaders] == [type(TRAIN)]
    assert callback._loaders.loaders[0].dataset is TRAIN
    assert callback._loaders.loaders[0].batch_size == plain.batch_size
    samplers = [loader.batch_sampler for loader in trained_with.made]
    assert not any(isinstance(sampler, NotingSampler) for sampler in samplers)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Checkpoint directory")
@pytest.mark.parametrize(
    ("name", "is_first"), [("batch size", False), ("binary search", True), ("learning rate", False), ("both", True)]
)
def test_trainings_beside_tuning_callbacks_are_ranked_and_left_alone(name, is_first, tmp_path):
    tuners = TUNERS[name]
    callback = SGDInfluence(epochs="all", verify=0)
    module = trained(tuners, callback, is_first, tmp_path)
    assert_ranked_as_trained(module, callback, trained(tuners, None, is_first, tmp_path))


TUNINGS = {
    "batch size": lambda trainer, module: Tuner(trainer).scale_batch_size(
        module, init_val=2, max_trials=2, steps_per_trial=2
    ),
    "learning rate": lambda trainer, module: Tuner(trainer).lr_find(module, min_lr=1e-3, max_lr=0.1, num_training=8),
}


@pytest.mark.parametrize("tune", TUNINGS.values(), ids=TUNINGS)
def test_trainings_behind_a_tuner_are_ranked_in_the_directory_that_was_asked_for(tune, tmp_path):
    callback = SGDInfluence(epochs="all", verify=0, dirpath=tmp_path / "run")
    module = trained(list, callback, True, tmp_path, tune)
    assert_ranked_as_trained(module, callback, trained(list, None, True, tmp_path, tune))
    assert callback.run_dir == tmp_path / "run"


def test_a_loader_made_before_the_callback_is_set_up_is_refused(tmp_path):
    class Early(pl.LightningDataModule):
        def setup(self, stage):
            _ = self.trainer.estimated_stepping_batches

        def train_dataloader(self):
            return DataLoader(TRAIN, 5)

        def val_dataloader(self):
            return DataLoader(VAL, 4)

    from lightning_sgdclean.base.errors import SampleIdError

    with pytest.raises(SampleIdError, match="made before this callback was set up"):
        quiet_trainer([SGDInfluence()], default_root_dir=tmp_path).fit(Plain(), Early())
