# SPDX-License-Identifier: Apache-2.0
"""Buffers that training moves and nothing reads are no state; those that are read are refused by name."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import Case, Plain, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import UnsupportedTrainingError
from reference import assert_influence_is_the_derivative


class Bayesian(nn.Module):
    """A layer whose weights are drawn anew in each forward pass, into buffers."""

    def __init__(self, num_in, num_out):
        super().__init__()
        self.mean = nn.Linear(num_in, num_out)
        self.rho = nn.Parameter(torch.full((num_out, num_in), -2.0))
        self.register_buffer("noise", torch.zeros(num_out, num_in))
        self.register_buffer("last", torch.zeros(5, num_out))

    def forward(self, x):
        weight = self.mean.weight
        if self.training:
            self.noise.data.normal_()
            weight = weight + F.softplus(self.rho) * self.noise
        output = F.linear(x, weight, self.mean.bias)
        if len(x) == len(self.last):
            self.last.copy_(output.detach())
        return output


def bayesian():
    return nn.Sequential(Bayesian(5, 6), nn.Tanh(), Bayesian(6, 3))


class Logging(Plain):
    """Keeps an average of its losses, which nobody reads, and is written to between the steps, too."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.average.mul_(0.9).add_(loss.detach(), alpha=0.1)
        self.steps += 1
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.average += 1.0


@pytest.mark.parametrize("trainer", [{"max_epochs": 2}, {"max_epochs": 1, "accumulate_grad_batches": 2}], ids=str)
def test_noise_of_bayesian_layers_is_no_state(trainer):
    assert_influence_is_the_derivative(Case("bayesian", {"net": bayesian}, trainer))


@pytest.mark.parametrize("snapshots", ["every", 4])
def test_logs_in_buffers_are_no_state(snapshots):
    case = Case("logging", {"norm": True}, {"max_epochs": 2}, make=Logging)
    assert_influence_is_the_derivative(case, snapshots=snapshots)


class Reading(Logging):
    """Reads its average: in training from some step on, or in validation."""

    def __init__(self, in_training_from=10**6, in_validation=False):
        super().__init__()
        self.in_training_from, self.in_validation = in_training_from, in_validation

    def training_step(self, batch, batch_idx):
        factor = 1 + self.average.clone() * (1e-9 if self.in_training_from == self.global_step else 0)
        factor = factor if self.in_training_from == self.global_step else 1.0
        return super().training_step(batch, batch_idx) * factor

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("val_loss", loss * (1 + 1e-9 * self.average) if self.in_validation else loss)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"in_training_from": 1}, "step 1 reads"),
        ({"in_training_from": 7}, "step 7 reads"),
        ({"in_validation": True}, "the objective reads"),
    ],
    ids=str,
)
def test_a_buffer_that_is_read_however_little_is_refused_by_name(options, where):
    trainer = quiet_trainer([SGDInfluence("val_loss", epochs="all", verify=0)])
    with pytest.raises(UnsupportedTrainingError, match=f"'average'.*{where}"):
        trainer.fit(Reading(**options), *loaders())
