# SPDX-License-Identifier: Apache-2.0
"""Teachers that follow the trained weights: what samples do through them is part of their influence."""

import copy

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

from cases import Case, Plain, loaders, objective, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.adjoint import backward
from lightning_sgdclean.base.errors import UnsupportedTrainingError
from reference import assert_derivative, assert_influence_is_the_derivative, directional, fit, influences, ranked


class Byol(Plain):
    """Classifies, and predicts what a momentum teacher makes of another view."""

    def __init__(self, where="on_train_batch_end", how="lerp", norm=False, validates=False):
        super().__init__(norm=norm)
        self.predictor = nn.Linear(3, 3)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.where, self.how, self.validates = where, how, validates

    def follow(self):
        share = 0.3 / (1 + self.global_step // 4)
        for theirs, ours in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            if self.how == "lerp":
                with torch.no_grad():
                    theirs.lerp_(ours, share)
            elif self.how == "data":
                theirs.data = theirs.data * (1 - share) + ours.data * share
            elif self.how == "mul":
                theirs.data.mul_(1 - share).add_(ours.data, alpha=share)
            else:
                theirs.data.mul_(1 - share).add_(ours.data**2, alpha=share)

    def rows(self, batch):
        x, y, _ = batch
        output = self.net(x)
        with torch.no_grad():
            target = F.normalize(self.teacher(x.flip(1)), dim=-1)
        far = F.mse_loss(F.normalize(self.predictor(output), dim=-1), target, reduction="none")
        return F.cross_entropy(output, y, reduction="none"), far.sum(-1)

    def loss(self, batch):
        x, y, _ = batch
        return F.cross_entropy((self.teacher if self.validates else self.net)(x), y)

    def training_step(self, batch, batch_idx):
        if self.where == "before":
            self.follow()
        weights = 1.0 if self.sample_weights is None else self.sample_weights[batch[-1]]
        label, far = self.rows(batch)
        loss = 0.3 * (weights * label).mean() + 2.0 * (weights * far).mean()
        if self.where == "behind":
            self.follow()
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.where == "on_train_batch_end":
            self.follow()

    def on_train_batch_start(self, batch, batch_idx):
        if self.where == "on_train_batch_start":
            self.follow()

    def on_before_zero_grad(self, optimizer):
        if self.where == "on_before_zero_grad":
            self.follow()

    def optimizer_step(self, *arguments):
        super().optimizer_step(*arguments)
        if self.where == "optimizer_step":
            self.follow()

    def configure_optimizers(self):
        return torch.optim.SGD([*self.net.parameters(), *self.predictor.parameters()], lr=0.1, momentum=0.5)


def case(**options):
    return Case("byol", options, {"max_epochs": 2}, make=Byol)


PLACES = [
    {"where": "on_train_batch_end"},
    {"where": "on_train_batch_start", "how": "mul"},
    {"where": "on_before_zero_grad", "how": "data"},
    {"where": "optimizer_step"},
    {"where": "before", "how": "mul"},
    {"where": "behind", "how": "data"},
    {"where": "before", "norm": True},
    {"where": "on_train_batch_end", "validates": True},
    {"where": "behind", "validates": True},
]


@pytest.mark.parametrize("options", PLACES, ids=str)
def test_influence_through_a_teacher_is_the_derivative_of_the_whole_fit(options):
    assert_influence_is_the_derivative(case(**options))
