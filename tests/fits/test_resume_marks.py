# SPDX-License-Identifier: Apache-2.0
"""What a fit that goes on knows of the one before it: where it lies, what it took, and what it had found out."""

import shutil
from collections import namedtuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from cases import TRAIN, VAL, Case, Plain, adam, fit, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence, retrace
from lightning_sgdclean.base.errors import BudgetError, NonFiniteError, RunDirectoryError, SGDInfluenceWarning
from lightning_sgdclean.trajectory.live_state import current_state, trained_parameters
from lightning_sgdclean.trajectory.store import Trajectory
from lightning_sgdclean.trajectory.writer import TrajectoryWriter


class Order(Sampler):
    """A function of the epoch, from any batch of it on."""

    def __init__(self):
        self.epoch = self.done = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(len(TRAIN), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        done, self.done = self.done, 0
        return iter(order[5 * done :])

    def __len__(self):
        return len(TRAIN)


class Stateful(DataLoader):
    """A loader that a checkpoint remembers the place of within an epoch."""

    def __iter__(self):
        self.at = self.sampler.done
        for batch in super().__iter__():
            self.at += 1
            yield batch

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.sampler.done = state["at"] % 5


class Stop(pl.Callback):
    """A power cut once so many steps were made, behind a batch or before one."""

    def __init__(self, step, behind=False):
        self.step, self.behind = step, behind

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step and not self.behind:
            raise OSError("power cut")

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and self.behind:
            raise OSError("power cut")


def train(folder, callbacks=(), ckpt_path=None, max_epochs=4, data=None, module=None, every=7, **options):
    pl.seed_everything(1, verbose=False)
    options = {"epochs": "all", "snapshots": 4, "dirpath": folder / "run", **options}
    if data is None or isinstance(data, Stateful):  # whose own __iter__ could do anything with its batches
        options["sample_ids"] = lambda batch: batch[2]
    callback = SGDInfluence("val_loss", **options)
    saving = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    settings = {"max_epochs": max_epochs, "precision": "32-true", "enable_checkpointing": True}
    trainer = quiet_trainer([callback, saving, *callbacks], **settings)
    data = data or Stateful(TRAIN, batch_size=5, sampler=Order())
    trainer.fit(module or Plain(adam, norm=True), data, DataLoader(VAL, batch_size=4), ckpt_path=ckpt_path)
    return callback


def cut_short(folder, step, behind=False, callbacks=(), **options):
    with pytest.raises(OSError, match="power cut"):
        train(folder, [*callbacks, Stop(step, behind)], **options)


def assert_same(one, other):
    assert np.array_equal(one.ranking.sample_id, other.ranking.sample_id)
    assert np.array_equal(one.ranking.influence, other.ranking.influence)


def test_gone_on_within_an_epoch_it_is_ranked_as_an_uninterrupted_one_to_the_last_bit(tmp_path):
    cut_short(tmp_path / "cut", 10)
    resumed = train(tmp_path / "cut", ckpt_path=tmp_path / "cut" / "step=7.ckpt")
    assert resumed.summary["window"]["words"] == "steps 0 to 19: epochs 0 to 3"
    assert_same(resumed, train(tmp_path / "whole"))


def test_a_checkpoint_of_an_exception_leads_back_to_the_steps_before_it(tmp_path):
    class OnException(pl.callbacks.ModelCheckpoint):
        """Beside the one that saves every few steps, whose state has another name."""

    def saving():
        return OnException(tmp_path, filename="end", save_on_exception=True, every_n_epochs=100)

    cut_short(tmp_path, 8, behind=True, callbacks=[saving()])
    (checkpoint,) = (path for path in tmp_path.glob("*end*.ckpt"))
    resumed = train(tmp_path, [saving()], ckpt_path=checkpoint)
    assert resumed.summary["window"]["words"] == "steps 0 to 19: epochs 0 to 3"
    assert_same(resumed, train(tmp_path / "whole"))


def test_a_checkpoint_written_after_the_fit_leads_back_to_its_steps_whatever_the_callback_is_asked_next(tmp_path):
    trainer = quiet_trainer([SGDInfluence("val_loss", epochs="all")], max_epochs=2, default_root_dir=tmp_path)
    module = Plain()
    trainer.fit(module, *loaders())
    trainer.validate(module, loaders()[1], verbose=False)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    callback = SGDInfluence("val_loss", epochs="all", curvature="finite")
    trainer = quiet_trainer([callback], max_epochs=3, default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        trainer.fit(Plain(), *loaders(), ckpt_path=tmp_path / "after.ckpt")
    assert callback.summary["window"]["words"] == "steps 0 to 14: epochs 0 to 2"


def test_a_fit_that_goes_on_from_unrecorded_steps_says_so_and_its_window_is_called_short(tmp_path):
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    trainer = quiet_trainer([saving], max_epochs=2, precision="32-true", enable_checkpointing=True)
    data = Stateful(TRAIN, batch_size=5, sampler=Order())
    trainer.fit(Plain(adam, norm=True), data, DataLoader(VAL, batch_size=4))
    with (
        pytest.warns(
            SGDInfluenceWarning, match="goes on from step 7, but what it goes on from names no recorded steps"
        ),
        pytest.warns(SGDInfluenceWarning, match="begins with step 7, inside epoch 1; the window of epochs='all' would"),
    ):
        callback = train(tmp_path, ckpt_path=tmp_path / "step=7.ckpt", max_epochs=3)
    given = {"train_dataloaders": data, "val_dataloaders": DataLoader(VAL, batch_size=4)}
    with pytest.raises(
        RunDirectoryError, match="begins with step 7, inside epoch 1; the window of epochs=2 would begin"
    ):
        retrace(callback.run_dir, Plain(adam, norm=True), epochs=2, **given)
    assert retrace(callback.run_dir, Plain(adam, norm=True), epochs=1, **given).visits.sum() == len(TRAIN)


def test_a_run_trained_to_its_end_is_left_alone_though_its_retrace_failed(tmp_path):
    with pytest.raises(NonFiniteError):
        train(tmp_path, objective=lambda module, batch: module.loss(batch) * float("nan"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with (
        pytest.warns(SGDInfluenceWarning, match="already holds a run"),
        pytest.raises(RunDirectoryError, match="already holds a run"),
    ):
        train(tmp_path, ckpt_path=tmp_path / "step=7.ckpt")
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"), pytest.raises(BudgetError):
        train(tmp_path, ckpt_path=tmp_path / "step=7.ckpt", dirpath=tmp_path / "next", max_bytes=1000)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


class Noisy(Dataset):
    def __len__(self):
        return len(TRAIN)

    def __getitem__(self, index):
        x, y, name = TRAIN[index]
        return x + 0.1 * torch.randn(5), y, name


def test_data_known_to_be_random_are_kept_from_the_first_batch_on_when_the_fit_goes_on(tmp_path):
    """Drawn in workers: that they are random shows only when samples are drawn a second time."""

    def data():
        return DataLoader(Noisy(), batch_size=5, shuffle=True, num_workers=1)

    options = {"epochs": 1, "module": Plain(), "every": 5}
    with pytest.warns(SGDInfluenceWarning, match="holds other data"):
        cut_short(tmp_path, 17, data=data(), **options)
    with pytest.warns(SGDInfluenceWarning, match="holds other data"):
        callback = train(tmp_path, ckpt_path=tmp_path / "step=15.ckpt", data=data(), **options)
    assert callback.summary["window"]["words"] == "steps 15 to 19: epoch 3"
    assert callback.summary["batches"]["kept"] == 5


def test_what_a_run_has_on_disk_is_not_asked_for_again_when_it_goes_on(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    total = 220_000

    def disk_usage(folder):
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return usage(total, used, total - used)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    cut_short(tmp_path, 19, snapshots="every")
    assert train(tmp_path, ckpt_path=tmp_path / "step=14.ckpt", snapshots="every").summary["window"]["num_steps"] == 20


@pytest.mark.parametrize("harm", ["gone", "another fit's"])
def test_an_ending_that_is_gone_or_that_of_another_fit_is_refused_by_name(tmp_path, harm):
    for name in ("one", "other"):
        case = Case("limited", trainer={"limit_val_batches": 2})
        fit(case, SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / name))
    ending = tmp_path / "one" / "trajectory" / "ending.json"
    ending.unlink()
    if harm != "gone":
        shutil.copy(tmp_path / "other" / "trajectory" / "ending.json", ending)
    train_loader, val_loader = loaders()
    with pytest.raises(
        RunDirectoryError, match=r"ending.json (is missing|belongs to another run|is that of another fit)"
    ):
        retrace(tmp_path / "one", Plain(), train_dataloaders=train_loader, val_dataloaders=val_loader, epochs="all")


def test_a_run_killed_before_its_first_segment_is_said_to_hold_no_step(tmp_path):
    module = Plain()
    optimizer = module.configure_optimizers()
    trained = {"precision": "64-true", "device": "cpu", "optimizer": "torch.optim.sgd.SGD"}
    writer = TrajectoryWriter(tmp_path / "trajectory", trained=trained)
    writer.begin(current_state(module, trained_parameters(module, optimizer), optimizer))
    writer.flush()
    assert Trajectory(tmp_path / "trajectory").steps == []
    train_loader, val_loader = loaders()
    with pytest.raises(RunDirectoryError, match="holds no step: its training made none, or was killed"):
        retrace(tmp_path, module, train_dataloaders=train_loader, val_dataloaders=val_loader)
