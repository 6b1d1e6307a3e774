# SPDX-License-Identifier: Apache-2.0
"""Self-influence in its simplest form: the length of each training sample's gradient under the final weights."""

from baselines.gradients import squared_norms


def badness(net, train):
    """Gradient norms, ``(N,)``."""
    return squared_norms(net, train).sqrt().numpy()
