# SPDX-License-Identifier: Apache-2.0
"""Whose row is whose: found by replacing samples, held against every batch, and refused where it is not clear."""

import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from cases import TRAIN, Case, Plain, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import LossSplitError
from reference import assert_influence_is_the_derivative


def refused(match, step, trainer=None, train=None, module=None, **options):
    made = Plain() if module is None else module
    made.training_step = step.__get__(made)
    running = quiet_trainer([SGDInfluence("val_loss", epochs="all", **options)], **(trainer or {}))
    with pytest.raises(LossSplitError, match=f"(?s){match}.*sample_losses="):
        running.fit(made, loaders()[0] if train is None else train, loaders()[1])
    return running


def log_of_mean(self, batch, batch_idx):
    return F.mse_loss(self.net(batch[0]), batch[0][:, :3]).sqrt()


def soft_maximum(self, batch, batch_idx):
    return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none").logsumexp(0)


def scripted(self, batch, batch_idx):
    return SCRIPTED(self.net(batch[0]), batch[1]) + 0.1 * F.cross_entropy(self.net(batch[0]), batch[1])


def _scripted(logits: torch.Tensor, labels: torch.Tensor):
    return -logits.log_softmax(1).gather(1, labels[:, None]).mean()


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch means to part with it; users' old losses will not
    SCRIPTED = torch.jit.script(_scripted)


def mixup(self, batch, batch_idx):
    part = 0.3
    x = part * batch[0] + (1 - part) * batch[0].flip(0)
    out = self.net(x)
    return part * F.cross_entropy(out, batch[1]) + (1 - part) * F.cross_entropy(out, batch[1].flip(0))


def mixup_in_training_only(self, batch, batch_idx):
    return mixup(self, batch, batch_idx) if self.training else F.cross_entropy(self.net(batch[0]), batch[1])


def contrastive(self, batch, batch_idx):
    one, two = self.net(batch[0]), self.net(-batch[0])
    return F.cross_entropy(one @ two.T, torch.arange(len(one)))


def sorted_inside(self, batch, batch_idx):
    order = batch[0][:, 0].argsort()
    return F.cross_entropy(self.net(batch[0][order]), batch[1][order])


def attended(self, batch, batch_idx):
    h = batch[0]
    h = h + (h @ h.T).softmax(1) @ h
    return F.cross_entropy(self.net(h), batch[1])


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (log_of_mean, "reduced together other than by a sum"),
        (soft_maximum, "reduced together other than by a sum"),
        (scripted, "compiled by torch.jit"),
        (mixup, "depends on several samples"),
        (mixup_in_training_only, "depends on several samples"),
        (contrastive, "depends on several samples.*in-batch negatives"),
        (sorted_inside, "swapped|several"),
        (attended, "depends on several samples"),
    ],
)
def test_what_cannot_be_split_is_refused_before_the_first_step(step, match):
    assert refused(match, step).global_step == 0


def later_no_mean(self, batch, batch_idx):
    if self.global_step < 6:
        return F.cross_entropy(self.net(batch[0]), batch[1])
    return _scripted(self.net(batch[0]), batch[1]).sqrt()


def later_more(self, batch, batch_idx):
    loss = F.cross_entropy(self.net(batch[0]), batch[1])
    return loss + 0.1 * self.net(batch[0]).std() if self.global_step >= 6 else loss


def later_more_beside_a_penalty(self, batch, batch_idx):
    return later_more(self, batch, batch_idx) + 0.01 * sum(p.pow(2).sum() for p in self.parameters())


def later_filtered(self, batch, batch_idx):
    num = len(batch[0]) - (self.global_step >= 6)
    return F.cross_entropy(self.net(batch[0])[:num], batch[1][:num])


def later_swapped(self, batch, batch_idx):
    loss = F.cross_entropy(self.net(batch[0]), batch[1])
    if self.global_step < 3:
        return loss
    order = torch.arange(len(batch[0])).flip(0)
    return F.cross_entropy(self.net(batch[0][order]), batch[1][order])


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (later_no_mean, "several samples.*'Sqrt'"),
        (later_more, "several samples.*'Std'"),
        (later_more_beside_a_penalty, "several samples.*'Std'"),
        (later_filtered, "no multiple"),
        (later_swapped, "swapped"),
    ],
)
def test_later_batches_whose_loss_is_another_are_refused_rather_than_scored_by_halves(step, match):
    assert refused(match, step).global_step == 15


class Stream(IterableDataset):
    def __iter__(self):
        return iter([TRAIN[i] for i in range(10)])


def test_ids_of_another_number_than_the_rows_of_a_later_batch_are_refused():
    def ids(batch):
        return [0, 1, 2, 3] if 9 in batch[2] else batch[2].tolist()

    refused("", Plain.training_step, train=DataLoader(Stream(), batch_size=5), sample_ids=ids)


def test_penalty_by_a_loss_function_is_refused_in_batches_of_one_sample():
    def step(self, batch, batch_idx):
        bias = self.net[4].bias
        return F.cross_entropy(self.net(batch[0]), batch[1]) + F.mse_loss(bias, torch.zeros_like(bias))

    refused("a penalty, it seems", step, train=DataLoader(TRAIN, batch_size=1))


class Contrastive(Plain):
    """Every sample is the others' negative, and stays it whatever its own weight."""

    def anchors(self, batch):
        one, two = self.net(batch[0]), self.net(-batch[0])
        return F.cross_entropy(one @ two.T, torch.arange(len(one)), reduction="none")

    def training_step(self, batch, batch_idx):
        rows = self.anchors(batch)
        return rows.mean() if self.sample_weights is None else (rows * self.sample_weights[batch[-1]]).mean()


def test_contrastive_rows_count_as_their_anchors_where_sample_losses_say_so():
    case = Case("contrastive", {"options": {"momentum": 0.5}}, {"max_epochs": 2}, make=Contrastive)
    assert_influence_is_the_derivative(case, sample_losses=Contrastive.anchors)


class Counted(Plain):
    calls = 0

    def training_step(self, batch, batch_idx):
        Counted.calls += 1
        return super().training_step(batch, batch_idx)


def test_verifying_every_batch_costs_less_than_half_an_evaluation_a_step():
    counts = []
    for num_epochs in (4, 24):
        Counted.calls = 0
        callback = SGDInfluence("val_loss", epochs="all", verify=0)
        train = DataLoader(TRAIN, batch_size=4, shuffle=True, drop_last=True)
        quiet_trainer([callback], max_epochs=num_epochs).fit(Counted(), train, loaders()[1])
        counts.append((Counted.calls, callback.summary["window"]["num_steps"]))
    (few, short), (many, long) = counts
    assert (many - few) / (long - short) < 2.5  # a step is run once to train and once to retrace


def by_first_feature(items):
    return torch.utils.data.default_collate(sorted(items, key=lambda item: float(item[0][0])))


@pytest.mark.filterwarnings("ignore:Training batches are kept")  # by position a row holds now this sample, now that
def test_batches_sorted_by_the_collate_function_are_followed_by_ids_read_from_them():
    case = Case("sorted", {"options": {"momentum": 0.5}}, {"max_epochs": 2}, {"collate_fn": by_first_feature})
    assert_influence_is_the_derivative(case, sample_ids=lambda batch: batch[2].tolist())
