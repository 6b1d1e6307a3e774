# SPDX-License-Identifier: Apache-2.0
"""The page's content: sums against brute force, and what the rows hold."""

import numpy as np
import pytest

from lightning_sgdclean.ranking.ranking import run_id
from lightning_sgdclean.report import content
from lightning_sgdclean.report.appearance import Appearance
from lightning_sgdclean.report.content import (
    coded,
    concentration,
    groups_of_sources,
    histogram,
    page_data,
    running_sum,
    tally,
)
from lightning_sgdclean.report.samples import Shown
from rankings import ranking_of

RANDOM = np.random.default_rng(0)
INFLUENCES = {
    "heavy tail": RANDOM.standard_t(1.5, 3000) * 1e-5,
    "normal": RANDOM.normal(size=500),
    "few": np.array([-0.5, -0.25, 0.0, 0.0, 0.125]),
    "all harmful": -RANDOM.random(40),
}


# --- sums


@pytest.mark.parametrize("influence", INFLUENCES.values(), ids=INFLUENCES)
def test_bars_count_every_sample_once_on_its_side(influence):
    bars = histogram(influence)
    edges, counts = np.array(bars["edges"]), np.array(bars["counts"])
    assert counts[edges[1:] <= 0].sum() == (influence < 0).sum()
    assert counts[edges[:-1] >= 0].sum() == (influence > 0).sum()
    assert bars["zeros"] == (influence == 0).sum()


@pytest.mark.parametrize("influence", INFLUENCES.values(), ids=INFLUENCES)
def test_the_running_sum_has_the_sums_at_its_ranks(influence):
    ranked = np.sort(influence)
    curve = running_sum(ranked)
    assert curve["ranks"][0] == 0
    assert curve["ranks"][-1] == len(ranked)
    assert curve["harmful"] in curve["ranks"]
    for rank, total in zip(curve["ranks"], curve["sums"], strict=True):
        assert total == pytest.approx(float(ranked[:rank].sum()), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("influence", [np.array([]), np.zeros(3)], ids=["none", "zeros"])
def test_where_there_is_nothing_to_draw_nothing_is_drawn(influence):
    assert (histogram(influence), running_sum(influence), concentration(influence)) == (None, None, None)


def test_harm_by_group_is_what_counting_one_by_one_gives():
    influence = INFLUENCES["normal"]
    groups = [int(group) for group in RANDOM.integers(-1, 6, len(influence))]
    truth = {}
    for value, group in zip(influence.tolist(), groups, strict=True):
        entry = truth.setdefault(group, [0, 0, 0.0, 0.0])
        entry[0] += 1
        entry[1] += value < 0
        entry[2] += min(value, 0.0)
        entry[3] += max(value, 0.0)
    truth.pop(-1)
    found = tally(influence, groups)
    assert sorted(row["group"] for row in found) == sorted(truth)
    totals = [row["harm"] + row["help"] for row in found]
    assert totals == sorted(totals)
    for row in found:
        count, harmful, harm, help_ = truth[row["group"]]
        assert (row["count"], row["harmful"]) == (count, harmful)
        assert row["harm"] == pytest.approx(harm, rel=1e-5)
        assert row["help"] == pytest.approx(help_, rel=1e-5)


def test_concentration_is_the_share_of_the_worst_hundredth():
    influence = np.concatenate([[-6.0, -2.0], np.full(198, -0.01), np.ones(50)])
    assert concentration(np.sort(influence)) == pytest.approx(8.0 / (8.0 + 1.98), abs=0.002)


def test_values_are_coded_in_order_and_none_has_no_code():
    assert coded([3, None, 1, 3]) == ([1, 3], [1, -1, 0, 1])
    assert coded(["b", "a"]) == (["a", "b"], [1, 0])


def test_sources_are_grouped_by_part_and_folder():
    sources = ["dataset 1[7]", "dataset 1[8]", "dataset[0]", "cats/1.png", None]
    assert groups_of_sources(sources) == ["dataset 1", "dataset 1", "dataset", "cats", None]


# --- the data


def test_rows_hold_the_ranking():
    ranking = ranking_of(np.array([0.25, -0.5, 0.0]), [7, 8, 9])
    data = page_data(ranking)
    assert (data["ids"], data["influence"], data["visits"]) == ([8, 9, 7], [-0.5, 0.0, 0.25], [1, 1, 1])
    assert data["counts"] == {"harmful": 1, "helpful": 1}
    assert data["run"] == run_id(ranking)


def test_six_digits_keep_signs_even_of_the_smallest():
    data = page_data(ranking_of(np.array([-5e-324, 5e-324, 0.0])))
    assert [value < 0 for value in data["influence"]] == [True, False, False]
    assert [value > 0 for value in data["influence"]] == [False, False, True]


def test_ids_that_javascript_would_round_become_text():
    assert page_data(ranking_of(np.zeros(2), [2**53 + 1, 1]))["ids"] == ["1", str(2**53 + 1)]
    assert page_data(ranking_of(np.zeros(2), [2**53 - 1, 1]))["ids"] == [1, 2**53 - 1]


def test_of_a_long_ranking_the_middle_is_left_out_and_sums_are_of_all(monkeypatch):
    monkeypatch.setattr(content, "NUM_FIRST", 5)
    monkeypatch.setattr(content, "NUM_LAST", 3)
    ranking = ranking_of(np.arange(-10.0, 10.0), label=[0, 1] * 10)
    data = page_data(ranking)
    assert data["ids"] == [0, 1, 2, 3, 4, 17, 18, 19]
    assert data["skipped"] == {"after": 5, "count": 12}
    assert sum(data["histogram"]["counts"]) + data["histogram"]["zeros"] == 20
    assert [row["count"] for row in data["fields"][0]["tally"]] == [10, 10]


def test_labels_are_named_and_counted():
    ranking = ranking_of(np.array([-1.0, -0.5, 1.0, 2.0]))
    data = page_data(ranking, labels=[1, 0, 0, 1], class_names=["cat", "dog"])
    (field,) = data["fields"]
    assert field["values"] == [{"text": "0", "name": "cat"}, {"text": "1", "name": "dog"}]
    assert field["codes"] == [1, 0, 0, 1]
    assert data["choices"] == field["values"]


def test_measured_labels_make_no_groups_and_any_may_be_typed():
    data = page_data(ranking_of(np.zeros(3)), labels=[0.5, 1.25, 2.0])
    assert data["fields"] == [{"name": "label", "values": None, "texts": ["0.5", "1.25", "2"]}]
    assert data["choices"] == []


def shown_with(labels, first=0):
    return [Shown(first + i, label=label) for i, label in enumerate(labels)]


def test_classes_are_those_of_the_shown_samples_where_no_others_are_known():
    influence = np.arange(-4.0, 6.0)
    data = page_data(ranking_of(influence), [*shown_with(["cat", "dog", "cat"]), Shown(9, target="dog")])
    (field,) = data["fields"]
    assert (field["name"], data["classesOf"]) == ("label", "shown")
    assert field["codes"] == [0, 1, 0, *[-1] * 6, 1]
    harm = {field["values"][row["group"]]["name"]: (row["count"], row["harm"], row["help"]) for row in field["tally"]}
    assert harm == {"cat": (2, -6.0, 0.0), "dog": (2, -3.0, 5.0)}
    assert data["labelsAreOfDataset"] is False


def test_it_is_told_whose_classes_are_known():
    ranking, unknown = ranking_of(np.arange(4.0)), ranking_of(np.arange(4.0), label=[None] * 4)
    assert page_data(ranking)["classesOf"] == "none"
    assert page_data(ranking, labels=[0, 1, 0, 1])["classesOf"] == "all"
    assert page_data(ranking_of(np.arange(4.0), label=[0, 1, 0, 1]), shown_with([0, 1]))["classesOf"] == "all"
    assert page_data(unknown, shown_with([0, 1, 1, 0]))["classesOf"] == "shown"
    assert page_data(unknown)["classesOf"] == "none"
    assert page_data(ranking, shown_with([0.5, 0.25, 1.0, 2.0]))["classesOf"] == "measured"
    assert page_data(ranking, labels=[0.5, 0.25, 1.0, 2.0])["classesOf"] == "measured"


def test_columns_that_make_groups_are_shown():
    columns = {"annotator": ["ann", "bob"] * 4, "unique": [f"u{i}" for i in range(8)], "source": ["a[0]", "b[0]"] * 4}
    data = page_data(ranking_of(np.arange(8.0), **columns))
    assert [field["name"] for field in data["fields"]] == ["source", "annotator"]


def test_disagreement_is_known_only_between_classes():
    ranking = ranking_of(np.arange(3.0), label=[1, 2, None], prediction=[1, 3, 1])
    assert page_data(ranking)["disagrees"] == "ny-"
    assert page_data(ranking_of(np.arange(2.0), label=[1.5, 2.0], prediction=[1.5, 2.5]))["disagrees"] == "--"


def test_what_a_column_holds_is_decided_by_all_of_it():
    columns = {"label": [1.0, 1.5, None, 3.0], "prediction": [2.0, 1.5, 2.0, 3.0]}
    data = page_data(ranking_of(np.arange(4.0), **columns))
    assert data["disagrees"] == "----"
    assert data["fields"][0]["texts"] == ["1", "1.5", None, "3"]
    classes = {"label": [1.0, 2.0, None, 3.0], "prediction": [2.0, 2.0, 2.0, 3.0]}  # floats since one is unknown
    assert page_data(ranking_of(np.arange(4.0), **classes))["disagrees"] == "yn-n"


def test_a_shown_sample_leaves_out_what_is_not_known():
    row = Shown(1, Appearance(text="hello"), label=0, target=0, prediction=1, loss=float("nan"))
    data = page_data(ranking_of(np.array([0.0, -1.0])), [row], class_names={0: "no", 1: "yes"})
    assert data["samples"] == {
        0: {"text": "hello", "label": "no", "labelText": "0", "prediction": "yes", "disagrees": True}
    }
