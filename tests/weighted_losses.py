# SPDX-License-Identifier: Apache-2.0
"""Losses that are no mean over samples, each with weights on its samples."""

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from cases import NUM_CLASSES, TRAIN, VAL, Case, Plain, adam


class Weighted(Plain):
    """``training_step`` gives ``loss_with`` at weights of 1, or at those of the twin that is trained with weights."""

    def loss_with(self, batch, weights):
        raise NotImplementedError

    def training_step(self, batch, batch_idx):
        ones = torch.ones(len(batch[0]), dtype=self.net[0].weight.dtype)
        loss = self.loss_with(batch, ones if self.sample_weights is None else self.sample_weights[batch[-1]])
        self.log("train_loss", loss)
        return loss


def weighted(module, batch, weights):
    return module.loss_with(batch, weights)


class Dice(Weighted):
    def loss_with(self, batch, weights):
        chance, truth = self.net(batch[0]).softmax(1), F.one_hot(batch[1], NUM_CLASSES)
        inside, both = (weights @ (chance * truth)), (weights @ (chance + truth))
        return 1 - ((2 * inside + 1) / (both + 1)).mean()


class Jaccard(Weighted):
    def loss_with(self, batch, weights):
        chance, truth = self.net(batch[0]).softmax(1), F.one_hot(batch[1], NUM_CLASSES)
        inside = weights @ (chance * truth)
        return 1 - ((inside + 1) / (weights @ (chance + truth) - inside + 1)).mean()


class Cox(Weighted):
    """A sample of weight zero leaves the risk sets, too."""

    def loss_with(self, batch, weights):
        order = batch[1][:, 0].argsort(descending=True)
        risk, event, weights = self.net(batch[0])[:, 0][order], batch[1][:, 1][order], weights[order]
        at_risk = (weights * risk.exp()).cumsum(0).clamp(min=1e-12).log()
        return -(weights * event * (risk - at_risk)).sum() / len(risk)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def loss(self, batch, reduction="mean"):
        return (self.net(batch[0])[:, 0] + batch[1][:, 0].log()).pow(2).mean()


class NTXent(Weighted):
    """A sample's own anchors count by its weight; it stays the others' negative."""

    def loss_with(self, batch, weights):
        views = torch.cat([batch[0] + 0.1 * torch.randn_like(batch[0]) for _ in range(2)])
        z, num = F.normalize(self.net(views), dim=1), len(weights)
        likeness = (z @ z.T / 0.5).masked_fill(torch.eye(2 * num, dtype=torch.bool), -1e9)
        partner = torch.arange(2 * num).roll(num)
        return (weights.repeat(2) * F.cross_entropy(likeness, partner, reduction="none")).sum() / (2 * num)


class Barlow(Weighted):
    def loss_with(self, batch, weights):
        one, two = (self.net(batch[0] + 0.1 * torch.randn_like(batch[0])) for _ in range(2))
        one, two = ((z - z.mean(0)) / (z.std(0) + 1e-3) for z in (one, two))
        likeness = (weights[:, None] * one).T @ two / len(weights)
        wanted = torch.eye(len(likeness), dtype=one.dtype)
        return ((likeness - wanted) * (wanted + 0.3 * (1 - wanted))).pow(2).sum()


class VICReg(Weighted):
    def loss_with(self, batch, weights):
        one, two = (self.net(batch[0] + 0.1 * torch.randn_like(batch[0])) for _ in range(2))
        loss = (weights * (one - two).pow(2).mean(1)).sum() / len(weights)
        for z in (one, two):
            away = z - (weights @ z) / len(weights)
            spread = (weights[:, None] * away).T @ away / (len(weights) - 1)
            loss = loss + F.relu(1 - (spread.diagonal() + 1e-4).sqrt()).mean() + spread.triu(1).pow(2).sum() / 3
        return loss


class NormalisedFocal(Weighted):
    def loss_with(self, batch, weights):
        rows = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        focus = (1 - (-rows).exp()) ** 2
        return (weights * focus * rows).sum() / (weights * focus).sum()


class Mixup(Weighted):
    def loss_with(self, batch, weights):
        x, y, _ = batch
        share, other = float(np.random.beta(0.4, 0.4)), torch.randperm(len(x))
        logits = self.net(share * x + (1 - share) * x[other])
        own = weights * F.cross_entropy(logits, y, reduction="none")
        others = weights[other] * F.cross_entropy(logits, y[other], reduction="none")
        return (share * own + (1 - share) * others).mean()


class Blended(Weighted):
    """Mixup by one share."""

    def __init__(self, share, **options):
        super().__init__(**options)
        self.share = share

    def loss_with(self, batch, weights):
        x, y, _ = batch
        other = torch.randperm(len(x))
        logits = self.net(self.share * x + (1 - self.share) * x[other])
        own, others = (F.cross_entropy(logits, target, reduction="none") for target in (y, y[other]))
        return (self.share * weights * own + (1 - self.share) * weights[other] * others).mean()


class CutMix(Weighted):
    """Of five numbers in a row, which are a picture here, some come from another sample."""

    def loss_with(self, batch, weights):
        x, y, _ = batch
        other, begin = torch.randperm(len(x)), int(torch.randint(0, 4, ()))
        mixed = x.clone()
        mixed[:, begin : begin + 2] = x[other, begin : begin + 2]
        logits = self.net(mixed)
        own = weights * F.cross_entropy(logits, y, reduction="none")
        others = weights[other] * F.cross_entropy(logits, y[other], reduction="none")
        return (0.6 * own + 0.4 * others).mean()


def times(data, seed):
    """Survival times that fall with a sample's first number, and whether they ended by an event."""
    source = torch.Generator().manual_seed(seed)
    x, _, i = data.tensors
    found = torch.stack([(0.3 * torch.randn(len(x), generator=source) - x[:, 0]).exp(), (i % 4 != 1).float()], 1)
    return TensorDataset(x, found, i)


MOMENTUM = {"options": {"momentum": 0.5}}
SHORT = {"max_epochs": 2}
CASES = {
    case.name: case
    for case in [
        Case("dice", {"norm": True, "dropout": 0.2, **MOMENTUM}, SHORT, make=Dice),
        Case("jaccard", MOMENTUM, SHORT, make=Jaccard),
        Case("cox", {"make_optimizer": adam}, SHORT, make=Cox, train=times(TRAIN, 4), val=times(VAL, 5)),
        Case("nt-xent", MOMENTUM, {**SHORT, "accumulate_grad_batches": 2}, make=NTXent),
        Case("barlow", {"options": {"lr": 0.02}}, SHORT, make=Barlow),
        Case("vicreg", MOMENTUM, SHORT, make=VICReg),
        Case("normalised focal", MOMENTUM, {**SHORT, "gradient_clip_val": 0.3}, make=NormalisedFocal),
        Case("mixup", {"norm": True, "make_optimizer": adam}, SHORT, make=Mixup),
        Case("cutmix", {"dropout": 0.2, **MOMENTUM}, SHORT, make=CutMix),
    ]
}
