# SPDX-License-Identifier: Apache-2.0
"""Lightning's averages of the weights as end point: the influence is the derivative of the averaged model's loss."""

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, WeightAveraging

from cases import Case, Plain, adam, fit, objective
from lightning_sgdclean import SGDInfluence
from reference import assert_influence_is_the_derivative, influences, one_hot, ranked

MOMENTUM = {"momentum": 0.5}


def double(**options):
    """In 64 bits from the start: Lightning copies the module for its averages before the Trainer converts it."""
    return Plain(**options).double()


def case(averaging=EMAWeightAveraging, module=None, trainer=None, **options):
    given = {"options": MOMENTUM, **(module or {})}
    return Case(
        "averaged",
        given,
        {"max_epochs": 2, **(trainer or {})},
        make=double,
        callbacks=lambda: [] if averaging is None else [averaging(**options)],
    )


class Late(WeightAveraging):
    """A running mean of the weights from some step on, of Lightning's own recipe."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx >= 3


CASES = {
    "each step": case(decay=0.8),
    "every 2 steps": case(decay=0.7, update_every_n_steps=2),
    "from a step on": case(decay=0.7, update_starting_at_step=4),
    "each epoch": case(decay=0.6, update_every_n_steps=0, update_starting_at_epoch=0),
    "steps and epochs": case(decay=0.6, update_starting_at_step=2, update_starting_at_epoch=0),
    "running mean": case(Late),
    "averaged statistics": case(decay=0.8, module={"norm": True}),
    "copied statistics": case(decay=0.8, update_every_n_steps=2, use_buffers=False, module={"norm": True}),
    "accumulated": case(decay=0.7, module={"norm": True}, trainer={"accumulate_grad_batches": 2}),
    "adam": case(decay=0.8, module={"make_optimizer": adam, "options": {}}),
    "ends within an epoch": case(decay=0.8, trainer={"max_steps": 8}),
}


@pytest.mark.parametrize("name", CASES)
def test_influence_is_the_derivative_of_the_averaged_model_s_loss(name):
    callback = assert_influence_is_the_derivative(CASES[name])
    last = callback.summary["window"]["last_step"]
    by = "Late" if name == "running mean" else "EMAWeightAveraging"
    assert callback.summary["end_point"] == f"after step {last}, weights averaged by {by}"
