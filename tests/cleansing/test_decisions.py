# SPDX-License-Identifier: Apache-2.0
"""Decisions applied: what is dropped, what is relabelled in samples of every kind, and what is refused."""

import collections
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_sgdclean import Ranking
from lightning_sgdclean.cleansing.decisions import DECISION_COLUMNS, apply_decisions, read_decisions
from lightning_sgdclean.data.labels import converted_label, place_of_label
from lightning_sgdclean.ranking.ranking import run_id

RANKING = Ranking.from_influence(range(6), [-3.0, -2.0, -1.0, 1.0, 2.0, 3.0], [1] * 6)
HEADER = ",".join(DECISION_COLUMNS)
Pair = collections.namedtuple("Pair", "x y")


def write(tmp_path, *lines, run=None, header=HEADER):
    run = run_id(RANKING) if run is None else run
    path = tmp_path / "decisions.csv"
    path.write_text("\n".join([header, *(f"{line},{run}" for line in lines)]) + "\n", encoding="utf-8")
    return path


class Samples(Dataset):
    def __init__(self, samples, classes=None):
        self.samples, self.classes = samples, classes

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


PAIRS = Samples([(f"text {i}", i % 3) for i in range(6)])


# --- what comes out


def test_dropped_samples_are_gone_and_the_others_stand_in_order(tmp_path):
    path = write(tmp_path, "4,drop,,", "0,drop,,0", "2,keep,,2")
    cleaned = apply_decisions(PAIRS, path, run=RANKING)
    assert cleaned.indices == [1, 2, 3, 5]
    assert [*cleaned] == [PAIRS[i] for i in (1, 2, 3, 5)]


def test_relabelled_samples_have_the_new_label_and_nothing_else_changes(tmp_path):
    path = write(tmp_path, "4,relabel,0,1", "0,drop,,0")
    cleaned = apply_decisions(PAIRS, path, run=RANKING)
    assert [*cleaned] == [("text 1", 1), ("text 2", 2), ("text 3", 0), ("text 4", 0), ("text 5", 2)]
    assert PAIRS[4] == ("text 4", 1)


def test_without_decisions_all_samples_stay(tmp_path):
    assert len(apply_decisions(PAIRS, write(tmp_path), run=RANKING)) == 6


@pytest.mark.parametrize(
    ("sample", "label", "relabelled"),
    [
        (("a", 1), None, ("a", 2)),
        (["a", 1], None, ["a", 2]),
        (Pair("a", 1), None, Pair("a", 2)),
        ({"x": "a", "label": 1}, None, {"x": "a", "label": 2}),
        ({"x": "a", "y": 1}, None, {"x": "a", "y": 2}),
        (("a", "b", 1), 2, ("a", "b", 2)),
        ((1, "a"), 0, (2, "a")),
        ({"label": "keep", "kind": 1}, "kind", {"label": "keep", "kind": 2}),
        (("a", "1"), None, ("a", "2")),
        (("a", 1.0), None, ("a", 2.0)),
        (("a", {"deep": 1}), lambda s, text: (s[0], {"deep": int(text)}), ("a", {"deep": 2})),
    ],
)
def test_the_label_is_changed_where_it_lies(tmp_path, sample, label, relabelled):
    path = write(tmp_path, "3,relabel,2,")
    (changed,) = [apply_decisions(Samples([sample] * 6), path, run=RANKING, label=label)[3]]
    assert changed == relabelled
    assert type(changed) is type(sample)


@pytest.mark.parametrize(
    "old",
    [torch.tensor(1), torch.tensor([1]), torch.tensor(1, dtype=torch.uint8), np.int16(1), np.array(1), np.float32(1)],
    ids=repr,
)
def test_a_new_label_has_the_type_of_the_old_one(old):
    before = old.item()
    new = converted_label("2", old)
    assert type(new) is type(old)
    assert (new.dtype, new.shape, new.item()) == (old.dtype, old.shape, 2)
    assert old.item() == before


def test_truth_values_stay_truth_values():
    assert converted_label("0", True) is False
    assert converted_label("True", False) is True


def test_a_cleaned_dataset_goes_through_workers(tmp_path):
    data = TensorDataset(torch.arange(6.0), torch.arange(6) % 3)
    cleaned = apply_decisions(data, write(tmp_path, "1,relabel,0,1", "2,drop,,2"), run=RANKING)
    batches = [*DataLoader(cleaned, batch_size=5, num_workers=1)]
    assert batches[0][0].tolist() == [0.0, 1.0, 3.0, 4.0, 5.0]
    assert batches[0][1].tolist() == [0, 0, 0, 1, 2]


def test_names_of_samples_lead_to_their_positions(tmp_path):
    ranking = Ranking.from_influence(["b", "=a", "c"], [-2.0, -1.0, 1.0], [1] * 3)
    path = write(tmp_path, "'=a,relabel,5,1", "b,drop,,", run=run_id(ranking))
    cleaned = apply_decisions(Samples([("x", 1)] * 3), path, run=ranking, ids=["=a", "b", "c"])
    assert [*cleaned] == [("x", 5), ("x", 1)]


def test_the_run_is_found_beside_the_file(tmp_path):
    RANKING.save(tmp_path / "influence.csv")
    path = write(tmp_path, "0,drop,,")
    assert len(apply_decisions(PAIRS, path)) == 5
    assert len(apply_decisions(PAIRS, path, run=tmp_path)) == 5
    assert len(apply_decisions(PAIRS, path, run=tmp_path / "influence.csv")) == 5


def test_what_a_spreadsheet_makes_of_the_file_is_read(tmp_path):
    path = write(tmp_path, "0,drop,,", '"1",relabel,"2",1')
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert [decision.choice for decision in read_decisions(path, RANKING)] == ["drop", "relabel"]


def test_the_rule_for_the_place_of_a_label():
    assert place_of_label(("a", 1)) == 1
    assert place_of_label({"target": 1, "x": 0}) == "target"
    for unclear in [("a", 1, 2), {"label": 1, "y": 2}, {"x": 1}, "ab", torch.zeros(2)]:
        assert place_of_label(unclear) is None


# --- refusals


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["9,drop,,"], "line 2: the ranking has no sample '9'"),
        (["0,drop,,", "0,keep,,"], "line 3: sample '0' has a decision in {path}, line 2 already"),
        (["0,remove,,"], "line 2: expected keep, drop, relabel as decision, found 'remove'"),
        (["0,relabel,,"], "line 2: expected a label with 'relabel', found ''"),
        (["0,drop,1,"], "line 2: expected no label with 'drop', found '1'"),
        (["0,drop,"], "line 2: expected 5 fields, found 4"),
        (["0,relabel,cat,"], "line 2: the new label is 'cat', but the dataset's is 0; expected a whole number"),
        (["0,drop,,7"], "line 2: sample 0 had the label '7' when it was decided on, but has '0' now"),
        (["0,relabel,1,7"], "line 2: sample 0 had the label '7'"),
        (['0,"drop,,'], "line 2: unexpected end of data"),
    ],
)
def test_damaged_decisions_are_refused_with_file_and_line(tmp_path, lines, message):
    path = write(tmp_path, *lines)
    with pytest.raises(ValueError, match=re.escape(message.format(path=path))):
        apply_decisions(PAIRS, path, run=RANKING)


def test_decisions_on_another_run_are_refused(tmp_path):
    other = Ranking.from_influence(range(6), [-3.0, -2.0, -1.0, 1.0, 2.0, 3.5], [1] * 6)
    message = f"was made on run '{run_id(other)}', but the ranking is of run '{run_id(RANKING)}'"
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_decisions(PAIRS, write(tmp_path, "0,drop,,", run=run_id(other)), run=RANKING)


def test_another_header_is_refused(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"line 1: expected {HEADER}, found sample_id,decision")):
        apply_decisions(PAIRS, write(tmp_path, header="sample_id,decision"), run=RANKING)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "decisions.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="expected UTF-8"):
        apply_decisions(PAIRS, tmp_path / "decisions.csv", run=RANKING)


def test_a_missing_file_and_a_missing_run_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("decisions.csv does not exist")):
        apply_decisions(PAIRS, tmp_path / "decisions.csv")
    with pytest.raises(ValueError, match="Which run was decided on"):
        apply_decisions(PAIRS, write(tmp_path, "0,drop,,"))


def test_ids_outside_the_dataset_are_refused(tmp_path):
    with pytest.raises(IndexError, match="line 2: sample 5 is none of a dataset of 3 samples"):
        apply_decisions(Samples([("a", 1)] * 3), write(tmp_path, "5,drop,,"), run=RANKING)


def test_names_without_positions_are_refused(tmp_path):
    ranking = Ranking.from_influence(["a"], [-1.0], [1])
    path = write(tmp_path, "a,drop,,", run=run_id(ranking))
    with pytest.raises(TypeError, match="The sample ids are str, no positions"):
        apply_decisions(PAIRS, path, run=ranking)
    with pytest.raises(ValueError, match="ids= has 1 entries for a dataset of 6 samples"):
        apply_decisions(PAIRS, path, run=ranking, ids=["a"])
    with pytest.raises(ValueError, match="ids= names a sample twice"):
        apply_decisions(PAIRS, path, run=ranking, ids=["a"] * 6)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (("a", "b", 1), "not clear: found tuple of 3 items; give label="),
        ({"label": 1, "y": 2}, "not clear: found dict with the keys 'label', 'y'; give label="),
        (3, "not clear: found int; give label="),
    ],
)
def test_where_a_label_lies_is_asked_rather_than_guessed(tmp_path, sample, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        apply_decisions(Samples([sample] * 6), write(tmp_path, "0,relabel,1,"), run=RANKING)


def test_dropping_needs_no_label(tmp_path):
    assert len(apply_decisions(Samples([("a", "b", 1)] * 6), write(tmp_path, "0,drop,,1"), run=RANKING)) == 5


@pytest.mark.parametrize("label", [5, "key"])
def test_a_place_that_leads_nowhere_is_refused(tmp_path, label):
    with pytest.raises(TypeError, match=f"label={label!r} leads nowhere"):
        apply_decisions(PAIRS, write(tmp_path, "0,relabel,1,"), run=RANKING, label=label)


def test_labels_of_several_values_ask_for_a_callable(tmp_path):
    data = Samples([("a", torch.tensor([0, 1]))] * 6)
    with pytest.raises(ValueError, match="expected a single number or text; give label="):
        apply_decisions(data, write(tmp_path, "0,relabel,1,"), run=RANKING)


def test_classes_that_do_not_exist_are_refused(tmp_path):
    data = Samples([("a", 1)] * 6, classes=["cat", "dog"])
    with pytest.raises(ValueError, match="the new label is 2, but there are 2 classes"):
        apply_decisions(data, write(tmp_path, "0,relabel,2,"), run=RANKING)


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not fit into"):
        converted_label("300", torch.tensor(1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="does not fit into"):
        converted_label("300", np.uint8(1))
    with pytest.raises(ValueError, match="expected a finite number"):
        converted_label("nan", 1.0)
    with pytest.raises(ValueError, match="expected True or False"):
        converted_label("maybe", True)


def test_a_stream_has_no_samples_to_drop(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(TypeError, match="a length and positions, found Stream"):
        apply_decisions(Stream(), write(tmp_path), run=RANKING)


def test_the_label_then_may_be_that_of_the_likely_place_and_not_of_the_one_given(tmp_path):
    # The page takes the first single value for the label; only the person knows that it is the last one.
    data = Samples([(f"text {i}", 100 + i, i % 3) for i in range(6)])
    cleaned = apply_decisions(data, write(tmp_path, "4,drop,,104", "2,relabel,0,102"), run=RANKING, label=2)
    assert cleaned[2] == ("text 2", 102, 0)
    with pytest.raises(ValueError, match="sample 4 had the label '105' when it was decided on, but has '1' now"):
        apply_decisions(data, write(tmp_path, "4,drop,,105"), run=RANKING, label=2)
