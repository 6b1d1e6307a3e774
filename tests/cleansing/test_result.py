# SPDX-License-Identifier: Apache-2.0
"""Intervals against SciPy's and against their promise: how often they hold the truth, how often luck is believed."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from lightning_sgdclean.cleansing.plan import Measured, Question
from lightning_sgdclean.cleansing.result import Cleansing, estimate, judge

COUNTS = (10, 20)


def measured(none, worst, random, mode="min"):
    return Measured(np.array(none, float), np.array(worst, float), np.array(random, float)[..., None], mode)


def test_the_interval_is_students():
    values = np.random.default_rng(0).normal(size=6)
    by_scipy = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    found = estimate(values, 0.9)
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), *by_scipy))
    assert math.isnan(estimate([1.0]).low)
    assert estimate([0.5, 0.5]).low == 0.5
    assert str(estimate([1.0, 2.0], 0.5)) == "1.5 (1 to 2)"


def test_each_seed_is_judged_by_the_number_that_the_others_chose():
    val = measured([9, 9, 9], [[5, 8, 8], [6, 4, 9]], np.zeros((2, 3)))
    # Without seed 0: 8 against 6.5; without 1: 6.5 against 7.5; without 2: 6.5 against 5.
    test = measured([1, 1, 1], [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], [[1.1, 1.2, 1.3], [1.4, 1.5, 1.6]])
    found = judge(COUNTS, test, val)
    assert found.chosen == (20, 10, 20)
    assert found.recommended == 20  # 7 against 6.33 with all seeds
    assert found.gain.mean == pytest.approx(np.mean([0.6, 0.8, 0.4]))
    assert found.over_random.mean == pytest.approx(np.mean([1.0, 1.0, 1.0]))
    assert found.outcome == "improvement"


def test_high_metrics_and_several_draws():
    val = Measured(np.zeros(3), np.ones((1, 3)), np.zeros((1, 3, 2)), "max")
    test = Measured(np.array([0.8, 0.8, 0.8]), np.array([[0.9, 0.91, 0.92]]), np.array([[[0.7, 0.9]] * 3]), "max")
    found = judge((5,), test, val)
    assert found.gain.mean == pytest.approx(0.11)
    assert found.over_random.mean == pytest.approx(0.11)
    assert found.outcome == "improvement"


@pytest.mark.parametrize(
    ("none", "worst", "random", "outcome"),
    [
        ([1, 1, 1.1], [[0.5, 0.52, 0.5]], [[0.5, 0.4, 0.6]], "no more than random"),
        ([1, 1, 1.1], [[1.5, 1.52, 1.5]], [[1.6, 1.6, 1.6]], "harm"),
        ([1, 1.3, 0.8], [[0.9, 1.2, 1.0]], [[1.5, 1.6, 1.5]], "no improvement"),
        ([1, 1, math.nan], [[0.5, 0.52, 0.5]], [[1.0, 1.0, 1.0]], "undecided"),
        ([1, 1, 1], [[0.5, 0.52, 0.5]], [[1.0, math.nan, 1.0]], "undecided"),
    ],
)
def test_outcomes(none, worst, random, outcome):
    val = measured([1, 1, 1], [[0, 0, 0]], [[1, 1, 1]])
    assert judge((10,), measured(none, worst, random), val).outcome == outcome


def test_data_that_ranked_give_no_verdict():
    val = measured([1, 1, 1], [[0, 0, 0.1]], [[1, 1, 1]])
    assert judge((10,), val, val).outcome == "improvement"
    assert judge((10,), val, val, biased=True).outcome == "undecided"


def test_nothing_is_removed_if_validation_says_so_and_what_diverged_is_never_chosen():
    val = measured([1, 1, 1], [[1.1, 1, 1], [0.1, math.nan, 0.1]], np.ones((2, 3)))
    found = judge(COUNTS, measured([1, 1, 1], np.zeros((2, 3)), np.ones((2, 3))), val)
    assert found.recommended == 0
    assert found.chosen == (0, 20, 0)  # without seed 1 nothing diverged


def test_luck_is_rarely_taken_for_improvement():
    """Five numbers are tried, none does anything, and a lucky training is lucky in validation and test alike."""
    draw = np.random.default_rng(0)
    naive, outcomes = 0, Counter()
    for _ in range(2000):
        luck = draw.normal(size=(6, 4))
        val, test = (luck + 0.3 * draw.normal(size=luck.shape) for _ in range(2))
        random = draw.normal(size=(5, 4, 2))
        one = Measured(test[0], test[1:], random, "min")
        outcomes[judge((1, 2, 3, 4, 5), one, Measured(val[0], val[1:], random, "min")).outcome] += 1
        naive += estimate(one.gains[val.mean(1)[1:].argmin()]).low > 0
    assert outcomes["improvement"] / 2000 < 0.025
    assert (outcomes["improvement"] + outcomes["no more than random"]) / 2000 < 0.05
    assert naive / 2000 > 0.05


def test_a_figure_that_cannot_be_written_leaves_the_old_one(monkeypatch):
    numbers = Measured(np.array([2.0, 3.0]), np.array([[1.0, 2.0]]), np.array([[[2.0], [3.0]]]), "min")
    question = Question("test_loss", "min", "val_loss", "min", 0.95)
    verdict = judge((5,), numbers, numbers, 0.95, False)
    found = Cleansing(Path(), (0, 1), (5,), question, numbers, numbers, verdict, ())
    found.save()
    whole = Path("figure.png").read_bytes()

    def disk_full(figure, path, **options):
        Path(path).write_bytes(whole[:100])
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", disk_full)
    with pytest.raises(OSError, match="no space left"):
        found.save()
    assert Path("figure.png").read_bytes() == whole
    assert sorted(path.name for path in Path().iterdir()) == ["figure.png", "report.json", "table.csv"]
