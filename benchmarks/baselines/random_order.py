# SPDX-License-Identifier: Apache-2.0
"""Chance: what dropping as many samples does by itself."""

import numpy as np


def badness(num_samples, seed):
    """A random number a sample, ``(N,)``."""
    return np.random.default_rng([seed, 1]).random(num_samples)
