# SPDX-License-Identifier: Apache-2.0
"""Local outlier factor (Breunig et al., 2000), scikit-learn's."""

from sklearn.neighbors import LocalOutlierFactor


def badness(points, neighbours=20):
    """How much thinner it is around each of the points ``(N, D)`` than around its neighbours, ``(N,)``."""
    return -LocalOutlierFactor(min(neighbours, len(points) - 1)).fit(points).negative_outlier_factor_
