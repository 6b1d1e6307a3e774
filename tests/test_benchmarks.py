# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of costs still run, at their smallest; what they measure is for their pages to say."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module("cost")
    for name in ("cost", "cost_page", "recording_cost", "silent"):
        sys.modules.pop(name, None)


def test_recorded_steps_are_measured_beside_bare_ones(cost, tmp_path):
    row = cost.measure_recording("Adam", 24, 256, tmp_path / "run")
    assert set(row) == set(cost.RECORDED)
    for one in row.values():
        assert one["ratio"] == pytest.approx((one["recorded_ms"] + one["writing_ms"]) / one["bare_ms"])
        assert 0.5 < one["ratio"] < 20
    assert row["record"]["bytes"] > 13_750 * 3 * 4  # parameters and Adam's two averages


def test_the_retrace_is_measured_and_the_papers_way_gives_the_same_scores(cost, monkeypatch, tmp_path):
    train, val = cost.digits(128)
    monkeypatch.setattr(cost, "NUM_TRAIN", len(train))
    row = cost.measure_retrace("SGD", 1, train, val, tmp_path / "run")
    assert row["agreement_with_paper"] < 1e-5
    assert all(row[name] > 0 for name in (*cost.ENGINES, "paper"))
