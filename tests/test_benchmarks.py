# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of costs still run, at their smallest; what they measure is for their pages to say."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from pages import assert_figures_are

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module("cost")
    for name in ("cost", "cost_page", "recording_cost", "silent"):
        sys.modules.pop(name, None)


def test_recorded_steps_are_measured_beside_bare_ones(cost, tmp_path):
    row = cost.measure_recording("Adam", 150, 256, tmp_path / "run")
    assert set(row) == {*cost.RECORDED, *(f"{name}_free" for name in cost.FREE)}
    for one in row.values():
        assert one["ratio"] == pytest.approx(1 + (one["added_ms"] + one["held_up_ms"]) / one["bare_ms"])
        assert 0.2 < one["ratio"] < 20
    assert row["record"]["bytes"] > 13_750 * 3 * 4  # parameters and Adam's two averages


def test_what_is_added_is_told_apart_from_what_the_writer_holds_up(cost):
    """Bare steps of 3 ms, recorded ones 0.2 ms longer, each 32nd of these 3.2 ms more; 1 ms while files are written."""
    timed, spans = importlib.import_module("recording_cost"), [(0.5, 0.512), (1.5, 1.512)]
    steps, now, number = [], 0.0, 0
    for n in range(640):
        is_recorded = n % 2 == 1
        number += is_recorded
        length = 3.0 + (0.2 + 3.2 * (number % 32 == 0) if is_recorded else 0.0)
        is_held_up = any(began < now + length / 1000 and now < ended for began, ended in spans)
        steps.append(timed.TimedStep(now, now := now + (length + is_held_up) / 1000, is_recorded))
    found = timed.added_by(steps, spans)
    num_held_up = sum(any(began < step.ended and step.began < ended for began, ended in spans) for step in steps)
    assert found["bare_ms"] == pytest.approx(3.0)
    assert found["added_ms"] == pytest.approx(0.3, rel=0.02)
    assert found["held_up_ms"] == pytest.approx(num_held_up / 320, rel=0.1)
    assert found["ratio"] == pytest.approx(1 + (found["added_ms"] + found["held_up_ms"]) / 3.0)


def test_the_retrace_is_measured_and_the_papers_way_gives_the_same_scores(cost, monkeypatch, tmp_path):
    train, val = cost.digits(128)
    monkeypatch.setattr(cost, "NUM_TRAIN", len(train))
    row = cost.measure_retrace("SGD", 1, train, val, tmp_path / "run")
    assert row["agreement_with_paper"] < 1e-5
    assert all(row[name] > 0 for name in (*cost.ENGINES, "paper"))


def test_a_smooth_training_is_trusted_and_a_chaotic_one_is_not(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    trust = importlib.import_module("trust")
    monkeypatch.delitem(sys.modules, "trust")
    smooth, chaotic = (
        trust.KINDS["perceptron, tanh, SGD 0.02"],
        trust.KINDS["perceptron of 8, BatchNorm, ReLU, SGD 0.5"],
    )
    found = trust.measure(smooth, 0, tmp_path / "smooth")
    assert found["doubted"] == {4: False, 32: False}
    assert [window.tau > 0.9 for window in found["windows"]] == [True]
    found = trust.measure(chaotic, 0, tmp_path / "chaotic")
    assert found["doubted"] == {4: True, 32: True}
    assert [window.epochs for window in found["windows"]] == [3, 1, 2]
    assert found["windows"][0].growth > 30 > found["windows"][1].growth
    assert abs(found["windows"][0].tau) < 0.3
    assert trust.row("chaotic", [found]).startswith("| chaotic |")


def test_figures_of_the_page_on_finite_differences_are_those_of_the_json(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    finite = importlib.import_module("finite")
    result = json.loads(finite.RESULT.read_text(encoding="utf-8"))
    assert_figures_are(finite.PAGE.read_text(encoding="utf-8"), finite.page(result))
    sys.modules.pop("finite")
