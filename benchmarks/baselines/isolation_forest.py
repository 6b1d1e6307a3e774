# SPDX-License-Identifier: Apache-2.0
"""Isolation forest (Liu, Ting, Zhou, 2008), scikit-learn's."""

from sklearn.ensemble import IsolationForest


def badness(points, seed=0):
    """How few random cuts part each of the points ``(N, D)`` from the rest, ``(N,)``."""
    return -IsolationForest(random_state=seed).fit(points).score_samples(points)
