# SPDX-License-Identifier: Apache-2.0
"""Losses that are no mean over samples: with ``weighted_loss=`` influences are derivatives of whole fits."""

import numpy as np
import pytest

from cases import Case, Scaling, fit, loaders
from left_out import again, without
from lightning_sgdclean import SGDInfluence, retrace
from reference import assert_influence_is_the_derivative, influences, ranked
from weighted_losses import CASES, MOMENTUM, CutMix, Dice, weighted

IDS = [0, 7, 22]


@pytest.mark.parametrize("name", CASES)
def test_influence_is_the_derivative_of_the_fit(name):
    assert_influence_is_the_derivative(CASES[name], weighted_loss=weighted)


def test_without_the_hessian_the_influences_are_wrong():
    with pytest.raises(AssertionError):
        assert_influence_is_the_derivative(CASES["cox"], weighted_loss=weighted, curvature="none")


@pytest.mark.parametrize("name", ["cox", "nt-xent"])
def test_differences_along_a_move_come_close(name):
    options = {"weighted_loss": weighted, "curvature": "finite", "finite_radius": 1e-3}
    assert_influence_is_the_derivative(CASES[name], 1e-4, **options)


def test_a_scaled_loss_is_followed():
    trainer = {"precision": None, "plugins": [Scaling()], "max_epochs": 2}
    assert_influence_is_the_derivative(Case("scaled", MOMENTUM, trainer, make=Dice), weighted_loss=weighted)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_in_fewer_bits_the_influences_are_nearly_those_in_float64(precision):
    exact = influences(ranked(CASES["cutmix"], weighted_loss=weighted))
    case = Case("cutmix", CASES["cutmix"].module, {"max_epochs": 2, "precision": precision}, make=CutMix)
    options = {"retrace_precision": "float32"} if precision != "32-true" else {}
    found = influences(ranked(case, weighted_loss=weighted, **options))
    assert np.corrcoef(found, exact)[0, 1] > 0.999


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", ["dice", "cox", "mixup"])
def test_a_sample_left_out_has_weight_zero_in_the_loss(name, batched):
    case = CASES[name]
    callback = ranked(case, weighted_loss=weighted, snapshots=3)
    found = again(callback, case, without=IDS, weighted_loss=weighted, batched=batched)
    assert found.values == pytest.approx([without(case, [i]) for i in IDS], rel=1e-11)
    assert (found.differences != 0).all()


def test_verify_really_leaves_samples_out():
    callback = SGDInfluence("val_loss", epochs="all", verify=4, columns=("label", "loss"), weighted_loss=weighted)
    with pytest.warns(match=r"With weighted_loss= no row of the loss is one sample's"):
        fit(CASES["dice"], callback)
    ranking = callback.ranking
    tested = [i for i, value in enumerate(ranking.columns["real"]) if value is not None and not np.isnan(value)]
    assert len(tested) >= 4
    real = [without(CASES["dice"], [int(ranking.sample_id[i])]) for i in tested[:2]]
    whole = callback.summary["objective"]["recomputed"]
    assert [ranking.columns["real"][i] for i in tested[:2]] == pytest.approx(np.array(real) - whole, rel=1e-6)


def test_it_is_asked_for_again_by_a_retrace(tmp_path):
    case = CASES["dice"]
    callback = ranked(case, weighted_loss=weighted, dirpath=tmp_path / "run")
    train, val = loaders()

    def later(**options):
        loaders_of = {"train_dataloaders": train, "val_dataloaders": val}
        return retrace(callback.run_dir, case.make(**case.module), **loaders_of, **options)

    with pytest.raises(ValueError, match=r"had weighted_loss=, which is code and was not written down"):
        later()
    assert np.array_equal(later(weighted_loss=weighted).influence, callback.ranking.influence)
