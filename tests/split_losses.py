# SPDX-License-Identifier: Apache-2.0
"""Losses of a ``training_step``, each beside its rows written out by hand.

The twin that is trained with other weights is ``sum(w * rows) / divisor``, with the divisor of the run in which all
weights are one.
"""

import torch
from torch import nn
from torch.nn import functional as F

from cases import NUM_CLASSES, TRAIN, VAL, Case, Plain
from lightning_sgdclean.base.randomness import untouched_randomness

CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.2], dtype=torch.float64)


class Split(Plain):
    """Trains by ``plain(module, batch)``; with sample weights, by ``sum(w * rows) / divisor``."""

    def __init__(self, plain, rows, **options):
        super().__init__(**options)
        self.plain, self.rows = plain, rows
        self.extra = nn.Parameter(torch.linspace(-0.3, 0.4, 5))  # as many entries as a batch has samples

    def training_step(self, batch, batch_idx):
        if self.sample_weights is None:
            return self.plain(self, batch)
        return self.twin(batch, self.sample_weights[batch[-1]])

    def twin(self, batch, weights):
        parts, rest = [], 0.0
        for part in self.rows(self, batch):
            if isinstance(part, tuple):
                rows, divisor = part
                parts.append((rows * weights.view(-1, *[1] * (rows.ndim - 1))).sum() / divisor)
            else:
                rest = rest + part
        return sum(parts) + rest

    def on_train_start(self):
        """The twin is one: with all weights one it is the loss."""
        batch = [tensor[:5].double() if tensor.is_floating_point() else tensor[:5] for tensor in self.known]
        ones = torch.ones(5, dtype=torch.float64)
        was_training = self.training
        with torch.no_grad(), untouched_randomness(torch.device("cpu")):
            self.eval()
            torch.testing.assert_close(self.plain(self, batch), self.twin(batch, ones), rtol=1e-12, atol=0)
            self.train(was_training)


def case(name, plain, rows, train=TRAIN, val=VAL, loader=None, **module):
    def make(**options):
        made = Split(plain, rows, **options)
        made.known = train.tensors
        return made

    return Case(name, {"options": {"momentum": 0.5}, **module}, {"max_epochs": 2}, loader or {}, make, train, val)


def nll_rows(logits, y):
    return -logits.log_softmax(1).gather(1, y[:, None])[:, 0]


def target(x):
    return x[:, :3].tanh()


def chance(x):
    return x[:, :3].sigmoid()


def ignoring(x, y):
    return torch.where(x[:, 0] > 0.8, -100, y)


def class_loss(plain, rows):
    return (
        lambda m, b: plain(m.net(b[0]), b[0], b[1]),
        lambda m, b: [rows(m.net(b[0]), b[0], b[1])],
    )


def smoothed(logits, y, amount):
    return (1 - amount) * nll_rows(logits, y) - amount / NUM_CLASSES * logits.log_softmax(1).sum(1)


def weighted_smoothed(logits, y, amount):
    log = logits.log_softmax(1)
    return CLASS_WEIGHTS[y] * (1 - amount) * nll_rows(logits, y) - amount / NUM_CLASSES * (log * CLASS_WEIGHTS).sum(1)


def ignored_rows(logits, x, y):
    kept = ignoring(x, y) != -100
    return nll_rows(logits, y) * kept, kept.sum()


def huber_rows(error, delta):
    near = error.abs() < delta
    return torch.where(near, 0.5 * error**2, delta * (error.abs() - 0.5 * delta))


def dense(out):
    """(B, 3) -> (B, 3, 2, 2): an image of logits."""
    return torch.stack([out, out.roll(1, 1), out**2, out.tanh()], -1).view(len(out), 3, 2, 2)


def dense_labels(y):
    return torch.stack([y, (y + 1) % 3, y, (y + 2) % 3], -1).view(len(y), 2, 2)


def dense_rows(out, y):
    return -dense(out).log_softmax(1).gather(1, dense_labels(y)[:, None])[:, 0]


def bce_rows(logits, t, positive=1.0):
    return -(positive * t * F.logsigmoid(logits) + (1 - t) * F.logsigmoid(-logits))


def kl_rows(out, x):
    q = x[:, :3].softmax(1)
    return q * (q.log() - out.log_softmax(1))


def gaussian_rows(out, x):
    var = chance(x) + 0.5
    return 0.5 * (var.log() + (out - target(x)) ** 2 / var)


LOSSES = {
    "cross entropy": (lambda o, x, y: F.cross_entropy(o, y), lambda o, x, y: (nll_rows(o, y), len(y))),
    "cross entropy module": (lambda o, x, y: nn.CrossEntropyLoss()(o, y), lambda o, x, y: (nll_rows(o, y), len(y))),
    "class weights": (
        lambda o, x, y: F.cross_entropy(o, y, weight=CLASS_WEIGHTS),
        lambda o, x, y: (CLASS_WEIGHTS[y] * nll_rows(o, y), CLASS_WEIGHTS[y].sum()),
    ),
    "label smoothing": (
        lambda o, x, y: F.cross_entropy(o, y, label_smoothing=0.2),
        lambda o, x, y: (smoothed(o, y, 0.2), len(y)),
    ),
    "smoothing and class weights": (
        lambda o, x, y: F.cross_entropy(o, y, weight=CLASS_WEIGHTS, label_smoothing=0.2),
        lambda o, x, y: (weighted_smoothed(o, y, 0.2), CLASS_WEIGHTS[y].sum()),
    ),
    "ignore_index": (lambda o, x, y: F.cross_entropy(o, ignoring(x, y)), ignored_rows),
    "probabilities": (
        lambda o, x, y: F.cross_entropy(o, x[:, :3].softmax(1)),
        lambda o, x, y: (-(x[:, :3].softmax(1) * o.log_softmax(1)).sum(1), len(y)),
    ),
    "probabilities and class weights": (
        lambda o, x, y: F.cross_entropy(o, x[:, :3].softmax(1), weight=CLASS_WEIGHTS),
        lambda o, x, y: (-(CLASS_WEIGHTS * x[:, :3].softmax(1) * o.log_softmax(1)).sum(1), len(y)),
    ),
    "images": (
        lambda o, x, y: F.cross_entropy(dense(o), dense_labels(y)),
        lambda o, x, y: (dense_rows(o, y), 4 * len(y)),
    ),
    "images flattened": (
        lambda o, x, y: F.cross_entropy(dense(o).permute(0, 2, 3, 1).reshape(-1, 3), dense_labels(y).reshape(-1)),
        lambda o, x, y: (dense_rows(o, y), 4 * len(y)),
    ),
    "summed": (
        lambda o, x, y: 0.1 * F.cross_entropy(o, y, reduction="sum"),
        lambda o, x, y: (nll_rows(o, y), 10),
    ),
    "none, then a mean": (
        lambda o, x, y: F.cross_entropy(o, y, reduction="none").mean(),
        lambda o, x, y: (nll_rows(o, y), len(y)),
    ),
    "none, then weights of the data": (
        lambda o, x, y: (F.cross_entropy(o, y, reduction="none") * chance(x)[:, 0]).sum() / chance(x)[:, 0].sum(),
        lambda o, x, y: (nll_rows(o, y) * chance(x)[:, 0], chance(x)[:, 0].sum()),
    ),
    "focal through the rows": (
        lambda o, x, y: focal(F.cross_entropy(o, y, reduction="none")).mean(),
        lambda o, x, y: (focal(nll_rows(o, y)), len(y)),
    ),
    "nll": (lambda o, x, y: F.nll_loss(o.log_softmax(1), y), lambda o, x, y: (nll_rows(o, y), len(y))),
    "nll module": (
        lambda o, x, y: nn.NLLLoss(weight=CLASS_WEIGHTS)(o.log_softmax(1), y),
        lambda o, x, y: (CLASS_WEIGHTS[y] * nll_rows(o, y), CLASS_WEIGHTS[y].sum()),
    ),
    "nll in two dimensions": (
        lambda o, x, y: F.nll_loss(dense(o).log_softmax(1), dense_labels(y)),
        lambda o, x, y: (dense_rows(o, y), 4 * len(y)),
    ),
    "bce": (
        lambda o, x, y: F.binary_cross_entropy(o.sigmoid(), chance(x)),
        lambda o, x, y: (bce_rows(o, chance(x)), 3 * len(y)),
    ),
    "bce of one number": (
        lambda o, x, y: F.binary_cross_entropy_with_logits(o[:, 0], chance(x)[:, 0]),
        lambda o, x, y: (bce_rows(o[:, 0], chance(x)[:, 0]), len(y)),
    ),
    "bce with logits, weight and pos_weight": (
        lambda o, x, y: F.binary_cross_entropy_with_logits(
            o, chance(x), weight=chance(x.flip(1)), pos_weight=CLASS_WEIGHTS
        ),
        lambda o, x, y: (chance(x.flip(1)) * bce_rows(o, chance(x), CLASS_WEIGHTS), 3 * len(y)),
    ),
    "bce module with weight": (
        lambda o, x, y: nn.BCELoss(weight=CLASS_WEIGHTS)(o.sigmoid(), chance(x)),
        lambda o, x, y: (CLASS_WEIGHTS * bce_rows(o, chance(x)), 3 * len(y)),
    ),
    "mse": (lambda o, x, y: F.mse_loss(o, target(x)), lambda o, x, y: ((o - target(x)) ** 2, 3 * len(y))),
    "mse module": (lambda o, x, y: nn.MSELoss()(o, target(x)), lambda o, x, y: ((o - target(x)) ** 2, 3 * len(y))),
    "mse with weight": (
        lambda o, x, y: F.mse_loss(o, target(x), weight=chance(x)),
        lambda o, x, y: (chance(x) * (o - target(x)) ** 2, chance(x).sum()),
    ),
    "l1": (lambda o, x, y: F.l1_loss(o, target(x)), lambda o, x, y: ((o - target(x)).abs(), 3 * len(y))),
    "l1 with weight": (
        lambda o, x, y: F.l1_loss(o, target(x), weight=chance(x)),
        lambda o, x, y: (chance(x) * (o - target(x)).abs(), chance(x).sum()),
    ),
    "smooth l1": (
        lambda o, x, y: F.smooth_l1_loss(o, target(x), beta=0.4),
        lambda o, x, y: (huber_rows(o - target(x), 0.4) / 0.4, 3 * len(y)),
    ),
    "huber": (
        lambda o, x, y: F.huber_loss(o, target(x), delta=0.4),
        lambda o, x, y: (huber_rows(o - target(x), 0.4), 3 * len(y)),
    ),
    "huber with weight": (
        lambda o, x, y: F.huber_loss(o, target(x), delta=0.4, weight=chance(x)),
        lambda o, x, y: (chance(x) * huber_rows(o - target(x), 0.4), 3 * len(y)),
    ),
    "kl": (
        lambda o, x, y: F.kl_div(o.log_softmax(1), x[:, :3].softmax(1), reduction="mean"),
        lambda o, x, y: (kl_rows(o, x), 3 * len(y)),
    ),
    "kl per batch, target in logarithms": (
        lambda o, x, y: F.kl_div(o.log_softmax(1), x[:, :3].log_softmax(1), reduction="batchmean", log_target=True),
        lambda o, x, y: (kl_rows(o, x), len(y)),
    ),
    "kl module": (
        lambda o, x, y: nn.KLDivLoss(reduction="batchmean")(o.log_softmax(1), x[:, :3].softmax(1)),
        lambda o, x, y: (kl_rows(o, x), len(y)),
    ),
    "gaussian": (
        lambda o, x, y: F.gaussian_nll_loss(o, target(x), chance(x) + 0.5),
        lambda o, x, y: (gaussian_rows(o, x), 3 * len(y)),
    ),
    "poisson": (
        lambda o, x, y: F.poisson_nll_loss(o, chance(x)),
        lambda o, x, y: (o.exp() - chance(x) * o, 3 * len(y)),
    ),
}


def focal(ce, gamma=2.0):
    return (1 - torch.exp(-ce)) ** gamma * ce


def two_views(m, b):
    return F.cross_entropy(m.net(torch.cat([b[0], -b[0]])), torch.cat([b[1], b[1]]))


def two_views_rows(m, b):
    return [(nll_rows(m.net(b[0]), b[1]) + nll_rows(m.net(-b[0]), b[1]), 2 * len(b[1]))]


def interleaved_views(m, b):
    return F.cross_entropy(m.net(torch.stack([b[0], -b[0]], 1).flatten(0, 1)), b[1].repeat_interleave(2))


def terms(m, b):
    out = m.net(b[0])
    return 0.7 * F.cross_entropy(out, b[1]) + 2 * F.mse_loss(out, target(b[0]))


def terms_rows(m, b):
    out = m.net(b[0])
    return [(0.7 * nll_rows(out, b[1]), len(b[1])), (2 * (out - target(b[0])) ** 2, 3 * len(b[1]))]


def learned_factor(m, b):
    return F.cross_entropy(m.net(b[0]), b[1]) * torch.exp(-m.extra[0]) + m.extra[0]


def learned_factor_rows(m, b):
    return [(nll_rows(m.net(b[0]), b[1]) * torch.exp(-m.extra[0]), len(b[1])), m.extra[0]]


def penalised(m, b):
    return F.cross_entropy(m.net(b[0]), b[1]) + 0.05 * sum(p.pow(2).sum() for p in m.parameters())


def penalised_rows(m, b):
    return [(nll_rows(m.net(b[0]), b[1]), len(b[1])), 0.05 * sum(p.pow(2).sum() for p in m.parameters())]


def penalised_by_a_loss(m, b):
    return F.cross_entropy(m.net(b[0]), b[1]) + F.mse_loss(m.extra, torch.zeros_like(m.extra))


def penalised_by_a_loss_rows(m, b):
    return [(nll_rows(m.net(b[0]), b[1]), len(b[1])), m.extra.pow(2).mean()]


def focal_and_penalty(m, b):
    rows = F.cross_entropy(m.net(b[0]), b[1], reduction="none")
    return focal(rows).mean() + 0.05 * sum(p.pow(2).sum() for p in m.parameters())


def focal_and_penalty_rows(m, b):
    return [(focal(nll_rows(m.net(b[0]), b[1])), len(b[1])), penalised_rows(m, b)[1]]


STEPS = {
    "two views concatenated": (two_views, two_views_rows),
    "two views side by side": (interleaved_views, two_views_rows),
    "terms with factors": (terms, terms_rows),
    "a factor that is learned": (learned_factor, learned_factor_rows),
    "a penalty": (penalised, penalised_rows),
    "a penalty by a loss function, over as many entries as samples": (penalised_by_a_loss, penalised_by_a_loss_rows),
    "focal and a penalty": (focal_and_penalty, focal_and_penalty_rows),
}
