# SPDX-License-Identifier: Apache-2.0
"""The judge: central differences, in a sample's weight, of whole ``Trainer.fit`` runs in float64."""

import numpy as np
import pytest
import torch

from cases import CASES, NUM_TRAIN, Case, fit, objective
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.adjoint.objective import RunningStatistics
from reference import assert_derivative, influences, ranked


@pytest.mark.parametrize("name", CASES)
def test_influence_is_minus_the_derivative_of_the_whole_fit(recorded, name):
    """Along two directions, of which one shows any sample that is off by a millionth of the largest influence."""
    case, callback = CASES[name], recorded(name)
    for seed in (7, 8):
        assert_derivative(influences(callback), lambda w: objective(fit(case, weights=w), case.val), seed=seed)
    assert callback.summary["replay"]["batches"] == callback.summary["replay"]["batches_bit_for_bit"]


def test_without_the_hessian_the_influences_are_wrong(recorded):
    exact, without = influences(recorded("momentum")), influences(ranked(CASES["momentum"], curvature="none"))
    assert np.abs(exact - without).max() > 0.05 * np.abs(exact).max()


def test_without_the_adjoint_of_running_statistics_the_influences_are_wrong(recorded, monkeypatch):
    exact = influences(recorded("batchnorm"))
    monkeypatch.setattr(RunningStatistics, "_written_out", _native)
    without = influences(ranked(CASES["batchnorm"]))
    assert np.abs(exact - without).max() > 0.01 * np.abs(exact).max()


def _native(self, options, mean_name, var_name):
    return torch.nn.functional.batch_norm(**options)


@pytest.mark.parametrize("name", ["momentum", "batchnorm", "adam decay"])
def test_finite_agrees_with_exact_to_second_order_in_its_radius(recorded, name):
    exact = influences(recorded(name))
    finite = [influences(ranked(CASES[name], curvature="finite", finite_radius=r)) for r in (2e-2, 1e-2)]
    errors = [np.abs(found - exact).max() for found in finite]
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
