# SPDX-License-Identifier: Apache-2.0
"""Modules that step by hand in the style of lightning-bolts, with one optimizer; no further package is needed."""

import torch
from torch import nn
from torch.nn import functional as F

from cases import Case, Plain, adam, warm_up
from reference import assert_influence_is_the_derivative


class ByHand(Plain):
    """Zeroes, goes backward, clips and steps itself, and its schedule, too."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()
        if self.lr_schedulers() is not None:
            self.lr_schedulers().step()


class VAE(ByHand):
    """lightning-bolts' variational autoencoder: a reconstruction, and a divergence by hand."""

    def __init__(self):
        super().__init__(make_optimizer=adam, net=lambda: nn.Linear(5, 6))
        self.mu, self.log_var, self.decoder = nn.Linear(6, 2), nn.Linear(6, 2), nn.Linear(2, 5)

    def loss(self, batch, reduction="mean"):
        x, hidden = batch[0], self.net(batch[0]).tanh()
        mu, log_var = self.mu(hidden), self.log_var(hidden)
        z = mu + (log_var / 2).exp() * torch.randn_like(mu) if self.training else mu
        divergence = -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum(1)
        rows = F.mse_loss(self.decoder(z.tanh()), x, reduction="none").mean(1) + 0.1 * divergence
        return rows.mean() if reduction == "mean" else rows


def test_a_step_by_hand_is_followed_as_lightnings_own_is():
    assert_influence_is_the_derivative(Case("by hand", {"make_optimizer": adam, "schedule": warm_up}, make=ByHand))


def test_a_variational_autoencoder_that_steps_by_hand_is_followed():
    assert_influence_is_the_derivative(Case("VAE", make=VAE))
