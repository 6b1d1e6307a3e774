# SPDX-License-Identifier: Apache-2.0
"""Steps of other packages' optimizers: their own values, the derivatives of their own steps, and whole fits."""

from importlib import import_module

import numpy as np
import pytest
import torch
from torch import nn

from cases import Case, Plain, loaders
from lightning_sgdclean import retrace
from lightning_sgdclean.adjoint.optimizers import update_of
from lightning_sgdclean.base.errors import UnsupportedTrainingError
from optimizer_steps import (
    KINDS,
    SHAPES,
    Situation,
    assert_derivatives_are_finite,
    assert_forward_is_the_step,
    assert_transpose_is_the_difference,
)
from reference import assert_influence_is_the_derivative, ranked

HUGGING_FACE, LARS = "transformers.optimization.Adafactor", "lightly.utils.lars.LARS"
TIMM_LARS, LAMB, ADAMP = "timm.optim.lars.Lars", "timm.optim.lamb.Lamb", "timm.optim.adamp.AdamP"
OPTIONS = [
    (HUGGING_FACE, {}),
    (HUGGING_FACE, {"warmup_init": True, "beta1": 0.7, "weight_decay": 0.1}),
    (HUGGING_FACE, {"lr": 0.1, "relative_step": False, "eps": (1e-6, 10.0), "clip_threshold": 0.5}),
    (
        HUGGING_FACE,
        {"lr": 0.1, "relative_step": False, "scale_parameter": False, "decay_rate": -0.5, "weight_decay": 0.1},
    ),
    (HUGGING_FACE, {"lr": 0.0, "relative_step": False, "beta1": 0.9}),
    (LARS, {"lr": 0.3}),
    (LARS, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.5, "dampening": 0.3}),
    (LARS, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "eps": 1e-2}),
    (LARS, {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.1}),
    (TIMM_LARS, {"lr": 0.3, "momentum": 0.9}),
    (TIMM_LARS, {"lr": 0.3, "weight_decay": 0.1, "trust_coeff": 0.5, "foreach": True}),
    (TIMM_LARS, {"lr": 0.3, "momentum": 0.9, "always_adapt": True, "trust_clip": True, "trust_coeff": 0.5}),
    (TIMM_LARS, {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "eps": 1e-2}),
    (TIMM_LARS, {"lr": 0.01, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1, "trust_clip": True}),
    (TIMM_LARS, {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.1, "trust_clip": True}),
    (LAMB, {"lr": 0.1}),
    (LAMB, {"lr": 0.1, "max_grad_norm": None, "weight_decay": 0.0, "grad_averaging": False, "foreach": True}),
    (LAMB, {"lr": 0.1, "max_grad_norm": 0.1, "weight_decay": 0.1, "decoupled_decay": True, "trust_clip": True}),
    (LAMB, {"lr": 0.1, "weight_decay": 0.0, "always_adapt": True, "bias_correction": False, "betas": (0.7, 0.8)}),
    (LAMB, {"lr": 0.1, "decoupled_decay": True, "corrected_weight_decay": True, "foreach": True, "eps": 1e-3}),
    (LAMB, {"lr": 0.0, "weight_decay": 0.1}),
    (ADAMP, {"lr": 0.1}),
    (ADAMP, {"lr": 0.1, "delta": 10.0, "weight_decay": 0.1, "nesterov": True, "betas": (0.7, 0.8)}),
    (ADAMP, {"lr": 0.1, "delta": 1.1, "weight_decay": 0.1, "wd_ratio": 0.5, "eps": 1e-3}),
    (ADAMP, {"lr": 0.0}),
]
FITS = [
    (HUGGING_FACE, {"eps": (1e-6, 1e-3), "weight_decay": 0.05}),
    (LARS, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.3}),
    (TIMM_LARS, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1, "trust_coeff": 0.3}),
    (LAMB, {"lr": 0.02, "eps": 1e-3, "max_grad_norm": 0.5}),
    (ADAMP, {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.1}),
]


def class_of(place):
    module, _, name = place.rpartition(".")
    pytest.importorskip(module.partition(".")[0])
    return getattr(import_module(module), name)


def of(options):
    """Cases that are named after the class."""
    return [pytest.param(place, more, id=f"{place} {more}") for place, more in options]


@pytest.mark.parametrize("num_before", [0, 1, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("place", "options"), of(OPTIONS))
def test_step_and_derivatives_are_the_optimizers_own(place, options, shape, num_before):
    situation = Situation(class_of(place), options, shape, num_before)
    assert_forward_is_the_step(situation)
    assert_transpose_is_the_difference(situation)


@pytest.mark.parametrize("what", KINDS[1:])
@pytest.mark.parametrize(("place", "options"), of(OPTIONS))
def test_derivatives_are_finite_where_weights_or_gradients_are_zero(place, options, what):
    for shape in SHAPES:
        for num_before in (0, 2):
            situation = Situation(class_of(place), options, shape, num_before, what)
            assert_forward_is_the_step(situation)
            assert_derivatives_are_finite(situation)


@pytest.mark.parametrize(("place", "options"), of(FITS))
def test_influence_is_the_derivative_of_the_whole_fit(place, options):
    case = Case(place, {"make_optimizer": class_of(place), "options": options})
    callback = assert_influence_is_the_derivative(case, snapshots=3)
    replay = callback.summary["replay"]
    assert replay["segments"] == replay["segments_bit_for_bit"] > 0


def test_options_by_which_a_step_counts_are_no_rates_and_can_be_made_again_by_a_new_optimizer():
    case = Case(LAMB, {"make_optimizer": class_of(LAMB), "options": {"lr": 0.02, "eps": 1e-3}, "warmup": True})
    callback = ranked(case, snapshots=3, verify=2)
    assert callback.summary["rates"]["of_step_alone"]
    train, val = loaders(case.train, case.val)
    again = retrace(callback.run_dir, Plain(**case.module), train_dataloaders=train, val_dataloaders=val)
    assert np.array_equal(again.influence, callback.ranking.influence)


@pytest.mark.parametrize("place", [LAMB, ADAMP])
def test_caution_is_refused_for_its_steps_jump(place):
    optimizer = class_of(place)([nn.Parameter(torch.ones(2, 2))], caution=True)
    with pytest.raises(UnsupportedTrainingError, match=r"caution=True of .* a step jumps where a gradient changes"):
        update_of(optimizer)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("timm.optim.lion.Lion", "Lion cannot be followed backwards: its step knows only the gradient's sign"),
        *(
            (f"schedulefree.{name}", "cannot be followed backwards: it trains at one point and is evaluated at another")
            for name in ("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree")
        ),
    ],
)
def test_refusals_name_the_reason(place, words):
    with pytest.raises(UnsupportedTrainingError, match=words):
        update_of(class_of(place)([nn.Parameter(torch.ones(2, 2))]))
