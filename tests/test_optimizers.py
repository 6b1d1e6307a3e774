# SPDX-License-Identifier: Apache-2.0
"""Which optimizers are followed and which refused."""

import pytest
import torch

from lightning_sgdclean.errors import UnsupportedTrainingError
from lightning_sgdclean.optimizers import update_of


def test_unknown_optimizers_are_refused_by_name():
    class Mine(torch.optim.SGD):
        pass

    weight = [torch.nn.Parameter(torch.zeros(2, 2))]
    for kind in (torch.optim.LBFGS, torch.optim.Rprop, torch.optim.SparseAdam, torch.optim.Adafactor, torch.optim.Muon):
        with pytest.raises(UnsupportedTrainingError, match=f"{kind.__name__} cannot be followed backwards: "):
            update_of(kind(weight))
    with pytest.raises(UnsupportedTrainingError, match=r"Mine cannot be followed backwards. Train with one of"):
        update_of(Mine(weight))


def test_complex_parameters_are_refused():
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UnsupportedTrainingError, match=r"Group 0 of the optimizer holds a complex parameter"):
        update_of(torch.optim.SGD([weight]))
