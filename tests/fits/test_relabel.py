# SPDX-License-Identifier: Apache-2.0
"""What another label would have done: the derivative of trainings with the label changed by and by."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from cases import TRAIN, VAL, Case, Plain, adam, fit, objective
from lightning_sgdclean import Ranking
from lightning_sgdclean.base.errors import SGDInfluenceWarning
from reference import assert_derivative, influences, ranked

COLUMNS = ("label", "prediction", "relabel")


class Mixed(Plain):
    """With ``sample_weights`` set, trained on a share ``1 - a`` of each loss and ``a`` of another label's."""

    other = None

    def losses(self, scores, y, reduction):
        return F.cross_entropy(scores, y, reduction=reduction)

    def loss(self, batch, reduction="mean"):
        return self.losses(self.net(batch[0]), batch[1], reduction)

    def training_step(self, batch, batch_idx):
        if self.sample_weights is None:
            return self.loss(batch)
        x, y, number = batch
        amounts, scores = (self.sample_weights - 1)[number], self.net(x)
        changed = self.losses(scores, self.other[number], "none")
        return ((1 - amounts) * self.losses(scores, y, "none") + amounts * changed).mean()


class Sides(Mixed):
    """Two classes, told apart by one number."""

    def __init__(self, **options):
        super().__init__(net=lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)), **options)

    def losses(self, scores, y, reduction):
        return F.binary_cross_entropy_with_logits(scores[:, 0], y.to(scores.dtype), reduction=reduction)


def two_classes(source):
    x, y, number = source.tensors
    return TensorDataset(x, y % 2, number)


MOMENTUM = Case("momentum", {"options": {"momentum": 0.9}}, make=Mixed)
CASES = [
    MOMENTUM,
    Case(
        "BatchNorm, dropout, Adam, clipped, accumulated",
        {"make_optimizer": adam, "norm": True, "dropout": 0.2},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
        make=Mixed,
    ),
    Case("sides", {"options": {"momentum": 0.5}}, make=Sides, train=two_classes(TRAIN), val=two_classes(VAL)),
]


def by_id(ranking, name):
    found = np.zeros(len(ranking))
    found[ranking.sample_id] = ranking.columns[name]
    return found


@pytest.mark.parametrize("curvature", ["exact", "finite"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_relabel_is_the_derivative_by_the_amount_of_the_change(monkeypatch, case, curvature):
    ranking = ranked(case, columns=COLUMNS, curvature=curvature, finite_radius=1e-4).ranking
    found, other = by_id(ranking, "relabel"), torch.from_numpy(by_id(ranking, "prediction")).long()
    same = other.numpy() == by_id(ranking, "label")
    assert 0 < same.sum() < len(same)
    assert np.array_equal(found == 0, same)

    monkeypatch.setattr(case.make, "other", other)
    tolerance = 1e-7 if curvature == "exact" else 1e-3
    assert_derivative(-found, lambda weights: objective(fit(case, weights=weights), case.val), tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_influences_are_those_of_a_walk_that_does_not_ask(case):
    assert np.array_equal(influences(ranked(case, columns=COLUMNS)), influences(ranked(case)))


def test_the_column_comes_back_from_the_file():
    callback = ranked(MOMENTUM, columns=("relabel",))
    assert Ranking.load(callback.run_dir) == callback.ranking


class Regressing(Plain):
    def loss(self, batch, reduction="mean"):
        return F.mse_loss(self.net(batch[0])[:, 0], batch[1].to(batch[0].dtype), reduction=reduction)


class Conditional(Plain):
    """Reads the label before the loss, too."""

    def loss(self, batch, reduction="mean"):
        x, y, _ = batch
        return F.cross_entropy(self.net(x + 0.1 * y[:, None]), y, reduction=reduction)


class Shifted(Plain):
    """Makes its targets of what stands in the batch."""

    def loss(self, batch, reduction="mean"):
        return F.cross_entropy(self.net(batch[0]), (batch[1] + 1) % 3, reduction=reduction)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Regressing, "the loss has not one class a sample"),
        (Conditional, "the label does more in training_step than to be the target"),
        (Shifted, "not made of one class a sample alone, as it stands in the batch"),
    ],
)
def test_where_a_label_cannot_be_changed_the_column_is_empty_and_a_warning_says_why(make, words):
    with pytest.warns(SGDInfluenceWarning, match=words):
        ranking = ranked(Case("refused", make=make), columns=("relabel",)).ranking
    assert set(ranking.columns["relabel"]) == {""}


def test_with_the_users_own_split_it_is_not_seen_how_a_label_enters():
    with pytest.warns(SGDInfluenceWarning, match="with sample_losses= it is not seen"):
        ranked(Case("own"), columns=("relabel",), sample_losses=lambda module, batch: module.loss(batch, "none"))
