# SPDX-License-Identifier: Apache-2.0
"""TracIn (Pruthi et al., NeurIPS 2020): gradients of training and validation loss multiplied, over checkpoints."""

from baselines.gradients import along, mean_gradient, squared_norms


def over_checkpoints(net, checkpoints, score):
    """Sum of ``learning rate * score(net)`` over checkpoints ``(state_dict, learning rate)``."""
    total = 0.0
    for state, lr in checkpoints:
        net.load_state_dict(state)
        total += lr * score(net).double().numpy()
    return total


def badness(net, checkpoints, train, val):
    """Minus the validation loss that a sample's steps are credited with having taken off, ``(N,)``."""
    return over_checkpoints(net, checkpoints, lambda at: -along(at, train, mean_gradient(at, val)))


def self_badness(net, checkpoints, train):
    """The same of each training sample with itself, ``(N,)``: memorized samples stand out."""
    return over_checkpoints(net, checkpoints, lambda at: squared_norms(at, train))
