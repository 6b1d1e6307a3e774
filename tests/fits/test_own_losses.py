# SPDX-License-Identifier: Apache-2.0
"""Losses written by hand, without ``sample_losses=``, against central differences of whole fits.

Each stands beside its rows, one or a block a sample, with what they are divided by. A row that counted as another
sample's would be seen: the differences are along a direction in which no two samples are alike.
"""

import pytest
import torch
from torch import nn
from torch.distributions import NegativeBinomial, Normal
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from cases import TRAIN, data
from left_out import again, without
from reference import assert_influence_is_the_derivative, influences, ranked
from split_losses import case, nll_rows, smoothed, target


def normal(m, b):
    """The scale is learned, one for all: it is in each sample's loss."""
    return -Normal(m.net(b[0]), m.extra[:3].exp()).log_prob(target(b[0])).sum(1).mean()


def normal_rows(m, b):
    scale = m.extra[:3].exp()
    rows = 0.5 * ((target(b[0]) - m.net(b[0])) / scale) ** 2 + scale.log() + 0.9189385332046727
    return [(rows, len(b[0]))]


def counts(b):
    return (3 * b[0][:, :3].sigmoid()).round()


def negative_binomial(m, b):
    return -NegativeBinomial(m.extra[:3].exp(), logits=m.net(b[0])).log_prob(counts(b)).mean()


def negative_binomial_rows(m, b):
    return [(-NegativeBinomial(m.extra[:3].exp(), logits=m.net(b[0])).log_prob(counts(b)), 3 * len(b[0]))]


def gathered(m, b):
    return -m.net(b[0]).log_softmax(1).gather(1, b[1][:, None]).mean()


def quantile_of(m, b):
    off = target(b[0]) - m.net(b[0])
    return torch.maximum(0.9 * off, -0.1 * off)


def timm(m, b):
    log = m.net(b[0]).log_softmax(-1)
    nll = -log.gather(dim=-1, index=b[1].unsqueeze(1)).squeeze(1)
    return (0.8 * nll + 0.2 * -log.mean(dim=-1)).mean()


def drawn(m, mu):
    return torch.randn_like(mu) if m.training else torch.zeros_like(mu)


def elbo(m, b):
    mu, log_var = m.net(b[0]), 0.3 * m.net(-b[0])
    z = mu + drawn(m, mu) * (0.5 * log_var).exp()
    kl = -0.5 * (1 + log_var - mu.pow(2) - log_var.exp()).sum()
    return F.mse_loss(z @ m.net[4].weight.T[:3], target(b[0]), reduction="sum") / len(mu) + 0.5 * kl / len(mu)


def elbo_rows(m, b):
    mu, log_var = m.net(b[0]), 0.3 * m.net(-b[0])
    z = mu + drawn(m, mu) * (0.5 * log_var).exp()
    kl = -0.5 * (1 + log_var - mu.pow(2) - log_var.exp())
    return [((z @ m.net[4].weight.T[:3] - target(b[0])) ** 2, len(mu)), (0.5 * kl, len(mu))]


def mask_of(b):
    """Of each sample 0 to 3 entries."""
    return b[0][:, :3] > -0.4


def token_mean(m, b):
    rows = (m.net(b[0]) - target(b[0])).abs().pow(1.5) * mask_of(b)
    return rows.sum() / mask_of(b).sum()


def token_rows(m, b):
    return [((m.net(b[0]) - target(b[0])).abs().pow(1.5) * mask_of(b), mask_of(b).sum())]


def picked(m, b):
    return (m.net(b[0]) - target(b[0])).abs().pow(1.5)[mask_of(b)].mean()


def picked_before(m, b):
    """Masked positions, as of a language model."""
    places = mask_of(b).nonzero(as_tuple=True)
    return F.smooth_l1_loss(m.net(b[0])[places], target(b[0])[places])


def picked_before_rows(m, b):
    rows = F.smooth_l1_loss(m.net(b[0]), target(b[0]), reduction="none")
    return [(rows * mask_of(b), mask_of(b).sum())]


def kept_samples(m, b):
    kept = b[0][:, 0] > -1.0
    return F.cross_entropy(m.net(b[0])[kept], b[1][kept])


def kept_samples_rows(m, b):
    kept = b[0][:, 0] > -1.0
    return [(nll_rows(m.net(b[0]), b[1]) * kept, kept.sum())]


def packed(m, b):
    lengths = 1 + mask_of(b)[:, 1:].sum(1)
    pack = nn.utils.rnn.pack_padded_sequence
    out, aim = (
        pack(values, lengths, batch_first=True, enforce_sorted=False).data
        for values in (m.net(b[0])[..., None], target(b[0])[..., None])
    )
    return (out - aim).pow(2).mean()


def packed_rows(m, b):
    lengths = 1 + mask_of(b)[:, 1:].sum(1)
    kept = torch.arange(3) < lengths[:, None]
    return [((m.net(b[0]) - target(b[0])) ** 2 * kept, kept.sum())]


def sample_by_sample(m, b):
    losses = [F.mse_loss(out, aim) for out, aim in zip(m.net(b[0]), target(b[0]), strict=True)]
    return torch.stack(losses).mean()


def ragged_loop(m, b):
    total = 0.0
    for out, aim, mask in zip(m.net(b[0]), target(b[0]), mask_of(b), strict=True):
        total += (out - aim)[mask].pow(2).sum()
    return total / len(b[0])


def ragged_rows(m, b):
    return [((m.net(b[0]) - target(b[0])) ** 2 * mask_of(b), len(b[0]))]


def written_to_a_tensor(m, b):
    losses = torch.zeros(len(b[0]), dtype=torch.float64)
    for i, (out, aim) in enumerate(zip(m.net(b[0]), target(b[0]), strict=True)):
        losses[i] = (out - aim).pow(2).sum()
    loss = losses.sum()
    loss *= 0.5
    loss /= len(losses)
    loss += 0.1 * m.extra.norm()
    return loss


def written_to_a_tensor_rows(m, b):
    return [(0.5 * (m.net(b[0]) - target(b[0])) ** 2, len(b[0])), 0.1 * m.extra.norm()]


def chunked(m, b):
    pairs = zip(b[0].chunk(2), b[1].chunk(2), strict=True)
    return sum(F.cross_entropy(m.net(x), y, reduction="sum") for x, y in pairs) / len(b[0])


def hinge(m, b):
    """Triplets within a sample; the mean is over those that are not fulfilled yet."""
    out = m.net(b[0])
    loss = ((out[:, 0] - target(b[0])[:, 0]) ** 2 - (out[:, 1] - target(b[0])[:, 1]) ** 2 + 0.2).relu()
    return loss.sum() / (loss > 0).sum().clamp(min=1)


def hinge_rows(m, b):
    out = m.net(b[0])
    loss = ((out[:, 0] - target(b[0])[:, 0]) ** 2 - (out[:, 1] - target(b[0])[:, 1]) ** 2 + 0.2).relu()
    return [(loss, (loss > 0).sum().clamp(min=1))]


def two_parts(m, b):
    out = m.net(b[0])
    own = (out.logsumexp(1) ** 2).mean()
    penalty = sum(p.pow(2).sum() for p in m.net.parameters())
    return F.cross_entropy(out, b[1]) + 0.1 * own + 0.01 * penalty


def two_parts_rows(m, b):
    out = m.net(b[0])
    penalty = sum(p.pow(2).sum() for p in m.net.parameters())
    return [(nll_rows(out, b[1]) + 0.1 * out.logsumexp(1) ** 2, len(out)), 0.01 * penalty]


def learned_mixture(m, b):
    """Kendall et al. (2018): each term has an uncertainty of its own, here in tensors of one entry and of none."""
    out, one, two = m.net(b[0]), m.extra[:1], m.extra[1]
    first, second = nll_rows(out, b[1]).mean(), (out - target(b[0])).pow(2).mean()
    return (torch.exp(-one) * first + one + torch.exp(-two) * second + two).sum()


def learned_mixture_rows(m, b):
    out, (one, two) = m.net(b[0]), m.extra[:2]
    rows = (torch.exp(-one) * nll_rows(out, b[1]), len(out))
    return [rows, (torch.exp(-two) * (out - target(b[0])) ** 2, out.numel()), one + two]


def across(m, b):
    """The batch is summed up first, then the outputs."""
    return (m.net(b[0]) - target(b[0])).pow(2).mean(0).sum()


def another_later(m, b):
    return F.cross_entropy(m.net(b[0]), b[1]) if m.current_epoch == 0 else two_parts(m, b)


def another_later_rows(m, b):
    return [(nll_rows(m.net(b[0]), b[1]), len(b[0]))] if m.current_epoch == 0 else two_parts_rows(m, b)


LOSSES = {
    "quantiles": (lambda m, b: quantile_of(m, b).mean(), lambda m, b: [(quantile_of(m, b), 3 * len(b[0]))]),
    "log_prob with a learned scale": (normal, normal_rows),
    "log_prob of counts": (negative_binomial, negative_binomial_rows),
    "gather": (gathered, lambda m, b: [(nll_rows(m.net(b[0]), b[1]), len(b[0]))]),
    "label smoothing of timm": (timm, lambda m, b: [(smoothed(m.net(b[0]), b[1], 0.2), len(b[0]))]),
    "ELBO": (elbo, elbo_rows),
    "mean over the tokens": (token_mean, token_rows),
    "rows picked by a mask": (picked, token_rows),
    "outputs picked by positions": (picked_before, picked_before_rows),
    "samples picked by a mask": (kept_samples, kept_samples_rows),
    "packed sequences": (packed, packed_rows),
    "one call a sample": (sample_by_sample, lambda m, b: [((m.net(b[0]) - target(b[0])) ** 2, 3 * len(b[0]))]),
    "a loop over ragged samples": (ragged_loop, ragged_rows),
    "written to a tensor, one by one": (written_to_a_tensor, written_to_a_tensor_rows),
    "chunks": (chunked, lambda m, b: [(nll_rows(m.net(b[0]), b[1]), len(b[0]))]),
    "hinges over those that hold": (hinge, hinge_rows),
    "cross-entropy, a part of one's own, a penalty": (two_parts, two_parts_rows),
    "learned weights of terms": (learned_mixture, learned_mixture_rows),
    "another one later": (another_later, another_later_rows),
    "batch first summed": (across, lambda m, b: [((m.net(b[0]) - target(b[0])) ** 2, len(b[0]))]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_ones_own_are_followed_exactly(name):
    assert_influence_is_the_derivative(case(name, *LOSSES[name]))


@pytest.mark.parametrize("name", ["one call a sample", "outputs picked by positions", "learned weights of terms"])
def test_so_are_they_where_the_last_batch_has_one_sample(name):
    assert_influence_is_the_derivative(case(name, *LOSSES[name], loader={"batch_size": 11}))


@pytest.mark.parametrize("name", ["one call a sample", "cross-entropy, a part of one's own, a penalty"])
def test_finite_agrees_with_exact(name):
    following = case(name, *LOSSES[name])
    exact = influences(ranked(following))
    finite = influences(ranked(following, curvature="finite", finite_radius=5e-3))
    assert abs(finite - exact).max() < 0.02 * abs(exact).max()


@pytest.mark.parametrize("name", ["rows picked by a mask", "one call a sample", "learned weights of terms"])
def test_samples_left_out_have_weight_zero_in_place(name):
    following = case(name, *LOSSES[name])
    found = again(
        ranked(following, snapshots=3), following, without=[0, 7, 12, 22]
    )  # so many are tried at once, and then made one by one
    assert found.is_bitwise
    assert found.values == pytest.approx([without(following, group) for group in found.without], rel=1e-11)


def test_columns_show_what_torchs_losses_among_the_parts_were_called_with():
    name = "cross-entropy, a part of one's own, a penalty"
    callback = ranked(case(name, *LOSSES[name]), columns=("label", "loss"))
    columns = callback.ranking.columns
    assert columns["label"].tolist() == [int(TRAIN[i][1]) for i in callback.ranking.sample_id]
    assert all(loss > 0 for loss in columns["loss"])


class Twins(TensorDataset):
    """Every sample stands there twice, one beside the other."""

    def __init__(self, num, seed):
        x, y, numbers = (tensor[: num // 2].repeat_interleave(2, 0) for tensor in data(num, seed).tensors)
        super().__init__(x, y, torch.arange(len(numbers)))


@pytest.mark.parametrize("name", ["one call a sample", "written to a tensor, one by one"])
def test_samples_that_are_alike_have_each_a_part_of_their_own(name):
    following = case(name, *LOSSES[name], train=Twins(20, 1), loader={"shuffle": False, "batch_size": 4})
    found = influences(assert_influence_is_the_derivative(following), 20)
    assert (found != 0).all()
