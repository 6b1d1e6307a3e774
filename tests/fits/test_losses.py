# SPDX-License-Identifier: Apache-2.0
"""Losses of an unmodified ``training_step``, against central differences of whole fits in the sample's weight."""

import pytest
from torch.nn import functional as F

from cases import Case, Plain
from reference import assert_influence_is_the_derivative, influences, ranked
from split_losses import LOSSES, STEPS, case, chance, class_loss, target


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_an_unmodified_training_step_are_followed_exactly(name):
    assert_influence_is_the_derivative(case(name, *class_loss(*LOSSES[name])))


@pytest.mark.parametrize("name", STEPS)
def test_views_terms_and_penalties_are_followed_exactly(name):
    assert_influence_is_the_derivative(case(name, *STEPS[name]))


@pytest.mark.parametrize("name", ["focal through the rows", "class weights"])
def test_finite_agrees_with_exact_to_second_order_also_where_the_loss_bends_the_rows(name):
    following = case(name, *class_loss(*LOSSES[name]))
    exact = influences(ranked(following))
    errors = [
        abs(influences(ranked(following, curvature="finite", finite_radius=r)) - exact).max() for r in (2e-2, 1e-2)
    ]
    assert errors[1] < 0.05 * abs(exact).max()
    assert 3.0 < errors[0] / errors[1] < 5.0


class ValidatedByL1(Plain):
    """Torch drops the weight of ``l1_loss`` where functions are watched."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.l1(batch))

    def l1(self, batch):
        return F.l1_loss(self.net(batch[0]), target(batch[0]), weight=chance(batch[0]), reduction="sum")


def test_an_objective_of_l1_with_weight_is_that_of_validation():
    callback = ranked(Case("l1", {}, {"max_epochs": 1}, make=ValidatedByL1))
    assert callback.summary["objective"]["recomputed"] == pytest.approx(
        callback.summary["objective"]["logged"], rel=1e-9
    )
