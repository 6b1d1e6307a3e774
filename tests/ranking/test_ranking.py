# SPDX-License-Identifier: Apache-2.0
"""The ranking: order, refusals, the CSV and its way back, keep and by."""

import copy
import csv
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from lightning_sgdclean.ranking import table as ranking_csv
from lightning_sgdclean.ranking.ranking import Ranking
from rankings import STRANGE_IDS

HEADER = "rank,sample_id,influence,effect,visits\n"
GOOD = HEADER + "1,4,-0.5,harmful,2\n2,9,0.0,none,1\n3,1,0.25,helpful,1\n"


def make(ids: list, influence: list[float] | None = None) -> Ranking:
    influence = [float(i) for i in range(len(ids))] if influence is None else influence
    return Ranking.from_influence(ids, influence, [1] * len(ids))


# --- order and attributes


def test_most_negative_influence_has_rank_one() -> None:
    ranking = Ranking.from_influence([5, 6, 7], [0.1, -2.0, -1.0], [1, 2, 3])
    assert ranking.sample_id.tolist() == [6, 7, 5]
    assert ranking.influence.tolist() == [-2.0, -1.0, 0.1]
    assert ranking.visits.tolist() == [2, 3, 1]
    assert ranking.rank.tolist() == [1, 2, 3]
    assert ranking.effect == ["harmful", "harmful", "helpful"]


def test_ties_of_integer_ids_are_ordered_as_numbers() -> None:
    assert make([10, 9, 100, -1], [0.5] * 4).sample_id.tolist() == [-1, 9, 10, 100]


def test_ties_of_str_ids_are_ordered_as_text() -> None:
    assert make(["10", "9", "100"], [0.5] * 3).sample_id.tolist() == ["10", "100", "9"]


def test_positive_and_negative_zero_tie_and_have_no_effect() -> None:
    ranking = make([3, 2, 1], [0.0, -0.0, 0.0])
    assert ranking.sample_id.tolist() == [1, 2, 3]
    assert ranking.effect == ["none"] * 3


def test_arrays_have_the_promised_types() -> None:
    ranking = make([1, 2])
    assert (ranking.sample_id.dtype, ranking.influence.dtype) == (np.int64, np.float64)
    assert (ranking.visits.dtype, ranking.rank.dtype) == (np.int64, np.int64)
    assert make(["a"]).sample_id.dtype == object


@pytest.mark.parametrize(
    "ids",
    [
        [False, True],
        [np.bool_(False), np.int16(1)],
        np.array([0, 1], dtype=np.uint8),
        torch.tensor([0, 1]),
        range(2),
    ],
    ids=["bool", "numpy scalars", "numpy array", "tensor", "range"],
)
def test_every_kind_of_integer_id_becomes_a_python_int(ids: object) -> None:
    ranking = Ranking.from_influence(ids, [-1.0, -2.0], [1, 1])
    assert ranking.harmful(2) == [1, 0]
    assert {type(sample) for sample in ranking.harmful(2)} == {int}


def test_numpy_text_ids_become_python_str() -> None:
    ranking = Ranking.from_influence(np.array(["a", "b"]), [-1.0, -2.0], [1, 1])
    assert ranking.harmful(2) == ["b", "a"]
    assert {type(sample) for sample in ranking.harmful(2)} == {str}


def test_tensors_of_any_floating_type_are_taken() -> None:
    influence = torch.tensor([0.5, -0.25], dtype=torch.bfloat16, requires_grad=True)
    ranking = Ranking.from_influence([0, 1], influence, torch.tensor([1, 2]))
    assert ranking.influence.tolist() == [-0.25, 0.5]


def test_the_arrays_cannot_be_changed_nor_reach_the_caller() -> None:
    influence = np.array([1.0, 2.0])
    ranking = Ranking.from_influence([0, 1], influence, [1, 1])
    influence[:] = 0.0
    assert ranking.influence.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="read-only"):
        ranking.influence[0] = 3.0


def test_equality_is_by_content() -> None:
    assert make([1, 2]) == make([1, 2])
    assert make([1, 2]) != make([1, 3])
    assert make([1, 2]) != make(["1", "2"])
    assert make([1]) != make([1, 2])
    assert make([1]) != "ranking"


def test_copies_and_pickles_are_equal() -> None:
    ranking = make(["b", "a"])
    assert copy.deepcopy(ranking) == ranking
    assert pickle.loads(pickle.dumps(ranking)) == ranking


def test_harmful_and_helpful_stop_at_the_sign() -> None:
    ranking = make([1, 2, 3, 4, 5], [-1.0, 0.0, 2.0, -3.0, 5.0])
    assert ranking.harmful(1) == [4]
    assert ranking.harmful(10) == [4, 1]
    assert ranking.helpful(1) == [5]
    assert ranking.helpful(10) == [5, 3]
    assert ranking.harmful(0) == ranking.helpful(0) == []


def test_ties_of_helpful_samples_ascend_too() -> None:
    assert make([3, 1, 2], [1.0, 1.0, 1.0]).helpful(2) == [1, 2]


def test_a_negative_number_of_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected n to be 0 or more, found -1"):
        make([1]).harmful(-1)


def test_an_empty_ranking_works(tmp_path: Path) -> None:
    ranking = make([])
    assert (len(ranking), ranking.harmful(3), ranking.by({})) == (0, [], {})
    assert repr(ranking) == "Ranking(0 samples: 0 harmful, 0 helpful)"
    assert Ranking.load(ranking.save(tmp_path / "influence.csv")) == ranking


def test_repr_is_short_whatever_the_ids_are() -> None:
    assert repr(make([4, 5], [-0.125, 0.0])) == "Ranking(2 samples: 1 harmful, 0 helpful; worst 4 with -0.125)"
    assert len(repr(make(["x" * 10_000], [-1.0]))) < 120


# --- refusals


@pytest.mark.parametrize(
    ("ids", "influence", "visits", "message"),
    [
        ([1, 2], [0.0, float("nan")], [1, 1], "finite influences, found nan for sample 2 (1 of 2"),
        ([1, 2], [float("inf"), -float("inf")], [1, 1], "finite influences, found inf for sample 1 (2 of 2"),
        ([1, 2, 1], [0.0] * 3, [1] * 3, "every sample id once, found 1 twice"),
        (["a", "a"], [0.0] * 2, [1] * 2, "every sample id once, found 'a' twice"),
        ([0, False], [0.0] * 2, [1] * 2, "every sample id once, found 0 twice"),
        ([1, 2], [0.0], [1, 1], "found 2 ids, 1 influences and 2 numbers of visits"),
        ([1], [0.0], [], "found 1 ids, 1 influences and 0 numbers of visits"),
        ([1, "a", "b"], [0.0] * 3, [1] * 3, "of one type, found 1 integers and 2 str"),
        ([2**63], [0.0], [1], "9223372036854775808 does not fit into 64 bits"),
        (["\ud800"], [0.0], [1], r"'\ud800' cannot be written as UTF-8"),
        ([1], [[0.0]], [1], "one row of numbers, found shape (1, 1)"),
        ([1], ["0.5"], [1], "influence as numbers, found <U3"),
        ([1], [0.0], [1.5], "visits as whole numbers, found float64"),
        ([1], [0.0], [-1], "Sample 1 has -1 visits"),
    ],
)
def test_impossible_input_is_refused_with_what_was_found(
    ids: list, influence: list, visits: list, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Ranking.from_influence(ids, influence, visits)


@pytest.mark.parametrize("sample", [1.0, None, b"a", (1,), np.float32(1), np.datetime64("2020-01-01")])
def test_ids_of_other_types_are_refused(sample: object) -> None:
    with pytest.raises(TypeError, match="Expected sample ids of type int or str, found"):
        make([sample])


# --- CSV


def test_the_csv_is_written_exactly_as_specified(tmp_path: Path) -> None:
    ranking = Ranking.from_influence([1, 4, 9], [0.25, -0.5, 0.0], [1, 2, 1])
    path = ranking.save(tmp_path / "new" / "influence.csv")
    assert path == tmp_path / "new" / "influence.csv"
    assert path.read_bytes() == GOOD.encode()
    assert [file.name for file in path.parent.iterdir()] == ["influence.csv"]


def test_influences_come_back_bit_for_bit(tmp_path: Path) -> None:
    random = np.random.default_rng(0).integers(0, 2**64, 2000, dtype=np.uint64).view(np.float64)
    special = [5e-324, -5e-324, 0.0, -0.0, 0.1 + 0.2, 1e22, 1.7976931348623157e308, -1e-5, 123456789.0]
    influence = np.concatenate([special, random[np.isfinite(random)], np.float32([0.1, 1 / 3]).astype(float)])
    ranking = Ranking.from_influence(range(len(influence)), influence, [3] * len(influence))
    loaded = Ranking.load(ranking.save(tmp_path / "influence.csv"))
    assert loaded.influence.tobytes() == ranking.influence.tobytes()
    assert loaded == ranking


def test_strange_str_ids_come_back(tmp_path: Path) -> None:
    ranking = make(STRANGE_IDS)
    assert Ranking.load(ranking.save(tmp_path / "influence.csv")) == ranking


@pytest.mark.parametrize(
    "sample", ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "\nx", "'x", "'", "\uff1d1", "\uff0b1", "\uff0d1", "\uff20x"]
)
def test_ids_that_look_like_formulas_are_saved_with_an_apostrophe(sample: str, tmp_path: Path) -> None:
    path = make([sample]).save(tmp_path / "influence.csv")
    with path.open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file))[1][1] == "'" + sample


def test_negative_integer_ids_are_no_formulas(tmp_path: Path) -> None:
    ranking = make([-7, 7])
    path = ranking.save(tmp_path / "influence.csv")
    assert "1,-7,0.0,none,1\n" in path.read_text(encoding="utf-8")
    assert Ranking.load(path) == ranking


@pytest.mark.parametrize("sample", ["007", "+7", "-0", "7.0", " 7", "1_000", "\u0667", "9" * 20, "9" * 5000])
def test_ids_that_only_resemble_integers_stay_str(sample: str, tmp_path: Path) -> None:
    ranking = make([sample])
    assert Ranking.load(ranking.save(tmp_path / "influence.csv")) == ranking


def test_the_summary_decides_between_integers_and_str(tmp_path: Path) -> None:
    make(["7", "8"]).save(tmp_path / "influence.csv")
    assert Ranking.load(tmp_path) == make([7, 8])
    (tmp_path / "summary.json").write_text('{"id_type": "str"}', encoding="utf-8")
    assert Ranking.load(tmp_path) == make(["7", "8"])
    (tmp_path / "summary.json").write_text('{"id_type": "int"}', encoding="utf-8")
    assert Ranking.load(tmp_path) == make([7, 8])


@pytest.mark.parametrize("content", ["{}", "[]"])
def test_a_summary_without_id_type_decides_nothing(content: str, tmp_path: Path) -> None:
    make([7]).save(tmp_path / "influence.csv")
    (tmp_path / "summary.json").write_text(content, encoding="utf-8")
    assert Ranking.load(tmp_path) == make([7])


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "expected JSON"), ('{"id_type": "uuid"}', "'int' or 'str', found 'uuid'")],
)
def test_a_damaged_summary_is_named(content: str, message: str, tmp_path: Path) -> None:
    make([7]).save(tmp_path / "influence.csv")
    (tmp_path / "summary.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"summary.json: .*{message}"):
        Ranking.load(tmp_path)


def test_str_where_the_summary_promises_integers_is_refused(tmp_path: Path) -> None:
    make([7, 8]).save(tmp_path / "influence.csv")
    text = (tmp_path / "influence.csv").read_text(encoding="utf-8").replace("2,8", "2,x")
    (tmp_path / "influence.csv").write_text(text, encoding="utf-8")
    (tmp_path / "summary.json").write_text('{"id_type": "int"}', encoding="utf-8")
    with pytest.raises(ValueError, match="line 3: expected an integer sample id, found 'x'"):
        Ranking.load(tmp_path)


HOSTILE = ["=HYPERLINK(1)", "'quoted", "a\r\nb", "-5", "", '",x', "007"]


@pytest.mark.parametrize(
    "values",
    [
        [3, 1, 2, 0, -7, 5, 6],
        [0.1, -0.0, 1e-300, 3.0, 2.0, -1e22, 5.5],
        [0.25, None, float("nan"), -1.0, 2.0, 3.0, 4.0],
        [3, None, 4, 5, 6, 7, 8],
        [True, False, True, True, False, False, True],
        HOSTILE,
        ["7", "8", "9", "10", "-1", "0", "1"],
        ["1e999", "1", "2", "3", "4", "5", "6"],
        [None] * 7,
        ["", None, "x", "", "", "", ""],
    ],
    ids=str,
)
def test_further_columns_round_trip_in_the_order_of_the_ranks(tmp_path: Path, values: list[object]) -> None:
    influence = [3.0, -1.0, 0.0, 7.0, -5.0, 2.0, 1.0]
    ranking = Ranking.from_influence(range(7), influence, [1] * 7, {"of mine": values, "=second": range(7)})
    ranking.save(tmp_path / "influence.csv")
    again = Ranking.load(tmp_path / "influence.csv")
    assert again == ranking
    assert again.columns["=second"].tolist() == again.sample_id.tolist() == [4, 1, 2, 6, 5, 0, 3]
    found = [again.columns["of mine"].tolist()[i] for i in (5, 1, 2, 6, 0, 4, 3)]
    if any(isinstance(value, str) for value in found):
        assert found == [value or "" for value in values]
    else:
        assert np.array_equal(found, [np.nan if value is None else float(value) for value in values], equal_nan=True)


def test_a_column_that_a_csv_could_not_hold_is_refused() -> None:
    for columns, error, message in (
        ({"rank": [1]}, ValueError, "name for a further column"),
        ({"x": [1, 2]}, ValueError, "Expected 1 values in column 'x'"),
        ({"x": [float("inf")]}, ValueError, "infinite"),
        ({"x": [2**70]}, ValueError, "64 bits"),
        ({"x": ["\ud800"]}, ValueError, "UTF-8"),
        ({"x": [object()]}, TypeError, "numbers or text"),
    ):
        with pytest.raises(error, match=message):
            Ranking.from_influence([7], [0.5], [1], columns)


def test_columns_are_added_in_the_order_of_the_ranks() -> None:
    ranking = Ranking.from_influence([7, 8], [0.5, -0.5], [1, 1], {"a": ["x", "y"]}).with_columns({"b": [1, 2]})
    assert ranking.sample_id.tolist() == [8, 7]
    assert {name: column.tolist() for name, column in ranking.columns.items()} == {"a": ["y", "x"], "b": [1, 2]}
    assert ranking != Ranking.from_influence([7, 8], [0.5, -0.5], [1, 1])


def test_further_columns_and_windows_line_ends_are_no_damage(tmp_path: Path) -> None:
    lines = GOOD.splitlines()
    text = "".join(f"{line},{extra}\r\n" for line, extra in zip(lines, ("label", "a", "b", "c"), strict=True))
    (tmp_path / "influence.csv").write_bytes(text.encode())
    assert Ranking.load(tmp_path).sample_id.tolist() == [4, 9, 1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (GOOD, "", "line 1: the line does not end"),
        (GOOD, "\n", "line 1: expected rank,sample_id"),
        ("sample_id", "id", "line 1: expected rank,sample_id,influence,effect,visits, found rank,id"),
        ("rank,sample_id", "\ufeffrank,sample_id", "line 1: expected rank"),
        ("2,9,0.0", "3,9,0.0", "line 3: expected rank 2, found '3'"),
        ("1,4,-0.5,harmful,2\n", "", "line 2: expected rank 1, found '2'"),
        ("2,9,0.0,none,1", "", "line 3: expected 5 fields, found 0"),
        ("none,1", "none", "line 3: expected 5 fields, found 4"),
        ("none,1", "none,1,1", "line 3: expected 5 fields, found 6"),
        ("-0.5", "nan", "line 2: expected a finite number as influence, found 'nan'"),
        ("-0.5", "-inf", "line 2: expected a finite number as influence, found '-inf'"),
        ("-0.5", "-1e999", "line 2: expected a finite number as influence, found '-1e999'"),
        ("-0.5", "-0_5", "line 2: expected a finite number as influence, found '-0_5'"),
        ("-0.5", "", "line 2: expected a finite number as influence, found ''"),
        ("3,1,0.25,helpful", "3,1,-0.25,harmful", "line 4: influence -0.25 is below that of the rank before"),
        ("none", "helpful", "line 3: expected effect 'none' of influence 0.0, found 'helpful'"),
        ("harmful,2", "harmful,two", "line 2: expected a number of visits, found 'two'"),
        ("harmful,2", "harmful,-2", "line 2: expected a number of visits, found '-2'"),
        ("harmful,2", "harmful,99999999999999999999", "line 2: expected a number of visits"),
        ("3,1,", "3,4,", "line 4: sample id 4 stands in line 2 too"),
        ("helpful,1\n", "helpful,1", "line 4: the line does not end"),
        ("helpful,1\n", 'helpful,"1\n', "line 4: unexpected end of data"),
        ("4,-0.5", '"4"x,-0.5', "line 2: "),
    ],
)
def test_damage_is_refused_with_file_and_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "influence.csv"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new), encoding="utf-8", newline="")
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")):
        Ranking.load(path)


def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "influence.csv").write_bytes(GOOD.encode().replace(b"none", b"n\xffne"))
    with pytest.raises(ValueError, match="line 3: expected UTF-8"):
        Ranking.load(tmp_path)


def test_lines_are_counted_where_ids_span_several(tmp_path: Path) -> None:
    path = make(["a\nb\nc", "d"]).save(tmp_path / "influence.csv")
    path.write_text(path.read_text(encoding="utf-8").replace("2,d", "9,d"), encoding="utf-8")
    with pytest.raises(ValueError, match="line 5: expected rank 2, found '9'"):
        Ranking.load(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("influence.csv")):
        Ranking.load(tmp_path)


def test_a_save_that_fails_leaves_the_older_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make([1]).save(tmp_path / "influence.csv")

    def rows_until_the_disk_is_full(table: object) -> object:
        yield 1, 2, "0.0", "none", 1
        raise OSError("disk full")

    monkeypatch.setattr(ranking_csv, "_rows", rows_until_the_disk_is_full)
    with pytest.raises(OSError, match="disk full"):
        make([2]).save(path)
    assert Ranking.load(path) == make([1])
    assert list(tmp_path.iterdir()) == [path]


def test_save_puts_a_new_file_in_the_place_of_the_older_one(tmp_path: Path) -> None:
    path = make([1]).save(tmp_path / "influence.csv")
    (tmp_path / "older.csv").hardlink_to(path)  # what somebody who is reading it has open
    make([2]).save(path)
    assert Ranking.load(tmp_path / "older.csv") == make([1])
    assert Ranking.load(path) == make([2])


# --- pandas


def test_the_data_frame_has_the_columns_of_the_csv(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    ranking = make([3, 1, 2], [0.5, -0.1, 0.0])
    read = pandas.read_csv(ranking.save(tmp_path / "influence.csv"))
    pandas.testing.assert_frame_equal(ranking.to_pandas(), read)
    assert make(["b", "a"]).to_pandas()["sample_id"].tolist() == ["b", "a"]


def test_missing_pandas_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=re.escape("pip install lightning-sgdclean[pandas]")):
        make([1]).to_pandas()


# --- keep


DATASET = TensorDataset(torch.arange(6))


def test_keep_leaves_out_the_first_of_the_ranking() -> None:
    ranking = make([4, 0, 2], [-3.0, -2.0, 1.0])
    subset = ranking.keep(DATASET, drop=2)
    assert list(subset.indices) == [1, 2, 3, 5]
    assert [int(sample) for (sample,) in subset] == [1, 2, 3, 5]


def test_keep_without_drop_is_everything_and_with_all_only_the_unranked() -> None:
    ranking = make([4, 0, 2], [-3.0, -2.0, 1.0])
    assert list(ranking.keep(DATASET, drop=0).indices) == [0, 1, 2, 3, 4, 5]
    assert list(ranking.keep(DATASET, 3).indices) == [1, 3, 5]


@pytest.mark.parametrize(
    ("drop", "message"), [(-1, "drop to be 0 or more, found -1"), (4, "drop 4 samples: the ranking holds 3")]
)
def test_keep_refuses_to_drop_more_or_less_than_there_is(drop: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([4, 0, 2]).keep(DATASET, drop=drop)


@pytest.mark.parametrize("sample", [6, -1])
def test_keep_refuses_ids_that_are_no_positions(sample: int) -> None:
    with pytest.raises(IndexError, match=f"Sample id {sample} is no position in a dataset of 6 samples"):
        make([0, sample]).keep(DATASET, drop=0)


def test_keep_refuses_str_ids() -> None:
    with pytest.raises(TypeError, match="positions in the dataset, found str ids"):
        make(["0"]).keep(DATASET, drop=0)


class _Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(6))

    def __len__(self) -> int:
        return 6


class _NoLength(Dataset):
    pass


@pytest.mark.parametrize("dataset", [_Stream(), _NoLength()], ids=["iterable", "no length"])
def test_keep_refuses_datasets_without_positions(dataset: Dataset) -> None:
    with pytest.raises(TypeError, match="a dataset with a length and positions, found _"):
        make([0]).keep(dataset, drop=0)


# --- by


def test_by_sums_groups_and_puts_the_most_harmful_first() -> None:
    ranking = make([0, 1, 2, 3], [1.0, -3.0, 1.5, -0.5])
    sums = ranking.by(["cat", "dog", "cat", "owl"])
    assert list(sums.items()) == [("dog", -3.0), ("owl", -0.5), ("cat", 2.5)]


def test_by_orders_ties_by_the_text_of_the_group() -> None:
    assert list(make([0, 1, 2], [1.0, 1.0, 1.0]).by([10, 9, "b"])) == [10, 9, "b"]


def test_by_sums_without_rounding_on_the_way() -> None:
    assert make([0, 1, 2], [1e16, 1.0, -1e16]).by([0, 0, 0]) == {0: 1.0}


@pytest.mark.parametrize(
    "groups",
    [
        [7, 8, 7],
        (7, 8, 7),
        np.array([7, 8, 7]),
        torch.tensor([7, 8, 7]),
        {0: 7, 1: 8, 2: 7},
        {0: torch.tensor(7), 1: torch.tensor(8), 2: np.int64(7)},
        [torch.tensor(7), torch.tensor(8), torch.tensor(7)],
    ],
    ids=["list", "tuple", "array", "tensor", "dict", "dict of tensors", "list of tensors"],
)
def test_by_takes_groups_in_every_form(groups: object) -> None:
    sums = make([0, 1, 2], [1.0, -1.0, 2.0]).by(groups)
    assert sums == {8: -1.0, 7: 3.0}
    assert {type(group) for group in sums} == {int}


def test_by_takes_a_series_by_its_labels_and_str_ids_by_a_mapping() -> None:
    pandas = pytest.importorskip("pandas")
    assert make([5, 3], [-1.0, 2.0]).by(pandas.Series(["x", "y"], index=[3, 5])) == {"y": -1.0, "x": 2.0}
    assert make(["a", "b"], [-1.0, 2.0]).by({"a": 0, "b": 1}) == {0: -1.0, 1: 2.0}


@pytest.mark.parametrize("groups", [["x"], np.array([0]), torch.tensor([0]), {0: "x"}])
@pytest.mark.parametrize("sample", [3, -1])
def test_by_names_the_id_without_a_group(groups: object, sample: int) -> None:
    with pytest.raises(KeyError, match=f"^{sample}$"):
        make([0, sample]).by(groups)


def test_by_refuses_what_makes_no_groups() -> None:
    with pytest.raises(TypeError, match="groups must be a mapping"):
        make(["a"]).by(["x"])
    with pytest.raises(ValueError, match="The group of sample 0 is NaN"):
        make([0]).by([float("nan")])
    with pytest.raises(ValueError, match=re.escape("found an array of shape (2, 3)")):
        make([0]).by(torch.zeros(2, 3))
