# SPDX-License-Identifier: Apache-2.0
"""The ranking as CSV and as a table: there and back, damaged, and with further columns."""

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lightning_sgdclean import Ranking
from lightning_sgdclean.ranking.csv_files import guarded, unguarded, write_rows
from lightning_sgdclean.ranking.table import COLUMNS
from rankings import STRANGE_IDS

HEADER = "rank,sample_id,influence,effect,visits\n"
GOOD = HEADER + "1,4,-0.5,harmful,2\n2,9,0.0,none,1\n3,1,0.25,helpful,1\n"


def make(ids: list, influence: list[float] | None = None, columns: dict | None = None) -> Ranking:
    influence = [float(i) for i in range(len(ids))] if influence is None else influence
    return Ranking.from_influence(ids, influence, [1] * len(ids), columns)


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
    [("{", "expected JSON"), ('{"id_type": "uuid"}', "Invalid enum value 'uuid'")],
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


def test_a_save_that_fails_leaves_the_older_file_alone(tmp_path: Path) -> None:
    path = make([1]).save(tmp_path / "influence.csv")

    def rows_until_the_disk_is_full() -> Iterator[tuple]:
        yield 1, 2, "0.0", "none", 1
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_rows(path, COLUMNS, rows_until_the_disk_is_full())
    assert Ranking.load(path) == make([1])
    assert list(tmp_path.iterdir()) == [path]


def test_save_puts_a_new_file_in_the_place_of_the_older_one(tmp_path: Path) -> None:
    path = make([1]).save(tmp_path / "influence.csv")
    (tmp_path / "older.csv").hardlink_to(path)  # what somebody who is reading it has open
    make([2]).save(path)
    assert Ranking.load(tmp_path / "older.csv") == make([1])
    assert Ranking.load(path) == make([2])


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


def test_what_a_spreadsheet_makes_of_a_table_is_read(tmp_path: Path) -> None:
    path = make(["a;=b", "c"], columns={"note": [" =1", "x"]}).save(tmp_path / "influence.csv")
    expected = Ranking.load(path)
    text = path.read_text(encoding="utf-8")
    for changed in (f"\ufeff{text}", text.replace("\n", "\r\n"), f"{text},,,,,\n\n\n,,,,,\n"):
        path.write_text(changed, encoding="utf-8", newline="")
        assert Ranking.load(path) == expected
    path.write_text(text.replace("2,c", "\n2,c"), encoding="utf-8")
    with pytest.raises(ValueError, match="line 3: expected 6 fields, found 0"):
        Ranking.load(path)


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        *((" =1", "' =1"), ("\u200b@x", "'\u200b@x"), ("a;=1", "a;'=1"), ("a; +1;b", "a;' +1;b"), ("'=1", "''=1")),
        *(("\nx", "'\nx"), ("a;'b", "a;''b"), ("'", "''"), (";", ";"), ("=;=", "'=;'="), ("", ""), ("a=1", "a=1")),
    ],
)
def test_text_that_a_spreadsheet_could_take_for_a_formula_is_guarded_and_comes_back(text: str, cell: str) -> None:
    assert guarded(text) == cell
    assert unguarded(cell) == text


def test_a_column_that_is_there_twice_is_refused_by_both_readers(tmp_path: Path) -> None:
    path = make([1], columns={"a": [1], "b": [2]}).save(tmp_path / "influence.csv")
    path.write_text(path.read_text(encoding="utf-8").replace("visits,a,b", "visits,a,a"), encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: expected every column once"):
        Ranking.load(path)


def test_text_of_several_lines_is_no_number(tmp_path: Path) -> None:
    ranking = make(["7\n8", "9"], columns={"note": ["1\n2", "3"], "size": ["1.5\n", ""]})
    assert Ranking.load(ranking.save(tmp_path / "influence.csv")) == ranking
    path = make([1, 2]).save(tmp_path / "damaged.csv")
    path.write_text(path.read_text(encoding="utf-8").replace(",1.0,", ',"1.0\n2.0",'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 3: expected a finite number as influence, found '1.0\\n2.0'"):
        Ranking.load(path)


def test_a_column_of_which_nothing_is_known_is_the_same_when_it_is_read_again(tmp_path: Path) -> None:
    unknown = np.full(2, np.nan)
    for values in (unknown, unknown.astype(np.float32), [None, None], [float("nan")] * 2):
        ranking = make([1, 2], columns={"loss": values})
        assert Ranking.load(ranking.save(tmp_path / "influence.csv")) == ranking
