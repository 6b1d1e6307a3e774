# SPDX-License-Identifier: Apache-2.0
"""Trainings that optimize by themselves: one optimizer, one step a ``training_step``, against differences of fits."""

import re

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from cases import Case, Overflowing, Plain, Scaling, adam, fit, loaders, quiet_trainer
from left_out import again, without
from lightning_sgdclean import SGDInfluence, retrace
from lightning_sgdclean.base.errors import ReplayMismatchError, SGDInfluenceWarning, UnsupportedTrainingError
from reference import assert_influence_is_the_derivative, ranked


class Manual(Plain):
    """Does by hand what Lightning does for ``Plain``."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        self.clip(optimizer)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()

    def clip(self, optimizer):
        pass


class ClipsByLightning(Manual):
    def clip(self, optimizer):
        self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")


class ClipsValues(Manual):
    def clip(self, optimizer):
        nn.utils.clip_grad_value_(self.parameters(), clip_value=0.05)


class ClipsOnSchedule(Manual):
    """By a name of its own, at a value that follows the step, and looks at the gradient."""

    def clip(self, optimizer):
        norm = clip_grad_norm_(self.net.parameters(), 0.5 / (1 + self.global_step % 3))
        self.log("norm", norm + self.net[0].weight.grad.norm())


class Toggles(Manual):
    """In the context that the documentation shows; returns the loss in a dict; zeroes afterwards."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        with optimizer.toggle_model():
            loss = Plain.training_step(self, batch, batch_idx)
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": loss, "size": len(batch[0])}


class Accumulates(Manual):
    """Five batches an epoch, two of them a step: the last one's gradient is that of the next epoch's first step."""

    every = 2

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = Plain.training_step(self, batch, batch_idx) / self.every
        self.manual_backward(loss)
        if (batch_idx + 1) % self.every == 0:
            self.clip(optimizer)
            optimizer.step()
            optimizer.zero_grad()


class AccumulatesAndClips(Accumulates, ClipsByLightning):
    pass


class AccumulatesAnew(Accumulates):
    """Throws away what an epoch leaves."""

    def training_step(self, batch, batch_idx):
        if batch_idx % self.every == 0:
            self.optimizers().zero_grad()
        self.manual_backward(Plain.training_step(self, batch, batch_idx) / self.every)
        if (batch_idx + 1) % self.every == 0:
            self.optimizers().step()


class TwoLosses(Manual):
    """Two backward calls for one step, the second through a graph of its own."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(Plain.training_step(self, batch, batch_idx), retain_graph=True)
        self.manual_backward(0.1 * self.second(batch))
        optimizer.step()

    def second(self, batch):
        out = self.net(batch[0])
        if self.sample_weights is None:
            return F.mse_loss(out, torch.zeros_like(out))
        return (
            F.mse_loss(out, torch.zeros_like(out), reduction="none").mean(1) * self.sample_weights[batch[-1]]
        ).mean()


class WithClosure(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            loss = Plain.training_step(self, batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)

        optimizer.step(closure=closure)


def decaying(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


MOMENTUM = {"options": {"momentum": 0.9}}


SELDOM = {"check_val_every_n_epoch": 3}  # a validation throws away the gradients that wait


@pytest.mark.filterwarnings("ignore:Gradients were clipped at 3 different values")
@pytest.mark.parametrize(
    "case",
    [
        Case("plain", {**MOMENTUM, "schedule": decaying}, make=Manual),
        Case("batchnorm, dropout", {"norm": True, "dropout": 0.2, "make_optimizer": adam}, make=Toggles),
        Case("clip by Lightning", MOMENTUM, make=ClipsByLightning),
        Case("clip values", MOMENTUM, make=ClipsValues),
        Case("clip on schedule", MOMENTUM, make=ClipsOnSchedule),
        Case("accumulate", {**MOMENTUM, "norm": True}, make=Accumulates),
        Case("accumulate across epochs", {**MOMENTUM, "norm": True}, SELDOM, make=Accumulates),
        Case("accumulate and clip", MOMENTUM, SELDOM, make=AccumulatesAndClips),
        Case("accumulate anew", MOMENTUM, SELDOM, make=AccumulatesAnew),
        Case("two losses", MOMENTUM, make=TwoLosses),
        Case("closure", MOMENTUM, make=WithClosure),
    ],
    ids=str,
)
def test_every_form_of_one_step_is_exact(case):
    assert_influence_is_the_derivative(case)


def test_snapshots_samples_left_out_and_another_process_see_the_same_steps(tmp_path):
    """Steps repeated forward, to the bit, and runs without samples, at once and one by one."""
    case = Case("", {**MOMENTUM, "norm": True}, make=AccumulatesAndClips)
    callback = ranked(case, snapshots=3, verify=3, dirpath=tmp_path / "run")
    replayed = callback.summary["replay"]
    assert replayed["segments_bit_for_bit"] == replayed["segments"] > 0
    model, (train, val) = AccumulatesAndClips(**case.module).double(), loaders()
    whole = retrace(callback.run_dir, model, train_dataloaders=train, val_dataloaders=val, epochs="all", verify=0)
    assert whole.influence.tolist() == callback.ranking.influence.tolist()
    alone, found = (again(callback, case, without=[0, 3, 11], batched=batched) for batched in (False, True))
    assert alone.is_bitwise
    assert found.is_bitwise
    assert found.values == pytest.approx(alone.values, rel=1e-10)
    assert found.values[1] == pytest.approx(without(case, [3]), rel=1e-10)


@pytest.mark.filterwarnings("ignore:Gradients were clipped at 3 different values")
@pytest.mark.parametrize("make", [ClipsOnSchedule, Accumulates, Toggles], ids=lambda make: make.__name__)
def test_training_is_untouched_to_the_last_bit(make):
    case = Case("", {**MOMENTUM, "dropout": 0.2, "norm": True}, make=make)
    before = clip_grad_norm_, nn.utils.clip_grad_norm_, torch.Tensor.backward
    bare, watched = fit(case), fit(case, SGDInfluence("val_loss", verify=0, on_mismatch="warn"))
    assert all(
        torch.equal(a, b) for a, b in zip(bare.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    assert (clip_grad_norm_, nn.utils.clip_grad_norm_, torch.Tensor.backward) == before


def test_a_resumed_fit_goes_on_with_the_trajectory(tmp_path):
    def run(name, max_epochs, ckpt_path=None, **options):
        pl.seed_everything(1, verbose=False)
        callback = SGDInfluence("val_loss", epochs="all", verify=0, dirpath=tmp_path / name, **options)
        saving = pl.callbacks.ModelCheckpoint(tmp_path / f"{name}-saved", filename="{epoch}")
        settings = {"max_epochs": max_epochs, "precision": "32-true", "enable_checkpointing": True}
        train, val = loaders(shuffle=False)
        quiet_trainer([callback, saving], **settings).fit(Manual(**MOMENTUM), train, val, ckpt_path=ckpt_path)
        return callback

    whole = run("whole", 2)
    run("first", 1)
    resumed = run("first", 2, tmp_path / "first-saved" / "epoch=0.ckpt", overwrite=True)
    assert resumed.ranking.sample_id.tolist() == whole.ranking.sample_id.tolist()
    assert resumed.ranking.influence.tolist() == whole.ranking.influence.tolist()


class Gan(Manual):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        super().training_step(batch, batch_idx)


class StepsTwice(Manual):
    def clip(self, optimizer):
        optimizer.step()


class BackwardItself(Manual):
    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        self.loss(batch).backward()
        self.optimizers().step()


class RawStep(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(Plain.training_step(self, batch, batch_idx))
        optimizer.step()


class Delayed(Manual):
    """Backward behind the step, for the next one."""

    def training_step(self, batch, batch_idx):
        loss, optimizer = Plain.training_step(self, batch, batch_idx), self.optimizers()
        if batch_idx:
            optimizer.step()
        optimizer.zero_grad()
        self.manual_backward(loss)


class Outside(Manual):
    def training_step(self, batch, batch_idx):
        self.manual_backward(Plain.training_step(self, batch, batch_idx))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.optimizers().step()
        self.optimizers().zero_grad()


class NeverZeroed(Manual):
    def training_step(self, batch, batch_idx):
        self.manual_backward(Plain.training_step(self, batch, batch_idx))
        self.optimizers().step()


class ClipsAPart(Manual):
    def clip(self, optimizer):
        clip_grad_norm_(self.net[0].parameters(), 0.1)


class ClipsByTheLargest(Manual):
    def clip(self, optimizer):
        clip_grad_norm_(self.parameters(), 0.1, norm_type=float("inf"))


class ClipsTwice(Manual):
    def clip(self, optimizer):
        clip_grad_norm_(self.parameters(), 0.3)
        nn.utils.clip_grad_value_(self.parameters(), 0.05)


class ClipsEachBatch(Accumulates):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        clip_grad_norm_(self.parameters(), 0.1)


class WithGradient(Manual):
    def training_step(self, batch, batch_idx):
        self.manual_backward(Plain.training_step(self, batch, batch_idx), gradient=torch.tensor(2.0))
        self.optimizers().step()


class EditsGradients(Manual):
    def clip(self, optimizer):
        for param in self.parameters():
            param.grad *= 0.5


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (Gan, "manual_backward is called after opt.step()"),
        (StepsTwice, "calls opt.step() more than once"),
        (BackwardItself, "self.manual_backward(loss)"),
        (RawStep, "that Lightning does not count"),
        (Delayed, "opt.step() comes without self.manual_backward(loss) before it"),
        (Outside, "outside of training_step"),
        (NeverZeroed, "the gradients of a step that was made are left"),
        (ClipsAPart, "of some parameters are clipped by themselves"),
        (ClipsByTheLargest, "norm_type=inf"),
        (ClipsTwice, "clipped 2 times"),
        (ClipsEachBatch, "clipped before another loss is backpropagated"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
@pytest.mark.parametrize("options", [{}, {"sample_losses": lambda m, batch: m.loss(batch, "none")}], ids=["", "own"])
def test_other_forms_are_refused_by_name_within_the_first_steps(make, found, options):
    module = make().double()
    with pytest.raises(UnsupportedTrainingError, match=re.escape(found)):
        quiet_trainer([SGDInfluence("val_loss", verify=0, **options)], max_epochs=1).fit(module, *loaders())
    assert module.global_step <= 2


def test_a_gradient_that_is_given_to_backward_is_refused():
    with pytest.raises(UnsupportedTrainingError, match="gets gradient="):
        quiet_trainer([SGDInfluence("val_loss")], max_epochs=1).fit(WithGradient().double(), *loaders())


def test_gradients_that_are_edited_by_hand_are_found_at_the_first_steps():
    with pytest.raises(ReplayMismatchError, match=r"gradients edited in a hook .* or by hand in training_step"):
        quiet_trainer([SGDInfluence("val_loss")], max_epochs=1).fit(EditsGradients().double(), *loaders())


class LateStep(Manual):
    """Clips twice from the second epoch on."""

    def clip(self, optimizer):
        clip_grad_norm_(self.parameters(), 0.3)
        if self.current_epoch:
            clip_grad_norm_(self.parameters(), 0.3)


def test_what_shows_late_never_ends_the_training():
    module = LateStep().double()
    callback = SGDInfluence("val_loss")
    with pytest.warns(SGDInfluenceWarning, match="Recording stopped"), pytest.raises(UnsupportedTrainingError):
        quiet_trainer([callback]).fit(module, *loaders())
    assert module.trainer.global_step == 15


def test_a_grad_scaler_that_skips_a_step_is_followed():
    class ByHand(Manual, Overflowing):
        pass

    case = Case("", MOMENTUM, {"precision": None, "plugins": [Scaling()]}, make=ByHand)
    assert_influence_is_the_derivative(case)
