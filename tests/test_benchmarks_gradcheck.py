# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the derivative's check: in little, and its sections of two pages have the figures of its JSON."""

import json

import pytest

import gradcheck
import gradcheck_cost
from gradcheck_faults import HIDDEN, Trial, when
from gradcheck_page import bin_of, is_caught, kind_of, silent
from gradcheck_right import EXACT32, EXACT64, Right, by, detached_maximum
from pages import assert_figures_are


@pytest.mark.parametrize("page", gradcheck.PAGES, ids=lambda page: page.name)
def test_figures_of_the_pages_are_those_of_the_json(page):
    result = json.loads(gradcheck.RESULT.read_text(encoding="utf-8"))
    _, section, _ = gradcheck.parts_of(page)
    assert_figures_are(section, gradcheck.PAGES[page](result))


def test_the_json_has_a_line_for_each_training_and_is_read_as_it_was_written():
    result = {"cost": {"a": {"b": 1}}, "right": [{"name": "x"}, {"name": "y"}], "faulty": [{"fault": "z"}]}
    text = gradcheck.as_text(result)
    assert json.loads(text) == result
    assert sum(line.startswith("  {") for line in text.splitlines()) == 3


FOUND = [
    (Trial("detached ratio of terms", 1), ["derivative"], 1e-2),
    (Trial("objective, item of a factor", 0.1, network="Adam, BatchNorm"), ["objective"], 1e-3),
    (Trial("detached ratio of terms", 1, "in one batch"), ["derivative"], 1e-3),
    (Trial("Function, reversal", 1, "in one batch" + HIDDEN), [], 1e-3),
]


@pytest.mark.parametrize(("trial", "said", "error"), FOUND, ids=lambda value: getattr(value, "fault", ""))
def test_a_fault_is_measured_by_whole_fits_and_what_was_said_of_it_is_known(trial, said, error):
    row = gradcheck.faulted(trial, {})
    assert row["said"] == said
    assert error < row["error"] < 10
    assert is_caught(row) == bool(said)
    assert bool(silent({"faulty": [row]})) != bool(said)


@pytest.mark.parametrize("name", ["detached focal weights", "Function, values kept beside", "hook of a parameter"])
def test_without_strength_a_fault_is_none(name):
    row = gradcheck.faulted(Trial(name, 0), {})
    assert row["said"] == []
    assert row["error"] < 1e-7
    assert bin_of(row) == 0


def test_a_hook_that_the_engine_follows_is_right_however_strong():
    row = gradcheck.faulted(Trial("hook of a tensor", 1), {})
    assert row["is_right"]
    assert row["said"] == []
    assert row["error"] < 1e-7


def test_a_number_that_is_rounded_is_told_apart_by_a_twin_that_is_given_it_in_full():
    rounded, whole = (gradcheck.faulted(Trial(f"{way} of a length", 1), {}) for way in ("numpy in float32", "numpy"))
    assert rounded["error"] == pytest.approx(whole["error"], rel=1e-2)
    assert kind_of(rounded) == "rounded outside of torch"


def test_in_fewer_bits_the_error_is_that_of_the_same_training_in_64():
    errors = {}
    wide = gradcheck.faulted(Trial("detached ratio of terms", 1), errors)
    narrow = gradcheck.faulted(Trial("detached ratio of terms", 1, precision="32-true"), errors)
    assert narrow["error"] == wide["error"]
    assert narrow["said"] == ["derivative"]


def test_a_fault_begins_where_it_is_said_to():
    assert [when("from epoch 1 on", epoch, 3, 0.5) for epoch in (0, 1, 2)] == [None, 0.5, 0.5]
    assert [when("in odd micro-batches", 0, number, 0.5) for number in (0, 1, 2)] == [None, 0.5, None]
    assert [when("in one batch" + HIDDEN, 1, number, 0.5) for number in (1, 2, 3)] == [0.0, 0.5, 0.0]


def test_a_right_training_is_tried_and_what_is_said_of_it_counts_as_a_false_alarm():
    case = by(detached_maximum)
    row = gradcheck.tried(Right("in vain", case, *EXACT64))
    assert row["said"] == []
    assert row["error"] < 1e-7
    assert "error" not in gradcheck.tried(Right("in vain", case, *EXACT32))
    assert gradcheck.tried(Right("a fault", Trial("detach of a length", 1).case, *EXACT64))["said"] == ["derivative"]


def test_what_a_check_takes_is_measured_with_and_without_it():
    row = gradcheck_cost.share_of(gradcheck_cost.PaperCNN, "SGD", gradcheck_cost.digits(192), 64, 2, 1)
    assert (row["num_steps"], row["num_checks"]) == (6, 3)
    assert 0 < row["share_by_clock"] < 1
    assert row["checks_of_window"] == 3
    assert 1 < row["check_in_steps"] < 50
