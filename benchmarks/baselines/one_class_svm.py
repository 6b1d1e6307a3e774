# SPDX-License-Identifier: Apache-2.0
"""One-class support vector machine (Schoelkopf et al., 2001), scikit-learn's."""

from sklearn.svm import OneClassSVM


def badness(points):
    """How far outside the learned region each of the points ``(N, D)`` lies, ``(N,)``."""
    return -OneClassSVM().fit(points).score_samples(points)
