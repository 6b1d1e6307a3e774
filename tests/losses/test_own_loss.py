# SPDX-License-Identifier: Apache-2.0
"""What is checked of ``weighted_loss=`` before the first step."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cases import Case, Plain, fit, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import LossSplitError, ReplayMismatchError, SGDInfluenceWarning
from weighted_losses import CASES, Blended, Cox, Dice, Mixup, NTXent, weighted


def rows(module, batch):
    return module.loss(batch, "none")


def refused(function, match, case="plain", **options):
    """The error, which comes before the first step."""
    case = CASES.get(case, Case("plain"))
    module = case.make(**case.module)
    trainer = quiet_trainer([SGDInfluence("val_loss", weighted_loss=function, **options)])
    with pytest.raises(LossSplitError, match=f"(?s){match}") as caught:
        trainer.fit(module, *loaders(case.train, case.val))
    assert trainer.global_step == 0
    return str(caught.value)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda m, b, w: w * rows(m, b), r"a tensor of shape \(5,\) .*expected a scalar.*is sample_losses="),
        (lambda m, b, w: rows(m, b).mean().item(), "gave float; expected a scalar"),
        (lambda m, b, w: (w * rows(m, b)).mean().detach(), "without a graph"),
        (lambda m, b, w: 0.5 * (w * rows(m, b)).mean(), r"gives [\d.]+ .* all weights 1, and training_step [\d.]+\."),
        (lambda m, b, w: rows(m, b).mean(), "does not use its weights"),
        (lambda m, b, w: rows(m, b)[w > 0].mean(), "does not use its weights"),
        (lambda m, b, w: (w.detach() * rows(m, b)).mean(), "uses its weights outside of the graph"),
        (lambda m, b, w: rows(m, b).mean() + (w - 1).sum(), "has a gradient by the parameters that does not change"),
        (lambda m, b, w: rows(m, b).mean() + 0 * (w - 1).sqrt().sum(), "derivative .* is not finite.*samples \\[0, 1"),
        (lambda m, b, w: (w.roll(1) * rows(m, b)).mean(), r"multiplies by weights\[0\] what depends on other samples"),
    ],
    ids=["vector", "number", "no graph", "value", "ignored", "mask", "detached", "beside", "root of zero", "shifted"],
)
def test_what_is_no_loss_with_weights_on_its_samples_is_refused_by_name(function, match):
    refused(function, match)


def test_another_value_is_named_with_that_of_training():
    found = refused(lambda m, b, w: 0.5 * (w * rows(m, b)).mean(), "They have to be the same")
    own, training = map(float, re.search(r"gives ([\d.]+) .* training_step ([\d.]+)\. They", found).groups())
    assert own == pytest.approx(training / 2)


def test_the_right_value_with_another_gradient_is_refused():
    def half(module, batch, weights):
        loss = (weights * rows(module, batch)).mean()
        return 0.5 * loss + 0.5 * loss.detach()

    assert "its gradient differs by 50.0%" in refused(half, "Something is detached in one of them")


def sorted_cox(module, batch, weights):
    """As in ``Cox``, but the weights are not sorted with the samples."""
    order = batch[1][:, 0].argsort(descending=True)
    risk, event = module.net(batch[0])[:, 0][order], batch[1][:, 1][order]
    at_risk = (weights * risk.exp()).cumsum(0).clamp(min=1e-12).log()
    return -(weights * event * (risk - at_risk)).sum() / len(risk)


def test_weights_that_are_not_sorted_with_their_samples_are_refused():
    refused(sorted_cox, "gives some weights to other samples than theirs.*sort, shuffle or pick weights", "cox")


def tied(data):
    x, found, i = data.tensors
    return torch.utils.data.TensorDataset(x, torch.stack([found[:, 0].ceil().clamp(max=2), found[:, 1]], 1), i)


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
@pytest.mark.parametrize("function", [weighted, sorted_cox], ids=["right", "unsorted"])
def test_that_is_seen_where_ties_leave_the_order_to_chance(function, precision):
    case = CASES["cox"]
    callback = SGDInfluence("val_loss", weighted_loss=function, verify=0)
    trainer = quiet_trainer([callback], precision=precision, max_epochs=1)
    given = case.make(**case.module), *loaders(tied(case.train), case.val, batch_size=12)
    if function is weighted:
        trainer.fit(*given)
        assert trainer.global_step == 2
        return
    with pytest.raises(LossSplitError, match=r"weights\[\d\] of zero takes sample \d+ of the batch out of"):
        trainer.fit(*given)


def test_a_logarithm_of_a_risk_set_that_is_left_empty_is_refused():
    def loss(module, batch, weights):
        order = batch[1][:, 0].argsort(descending=True)
        risk, event, weights = module.net(batch[0])[:, 0][order], batch[1][:, 1][order], weights[order]
        return -(weights * event * (risk - (weights * risk.exp()).cumsum(0).log())).sum() / len(risk)

    refused(loss, r"is not finite where weights\[\d\] is zero.*clamp\(min=1e-12\)", "cox")


def test_weights_of_the_wrong_partner_are_refused_where_a_loss_draws_its_pairs():
    def loss(module, batch, weights):
        x, y, _ = batch
        share, other = float(np.random.beta(0.4, 0.4)), torch.randperm(len(x))
        logits = module.net(share * x + (1 - share) * x[other])
        own, others = (F.cross_entropy(logits, target, reduction="none") for target in (y, y[other]))
        return (share * weights.roll(2) * own + (1 - share) * weights[other].roll(2) * others).mean()

    refused(loss, r"multiplies by weights\[\d\] what depends on other samples", "mixup")


@pytest.mark.parametrize("make", [Cox, Dice, Mixup, NTXent])
def test_the_weights_of_losses_that_mix_samples_pass_in_float32(make):
    case = next(case for case in CASES.values() if case.make is make)
    trainer = quiet_trainer([SGDInfluence("val_loss", weighted_loss=weighted, verify=0)], precision="32-true")
    trainer.fit(case.make(**case.module), *loaders(case.train, case.val))
    assert trainer.global_step == 15


def test_a_mixup_that_hardly_mixes_is_no_sign_of_wrong_weights():
    for share in (0.99, 0.999, 0.9999, 0.99999):
        case = Case("mixup", make=partial(Blended, share=share), module={"norm": True})
        trainer = quiet_trainer([SGDInfluence("val_loss", weighted_loss=weighted, verify=0)], precision="32-true")
        trainer.fit(case.make(**case.module), *loaders(case.train, case.val))
        assert trainer.global_step == 15


def test_equal_samples_are_no_sign_of_wrong_weights():
    train = torch.utils.data.TensorDataset(torch.ones(10, 5), torch.ones(10, dtype=torch.long), torch.arange(10))
    case = Case("equal", train=train)
    fit(case, SGDInfluence("val_loss", verify=0, weighted_loss=lambda m, b, w: (w * rows(m, b)).mean()))


def test_weights_that_leave_the_graph_in_part_are_refused_after_the_first_step():
    """What they multiply there is off: only differences of float64 show it."""

    def loss(module, batch, weights):
        losses = rows(module, batch)
        return (0.5 * weights * losses + 0.5 * weights.detach() * losses).mean()

    callback = SGDInfluence("val_loss", weighted_loss=loss)
    with pytest.raises(Exception, match=r"weighted_loss= has values.*weights is off by"):
        fit(Case("in part"), callback)


def test_a_later_batch_whose_loss_is_another_is_named_with_both_numbers():
    def loss(module, batch, weights):
        return (weights * rows(module, batch)).mean() * (2.0 if module.global_step > 8 else 1.0)

    with pytest.raises(ReplayMismatchError, match=r"The former is weighted_loss= at weights of 1, the latter what"):
        fit(Case("later"), SGDInfluence("val_loss", weighted_loss=loss, epochs="all"))


def test_where_mismatches_are_only_warned_of_another_value_is_no_error():
    def loss(module, batch, weights):
        return 1.001 * (weights * rows(module, batch)).mean()

    callback = SGDInfluence("val_loss", weighted_loss=loss, on_mismatch="warn", verify=0)
    with pytest.warns(SGDInfluenceWarning) as warned:
        fit(Case("warned"), callback)
    assert any("Weighted_loss= at weights of 1 has to be the training loss" in str(one.message) for one in warned)


def test_a_mean_over_samples_is_what_it_is_without_the_option():
    plain, own = (
        SGDInfluence("val_loss", epochs="all", verify=0, **options)
        for options in ({}, {"weighted_loss": lambda m, b, w: (w * rows(m, b)).mean()})
    )
    for callback in (plain, own):
        fit(Case("plain", {"norm": True}), callback)
    assert own.ranking.influence == pytest.approx(plain.ranking.influence, rel=1e-9)


class MixesRows(Plain):
    """One call of torch's loss, whose rows are made of two samples each."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(0.7 * batch[0] + 0.3 * batch[0].flip(0)), batch[1])


class UnderARoot(Plain):
    def training_step(self, batch, batch_idx):
        return rows(self, batch).mean().sqrt()


@pytest.mark.parametrize("make", [MixesRows, UnderARoot, Dice], ids=lambda make: make.__name__)
def test_where_a_loss_mixes_samples_the_refusal_names_the_option_once(make):
    with pytest.raises(LossSplitError, match="Give weighted_loss=, a callable") as caught:
        fit(Case("mixes", make=make), SGDInfluence("val_loss"))
    assert str(caught.value).count("Losses that mix samples") == 1
