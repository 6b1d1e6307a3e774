# SPDX-License-Identifier: Apache-2.0
"""lightly's losses, heads, teachers and optimizer, each in a module as its documentation writes them."""

import copy

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules.heads import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from torch import nn
from torch.nn import functional as F

from cases import Case, Plain
from lightning_sgdclean.base.errors import LossSplitError
from reference import assert_influence_is_the_derivative, ranked

STEADY = {"batch_size": 6, "drop_last": True}


def backbone():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh())


def views(items):
    """Two views of each sample, as a transform of lightly's gives them; and the samples' numbers."""
    x, index = (torch.stack(part) for part in list(zip(*items, strict=True))[::2])
    return [[x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)], index]


class TwoViews(Plain):
    """A loss of two views, and what a sample adds to it."""

    def __init__(self, opt=torch.optim.SGD, schedule=None, **options):
        super().__init__(net=backbone)
        self.opt, self.cosine, self.options = opt, schedule, {"lr": 0.06, **options}

    def configure_optimizers(self):
        optimizer = self.opt([param for param in self.parameters() if param.requires_grad], **self.options)
        if self.cosine is None:
            return optimizer
        return [optimizer], [{"scheduler": self.cosine(optimizer), "interval": "step"}]

    def training_step(self, batch, batch_idx):
        if self.sample_weights is None:
            return self.of_views(*batch[0])
        return (self.rows(*batch[0]) * self.sample_weights[batch[1]]).mean()

    def loss(self, batch, reduction="mean"):
        """In validation, of views that are the same each time."""
        x = batch[0]
        return self.of_views(x, 0.9 * x + 0.1)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))


class SimCLR(TwoViews):
    criterion = staticmethod(NTXentLoss(temperature=0.5))

    def __init__(self, **options):
        super().__init__(**options)
        self.projection_head = SimCLRProjectionHead(8, 8, 4)

    def forward(self, x):
        return self.projection_head(self.net(x).flatten(start_dim=1))

    def of_views(self, x0, x1):
        return self.criterion(self(x0), self(x1))

    def rows(self, x0, x1):
        """Each view is told from all others; a sample's are its own two."""
        z = F.normalize(torch.cat([self(x0), self(x1)]), dim=1)
        alike = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
        rows = F.cross_entropy(alike, torch.arange(len(z)).roll(len(x0)), reduction="none")
        return rows.view(2, -1).mean(0)


class BYOL(TwoViews):
    """The teacher follows, within ``training_step``, by a momentum that grows from epoch to epoch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.projection_head, self.prediction_head = BYOLProjectionHead(8, 8, 4), BYOLPredictionHead(4, 8, 4)
        self.backbone_momentum, self.projection_head_momentum = map(copy.deepcopy, (self.net, self.projection_head))
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x):
        return self.prediction_head(self.projection_head(self.net(x).flatten(start_dim=1)))

    def forward_momentum(self, x):
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1)).detach()

    def training_step(self, batch, batch_idx):
        momentum = cosine_schedule(self.current_epoch, 10, 0.9, 1)
        update_momentum(self.net, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        return super().training_step(batch, batch_idx)

    def of_views(self, x0, x1):
        one = self.criterion(self(x0), self.forward_momentum(x1))
        return 0.5 * (one + self.criterion(self(x1), self.forward_momentum(x0)))

    def rows(self, x0, x1):
        one = -F.cosine_similarity(self(x0), self.forward_momentum(x1), dim=1)
        return 0.5 * (one - F.cosine_similarity(self(x1), self.forward_momentum(x0), dim=1))

    def loss(self, batch, reduction="mean"):
        """What the features are good for: the teacher judges nothing."""
        return F.mse_loss(self(batch[0]), batch[0][:, :4])


class SimSiam(TwoViews):
    """One of both sides is detached, so that the gradient is not that of the loss."""

    def __init__(self, **options):
        super().__init__(**options)
        self.prediction_head = SimSiamPredictionHead(8, 4, 8)

    def of_views(self, x0, x1):
        z0, z1 = self.net(x0), self.net(x1)
        criterion = NegativeCosineSimilarity()
        return 0.5 * (
            criterion(self.prediction_head(z0), z1.detach()) + criterion(self.prediction_head(z1), z0.detach())
        )


def two_views(name, make, **options):
    return Case(name, options, loader={**STEADY, "collate_fn": views}, make=make)


def anchors(module, batch):
    """Which row of NT-Xent is whose: those in which the sample's views are the anchors."""
    return module.rows(*batch[0])


KEPT = {"keep_batches": True, "sample_losses": anchors}


def warm_up(optimizer):
    return CosineWarmupScheduler(optimizer, warmup_epochs=3, max_epochs=12)


@pytest.mark.parametrize(
    "case",
    [
        two_views("SimCLR", SimCLR, momentum=0.9, schedule=warm_up),
        two_views("SimCLR, LARS", SimCLR, opt=LARS, momentum=0.9, weight_decay=1e-3),
    ],
    ids=str,
)
def test_contrastive_rows_count_as_their_anchors(case):
    assert_influence_is_the_derivative(case, 1e-6, **KEPT)


def test_a_teacher_that_training_step_moves_is_part_of_the_training():
    assert_influence_is_the_derivative(two_views("BYOL", BYOL), 1e-6, keep_batches=True)


def test_in_batch_negatives_are_refused_before_training_without_a_word_on_whose_rows_they_are():
    with pytest.raises(LossSplitError, match="sample_losses="):
        ranked(two_views("SimCLR", SimCLR), keep_batches=True)
