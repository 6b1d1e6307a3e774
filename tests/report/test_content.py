# SPDX-License-Identifier: Apache-2.0
"""The page's content: sums against brute force, data that stay data, and what is said of trust."""

import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_sgdclean import Ranking
from lightning_sgdclean.data.datasets import class_names_of, listed_labels, names_by_label
from lightning_sgdclean.ranking.ranking import run_id
from lightning_sgdclean.report import content
from lightning_sgdclean.report.appearance import Appearance
from lightning_sgdclean.report.content import (
    coded,
    concentration,
    embedded,
    groups_of_sources,
    histogram,
    page_data,
    running_sum,
    tally,
)
from lightning_sgdclean.report.page import write_page
from lightning_sgdclean.report.samples import Shown, ids_to_show
from lightning_sgdclean.report.words import trust_lines
from rankings import SUMMARY

RANDOM = np.random.default_rng(0)
INFLUENCES = {
    "heavy tail": RANDOM.standard_t(1.5, 3000) * 1e-5,
    "normal": RANDOM.normal(size=500),
    "few": np.array([-0.5, -0.25, 0.0, 0.0, 0.125]),
    "all harmful": -RANDOM.random(40),
}
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    '=HYPERLINK("http://x","y")',
    "\u2028\u2029",
    "'\"&amp;",
    "{{ 7 * 7 }}",
    "__proto__",
]


def ranking_of(influence, ids=None, **columns):
    ids = range(len(influence)) if ids is None else ids
    return Ranking.from_influence(ids, influence, [1] * len(influence), columns)


class Page(HTMLParser):
    """Tags and the text of scripts, as a browser's parser sees them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.scripts, self.text, self._inside = [], [], [], None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, text):
        if self._inside == "script":
            self.scripts[-1] += text
        else:
            self.text.append(text)


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


# --- the run's id


def test_the_id_of_a_run_survives_the_csv_and_further_columns(tmp_path):
    ranking = ranking_of(INFLUENCES["heavy tail"])
    assert run_id(Ranking.load(ranking.save(tmp_path / "influence.csv"))) == run_id(ranking)
    assert run_id(ranking.with_columns({"label": [1] * len(ranking)})) == run_id(ranking)


def test_other_rankings_have_other_ids():
    influence = np.array([-1.0, 0.5])
    rankings = [
        ranking_of(influence),
        ranking_of(influence, ["0", "1"]),
        ranking_of(influence, [0, 2]),
        ranking_of(np.nextafter(influence, 0)),
        Ranking.from_influence([0, 1], influence, [1, 2]),
    ]
    assert len({run_id(ranking) for ranking in rankings}) == len(rankings)


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


def test_the_worst_and_the_best_are_shown_and_never_the_same_twice():
    ranking = ranking_of(np.array([-2.0, -1.0, 0.0, 1.0, 2.0]))
    assert ids_to_show(ranking) == [0, 1, 4, 3]
    assert ids_to_show(ranking, 1, 1) == [0, 4]


# --- classes and labels of datasets


class Listed(Dataset):
    classes = ("cat", "dog")

    def __init__(self, labels, targets=None):
        self.labels_, self.targets = labels, list(labels) if targets is None else targets

    def __len__(self):
        return len(self.labels_)

    def __getitem__(self, index):
        return f"text {index}", self.labels_[index]


def test_class_names_are_found_behind_subsets_and_unions():
    listed = Listed([0, 1])
    assert class_names_of(Subset(ConcatDataset([listed, Subset(listed, [0])]), [1])) == ["cat", "dog"]
    assert class_names_of(TensorDataset(torch.zeros(1))) == []


def test_names_are_taken_from_a_list_or_a_mapping():
    assert names_by_label(["a", "b"]) == {"0": "a", "1": "b"}
    assert names_by_label({torch.tensor(3): "three", "x": "ex"}) == {"3": "three", "x": "ex"}


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.zeros(6, 2), torch.arange(6)),
        TensorDataset(torch.zeros(6, 2), torch.arange(6), torch.arange(6) + 10),
        Listed(range(6)),
        Listed(torch.arange(6)),
        Subset(Listed([*range(9, -1, -1)]), [9, 8, 7, 6, 5, 4]),
        ConcatDataset([Listed([0, 1, 2]), TensorDataset(torch.zeros(3, 2), torch.arange(3, 6))]),
    ],
    ids=["tensors", "three tensors", "targets", "targets as a tensor", "subset", "union"],
)
def test_listed_labels_are_those_of_the_samples(dataset):
    assert listed_labels(dataset, [5, 0, 3]) == [5, 0, 3]


@pytest.mark.parametrize(
    "dataset",
    [
        [("text", 1), ("text", 0)],
        Listed([0, 1], targets=[1, 0]),
        Listed([0, 1], targets=[0]),
        TensorDataset(torch.zeros(2, 2), torch.zeros(2, 3)),
    ],
    ids=["no list", "list of others", "list of another length", "several values a sample"],
)
def test_labels_are_not_known_where_the_list_is_not_of_the_samples(dataset):
    assert listed_labels(dataset, [0, 1]) is None


def test_looking_at_labels_leaves_the_random_states_alone():
    class Drawing(Listed):
        def __getitem__(self, index):
            np.random.rand(), torch.rand(1)  # an augmentation, say
            return super().__getitem__(index)

    before = torch.get_rng_state(), np.random.get_state()[1].copy(), np.random.get_state()[2]
    assert listed_labels(Drawing([0, 1]), [1, 0]) == [1, 0]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert np.random.get_state()[2] == before[2]


# --- the file


@pytest.mark.parametrize("text", HOSTILE)
def test_embedded_data_come_back_and_cannot_get_out(text):
    script = embedded({"value": text})
    assert json.loads(script) == {"value": text}
    assert not re.search(r"[<>&\u2028\u2029]", script)


def test_hostile_data_stay_data(tmp_path):
    ranking = ranking_of(np.arange(-4.0, 4.0), HOSTILE, label=HOSTILE)
    shown = [Shown(name, Appearance(text=name, features=((name, name),), note=name), label=name) for name in HOSTILE]
    summary = SUMMARY | {
        "objective": SUMMARY["objective"] | {"name": HOSTILE[1]},
        "replay": {"words": HOSTILE[0], "complaints": HOSTILE},
    }
    harmless = Page(write_page(tmp_path / "a.html", ranking_of(np.arange(-4.0, 4.0)), SUMMARY))
    page = Page(write_page(tmp_path / "b.html", ranking, summary, shown, class_names={HOSTILE[0]: HOSTILE[1]}))
    assert len(page.scripts) == 2
    assert page.scripts[1] == harmless.scripts[1]
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in harmless.tags}
    assert json.loads(page.scripts[0])["ids"] == HOSTILE
    assert HOSTILE[1] in "".join(page.text)


def test_the_page_loads_nothing(tmp_path):
    page = Page(write_page(tmp_path / "report.html", ranking_of(np.arange(-4.0, 4.0)), SUMMARY))
    addresses = [attrs[name] for _, attrs in page.tags for name in ("src", "href") if name in attrs]
    assert set(addresses) == {"data:,", "#samples", "#meaning"}
    (policy,) = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")


def test_the_page_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_page(tmp_path / "report.html", ranking_of(np.arange(3.0)), SUMMARY)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_page(path, ranking_of(np.arange(4.0)), SUMMARY)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("summary", [{}, SUMMARY], ids=["no summary", "summary"])
@pytest.mark.parametrize("influence", [[], [0.0], [1.0]], ids=["empty", "zero", "helpful"])
def test_any_ranking_makes_a_page(tmp_path, summary, influence):
    text = write_page(tmp_path / "report.html", ranking_of(np.array(influence)), summary).read_text(encoding="utf-8")
    assert text.rstrip().endswith("</html>")


# --- trust


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
