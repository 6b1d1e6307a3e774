# SPDX-License-Identifier: Apache-2.0
"""The judge: central differences, in a sample's weight, of whole ``Trainer.fit`` runs in float64."""

import numpy as np
import pytest
import torch

from cases import CASES, NUM_TRAIN, Case, fit
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.adjoint.objective import RunningStatistics
from reference import derivative, influences, one_hot, ranked


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_influence_is_minus_the_derivative_of_the_whole_fit(case):
    callback = ranked(case)
    found = influences(callback)
    for sample in (0, 9, 20):
        truth = -derivative(case, one_hot(sample))
        assert abs(found[sample] - truth) <= 1e-6 * np.abs(found).max(), (sample, found[sample], truth)
    assert callback.summary["replay"]["batches"] == callback.summary["replay"]["batches_bit_for_bit"]


@pytest.mark.parametrize("case", [CASES["batchnorm"], CASES["adamw"]], ids=str)
def test_influences_sum_to_minus_the_derivative_in_a_common_weight(case):
    found = influences(ranked(case))
    truth = -derivative(case, torch.ones(NUM_TRAIN, dtype=torch.float64))
    assert found.sum() == pytest.approx(truth, abs=1e-6 * np.abs(found).max())


def test_without_the_hessian_the_influences_are_wrong():
    case = CASES["momentum"]
    exact, without = influences(ranked(case)), influences(ranked(case, curvature="none"))
    assert np.abs(exact - without).max() > 0.05 * np.abs(exact).max()


def test_without_the_adjoint_of_running_statistics_the_influences_are_wrong(monkeypatch):
    case = CASES["batchnorm"]
    exact = influences(ranked(case))
    monkeypatch.setattr(RunningStatistics, "_written_out", _native)
    without = influences(ranked(case))
    assert np.abs(exact - without).max() > 0.01 * np.abs(exact).max()


def _native(self, options, mean_name, var_name):
    return torch.nn.functional.batch_norm(**options)


@pytest.mark.parametrize("case", [CASES["momentum"], CASES["batchnorm"], CASES["adam decay"]], ids=str)
def test_finite_agrees_with_exact_to_second_order_in_its_radius(case):
    exact = influences(ranked(case))
    errors = [np.abs(influences(ranked(case, curvature="finite", finite_radius=r)) - exact).max() for r in (2e-2, 1e-2)]
    assert errors[1] < 0.05 * np.abs(exact).max()
    assert 3.0 < errors[0] / errors[1] < 5.0  # halving the radius quarters the error


def test_window_of_one_epoch_means_left_out_of_that_epoch_only():
    case = Case("two epochs", {"options": {"momentum": 0.9}}, {"max_epochs": 2})
    callback = SGDInfluence("val_loss", epochs=1)
    fit(case, callback)
    assert callback.summary["window"]["words"] == "steps 5 to 9: epoch 1"
    whole = influences(ranked(case))
    assert np.abs(influences(callback) - whole).max() > 0
    assert callback.ranking.visits.sum() == NUM_TRAIN
