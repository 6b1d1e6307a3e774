# SPDX-License-Identifier: Apache-2.0
"""Runs that are made at once are those that are made one by one; where they would not be, they are made one by one."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import split_losses
from cases import CASES, NUM_CLASSES, Case, Plain, adam, fit
from left_out import ByHand, again, by_hand, without
from lightning_sgdclean import SGDInfluence, register_update
from lightning_sgdclean.base.errors import UnsupportedOperationError
from lightning_sgdclean.leave_out import stacked
from reference import ranked

SOME = [0, 3, 7, 11, 16, 22]


def assert_at_once_is_one_by_one(case, groups=SOME, callback=None, **options):
    callback = callback or ranked(case)
    alone = again(callback, case, without=groups, batched=False, **options)
    found = again(callback, case, without=groups, batched=True, **options)
    assert found.is_batched
    assert not alone.is_batched
    assert found.is_bitwise
    assert alone.is_bitwise
    if "objective" not in options:
        assert alone.whole == callback.summary["objective"]["recomputed"]
    assert found.values == pytest.approx(alone.values, rel=1e-10)
    assert found.differences == pytest.approx(alone.differences, rel=1e-6, abs=1e-12)
    return found


@pytest.mark.parametrize(
    "name",
    [
        "nesterov",
        "batchnorm",
        "batchnorm adam",
        "adam amsgrad",
        "two groups",
        "warm-up from zero adamw",
        "accumulate 2",
        "accumulate 3 adam",
        "clip norm",
        "clip value",
    ],
)
def test_at_once_they_are_the_runs_that_are_made_one_by_one_and_whole_fits_with_weight_zero(recorded, name):
    found = assert_at_once_is_one_by_one(CASES[name], callback=recorded(name, snapshots="sqrt"))
    for place in (2, 5):
        assert found.values[place] == pytest.approx(without(CASES[name], [SOME[place]]), rel=1e-10)
        assert found.differences[place] != 0


class Shared(nn.Module):
    """One layer is reached by two names, another shares its weight; a norm stands in a dict as well."""

    def __init__(self):
        super().__init__()
        self.first, self.other, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, NUM_CLASSES)
        self.norm = nn.BatchNorm1d(5)
        self.again, self.other.weight = self.first, self.first.weight
        self.by_name = nn.ModuleDict({"norm": self.norm})

    def forward(self, x):
        hidden = self.by_name["norm"](self.again(self.first(x).tanh())).tanh()
        return self.last(self.other(hidden).tanh())


def test_a_module_reached_by_two_names_is_left_as_it_was():
    case = Case("shared", {"net": Shared, "make_optimizer": adam})
    plain, callback = fit(case).state_dict(), SGDInfluence("val_loss", epochs="all", verify=4)
    module = fit(case, callback)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in module.state_dict().items())
    assert module.net.again is module.net.first
    assert module.net.other.weight is module.net.first.weight
    assert callback.summary["trust"]["runs"] == "at once"
    assert_at_once_is_one_by_one(case)


def test_groups_at_once(recorded):
    groups = {"few": [3, 4], "many": [*range(1, 23, 2)], "all": [*range(23)], "nobody": []}
    assert_at_once_is_one_by_one(CASES["batchnorm"], groups, recorded("batchnorm"))


@pytest.mark.parametrize("name", ["focal through the rows", "class weights", "mse with weight"])
def test_losses_of_every_form_at_once(name):
    assert_at_once_is_one_by_one(split_losses.case(name, *split_losses.class_loss(*split_losses.LOSSES[name])))


@pytest.mark.parametrize("name", ["two views side by side", "focal and a penalty"])
def test_views_and_penalties_at_once(name):
    assert_at_once_is_one_by_one(split_losses.case(name, *split_losses.STEPS[name]))


def test_losses_that_the_user_splits_at_once():
    case = Case("by hand", {"norm": True, "dropout": 0.2}, make=ByHand)
    callback = ranked(case, sample_losses=by_hand)
    assert_at_once_is_one_by_one(case, callback=callback, sample_losses=by_hand)


def test_the_objective_may_be_another_one_at_once(recorded):
    def squared(module, batch):
        return F.cross_entropy(module.net(batch[0]), batch[1]) ** 2, 3.0

    assert_at_once_is_one_by_one(CASES["batchnorm"], callback=recorded("batchnorm"), objective=squared)


@pytest.mark.parametrize("kind", ["Adadelta", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop"])
def test_every_optimizer_of_torch_steps_all_runs_as_one(kind):
    module = {"make_optimizer": getattr(torch.optim, kind), "options": {"lr": 0.02}, "two_groups": True}
    assert_at_once_is_one_by_one(Case(kind, module))


def network():
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(12, NUM_CLASSES),
    )


def test_convolutions_and_other_norms_at_once():
    assert_at_once_is_one_by_one(Case("convolution", {"net": network, "make_optimizer": adam}))


def test_more_runs_than_fit_at_once_come_to_the_same(recorded, monkeypatch):
    together = again(recorded("batchnorm"), CASES["batchnorm"], without=SOME, batched=True)
    monkeypatch.setattr(stacked, "_MOST", 4)
    found = again(recorded("batchnorm"), CASES["batchnorm"], without=SOME, batched=True)
    assert found.values == pytest.approx(together.values, rel=1e-12)


def test_small_networks_are_run_at_once_of_themselves_and_large_ones_or_few_runs_are_not(recorded, monkeypatch):
    def words(groups):
        return again(recorded("sgd"), CASES["sgd"], without=groups).words

    assert words(SOME).endswith(", at once")
    assert words([1, 2]).endswith("one after another: there are few of them")
    monkeypatch.setattr(stacked, "_LARGE", 100)
    assert words(SOME).endswith("keeps a processor busy as it is")


# Where at once it would be something else -------------------------------------------------------------------


class Looking(Plain):
    """Looks at its loss, which is many at once."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if loss.item() > 0 else 2 * loss


class Hooked(Plain):
    """Gradients go through a hook of a parameter, which belongs to the live one alone."""

    def on_fit_start(self):
        self.net[0].weight.register_hook(lambda gradient: gradient * 1.5)


class Renewing(Plain):
    """Counts in a new buffer each time, instead of in the old one."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen = self.seen + 1
        return loss


class BackwardOfItsOwn(Plain):
    def backward(self, loss):
        loss.backward()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(1, 6, batch_first=True), nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        return self.head(self.rnn(x[..., None])[0][:, -1])


REFUSED = {
    "looking": ({"make": Looking}, "fails .RuntimeError"),
    "a backward of its own": ({"make": BackwardOfItsOwn}, "has a backward of its own"),
    "a recurrent layer": ({"module": {"net": Recurrent}}, "fails .RuntimeError"),
    "a mean that is cumulative": (
        {"module": {"net": lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, momentum=None))}},
        "fails .RuntimeError",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_at_once_is_run_one_by_one(name):
    options, reason = REFUSED[name]
    case = Case(name, **options)
    callback = ranked(case)
    found = again(callback, case, without=SOME)
    assert not found.is_batched
    assert reason.replace(".RuntimeError", "(RuntimeError") in found.words
    assert np.array_equal(found.values, again(callback, case, without=SOME, batched=False).values)
    with pytest.raises(UnsupportedOperationError, match=rf"cannot be made at once: .*{reason}"):
        again(callback, case, without=SOME, batched=True)


@pytest.mark.parametrize(("make", "what"), [(Hooked, "have other gradients"), (Renewing, "move its buffers otherwise")])
def test_what_means_something_else_at_once_is_found_and_run_one_by_one(make, what):
    case = Case("other", make=make)
    callback = ranked(case)
    found = again(callback, case, without=SOME)
    assert f"side by side, runs of this module {what}" in found.words
    assert np.array_equal(found.values, again(callback, case, without=SOME, batched=False).values)


class ValidatesAlone(Plain):
    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        float(loss.detach())
        self.log("val_loss", loss)


def test_a_validation_that_looks_at_its_loss_is_run_one_by_one():
    case = Case("validates", make=ValidatesAlone)
    assert "fails (RuntimeError" in again(ranked(case), case, without=SOME).words


def test_optimizers_from_outside_are_run_one_by_one():
    class Own(torch.optim.SGD):
        pass

    register_update(Own, torch.optim.SGD)
    case = Case("own", {"make_optimizer": lambda params, **options: Own(params, lr=0.1, **options)})
    found = again(ranked(case), case, without=SOME)
    assert found.words.endswith("one after another: a step of Own may mix the numbers of a tensor")
