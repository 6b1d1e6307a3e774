# SPDX-License-Identifier: Apache-2.0
"""Values that are moved by the parameters but used as constants: refused where the gradient depends on them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import NUM_TRAIN, Case, Plain, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import SGDInfluenceWarning, UnsupportedOperationError
from reference import assert_influence_is_the_derivative


class Focal(Plain):
    """Hard samples weigh more; the weight is detached."""

    def loss(self, batch, reduction="mean"):
        rows = super().loss(batch, "none")
        rows = rows * (1 - (-rows).exp()).detach()
        return rows.mean() if reduction == "mean" else rows


class Distilled(Plain):
    """The softened predictions of the same network without dropout are targets, too."""

    def loss(self, batch, reduction="mean"):
        with torch.no_grad():
            target = (self.net(batch[0]) / 2).softmax(-1)
        return super().loss(batch, reduction) + F.cross_entropy(self.net(batch[0]), target, reduction=reduction)


class Balanced(Plain):
    """Divides by its own size as a Python number."""

    def loss(self, batch, reduction="mean"):
        rows = super().loss(batch, "none")
        rows = rows / rows.mean().item()
        return rows.mean() if reduction == "mean" else rows


class StraightThrough(nn.Module):
    def forward(self, x):
        return x + (x.round(decimals=1).sin() - x).detach()


class Stable(Plain):
    """Detaches what cancels, logs what it detaches, and looks at its weights without a gradient."""

    def loss(self, batch, reduction="mean"):
        x, y, _ = batch
        scores = self.net(x)
        scores = scores - scores.max(-1, keepdim=True).values.detach()
        with torch.no_grad():
            self.size = sum(param.norm() for param in self.parameters())
        rows = F.cross_entropy(scores, y, reduction=reduction)
        self.seen = rows.detach().mean().item()
        return rows


class Teacher(Plain):
    """The targets come from a network that is not trained."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(5, 3)

    def loss(self, batch, reduction="mean"):
        with torch.no_grad():
            target = self.teacher(batch[0]).softmax(-1)
        return F.cross_entropy(self.net(batch[0]), target, reduction=reduction)

    def configure_optimizers(self):
        return self.make_optimizer(self.net.parameters())


@pytest.mark.parametrize("curvature", ["exact", "finite"])
@pytest.mark.parametrize("module", [Focal, Distilled, Balanced], ids=lambda kind: kind.__name__)
def test_gradient_that_depends_on_what_is_stopped_is_refused_within_two_steps(module, curvature):
    callback = SGDInfluence("val_loss", curvature=curvature, sample_losses=lambda m, batch: m.loss(batch, "none"))
    trainer = quiet_trainer([callback])
    with pytest.raises(UnsupportedOperationError, match=r"stops gradients.*gradient depends on them"):
        trainer.fit(module(), *loaders())
    assert trainer.global_step <= 2


def test_straight_through_is_refused():
    net = nn.Sequential(nn.Linear(5, 5), StraightThrough(), nn.Linear(5, 3))
    with pytest.raises(UnsupportedOperationError, match="stops gradients"):
        quiet_trainer([SGDInfluence("val_loss")]).fit(Plain(net=lambda: net), *loaders())


def test_it_is_warned_about_on_wish():
    callback = SGDInfluence("val_loss", on_mismatch="warn")
    with pytest.warns(SGDInfluenceWarning, match="stops gradients"):
        quiet_trainer([callback]).fit(Focal(), *loaders())
    assert len(callback.ranking) == NUM_TRAIN


@pytest.mark.parametrize("module", [Stable, Teacher], ids=lambda kind: kind.__name__)
def test_what_is_stopped_without_effect_on_the_gradient_is_followed(module):
    assert_influence_is_the_derivative(Case(module.__name__, make=module))
