# SPDX-License-Identifier: Apache-2.0
"""``curvature="gauss-newton"`` where a loss is the user's own, or reads more than the trained weights.

Of a network that is linear in its weights, Gauss-Newton's product is the exact one, whatever the loss: the exact
engine, which is held against whole fits elsewhere, gives the truth.
"""

import numpy as np
import pytest
import torch
from test_manual_optimization import Accumulates, AccumulatesAndClips, Manual
from test_own_losses import LOSSES
from test_scratch_buffers import Logging, Reading
from test_teachers import Byol
from torch import nn
from torch.nn import functional as F

from cases import NUM_CLASSES, Case, Plain, adam
from lightning_sgdclean.base.errors import UnsupportedOperationError, UnsupportedTrainingError
from reference import influences, ranked
from split_losses import case as split_case
from weighted_losses import CASES, Weighted, weighted


def linear():
    return nn.Sequential(nn.Linear(5, NUM_CLASSES))


def assert_exact(case, **options):
    one, other = (influences(ranked(case, curvature=c, **options)) for c in ("gauss-newton", "exact"))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-10 * abs(other).max())
    without = influences(ranked(case, curvature="none", **options))
    assert abs(without - other).max() > 1e-3 * abs(other).max()


@pytest.mark.parametrize(
    "name",
    [
        "samples picked by a mask",
        "one call a sample",
        "cross-entropy, a part of one's own, a penalty",
    ],
)
def test_losses_written_by_hand_of_loss_calls_are_followed(name):
    assert_exact(split_case(name, *LOSSES[name], net=linear))


@pytest.mark.parametrize("name", ["gather", "rows picked by a mask"])
def test_those_without_a_loss_call_are_refused_by_name(name):
    with pytest.raises(UnsupportedOperationError, match=r"found no loss call.*curvature=\"exact\""):
        ranked(split_case(name, *LOSSES[name], net=linear), curvature="gauss-newton")


class WeightInTheCall(Weighted):
    """The weights enter the loss call with the outputs."""

    def loss_with(self, batch, weights):
        out, aim = self.net(batch[0]), F.one_hot(batch[1], NUM_CLASSES).to(batch[0])
        root = weights[:, None].clamp(min=1e-12).sqrt()
        rows = F.binary_cross_entropy_with_logits(out, aim, reduction="none").mean(1)
        return F.mse_loss(root * out, root * aim) + 0.3 * (weights * rows).mean()


WEIGHTED = {
    "mixup": (CASES["mixup"].make, {"make_optimizer": adam}),
    "normalised focal": (CASES["normalised focal"].make, {"options": {"momentum": 0.5}}),
    "in the call": (WeightInTheCall, {"options": {"momentum": 0.5}}),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_of_weighted_loss_the_calls_within_are_what_is_cut(name):
    make, module = WEIGHTED[name]
    case = Case(name, {**module, "net": linear}, {"max_epochs": 2}, make=make)
    assert_exact(case, weighted_loss=weighted)


@pytest.mark.parametrize("name", ["cox", "barlow"])
def test_weighted_loss_without_a_loss_call_is_refused_by_name(name):
    with pytest.raises(UnsupportedOperationError, match=r"found no loss call.*curvature=\"exact\""):
        ranked(CASES[name], weighted_loss=weighted, curvature="gauss-newton")


class Average(Byol):
    """The teacher is only validated."""

    def __init__(self):
        super().__init__(validates=True)
        self.net, self.teacher = linear(), linear().requires_grad_(False)
        self.teacher.load_state_dict(self.net.state_dict())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_an_average_of_the_weights_that_is_only_validated_is_followed():
    assert_exact(Case("average", {}, {"max_epochs": 2}, make=Average))


@pytest.mark.parametrize(
    ("where", "trainer"),
    [("before", {}), ("before", {"accumulate_grad_batches": 2}), ("on_train_batch_end", {})],
    ids=str,
)
def test_a_teacher_that_training_step_reads_is_refused_by_name(where, trainer):
    with pytest.raises(UnsupportedOperationError, match=r"reads 'teacher.*curvature=\"exact\""):
        ranked(Case("byol", {"where": where}, {"max_epochs": 1, **trainer}, make=Byol), curvature="gauss-newton")


def test_buffers_that_nothing_reads_are_no_state_and_those_that_are_read_are_refused_by_name():
    assert_exact(Case("logging", {"net": linear}, {"max_epochs": 2}, make=Logging))
    with pytest.raises(UnsupportedTrainingError, match=r"'average'.*step 7 reads"):
        ranked(Case("reading", {"in_training_from": 7}, {"max_epochs": 2}, make=Reading), curvature="gauss-newton")


def adafactor(params, **options):
    return torch.optim.Adafactor(params, lr=0.05)


@pytest.mark.parametrize(
    ("make", "module"),
    [
        (Manual, {"make_optimizer": adam}),
        (Accumulates, {}),
        (AccumulatesAndClips, {}),
        (Plain, {"make_optimizer": adafactor}),
    ],
    ids=["alone", "accumulated", "clipped", "Adafactor"],
)
def test_steps_by_hand_and_steps_of_other_optimizers_are_followed(make, module):
    """The gradient is had from Adam's moments alone; else it is computed first."""
    assert_exact(Case("steps", {"net": linear, **module}, {"max_epochs": 2}, make=make))
