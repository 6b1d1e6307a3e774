# SPDX-License-Identifier: Apache-2.0
"""Which optimizers are followed, proved by central differences of whole fits, and which are refused."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

from cases import Case, perceptron, warm_up
from lightning_sgdclean.adjoint.optimizers import update_of
from lightning_sgdclean.base.errors import UnsupportedTrainingError
from reference import assert_influence_is_the_derivative, influences, ranked

FOLLOWED = {
    optim.SGD: {"lr": 0.1, "momentum": 0.9},
    optim.Adam: {"lr": 0.02, "eps": 1e-3},
    optim.AdamW: {"lr": 0.02, "eps": 1e-3},
    optim.Adadelta: {"lr": 1.0, "eps": 1e-3},
    optim.Adagrad: {"lr": 0.05, "eps": 1e-3},
    optim.Adamax: {"lr": 0.02, "eps": 1e-3},
    optim.ASGD: {"lr": 0.1, "lambd": 0.01},
    optim.NAdam: {"lr": 0.02, "eps": 1e-3},
    optim.RAdam: {"lr": 0.02, "eps": 1e-3},
    optim.RMSprop: {"lr": 0.02, "eps": 1e-3},
}


class WithTable(nn.Module):
    """Has weights whose gradients are always zero: rows of a table never used, a column that sees zeros only."""

    def __init__(self):
        super().__init__()
        self.net = perceptron()
        self.table = nn.Embedding(7, 5)

    def forward(self, x):
        rows = self.table((x[:, 0] > 0).long() + (x[:, 1] > 0).long())
        return self.net((x + rows) * torch.tensor([1, 1, 1, 1, 0]))


def assert_followed(case):
    """Back to the derivative, and forward to the last bit: the optimizer takes its own steps again. The callback."""
    callback = assert_influence_is_the_derivative(case, snapshots=4)
    replay = callback.summary["replay"]
    assert replay["segments"] == replay["segments_bit_for_bit"] > 0
    return callback


def case_of(kind, options=None, **module):
    options = FOLLOWED[kind] | (options or {})
    return Case(kind.__name__, {"make_optimizer": kind, "options": options, **module})


@pytest.mark.parametrize("kind", FOLLOWED)
def test_influence_is_the_derivative_from_a_learning_rate_of_zero_on_and_with_second_moments_of_zero(kind):
    """With few snapshots as with all, to the last bit."""
    case = case_of(kind, warmup=True, net=WithTable)
    assert np.array_equal(influences(assert_followed(case)), influences(ranked(case, snapshots="every")))


def pausing_momentum(optimizer):
    return lr_scheduler.CyclicLR(optimizer, 0.05, 0.1, step_size_up=2, base_momentum=0.0, max_momentum=0.9)


CYCLE = partial(lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=15)
TENSOR = torch.tensor(0.02)
FURTHER = [
    (optim.SGD, {"fused": True}, partial(CYCLE, max_lr=0.2)),
    (optim.SGD, {"foreach": True, "nesterov": True}, partial(CYCLE, max_lr=0.2)),
    (optim.SGD, {"lr": torch.tensor(0.1), "nesterov": True}, warm_up),
    (optim.SGD, {}, pausing_momentum),
    (optim.Adam, {"decoupled_weight_decay": True, "weight_decay": 0.1, "maximize": True, "lr": 0.001}, None),
    (optim.Adam, {"fused": True, "amsgrad": True}, CYCLE),
    (optim.Adam, {"foreach": True, "weight_decay": 0.05}, CYCLE),
    (optim.AdamW, {"amsgrad": True, "betas": (0.7, 0.8), "lr": TENSOR}, CYCLE),
    (optim.Adadelta, {"rho": 0.7, "weight_decay": 0.05, "foreach": True}, None),
    (optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.05, "initial_accumulator_value": 0.1, "fused": True}, None),
    (optim.Adamax, {"betas": (0.7, 0.9), "weight_decay": 0.05, "foreach": True}, CYCLE),
    (optim.ASGD, {"lambd": 0.1, "alpha": 0.5, "t0": 2, "weight_decay": 0.05}, None),
    (optim.ASGD, {"foreach": True, "lr": torch.tensor(0.1)}, warm_up),
    (optim.NAdam, {"momentum_decay": 0.1, "weight_decay": 0.05, "foreach": True}, CYCLE),
    (optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True, "lr": TENSOR}, None),
    (optim.RAdam, {"betas": (0.8, 0.9), "weight_decay": 0.05, "foreach": True}, CYCLE),
    (optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, None),
    (optim.RMSprop, {"alpha": 0.9, "weight_decay": 0.05, "momentum": 0.5, "lr": TENSOR}, CYCLE),
    (optim.RMSprop, {"alpha": 0.8, "centered": True, "momentum": 0.5}, None),
]


@pytest.mark.parametrize(
    ("kind", "options", "schedule"), FURTHER, ids=lambda value: value.__name__ if isinstance(value, type) else None
)
def test_influence_is_the_derivative_with_further_options_flags_groups_and_momenta_that_cycle(kind, options, schedule):
    assert_followed(case_of(kind, options, two_groups=True, schedule=schedule))


def test_unknown_optimizers_are_refused_by_name():
    class Mine(optim.SGD):
        pass

    weight = [nn.Parameter(torch.zeros(2, 2))]
    for kind in (optim.LBFGS, optim.Rprop, optim.SparseAdam):
        with pytest.raises(UnsupportedTrainingError, match=f"{kind.__name__} cannot be followed backwards: "):
            update_of(kind(weight))
    with pytest.raises(
        UnsupportedTrainingError, match=r"Mine cannot be followed backwards. Train with one of .*register_update"
    ):
        update_of(Mine(weight))


def test_complex_parameters_are_refused():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UnsupportedTrainingError, match=r"Group 0 of the optimizer holds a complex parameter"):
        update_of(optim.SGD([weight]))
