# SPDX-License-Identifier: Apache-2.0
"""The benchmark that leaves samples out: in little, and docs/agreement.md has the figures of its JSON."""

import json
from dataclasses import replace

import numpy as np
import pytest

import leave_one_out
import papers_tasks
from pages import assert_figures_are

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own forward mode


@pytest.fixture
def few(monkeypatch):
    for module in (papers_tasks, leave_one_out):
        monkeypatch.setattr(module, "NUM", 24)


def two_clusters(folder):
    random = np.random.default_rng(0)
    labels = np.arange(60) % 2 == 1
    return random.standard_normal((60, 3)) + labels[:, None], labels


def test_the_logistic_regression_s_influences_are_those_of_leaving_out(few, tmp_path, monkeypatch):
    monkeypatch.setattr(leave_one_out, "penalty_of", lambda *_: 0.01)
    setting = replace(papers_tasks.SETTINGS["adult_linear"], load=two_clusters, epochs=2)
    part = leave_one_out.measured(setting, tmp_path, 0)
    assert part["agreement"]["exact"]["tau"] > 0.95
    assert part["agreement"]["finite"]["tau"] > 0.95
    assert part["spread"] > 0
    assert set(part["agreement"]) == set(leave_one_out.WORDS)


def test_figures_of_the_page_are_those_of_the_json():
    result = json.loads(leave_one_out.RESULT.read_text(encoding="utf-8"))
    assert_figures_are(leave_one_out.PAGE.read_text(encoding="utf-8"), leave_one_out.markdown(result))


def test_training_and_validation_samples_are_disjoint_and_those_of_the_seed(few, tmp_path):
    setting = replace(papers_tasks.SETTINGS["adult_network"], load=two_clusters)
    (x, y), (x_val, y_val) = papers_tasks.samples(setting, tmp_path, 0)
    assert x.shape == x_val.shape == (24, 3)
    assert not {row.numpy().tobytes() for row in x} & {row.numpy().tobytes() for row in x_val}
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-6)
    assert papers_tasks.samples(setting, tmp_path, 0)[0][1].tolist() == y.tolist()
    assert papers_tasks.samples(setting, tmp_path, 1)[0][0].tolist() != x.tolist()
    assert set(y.tolist()) | set(y_val.tolist()) == {0.0, 1.0}


def test_adult_s_words_become_columns_and_the_income_the_label(tmp_path):
    row = ["39", "Private", "77516", "11th", "13", "Divorced", "Sales", "Wife", "White", "Male", "2174", "0", "40"]
    row += ["Cuba", "<=50K"]
    other = ["50", *row[1:3], "9th", *row[4:13], "United-States", ">50K"]
    np.savez(tmp_path / "adult.npz", train=np.array([row, other]), test=np.array([row]))
    inputs, labels = papers_tasks.adult(tmp_path)
    assert labels.tolist() == [False, True, False]
    assert inputs[:, 0].tolist() == [39, 50, 39]
    assert inputs[0, 1] == np.log1p(77516)
    assert inputs[0, 6:].tolist() != inputs[1, 6:].tolist()  # the country
    assert inputs.shape[1] == 6 + 7 + 2  # one school, one of each other word, two countries
