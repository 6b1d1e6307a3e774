# SPDX-License-Identifier: Apache-2.0
"""Losses written by hand: refused with the line to write, and exact with it."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import Case, Plain, fit
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import LossSplitError
from lightning_sgdclean.losses.verified import advice_for
from reference import assert_influence_is_the_derivative, influences, ranked

SMOOTHING = 0.1


class LabelSmoothingLoss(nn.Module):
    """The formula of timm's ``LabelSmoothingCrossEntropy``: part of the target goes to all classes alike."""

    def forward(self, logits, target):
        log = logits.log_softmax(-1)
        picked, everywhere = log.gather(-1, target[:, None])[:, 0], log.mean(-1)
        return -((1 - SMOOTHING) * picked + SMOOTHING * everywhere).mean()


class FocalLoss(nn.Module):
    """Lin et al. (2017): what is predicted well counts less."""

    def forward(self, logits, target):
        chance = logits.softmax(-1).gather(-1, target[:, None])[:, 0]
        return -((1 - chance) ** 2 * chance.log()).mean()


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
        return rows.mean()


def test_a_mean_in_training_step_is_shown_and_the_line_for_a_classifier_is_exact():
    following = Case("inline", {"options": {"momentum": 0.5}}, {"max_epochs": 2}, make=Inline)
    with pytest.raises(LossSplitError, match=r"ends with `return rows\.mean\(\)`") as refused:
        fit(following, SGDInfluence("val_loss"))
    assert_influence_is_the_derivative(following, sample_losses=line_in(refused.value))


def test_advice_names_the_fields_of_the_batch_that_was_seen():
    batch = {"meta": 3, "tokens": torch.zeros(4, 7), "label": torch.zeros(4), "classes": torch.zeros(9)}
    assert "F.cross_entropy(m.net(batch['tokens']), batch['label']" in advice_for(Plain(), batch, 4)
