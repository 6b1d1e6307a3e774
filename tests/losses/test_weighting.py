# SPDX-License-Identifier: Apache-2.0
"""Weights inside torch's losses: the value stays, the derivative by a weight is the sample's part."""

import pytest
import torch
from torch.nn import functional as F

from lightning_sgdclean.losses.weighting import SampleWeights

N, C = 6, 4


def losses():
    torch.manual_seed(0)
    logits, labels = torch.randn(N, C, dtype=torch.float64), torch.randint(0, C, (N,))
    other, weight = torch.rand(N, C, dtype=torch.float64), torch.rand(C, dtype=torch.float64)
    some = labels.clone()
    some[2] = -100
    images, dense = torch.randn(N, C, 3, 2, dtype=torch.float64), torch.randint(0, C, (N, 3, 2))
    logp = logits.log_softmax(1)
    return {
        "cross entropy": lambda i: F.cross_entropy(logits[i], labels[i]),
        "class weights": lambda i: F.cross_entropy(logits[i], labels[i], weight=weight),
        "ignored": lambda i: F.cross_entropy(logits[i], some[i]),
        "smoothed and weighted": lambda i: F.cross_entropy(logits[i], some[i], weight=weight, label_smoothing=0.2),
        "probabilities": lambda i: F.cross_entropy(logits[i], other[i].softmax(1)),
        "images": lambda i: F.cross_entropy(images[i], dense[i]),
        "summed": lambda i: F.cross_entropy(logits[i], labels[i], reduction="sum"),
        "none, then a mean": lambda i: F.cross_entropy(logits[i], labels[i], reduction="none").mean(),
        "nll": lambda i: F.nll_loss(logp[i], labels[i], weight=weight),
        "module": lambda i: torch.nn.CrossEntropyLoss()(logits[i], labels[i]),
        "bce": lambda i: F.binary_cross_entropy(other[i], other[i].round()),
        "bce logits": lambda i: F.binary_cross_entropy_with_logits(logits[i], other[i], pos_weight=weight),
        "mse": lambda i: F.mse_loss(logits[i], other[i]),
        "l1": lambda i: F.l1_loss(logits[i], other[i]),
        "smooth l1": lambda i: F.smooth_l1_loss(logits[i], other[i]),
        "huber": lambda i: F.huber_loss(logits[i], other[i]),
        "kl": lambda i: F.kl_div(logp[i], other[i]),
        "kl per batch": lambda i: F.kl_div(logp[i], other[i], reduction="batchmean"),
        "poisson": lambda i: F.poisson_nll_loss(logits[i], other[i]),
        "gaussian": lambda i: F.gaussian_nll_loss(logits[i], other[i], other[i] + 1),
    }


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@pytest.mark.parametrize("name", losses())
def test_value_stays_and_the_parts_add_up_to_it(name):
    loss, everything = losses()[name], torch.arange(N)
    plain = loss(everything)
    weights = torch.ones(N, dtype=torch.float64, requires_grad=True)
    with SampleWeights(weights) as mode:
        weighted = loss(everything)
    assert weighted.item() == plain.item()
    parts = torch.autograd.grad(weighted, weights)[0]
    assert parts.sum().item() == pytest.approx(plain.item(), rel=1e-12)
    assert all(term.owners is not None for term in mode.calls)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@pytest.mark.parametrize("name", ["cross entropy", "mse", "bce", "images", "kl"])
def test_part_of_a_sample_is_its_own_loss_over_the_batch_size(name):
    loss = losses()[name]
    weights = torch.ones(N, dtype=torch.float64, requires_grad=True)
    with SampleWeights(weights):
        parts = torch.autograd.grad(loss(torch.arange(N)), weights)[0]
    alone = torch.stack([loss(torch.tensor([i])) for i in range(N)]) / N
    torch.testing.assert_close(parts, alone, rtol=1e-12, atol=0)
