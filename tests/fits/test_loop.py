# SPDX-License-Identifier: Apache-2.0
"""Everything around the loss: schedules, endings, skipped steps, several fits, other callbacks."""

import gc
import time
import weakref
from contextlib import nullcontext
from datetime import timedelta

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch.optim import lr_scheduler

from cases import NUM_TRAIN, TRAIN, Case, Plain, Scaling, adam, adamw, fit, loaders, objective, quiet_trainer, scaled
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import SampleIdError, SGDInfluenceWarning, UnsupportedTrainingError
from reference import assert_derivative, assert_influence_is_the_derivative, influences, ranked


class Scheduled(Plain):
    """With any scheduler of torch's."""

    def __init__(self, schedule, interval="step", **options):
        super().__init__(**options)
        self.schedule, self.interval = schedule, interval

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = {"scheduler": self.schedule(optimizer), "interval": self.interval, "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class WarmingUp(Plain):
    """Sets the learning rate by hand, where Lightning's documentation does."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min((self.trainer.global_step + 1) / 4, 1.0)
        optimizer.step(closure=optimizer_closure)


class Clipping(Plain):
    """Does what ``configure_gradient_clipping`` does without it."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=16, cycle_momentum=True)


def stop_at(step, batch_idx=None):
    """A callback that ends training behind that step, or within the accumulation that follows it."""

    def look(trainer, module, outputs, batch, number):
        trainer.should_stop = trainer.global_step == step and (batch_idx is None or number == batch_idx)

    return lambda: [LambdaCallback(on_train_batch_end=look)]


MOMENTUM = {"options": {"momentum": 0.9}}
STOPPED_WITHIN_AN_ACCUMULATION = Case(
    "stopped within an accumulation",
    {"norm": True, **MOMENTUM},
    {"accumulate_grad_batches": 2},
    callbacks=stop_at(4, batch_idx=2),
)
CASES = [
    Case(
        "schedule per epoch",
        {"schedule": lambda o: lr_scheduler.ExponentialLR(o, 0.7), "interval": "epoch", **MOMENTUM},
        make=Scheduled,
    ),
    Case("schedule per step", {"schedule": lambda o: lr_scheduler.CosineAnnealingLR(o, 12)}, make=Scheduled),
    Case(
        "plateau",
        {"schedule": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=2.0), "interval": "epoch"},
        make=Scheduled,
    ),
    Case("one cycle with momentum", {"schedule": one_cycle, **MOMENTUM}, make=Scheduled),
    Case("one cycle with betas", {"schedule": one_cycle, "make_optimizer": adam}, make=Scheduled),
    Case("warm-up by hand", MOMENTUM, make=WarmingUp),
    Case("clipping by hand", MOMENTUM, {"gradient_clip_val": 0.3}, make=Clipping),
    Case("clip norm adamw", {"make_optimizer": adamw, "norm": True}, {"gradient_clip_val": 0.3}),
    Case("clip an accumulated gradient", MOMENTUM, {"gradient_clip_val": 0.3, "accumulate_grad_batches": 3}),
    Case("accumulation that changes", MOMENTUM, callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 3})]),
    Case("validation within the epoch", {"norm": True}, {"val_check_interval": 2}),
    Case("limited by a share", MOMENTUM, {"limit_train_batches": 0.5}),
    Case(
        "early stopping",
        {"norm": True, **MOMENTUM},
        {"max_epochs": 9},
        callbacks=lambda: [EarlyStopping("val_loss", patience=1, min_delta=0.5)],
    ),
    Case("stopped within an epoch", {"norm": True}, callbacks=stop_at(8)),
    STOPPED_WITHIN_AN_ACCUMULATION,
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_influence_is_minus_the_derivative_of_the_whole_fit(case):
    assert_influence_is_the_derivative(case)


def test_a_batch_that_never_made_a_step_moves_running_statistics_all_the_same():
    callback = ranked(STOPPED_WITHIN_AN_ACCUMULATION)
    assert callback.summary["window"]["num_without_update"] == 1
    assert callback.summary["window"]["num_steps"] == 4
    assert callback.ranking.visits.sum() == NUM_TRAIN + 10  # an epoch and two batches; the third counts for nothing


class Slow(Plain):
    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)


def test_training_that_ran_out_of_time_within_an_epoch_is_that_of_as_many_steps():
    callback = ranked(Case("max_time", MOMENTUM, {"max_time": timedelta(seconds=0.6), "max_epochs": 99}, make=Slow))
    num_steps = callback.summary["window"]["num_steps"]
    assert 1 < num_steps < 25
    same = ranked(Case("as many steps", MOMENTUM, {"max_steps": num_steps, "max_epochs": 99}))
    assert np.array_equal(influences(callback), influences(same))
    assert_influence_is_the_derivative(Case("truth", MOMENTUM, {"max_steps": num_steps, "max_epochs": 99}))


# Gradient scaling ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "accumulate"),
    [
        ({"norm": True, **MOMENTUM}, 1),
        ({"norm": True, "make_optimizer": adamw}, 1),
        ({"norm": True, "make_optimizer": adam, "options": {"fused": True}}, 1),
        ({"norm": True, **MOMENTUM}, 2),
    ],
    ids=["sgd", "adamw", "fused adam", "accumulated"],
)
def test_a_step_that_the_scaler_skips_is_no_step(module, accumulate):
    def case():  # the plugin keeps its scale, so a run needs one of its own
        return scaled("skipped", module, accumulate_grad_batches=accumulate)

    callback = ranked(case())
    window = callback.summary["window"]
    assert window["num_without_update"] == 1
    assert window["num_steps"] == (14 if accumulate == 1 else 8)
    found = influences(callback)
    assert_derivative(found, lambda weights: objective(fit(case(), weights=weights)))


def overflow_at_once():
    """The very first gradients overflow, as they do with the scale that float16 starts with."""

    def overflow(trainer, module):
        if trainer.global_step == 0:
            next(module.parameters()).grad.fill_(float("inf"))

    return [LambdaCallback(on_after_backward=overflow)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_first_step_may_be_the_one_that_is_skipped(accumulate):
    def case():
        trainer = {"precision": None, "plugins": [Scaling()], "accumulate_grad_batches": accumulate}
        return Case("skipped at once", {"norm": True, **MOMENTUM}, trainer, callbacks=overflow_at_once)

    callback = ranked(case())
    assert callback.summary["window"]["num_without_update"] == 1
    assert_derivative(influences(callback), lambda weights: objective(fit(case(), weights=weights)))


# Other end points ----------------------------------------------------------------------------------


def best_of(module):
    return module.trainer.checkpoint_callback.best_model_path


class Worsening(Plain):
    """Best after two epochs of four: later ones climb."""

    def loss(self, batch, reduction="mean"):
        climbs = self.training and self.current_epoch >= 2
        return -super().loss(batch, reduction) if climbs else super().loss(batch, reduction)


@pytest.mark.parametrize("epochs", [1, "all"])
def test_at_best_the_walk_starts_at_the_best_model(tmp_path, epochs):
    def case(name):
        return Case(
            "best",
            {"options": {"momentum": 0.5, "lr": 0.02}},
            {"max_epochs": 4, "enable_checkpointing": True},
            make=Worsening,
            callbacks=lambda: [ModelCheckpoint(tmp_path / name, filename="best", monitor="val_loss", mode="min")],
        )

    callback = SGDInfluence("val_loss", epochs=epochs, at="best")
    fit(case("run"), callback)
    assert callback.summary["window"]["words"] == (
        "steps 5 to 9: epoch 1" if epochs == 1 else "steps 0 to 9: epochs 0 to 1"
    )
    assert callback.summary["end_point"] == "after step 9, at which the best model was saved"
    assert callback.summary["objective"]["recomputed"] == pytest.approx(callback.summary["objective"]["logged"])
    found = influences(callback)

    def truth(weights):
        module = fit(case(f"{hash(weights)}"), weights=weights)
        module.load_state_dict(torch.load(best_of(module), weights_only=True)["state_dict"])
        return objective(module)

    if epochs == "all":
        assert_derivative(found, truth)
    else:
        shorter = SGDInfluence("val_loss", epochs=1)
        fit(Case("two epochs", {"options": {"momentum": 0.5, "lr": 0.02}}, {"max_epochs": 2}), shorter)
        assert np.array_equal(found, influences(shorter))


@pytest.mark.parametrize("num_epochs", [1, 3])
def test_at_best_the_best_model_may_be_that_of_the_last_epoch(tmp_path, num_epochs):
    case = Case(
        "best at last",
        {"options": {"lr": 0.02}},
        {"max_epochs": num_epochs, "enable_checkpointing": True},
        callbacks=lambda: [ModelCheckpoint(tmp_path, monitor="val_loss", save_on_train_epoch_end=True)],
    )
    callback, last = SGDInfluence("val_loss", at="best"), SGDInfluence("val_loss")
    fit(case, callback)
    fit(Case("last", case.module, {"max_epochs": num_epochs}), last)
    assert callback.ranking == last.ranking


def test_the_window_reaches_a_whole_epoch_though_training_stops_within_the_next():
    callback = SGDInfluence("val_loss", epochs=1)
    fit(Case("stopped", MOMENTUM, {"max_steps": 12}), callback)
    assert callback.summary["window"]["words"] == "steps 5 to 11: epoch 1 and 2 steps of epoch 2"


@pytest.mark.parametrize(
    ("callbacks", "match"),
    [
        ([], "the Trainer has no ModelCheckpoint"),
        ([ModelCheckpoint()], "a ModelCheckpoint that keeps no best model"),
        ([ModelCheckpoint(monitor="val_loss", save_top_k=0)], "a ModelCheckpoint that keeps no best model"),
    ],
)
def test_at_best_without_a_best_model_is_refused_before_training(callbacks, match):
    trainer = quiet_trainer([SGDInfluence("val_loss", at="best"), *callbacks], enable_checkpointing=bool(callbacks))
    with pytest.raises(UnsupportedTrainingError, match=match):
        trainer.fit(Plain(), *loaders())
    assert trainer.global_step == 0


# Averaged weights ----------------------------------------------------------------------------------


class Grab(pl.Callback):
    """Keeps the weights of the last real epoch's end, before an averaging callback replaces them."""

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 2:
            module.grabbed = {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.filterwarnings("ignore:Swapping scheduler", "ignore:.*replaces the weights")
def test_with_swa_and_batchnorm_the_end_point_is_the_last_trained_weights_and_said_so():
    averaging = {"swa_lrs": 0.05, "swa_epoch_start": 1, "annealing_epochs": 1}
    case = Case("swa", {"norm": True, **MOMENTUM}, callbacks=lambda: [Grab(), StochasticWeightAveraging(**averaging)])
    callback = ranked(case)
    assert callback.summary["end_point"].startswith("after step 14, the last; the averaged weights of StochasticWeight")
    found = influences(callback)

    def truth(weights):
        module = fit(case, weights=weights)
        module.double().load_state_dict(module.grabbed)
        return objective(module)

    assert_derivative(found, truth)


# Loaders and fits ----------------------------------------------------------------------------------


class Reloading(Plain):
    """Makes its loaders itself, anew in every epoch."""

    shift = 0.0

    def train_dataloader(self):
        x, y, index = TRAIN.tensors
        moved = x + self.shift * self.current_epoch
        return loaders(torch.utils.data.TensorDataset(moved, y, index))[0]

    def val_dataloader(self):
        return loaders()[1]


def test_loaders_made_anew_every_epoch_are_each_asked_for_their_own_batches():
    def run(callback=None, weights=None):
        pl.seed_everything(1, verbose=False)
        module = Reloading(**MOMENTUM)
        module.sample_weights = weights
        trainer = quiet_trainer([callback] if callback else [], reload_dataloaders_every_n_epochs=1)
        trainer.fit(module)
        return module

    callback = SGDInfluence("val_loss", epochs="all")
    run(callback)
    assert_derivative(influences(callback), lambda weights: objective(run(weights=weights)))


def test_loaders_that_no_window_reaches_are_let_go():
    alive, counts = [], []

    class Counting(Reloading):
        def train_dataloader(self):
            loader = super().train_dataloader()
            alive.append(weakref.ref(loader.dataset))
            return loader

        def on_train_epoch_start(self):
            gc.collect()  # of what this test made
            counts.append(sum(ref() is not None for ref in alive))

    callback = SGDInfluence("val_loss", epochs=1)
    gc.freeze()
    quiet_trainer([callback], reload_dataloaders_every_n_epochs=1, max_epochs=6).fit(Counting(**MOMENTUM))
    gc.unfreeze()
    assert max(counts) <= 3  # the window's, the Trainer's, and one about to go
    assert len(callback.ranking) == NUM_TRAIN


@pytest.mark.filterwarnings("ignore:Training batches are kept")
def test_positions_that_hold_other_samples_after_a_reload_are_refused():
    class Moving(Reloading):
        shift = 1.0

    trainer = quiet_trainer([SGDInfluence("val_loss", epochs="all")], reload_dataloaders_every_n_epochs=1)
    with pytest.raises(SampleIdError, match=r"(?s)position.*another sample.*sample_ids="):
        trainer.fit(Moving())


@pytest.mark.filterwarnings("ignore:What was kept of the run begins with step 5, at the start of epoch 1")
def test_the_second_fit_of_a_callback_is_ranked_by_itself():
    def run(callback=None, weights=None):
        pl.seed_everything(1, verbose=False)
        module = Plain(norm=True, make_optimizer=adam)
        trainer = quiet_trainer([callback] if callback else [], max_epochs=1)
        trainer.fit(module, *loaders())
        module.sample_weights = weights
        trainer.fit_loop.max_epochs = 3
        said = pytest.warns(SGDInfluenceWarning, match="goes on from step 5") if callback else nullcontext()
        with said:
            trainer.fit(module, *loaders())
        return module

    callback = SGDInfluence("val_loss", epochs="all")
    run(callback)
    assert callback.summary["window"]["num_steps"] == 10
    assert_derivative(influences(callback), lambda weights: objective(run(weights=weights)))


@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
def test_a_fit_with_nothing_left_to_train_warns_and_keeps_the_ranking(limit, tmp_path):
    callback = SGDInfluence("val_loss", dirpath=tmp_path / "run")
    trainer = quiet_trainer([callback], **{"max_epochs": 2, limit: 2})
    module = Plain()
    trainer.fit(module, *loaders())
    before = callback.ranking, callback.run_dir
    with pytest.warns(SGDInfluenceWarning, match=f"nothing left to train, since the Trainer has reached {limit}=2"):
        trainer.fit(module, *loaders())
    assert (callback.ranking, callback.run_dir) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
