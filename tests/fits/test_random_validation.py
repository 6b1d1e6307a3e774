# SPDX-License-Identifier: Apache-2.0
"""Validation that draws random numbers: the objective is the mean that was logged, with the very numbers of then.

The truth is what other fits log, which draw the same numbers, since they begin with the same seed.
"""

import json
import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

from cases import TRAIN, VAL, Case, Plain, fit, quiet_trainer
from lightning_sgdclean import SGDInfluence, counterfactual, retrace
from lightning_sgdclean.base.errors import ReplayMismatchError
from reference import assert_derivative, influences, one_hot

CURVED = {"options": {"momentum": 0.5}}


class Noisy(Plain):
    """Draws in training and in validation, and keeps what it last logged."""

    def __init__(self, **options):
        super().__init__(**options)
        self.parts = []

    def loss(self, batch, reduction="mean"):
        x, *rest = batch
        noise = torch.rand(len(x), 1).to(x) * torch.randn_like(x) + 0.1 * random.random() + 0.1 * np.random.rand()
        return super().loss([x + noise, *rest], reduction)

    def on_validation_start(self):
        self.parts = []

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.parts.append((len(batch[0]), loss.detach()))
        self.log("val_loss", loss)

    @property
    def logged(self):
        return float(sum(num * loss for num, loss in self.parts)) / sum(num for num, _ in self.parts)


class Shown(Noisy):
    """Draws nothing itself."""

    loss = Plain.loss


def masked(items):
    x, y, number = default_collate(items)
    return [x * (torch.rand(x.shape) < 0.7), y, number]


class Masked(TensorDataset):
    def __getitem__(self, index):
        x, y, number = super().__getitem__(index)
        return x * torch.from_numpy((np.random.rand(5) < 0.7).astype("float32")), y, number


def val_loader(kind):
    if kind == "dataset":
        return DataLoader(Masked(*VAL.tensors), batch_size=4)
    return DataLoader(VAL, batch_size=4, collate_fn=masked if kind == "collate" else None, shuffle=kind == "order")


MAKES = {"step": Noisy, "collate": Shown, "dataset": Shown, "order": Noisy}


def trained(kind, callback=None, weights=None, **trainer):
    pl.seed_everything(1, verbose=False)
    module = MAKES[kind](**CURVED)
    module.sample_weights = weights
    loader = DataLoader(TRAIN, batch_size=5, shuffle=True)
    callbacks = [callback] if callback else []
    quiet_trainer([*callbacks, *trainer.pop("callbacks", ())], max_epochs=2, **trainer).fit(
        module, loader, val_loader(kind)
    )
    return module


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
@pytest.mark.parametrize("kind", MAKES)
def test_the_influence_is_the_derivative_of_what_was_logged(kind, tmp_path):
    callback = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "run")
    module = trained(kind, callback)
    about = callback.summary["objective"]
    assert about["recomputed"] == pytest.approx(about["logged"], rel=1e-6)
    assert about["recomputed"] == pytest.approx(module.logged, rel=1e-13)
    assert_derivative(influences(callback), lambda weights: trained(kind, weights=weights).logged)
    torch.rand(7)
    again = retrace(
        callback.run_dir,
        MAKES[kind](**CURVED),
        train_dataloaders=DataLoader(TRAIN, batch_size=5, shuffle=True),
        val_dataloaders=val_loader(kind),
        epochs="all",
    )
    assert np.array_equal(again.influence, callback.ranking.influence)


def test_runs_without_a_sample_draw_what_the_whole_run_did(tmp_path):
    callback = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "run", verify=2)
    whole = trained("step", callback).logged
    ids = [3, 11]
    truth = [trained("step", weights=1 - one_hot(i)).logged - whole for i in ids]
    real = callback.ranking.columns["real"]
    assert np.isfinite(real).sum() == 2
    for batched in (False, True):
        found = counterfactual(
            callback.run_dir,
            Noisy(**CURVED),
            without=ids,
            train_dataloaders=DataLoader(TRAIN, batch_size=5, shuffle=True),
            val_dataloaders=val_loader("step"),
            epochs="all",
            batched=batched,
        )
        assert found.whole == pytest.approx(whole, rel=1e-12)
        assert found.differences == pytest.approx(truth, rel=1e-7)
    for number in np.flatnonzero(np.isfinite(real)):
        without = trained("step", weights=1 - one_hot(callback.ranking.sample_id[number])).logged
        assert real[number] == pytest.approx(without - whole, rel=1e-7)


def test_at_the_best_model_the_numbers_are_those_of_its_validation(tmp_path):
    saving = pl.callbacks.ModelCheckpoint(tmp_path, monitor="train_loss", mode="max")
    trainer = {"enable_checkpointing": True, "val_check_interval": 2, "callbacks": [saving]}
    callback = SGDInfluence("val_loss", epochs="all", at="best", dirpath=tmp_path / "run")
    trained("step", callback, **trainer)
    about = callback.summary["objective"]
    assert callback.summary["window"]["last_step"] < 9  # the best is not the last
    assert about["logged"] is not None
    assert about["recomputed"] == pytest.approx(about["logged"], rel=1e-6)
    ending = json.loads((callback.run_dir / "trajectory" / "ending.json").read_text())
    assert len(ending["random"]) <= 2  # end points only


def test_several_objectives_draw_the_same(tmp_path):
    def whole(module, batch):
        return module.loss(batch)

    def twice(module, batch):
        return 2 * module.loss(batch)

    both = SGDInfluence(objective={"whole": whole, "twice": twice}, epochs="all", dirpath=tmp_path / "run")
    module = trained("step", both)
    assert both.summary["objective"]["recomputed"] == pytest.approx(module.logged, rel=1e-13)
    assert both.ranking.columns["influence:twice"] == pytest.approx(2 * both.ranking.influence, rel=1e-9)


def test_where_the_fit_did_not_validate_the_numbers_are_always_the_same(tmp_path):
    callback = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "run")
    trained("step", callback, max_steps=7)
    assert callback.summary["objective"]["logged"] is None
    again = retrace(
        callback.run_dir,
        Noisy(**CURVED),
        train_dataloaders=DataLoader(TRAIN, batch_size=5, shuffle=True),
        val_dataloaders=val_loader("step"),
        epochs="all",
    )
    assert np.array_equal(again.influence, callback.ranking.influence)


def test_a_validation_that_draws_nothing_leaves_nothing(tmp_path):
    callback = SGDInfluence("val_loss", dirpath=tmp_path / "run")
    fit(Case("plain"), callback)
    assert "random" not in json.loads((tmp_path / "run" / "trajectory" / "ending.json").read_text())


def test_numbers_that_workers_drew_cannot_be_had_again(tmp_path):
    loader = DataLoader(VAL, batch_size=4, collate_fn=masked, num_workers=1)
    callback = SGDInfluence("val_loss", dirpath=tmp_path / "run")
    with pytest.raises(ReplayMismatchError, match="Likely causes: validation data that workers make random"):
        quiet_trainer([callback], max_epochs=1).fit(Plain(), DataLoader(TRAIN, batch_size=5), loader)
