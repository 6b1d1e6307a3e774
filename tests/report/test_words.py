# SPDX-License-Identifier: Apache-2.0
"""What is said of a ranking's trust, line by line."""

import math

import pytest

from lightning_sgdclean.report.words import trust_lines
from rankings import SUMMARY


def test_trust_is_told_line_by_line():
    lines = trust_lines(SUMMARY)
    assert [(line.term, line.state) for line in lines] == [
        ("Replay", "good"),
        ("Window", "plain"),
        ("Model", "plain"),
        ("Objective", "plain"),
        ("Engine", "plain"),
    ]
    assert lines[3].words == "val_loss = 0.25, evaluated anew; 0.25 was logged for the same weights"


def test_what_speaks_against_trust_is_a_warning():
    summary = SUMMARY | {
        "replay": {"words": "off", "complaints": ["step 3 differs"]},
        "engine": "none",
        "float32_agreement": {"cosine": 0.5, "num_steps": 8},
        "window": {"words": "steps 5 to 9", "first_step": 5},
        "batches": {"kept": 3, "why": "random data", "bytes": 9},
    }
    found = {(line.term, line.state): line.words for line in trust_lines(summary)}
    assert found["Replay", "warning"] == "step 3 differs"
    assert "cosine 0.500" in found["Rounding", "warning"]
    assert "Hessian" in found["Engine", "warning"]
    assert "earlier steps" in found["Window", "plain"]
    assert "may look different" in found["Data", "plain"]


def test_a_run_that_is_not_whole_and_rates_that_may_follow_the_training_are_warnings():
    window = {"words": "steps 0 to 9; the fit did not come to its end", "first_step": 0, "partial": True}
    for is_known in (False, None):
        rates = {"of_step_alone": is_known, "words": "may follow"}
        found = {line.term: line for line in trust_lines(SUMMARY | {"window": window, "rates": rates})}
        assert (found["Window"].words, found["Window"].state) == (window["words"], "warning")
        assert (found["Learning rate"].words, found["Learning rate"].state) == ("may follow", "warning")
    whole = SUMMARY | {"rates": {"of_step_alone": True, "words": "constant"}}
    assert [line.term for line in trust_lines(whole)] == [line.term for line in trust_lines(SUMMARY)]


@pytest.mark.parametrize("cosine", [None, math.nan])  # as summary.json holds it, and as the callback does
def test_a_cosine_that_is_no_number_is_a_warning(cosine):
    summary = SUMMARY | {"float32_agreement": {"cosine": cosine, "num_steps": 8}}
    (line,) = [line for line in trust_lines(summary) if line.term == "Rounding"]
    assert line.state == "warning"
    assert line.words.startswith("cosine nan with a retrace")


@pytest.mark.parametrize(
    ("trust", "words"),
    [({"words": "tau 0.9 of 30"}, "tau 0.9 of 30"), ({"kendall_tau": 0.9, "num": 30}, "kendall tau 0.9; num 30")],
)
def test_leave_one_out_runs_are_told_where_they_were_made(trust, words):
    assert trust_lines(SUMMARY | {"trust": trust})[-1].words == words
