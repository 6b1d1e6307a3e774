# SPDX-License-Identifier: Apache-2.0
"""Rows found in the graph of a loss: which are taken, and what is refused by name."""

import pytest
import torch
from torch.nn import functional as F

from cases import TRAIN, Plain, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import LossSplitError


def rows(m, b):
    return -m.net(b[0]).log_softmax(1).gather(1, b[1][:, None])[:, 0]


def squared_mean(m, b):
    return rows(m, b).mean() ** 2


def product_of_means(m, b):
    return rows(m, b).mean() * m.net(b[0]).pow(2).mean()


def log_of_mean(m, b):
    return rows(m, b).mean().log()


def normalised(m, b):
    losses = rows(m, b)
    return ((losses - losses.mean()) / losses.std()).pow(2).mean() + losses.mean()


def with_deviation(m, b):
    return rows(m, b).mean() + 0.1 * rows(m, b).std()


def hardest(m, b):
    return rows(m, b).topk(3).values.mean()


def worst(m, b):
    return rows(m, b).max()


def sorted_by_loss(m, b):
    losses = rows(m, b).sort().values
    return (losses * torch.linspace(0, 1, len(losses))).mean()


def root(m, b):
    return rows(m, b).pow(2).sum().sqrt()


def divided_by_what_is_learned(m, b):
    return rows(m, b).sum() / m.net(b[0]).exp().sum()


def divided_by_what_hides(m, b):
    out = m.net(b[0]).sum()
    return rows(m, b).mean() * (1 + out - out.detach())


def mixup(m, b):
    log = m.net(0.7 * b[0] + 0.3 * b[0].flip(0)).log_softmax(1)
    return -(0.7 * log.gather(1, b[1][:, None]) + 0.3 * log.gather(1, b[1].flip(0)[:, None])).mean()


def contrastive(m, b):
    one, two = F.normalize(m.net(b[0])), F.normalize(m.net(-b[0]))
    return -(one @ two.T).log_softmax(1).diagonal().mean()


def all_pairs(m, b):
    out = m.net(b[0])[:, 0]
    return (out[:, None] - out[None]).sigmoid().mean()


def foreign_labels(m, b):
    return -m.net(b[0]).log_softmax(1).gather(1, b[1].flip(0)[:, None]).mean()


def foreign_labels_by_product(m, b):
    return -(m.net(b[0]).log_softmax(1) * F.one_hot(b[1].flip(0), 3)).sum(1).mean()


def foreign_labels_one_by_one(m, b):
    log = m.net(b[0]).log_softmax(1)
    return -sum(log[i, int(b[1][i - 1])] for i in range(len(log))) / len(log)


def swapped(m, b):
    order = b[0][:, 0].argsort()
    return rows(m, [b[0][order], b[1][order]]).mean()


def swapped_sum(m, b):
    return (rows(m, b) + rows(m, b).flip(0)).mean()


def picked_by_another(m, b):
    return rows(m, b)[b[0][:, 0].roll(1) > 0].mean()


def a_term_for_all_beside_a_divisor(m, b):
    """Below the divisor the scale would look like a penalty, but it is in each sample's loss."""
    kept = b[0][:, 0] > 0
    return (rows(m, b) * kept / kept.sum() + m.net[4].bias[0]).sum()


def hooked(m, b):
    loss = rows(m, b).mean()
    loss.register_hook(lambda grad: 2 * grad)
    return loss


def normalised_by_hand(m, b):
    """As BatchNorm does, which is told apart where it is torch's own."""
    out = m.net(b[0])
    return (((out - out.mean(0)) / (out.var(0) + 1) - b[0][:, :3]) ** 2).mean()


def penalties_like_samples(m, b):
    """As many numbers to be kept small as there are samples, each added as a sample's loss is."""
    off = m.net(b[0]) - b[0][:, :3]
    return sum(part.pow(2).sum() for part in [*off, *m.net[0].weight[:5, 0].view(-1, 1)])


REFUSED = {
    penalties_like_samples: "no multiple|move with no sample",
    squared_mean: "depends on several",
    product_of_means: "depends on the samples|depends on several",
    log_of_mean: "depends on several",
    normalised: "depends on several",
    with_deviation: "depends on several.*Std",
    hardest: "Topk|several",
    worst: "Max",
    sorted_by_loss: "several",
    root: "Sqrt",
    divided_by_what_is_learned: "divided by",
    divided_by_what_hides: "gradient depends on the samples|depends on the samples",
    mixup: "several",
    contrastive: "several",
    all_pairs: "several",
    foreign_labels: "several",
    hooked: "several",
    normalised_by_hand: "several",
    foreign_labels_by_product: "several",
    foreign_labels_one_by_one: "several",
    swapped: "swapped|several",
    swapped_sum: "swapped|several",
    picked_by_another: "no mask or index|several",
    a_term_for_all_beside_a_divisor: "several|moves with no sample",
}


@pytest.mark.parametrize("loss", REFUSED, ids=lambda loss: loss.__name__)
def test_what_is_no_sum_of_samples_losses_is_refused_by_name_before_the_first_step(loss):
    class Own(Plain):
        def training_step(self, batch, batch_idx):
            return loss(self, batch)

    trainer = quiet_trainer([SGDInfluence("val_loss")])
    with pytest.raises(LossSplitError, match=f"(?s)({REFUSED[loss]}).*sample_losses="):
        trainer.fit(Own(), *loaders(TRAIN))
    assert trainer.global_step == 0
