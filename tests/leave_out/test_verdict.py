# SPDX-License-Identifier: Apache-2.0
"""The one sentence on a ranking's trust says what the figures say, and no more."""

import math

import pytest

from lightning_sgdclean.leave_out.outcome import NOTHING_RUN, Outcome
from lightning_sgdclean.leave_out.trust import card_of
from lightning_sgdclean.leave_out.verdict import Sizes, low_tau, worth_retracing

SIZES = Sizes(0.2, -0.04, 2.3, 0.5, {"epoch": [0, 1, 2], "factor": [3.0, 1.5, 0.9]})
GOOD = {"a": (-0.04, -0.03), "b": (0.03, 0.02), "c": (0.01, 0.008), "d": (-0.002, -0.001)}


def outcome(pairs, together=(), noise=1e-6):
    strata = dict(zip(pairs, ["worst", "best"] + ["random"] * len(pairs), strict=False))
    predicted, real = ({name: pair[at] for name, pair in pairs.items()} for at in (0, 1))
    return Outcome(strata, predicted, real, list(together), noise, 0, "at once", 1.0)


def card(pairs=GOOD, sizes=SIZES, **given):
    return card_of("auto", sizes, outcome(pairs, **given))


def test_agreement_is_one_sentence_that_says_how_few_they_were():
    found = card()
    assert found["doubts"] == []
    assert found["verdict"] == (
        "Leaving out 4 samples for real agreed with the ranking: tau 1.00, 6 of 6 pairs in order; of so few samples, "
        "a rough check."
    )
    many = {number: (number / 100, number / 90) for number in range(-8, 8)}
    assert card(many)["verdict"] == (
        "Leaving out 16 samples for real agreed with the ranking: tau 1.00, 120 of 120 pairs in order."
    )


@pytest.mark.parametrize(("num", "low"), [(4, 0.1), (11, 0.1), (12, 0.3), (32, 0.3)])
def test_of_few_samples_only_an_order_no_better_than_chance_is_a_doubt(num, low):
    assert low_tau(num) == low


def test_an_order_that_chance_would_give_is_not_to_be_trusted():
    found = card({"a": (-0.04, 0.02), "b": (0.03, -0.03), "c": (0.01, 0.03), "d": (-0.002, -0.001)})
    assert found["kendall_tau"] <= 0
    assert found["verdict"] == "Do not trust the order: tau is below 0.1 among 4 samples really left out."


def test_a_third_of_pairs_in_disorder_is_no_doubt_of_four_samples():
    found = card({"a": (-0.04, -0.03), "b": (0.03, 0.01), "c": (0.01, 0.02), "d": (-0.002, 0.015)})
    assert found["kendall_tau"] == pytest.approx(1 / 3)
    assert found["doubts"] == []
    assert "tau 0.33, 4 of 6 pairs in order; of so few samples, a rough check" in found["verdict"]


@pytest.mark.parametrize(
    ("factor", "words"),
    [(11, "are 11 times as large as what leaving"), (1 / 11, "really does 11 times as much"), (9, ""), (1 / 9, "")],
)
def test_sizes_wrong_by_a_factor_of_ten_are_a_doubt(factor, words):
    found = card({name: (real * factor, real) for name, (_, real) in GOOD.items()})
    assert found["verdict"].startswith("Do not trust the order" if words else "Leaving out")
    assert words in found["verdict"]


def test_one_sample_wrong_by_a_factor_of_ten_is_a_doubt_about_it_and_not_about_the_order():
    found = card(GOOD | {"c": (0.001, 0.018)})
    (doubt,) = found["doubts"]
    assert doubt == "1 influence is wrong by a factor of 10 or more (sample c: predicted 0.001, really 0.018)"
    assert found["verdict"].startswith("Leaving out 4 samples for real agreed")
    assert found["verdict"].endswith(f"; but {doubt}.")


def test_near_zero_or_within_the_noise_a_factor_means_nothing():
    assert card(GOOD | {"d": (-0.00002, -0.001)})["doubts"] == []
    assert card(GOOD | {"c": (0.001, 0.018)}, noise=0.001)["doubts"] == []


def test_a_sum_that_is_off_by_ten_times_is_a_doubt():
    found = card(together=[0.01, -0.03])
    assert found["doubts"] == []
    (doubt,) = card({name: (5 * p, r) for name, (p, r) in GOOD.items()}, together=[-0.03, 0.001])["doubts"]
    assert doubt == "the worst together 0.001, predicted -0.2, off by 201 times as much"


def test_a_sum_that_nearly_cancels_out_is_no_doubt():
    assert card(together=[1e-5])["together"]["error"] > 10
    assert card(together=[1e-5])["doubts"] == []


@pytest.mark.parametrize(
    ("tau_less", "noise", "words"),
    [
        (GOOD, 0.02, "most differences are within the noise"),
        (GOOD, math.inf, "rounding alone makes training diverge"),
        (GOOD | {"a": (-0.04, None)}, 1e-6, "where training diverges, no derivative says so"),
    ],
)
def test_noise_and_divergence_are_doubts(tau_less, noise, words):
    found = card(tau_less, noise=noise)
    assert any(words in doubt for doubt in found["doubts"])
    assert found["verdict"].startswith("Do not trust the order")


def test_the_largest_influence_within_the_noise_is_a_doubt():
    sizes = Sizes(0.0, 1e-7, 2.3, 0.5, SIZES.adjoint_growth)
    (doubt,) = card(sizes=sizes)["doubts"]
    assert doubt == "the largest influence (1e-07) is within what rounding alone does (1e-06)"


@pytest.mark.parametrize(
    ("total", "largest", "words"),
    [(22.0, 0.1, ""), (-24.0, 0.1, "add up to -24"), (24.0, 23.5, "one sample alone"), (None, None, "")],
)
def test_influences_beyond_what_the_objective_could_change_are_a_doubt_without_any_run(total, largest, words):
    sizes = Sizes(total, largest, 2.3, 0.5, SIZES.adjoint_growth)
    found = card_of(0, sizes, NOTHING_RUN)
    assert len(found["doubts"]) == bool(words)
    assert words in found["verdict"]


@pytest.mark.parametrize(
    ("factors", "worth", "words"),
    [
        (
            [5e4, 200.0, 2.0, 1.0],
            2,
            "back to epoch 7 the derivative grows by a factor of 5e+04; a window is worth retracing "
            "from epoch 9 on: epochs=2",
        ),
        ([5e4, 2.0, 20.0, 1.0], 1, "from epoch 10 on: epochs=1"),
        ([1.0, 1.0, 1.0, 40.0], 0, "not even the last epoch is worth retracing"),
        ([20.0, None, 1.0, 1.0], None, ""),
    ],
)
def test_an_adjoint_that_explodes_says_which_window_is_worth_it(factors, worth, words):
    growth = {"epoch": [7, 8, 9, 10], "factor": factors}
    assert worth_retracing(growth) == worth
    found = card_of(0, Sizes(0.2, 0.04, 2.3, 0.5, growth))
    assert found["worth_epochs"] == worth
    assert len(found["doubts"]) == bool(words)
    assert words in found["verdict"]


def test_where_nothing_could_be_run_the_sentence_says_why():
    found = card_of("auto", SIZES, failure="RuntimeError: no")
    assert found["verdict"] == "No sample could be left out for real, so the order is untested: RuntimeError: no"
    assert found["doubts"] == []


def test_without_an_order_there_is_none_to_agree_with():
    found = card({name: (predicted, 0.02) for name, (predicted, _) in GOOD.items()})
    assert found["verdict"] == "Leaving out 4 samples for real gave no order to compare the ranking with."
