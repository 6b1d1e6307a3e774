# SPDX-License-Identifier: Apache-2.0
"""Survival losses of torchsurv: Weibull's is a mean over samples, Cox's compares each with those at risk."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchsurv.loss.cox import neg_partial_log_likelihood
from torchsurv.loss.weibull import neg_log_likelihood_weibull

from cases import NUM_TRAIN, NUM_VAL, Case, Plain, adam
from lightning_sgdclean.base.errors import LossSplitError
from reference import assert_influence_is_the_derivative, ranked


def patients(num, seed):
    source = torch.Generator().manual_seed(seed)
    x, event = torch.randn(num, 5, generator=source), torch.rand(num, generator=source) < 0.7
    time = (1 + x[:, 0]).exp() * (0.5 + torch.rand(num, generator=source))
    return TensorDataset(x, event, time, torch.arange(num))


PATIENTS = {"train": patients(NUM_TRAIN, 1), "val": patients(NUM_VAL, 2)}


class Weibull(Plain):
    def __init__(self, num_out=2, **options):
        super().__init__(net=lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, num_out)), **options)

    def loss(self, batch, reduction="mean"):
        x, event, time, _ = batch
        params = self.net(x)
        if reduction == "mean":
            return neg_log_likelihood_weibull(params, event, time)
        rows = zip(params.split(1), event.split(1), time.split(1), strict=True)
        return torch.stack([neg_log_likelihood_weibull(*row) for row in rows])


class Cox(Weibull):
    """Trained by the weighted partial likelihood with weights of one, which is torchsurv's."""

    def __init__(self, **options):
        super().__init__(num_out=1, **options)

    def loss(self, batch, reduction="mean"):
        x, event, time, _ = batch
        return neg_partial_log_likelihood(self.net(x), event, time, ties_method="breslow", reduction=reduction)

    def training_step(self, batch, batch_idx):
        weights = torch.ones(len(batch[0]))
        return weighted(self, batch, weights if self.sample_weights is None else self.sample_weights[batch[-1]])


def weighted(module, batch, weights):
    """Each event counts as much as its sample weighs, and so does each sample among those at risk."""
    x, event, time, _ = batch
    hazard = module.net(x)[:, 0]
    at_risk = (time[None, :] >= time[:, None]).to(hazard)
    risk = (at_risk * (weights * hazard.exp())[None, :]).sum(1)
    counts = event & (weights > 0)
    return (weights[counts] * (risk[counts].log() - hazard[counts])).sum() / event.sum()


class Unweighted(Cox):
    def training_step(self, batch, batch_idx):
        return self.loss(batch)


def test_weibull_is_followed_by_its_own_losses_of_samples():
    case = Case("Weibull", {"make_optimizer": adam}, make=Weibull, **PATIENTS)
    assert_influence_is_the_derivative(case, 1e-6, sample_losses=lambda module, batch: module.loss(batch, "none"))


def test_cox_compares_samples_and_is_refused_before_training():
    with pytest.raises(LossSplitError, match="_loss"):
        ranked(Case("Cox", make=Unweighted, **PATIENTS))


def test_cox_is_followed_where_its_weighted_form_is_given():
    module, batch = Cox(), PATIENTS["train"].tensors
    assert torch.allclose(weighted(module, batch, torch.ones(NUM_TRAIN)), module.loss(batch))
    case = Case("Cox", {"make_optimizer": adam}, loader={"batch_size": 8}, make=Cox, **PATIENTS)
    assert_influence_is_the_derivative(case, 1e-6, weighted_loss=weighted)
