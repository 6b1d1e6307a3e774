# SPDX-License-Identifier: Apache-2.0
"""Losses by hand whose mean cannot be followed: refused with the line to write, and exact with it."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import Case, Plain, fit
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import LossSplitError
from lightning_sgdclean.losses.verified import sample_lines
from reference import assert_influence_is_the_derivative, influences, ranked

SMOOTHING = 0.1


def mean(rows):
    """A product: of its factors it is not proved which sample each is of, so that it counts as no mean."""
    return rows @ torch.full_like(rows, 1 / len(rows))


class LabelSmoothingLoss(nn.Module):
    """The formula of timm's ``LabelSmoothingCrossEntropy``: part of the target goes to all classes alike."""

    def forward(self, logits, target):
        log = logits.log_softmax(-1)
        picked, everywhere = log.gather(-1, target[:, None])[:, 0], log.mean(-1)
        return -mean((1 - SMOOTHING) * picked + SMOOTHING * everywhere)


class FocalLoss(nn.Module):
    """Lin et al. (2017): what is predicted well counts less."""

    def forward(self, logits, target):
        chance = logits.softmax(-1).gather(-1, target[:, None])[:, 0]
        return -mean((1 - chance) ** 2 * chance.log())


class WithCriterion(Plain):
    """Its twin weights the criterion of each sample alone."""

    def __init__(self, criterion, **options):
        super().__init__(**options)
        self.criterion = criterion()

    def training_step(self, batch, batch_idx):
        out, y = self.net(batch[0]), batch[1]
        if self.sample_weights is None:
            return self.criterion(out, y)
        rows = [self.criterion(out[i : i + 1], y[i : i + 1]) for i in range(len(y))]
        return (torch.stack(rows) * self.sample_weights[batch[-1]]).mean()


def case(criterion):
    return Case(
        criterion.__name__,
        {"options": {"momentum": 0.5}, "norm": True, "dropout": 0.2},
        {"max_epochs": 2},
        make=lambda **options: WithCriterion(criterion, **options),
    )


def line_in(error):
    return eval(re.search(r"sample_losses=(lambda .*)", str(error))[1], {"torch": torch, "F": F})


@pytest.mark.parametrize("criterion", [LabelSmoothingLoss, FocalLoss])
def test_the_line_in_the_error_is_exact_for_a_loss_written_by_hand(criterion):
    with pytest.raises(LossSplitError, match=r"m\.criterion\(out\[None\], y\[None\]\)") as refused:
        fit(case(criterion), SGDInfluence("val_loss"))
    assert_influence_is_the_derivative(case(criterion), sample_losses=line_in(refused.value))


def test_label_smoothing_by_hand_is_that_of_torch():
    def step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1], label_smoothing=SMOOTHING)

    class Torch(Plain):
        training_step = step

    def losses(module, batch):
        return F.cross_entropy(module.net(batch[0]), batch[1], label_smoothing=SMOOTHING, reduction="none")

    found = influences(ranked(case(LabelSmoothingLoss), sample_losses=losses))
    same = Case("torch", {"options": {"momentum": 0.5}, "norm": True, "dropout": 0.2}, {"max_epochs": 2}, make=Torch)
    assert found == pytest.approx(influences(ranked(same)), rel=1e-8)


class Inline(Plain):
    """A hand-written mean in ``training_step`` itself."""

    def training_step(self, batch, batch_idx):
        rows = -self.net(batch[0]).log_softmax(1).gather(1, batch[1][:, None])[:, 0]
        if self.sample_weights is not None:
            return (rows * self.sample_weights[batch[-1]]).mean()
        return mean(rows)


def test_a_mean_in_training_step_is_shown_and_the_line_for_a_classifier_is_exact():
    following = Case("inline", {"options": {"momentum": 0.5}}, {"max_epochs": 2}, make=Inline)
    with pytest.raises(
        LossSplitError, match=r"ends with `return mean\(rows\)`\. Here this line has that mean"
    ) as refused:
        fit(following, SGDInfluence("val_loss"))
    assert_influence_is_the_derivative(following, sample_losses=line_in(refused.value))


def test_advice_names_the_fields_of_the_batch_that_was_seen():
    batch = {"meta": 3, "tokens": torch.zeros(4, 7), "label": torch.zeros(4), "classes": torch.zeros(9)}
    assert any(
        "F.cross_entropy(m.net(batch['tokens']), batch['label']" in line for line in sample_lines(Plain(), batch, 4)
    )


class Autoencoder(Plain):
    """Its loss is by hand, and of the inputs alone."""

    def __init__(self, **options):
        super().__init__(net=lambda: nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 5)), **options)

    def loss(self, batch, reduction="mean"):
        rows = (self.net(batch[0]) - batch[0]).pow(2).mean(1)
        return rows if reduction == "none" else mean(rows)


def test_the_line_is_one_that_was_tried_also_where_the_module_is_no_classifier():
    case = Case("autoencoder", {"options": {"momentum": 0.5}}, {"max_epochs": 2}, make=Autoencoder)
    with pytest.raises(LossSplitError, match=r"Here this line has that mean: .*F\.mse_loss") as refused:
        fit(case, SGDInfluence("val_loss"))
    assert_influence_is_the_derivative(case, sample_losses=line_in(refused.value))


class Mixed(Plain):
    """Mixup by hand: a row has two samples, so no loss of one sample alone is the right one."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        log = self.net(0.7 * x + 0.3 * x.flip(0)).log_softmax(1)
        return -(0.7 * log.gather(1, y[:, None]) + 0.3 * log.gather(1, y.flip(0)[:, None])).mean()


class FromZero(Mixed):
    """At its start all classes are as likely, so that any cross-entropy has the loss's value."""

    def __init__(self, **options):
        super().__init__(**options)
        for param in self.net[-1].parameters():
            nn.init.zeros_(param)


@pytest.mark.parametrize("make", [Mixed, FromZero])
def test_where_no_line_fits_there_is_the_contract_alone(make):
    with pytest.raises(LossSplitError, match="Give sample_losses=, a callable") as refused:
        fit(Case("mixed", make=make), SGDInfluence("val_loss"))
    assert "lambda" not in str(refused.value)
