# SPDX-License-Identifier: Apache-2.0
"""cleanlab's label quality: how well a label agrees with what networks say that have not seen the sample."""

import numpy as np
from cleanlab.rank import get_label_quality_scores
from sklearn.model_selection import StratifiedKFold


def out_of_sample(labels, predict, folds=5, seed=0):
    """Cross-validated probabilities ``(N, classes)``.

    ``predict(train_rows, rows)`` trains on some samples and returns the probabilities of the others.
    """
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)
    rows, found = zip(*((held_out, predict(kept, held_out)) for kept, held_out in parts), strict=True)
    return np.concatenate(found)[np.argsort(np.concatenate(rows))]


def badness(labels, probabilities, method):
    """One minus the quality, ``(N,)``; ``method``: ``"self_confidence"`` or ``"normalized_margin"``."""
    return 1 - get_label_quality_scores(np.asarray(labels), np.asarray(probabilities), method=method)
