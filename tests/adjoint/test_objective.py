# SPDX-License-Identifier: Apache-2.0
"""Several objectives in one walk: each to the bits of a walk of its own, and each the derivative of its own mean."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cases import NUM_CLASSES, VAL, Case, adam, fit, warm_up
from lightning_sgdclean import Ranking, SGDInfluence
from lightning_sgdclean.adjoint.objective import objective_gradients
from lightning_sgdclean.base.errors import NonFiniteError, ObjectiveError
from lightning_sgdclean.losses.surroundings import Surroundings
from reference import assert_derivative, influences, ranked

WINDING = Case(
    "BatchNorm, dropout, Adam, clipped, accumulated, a batch left over",
    {"make_optimizer": adam, "norm": True, "dropout": 0.2, "schedule": warm_up},
    {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3, "max_epochs": 2},
)
PLAIN = Case("momentum", {"options": {"momentum": 0.9}}, {"max_epochs": 2})


def of_class(label):
    def loss_of_class(module, batch):
        chosen = batch[1] == label
        return F.cross_entropy(module.net(batch[0][chosen]), batch[1][chosen]), chosen.sum()

    return loss_of_class


def whole(module, batch):
    return module.loss(batch)


def squared_margin(module, batch):
    return module.net(batch[0]).pow(2).mean()


THREE = {"whole": whole, "second class": of_class(1), "margin": squared_margin}


def by_id(ranking, values):
    found = np.zeros(len(ranking))
    found[ranking.sample_id] = values
    return found


@pytest.mark.parametrize(
    ("case", "curvature"), [(WINDING, "exact"), (WINDING, "finite"), (PLAIN, "none")], ids=lambda value: str(value)[:9]
)
def test_each_objective_has_the_bits_of_a_walk_of_its_own(case, curvature):
    ranking = ranked(case, objective=THREE, curvature=curvature).ranking
    assert list(ranking.columns) == ["influence:second class", "influence:margin"]
    together = [ranking.influence, *ranking.columns.values()]
    for objective, found in zip(THREE.values(), together, strict=True):
        alone = ranked(case, objective=objective, curvature=curvature)
        assert np.array_equal(by_id(ranking, found), influences(alone))
    assert len({found.tobytes() for found in together}) == 3


@pytest.mark.parametrize("label", range(NUM_CLASSES))
def test_the_loss_of_a_class_is_its_mean_over_that_class_whatever_batches_it_lies_in(label):
    ranking = ranked(PLAIN, objective={"whole": whole, "class": of_class(label)}).ranking
    chosen = VAL.tensors[1] == label

    def mean_of_class(weights):
        module = fit(PLAIN, weights=weights)
        with torch.no_grad():
            return float(F.cross_entropy(module.net(VAL.tensors[0].double()[chosen]), VAL.tensors[1][chosen]))

    assert_derivative(by_id(ranking, ranking.columns["influence:class"]), mean_of_class)


def test_the_larger_the_better_holds_for_all_of_them():
    up = ranked(PLAIN, objective={"a": whole, "b": squared_margin}, mode="max").ranking
    down = ranked(PLAIN, objective={"a": whole, "b": squared_margin}).ranking
    assert np.array_equal(influences_of(up, "influence:b"), -influences_of(down, "influence:b"))
    assert up.harmful(3) == down.helpful(3)


def influences_of(ranking, column):
    return by_id(ranking, ranking.columns[column])


def test_the_summary_names_them_all_and_the_file_holds_their_columns():
    callback = ranked(PLAIN, objective=THREE)
    about = callback.summary["objective"]
    assert about["name"] == "whole"
    assert list(about["others"]) == ["second class", "margin"]
    assert all(math.isfinite(value) for value in about["others"].values())
    assert Ranking.load(callback.run_dir) == callback.ranking


@pytest.mark.parametrize("case", [WINDING, PLAIN], ids=str)
def test_what_the_epochs_did_adds_up_and_is_what_shorter_windows_show(case):
    by_epoch = ranked(case, columns=("by_epoch",)).ranking
    assert list(by_epoch.columns) == ["by_epoch:0", "by_epoch:1"]
    first, last = (influences_of(by_epoch, f"by_epoch:{epoch}") for epoch in (0, 1))
    assert np.allclose(first + last, by_id(by_epoch, by_epoch.influence), rtol=0, atol=1e-15)
    assert first.any()

    callback = SGDInfluence(epochs=1)
    fit(case, callback)
    assert np.array_equal(last, influences(callback))


def test_a_class_that_validation_lacks_is_refused_by_name():
    with pytest.raises(ObjectiveError, match="'absent' has a weight of zero in every validation batch"):
        ranked(PLAIN, objective={"whole": whole, "absent": of_class(99)})


def test_values_that_are_no_numbers_are_refused_by_the_objectives_name():
    with pytest.raises(NonFiniteError, match="'broken' is inf"):
        ranked(PLAIN, objective={"whole": whole, "broken": lambda module, batch: module.loss(batch) * math.inf})


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_makes_no_mean_is_refused(weight):
    with pytest.raises(ObjectiveError, match="expected a finite one that is not negative"):
        ranked(PLAIN, objective=lambda module, batch: (module.loss(batch), weight))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({}, "empty dict"),
        ({"a": whole, "b": "text"}, r"objective\['b'\] must be a callable .* got str"),
        ({"a": whole, 3: whole}, "has the name 3; expected text"),
        ("text", "objective must be a callable .* got str"),
    ],
)
def test_what_is_no_objective_is_refused_at_once(objective, message):
    with pytest.raises(ValueError, match=message):
        SGDInfluence(objective=objective)


@pytest.mark.parametrize("columns", ["by_epoch", ("by_epoch", "by_step")])
def test_unknown_columns_are_refused_at_once(columns):
    with pytest.raises(ValueError, match="expected a sequence of some of label"):
        SGDInfluence(columns=columns)


def test_in_16_bits_a_mean_over_many_batches_is_still_the_mean():
    module = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    batches = [(torch.ones(1, 1, dtype=torch.bfloat16), number, 0) for number in range(1000)]
    around = Surroundings(
        device=torch.device("cpu"),
        prepare=lambda batch, _: batch,
        train_context=nullcontext,
        val_context=nullcontext,
        set_clock=lambda *_: None,
        precision="bf16-true",
        as_stage=lambda _: nullcontext(),
    )
    objectives = {"output": lambda module, batch: module(batch).mean()}
    (found,) = objective_gradients(module, [module.weight], batches, around, "output", objectives, 1)
    assert found.params[0].item() == 1.0
