# SPDX-License-Identifier: Apache-2.0
"""Survival losses of torchsurv: Weibull's is a mean over samples, Cox's compares each with those at risk.

torchsurv computes them in 32 bits whatever the run's precision is. So the truth is had of the same losses, written out.
"""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchsurv.loss.cox import neg_partial_log_likelihood
from torchsurv.loss.weibull import neg_log_likelihood_weibull

from cases import NUM_TRAIN, NUM_VAL, Case, Plain, adam
from lightning_sgdclean.base.errors import LossSplitError
from reference import assert_influence_is_the_derivative, influences, ranked


def patients(num, seed):
    source = torch.Generator().manual_seed(seed)
    x, event = torch.randn(num, 5, generator=source), torch.rand(num, generator=source) < 0.9
    time = (1 + x[:, 0]).exp() * (0.5 + torch.rand(num, generator=source))
    return TensorDataset(x, event, time, torch.arange(num))


PATIENTS = {"train": patients(NUM_TRAIN, 1), "val": patients(NUM_VAL, 2)}


class ByHand(Plain):
    """Weibull's likelihood, written out."""

    def __init__(self, num_out=2, **options):
        super().__init__(net=lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, num_out)), **options)

    def rows(self, batch):
        x, event, time, _ = batch
        log_scale, log_shape = self.net(x).unbind(1)
        risen = (time.log() - log_scale) * log_shape.exp()
        return risen.exp() - event * (log_shape - time.log() + risen)

    def loss(self, batch, reduction="mean"):
        return self.rows(batch).mean() if reduction == "mean" else self.rows(batch)


class Weibull(ByHand):
    def loss(self, batch, reduction="mean"):
        x, event, time, _ = batch
        return neg_log_likelihood_weibull(self.net(x), event, time)


def rows(module, batch):
    return module.rows(batch)


def test_weibull_is_followed_by_its_losses_of_samples():
    batch = PATIENTS["train"].tensors
    assert torch.allclose(ByHand().loss(batch), Weibull().loss(batch))
    exact, own = (Case("Weibull", {"make_optimizer": adam}, make=make, **PATIENTS) for make in (ByHand, Weibull))
    callback = assert_influence_is_the_derivative(exact, sample_losses=rows)
    own.trainer["precision"] = "32-true"
    assert influences(ranked(own, sample_losses=rows)) == pytest.approx(influences(callback), rel=1e-2, abs=1e-4)


class Cox(Plain):
    """The partial likelihood, written out."""

    def __init__(self, **options):
        super().__init__(net=lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)), **options)

    def loss(self, batch, reduction="mean"):
        return weighted(self, batch, torch.ones(len(batch[0])))

    def training_step(self, batch, batch_idx):
        if self.sample_weights is None:
            return self.loss(batch)
        return weighted(self, batch, self.sample_weights[batch[-1]])


class OfTorchsurv(Cox):
    def loss(self, batch, reduction="mean"):
        x, event, time, _ = batch
        return neg_partial_log_likelihood(self.net(x), event, time, ties_method="breslow")


def weighted(module, batch, weights):
    """Each event counts as much as its sample weighs, and so does each sample among those at risk."""
    x, event, time, _ = batch
    hazard = module.net(x)[:, 0]
    at_risk = (time[None, :] >= time[:, None]).to(hazard)
    risk = (at_risk * (weights * hazard.exp())[None, :]).sum(1)
    counts = event & (weights > 0)
    return (weights[counts] * (risk[counts].log() - hazard[counts])).sum() / event.sum()


def test_cox_compares_samples_and_is_refused_before_training():
    with pytest.raises(LossSplitError, match="_loss"):
        ranked(Case("Cox", make=OfTorchsurv, **PATIENTS))


def test_cox_is_followed_where_its_weighted_form_is_given():
    batch = PATIENTS["train"].tensors
    assert torch.allclose(Cox().loss(batch), OfTorchsurv().loss(batch))
    case = Case("Cox", {"make_optimizer": adam}, loader={"batch_size": 8}, make=Cox, **PATIENTS)
    assert_influence_is_the_derivative(case, 1e-6, weighted_loss=weighted)
