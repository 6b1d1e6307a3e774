# SPDX-License-Identifier: Apache-2.0
"""Trainings that optimize by themselves: one optimizer, one step a ``training_step``, against differences of fits."""

from torch.nn.utils import clip_grad_norm_

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import Case, Plain, Scaling, adam, fit, objective
from lightning_sgdclean.base.errors import UnsupportedTrainingError
from reference import assert_influence_is_the_derivative


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
        return (F.mse_loss(out, torch.zeros_like(out), reduction="none").mean(1) * self.sample_weights[batch[-1]]).mean()


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


@pytest.mark.parametrize(
    "case",
    [
        Case("plain", {**MOMENTUM, "schedule": decaying}, make=Manual),
        Case("batchnorm, dropout", {"norm": True, "dropout": 0.2, "make_optimizer": adam}, make=Toggles),
        Case("clip by Lightning", MOMENTUM, make=ClipsByLightning),
        Case("clip values", MOMENTUM, make=ClipsValues),
        Case("clip on schedule", MOMENTUM, make=ClipsOnSchedule),
        Case("accumulate", {**MOMENTUM, "norm": True}, make=Accumulates),
        Case("accumulate and clip", MOMENTUM, make=AccumulatesAndClips),
        Case("accumulate anew", MOMENTUM, make=AccumulatesAnew),
        Case("two losses", MOMENTUM, make=TwoLosses),
        Case("closure", MOMENTUM, make=WithClosure),
    ],
    ids=str,
)
def test_every_form_of_one_step_is_exact(case):
    assert_influence_is_the_derivative(case)
