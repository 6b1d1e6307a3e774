# SPDX-License-Identifier: Apache-2.0
"""The slow, obvious truth: whole ``Trainer.fit`` runs in float64, once more for every changed weight."""

import numpy as np
import torch

from cases import NUM_TRAIN, fit, objective
from lightning_sgdclean import SGDInfluence

STEP = 1e-4  # the error of the fourth-order difference below is about STEP**4 and 1e-16 / STEP


def directional(objective_of, direction):
    """Derivative of a callable of the samples' weights ``(N,)`` at one, along a direction."""

    def at(amount):
        return objective_of(torch.ones(len(direction), dtype=torch.float64) + amount * direction)

    return (8 * (at(STEP) - at(-STEP)) - (at(2 * STEP) - at(-2 * STEP))) / (12 * STEP)


def derivative(case, direction):
    return directional(lambda weights: objective(fit(case, weights=weights), case.val), direction)


def one_hot(index, num=NUM_TRAIN):
    return torch.eye(num, dtype=torch.float64)[index]


def ranked(case, **options):
    callback = SGDInfluence("val_loss", epochs="all", **options)
    fit(case, callback)
    return callback


def influences(callback, num=NUM_TRAIN):
    found = np.zeros(num)
    found[callback.ranking.sample_id] = callback.ranking.influence
    return found


def assert_derivative(found, objective_of, tolerance=1e-6):
    """Along a direction that moves every sample's weight, so that none can be wrong unseen.

    ``objective_of`` trains with weights ``(N,)`` on the samples and gives the objective.
    """
    direction = torch.randn(len(found), dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    direction /= direction.norm()
    truth, predicted = -directional(objective_of, direction), float(found @ direction.numpy())
    assert np.abs(found).max() > 0
    assert abs(predicted - truth) <= tolerance * np.abs(found).max(), (predicted, truth, np.abs(found).max())


def assert_influence_is_the_derivative(case, tolerance=1e-6, **options):
    """See :func:`assert_derivative`."""
    found = influences(ranked(case, **options), len(case.train))
    assert_derivative(found, lambda weights: objective(fit(case, weights=weights), case.val), tolerance)


def leave_one_out(case):
    """What the objective really changes by when a sample's weight is zero in place, for every sample."""
    whole = objective(fit(case), case.val)
    num = len(case.train)
    without = [objective(fit(case, weights=1 - one_hot(i, num)), case.val) for i in range(num)]
    return np.array(without) - whole
