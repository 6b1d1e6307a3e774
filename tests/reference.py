# SPDX-License-Identifier: Apache-2.0
"""The slow, obvious truth: whole ``Trainer.fit`` runs in float64, once more for every changed weight."""

import numpy as np
import torch

from cases import NUM_TRAIN, fit, objective
from lightning_sgdclean import SGDInfluence

STEP = 1e-4  # the error of the fourth-order difference below is about STEP**4 and 1e-16 / STEP


def objective_with(case, direction, amount):
    weights = torch.ones(len(case.train), dtype=torch.float64) + amount * direction
    return objective(fit(case, weights=weights), case.val)


def derivative(case, direction):
    near = objective_with(case, direction, STEP) - objective_with(case, direction, -STEP)
    far = objective_with(case, direction, 2 * STEP) - objective_with(case, direction, -2 * STEP)
    return (8 * near - far) / (12 * STEP)


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


def assert_influence_is_the_derivative(case, tolerance=1e-6, **options):
    """Along a direction that moves every sample's weight, so that none can be wrong unseen."""
    found = influences(ranked(case, **options), len(case.train))
    direction = torch.randn(len(case.train), dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    direction /= direction.norm()
    truth = -derivative(case, direction)
    predicted = float(found @ direction.numpy())
    assert np.abs(found).max() > 0
    assert abs(predicted - truth) <= tolerance * np.abs(found).max(), (predicted, truth, np.abs(found).max())
