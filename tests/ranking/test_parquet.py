# SPDX-License-Identifier: Apache-2.0
"""The ranking as Parquet: there and back, in other readers' hands, and damaged."""

import math
import sys

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from cases import Case, fit
from lightning_sgdclean import Ranking, SGDInfluence
from rankings import STRANGE_IDS

NUMBERS = [5e-324, -1.7976931348623157e308, 0.1, -0.0, 0.0, math.pi, -2.0]
COLUMNS = {
    "label": [1, 2, 3, 4, 5, 6, -(2**63)],
    "loss": [0.1, math.nan, 1e-310, None, -3.5, 2.0, 7.0],
    "=text": ["=1+1", "", "'", "ü", "two\nlines", "7", "nul\x00byte"],
    "empty": [""] * 7,
    "unknown": [None] * 7,
}


@pytest.mark.parametrize("ids", [[3, -1, 2**63 - 1, 0, 7, 8, 9], [*"abcdef", "7"]], ids=["int", "str"])
def test_everything_comes_back_bit_for_bit(ids, tmp_path):
    ranking = Ranking.from_influence(ids, NUMBERS, range(7), COLUMNS)
    again = Ranking.load(ranking.save(tmp_path / "new" / "x.parquet"))
    assert again == ranking
    assert again.influence.tobytes() == ranking.influence.tobytes()
    assert [column.dtype for column in again.columns.values()] == [column.dtype for column in ranking.columns.values()]
    as_csv = Ranking.load(ranking.save(tmp_path / "x.csv"))
    assert as_csv == again
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.parquet"]


def test_strange_ids_come_back(tmp_path):
    ranking = Ranking.from_influence(STRANGE_IDS, [0.0] * len(STRANGE_IDS), [1] * len(STRANGE_IDS))
    assert Ranking.load(ranking.save(tmp_path / "x.parquet")) == ranking


@pytest.mark.parametrize("ids", [[], [7]])
def test_short_rankings_come_back(ids, tmp_path):
    ranking = Ranking.from_influence(ids, [0.5] * len(ids), [1] * len(ids), {"label": [1] * len(ids)})
    assert Ranking.load(ranking.save(tmp_path / "x.parquet")) == ranking


def test_other_readers_see_the_table_of_the_csv(tmp_path):
    pd = pytest.importorskip("pandas")
    ranking = Ranking.from_influence([4, 1], [0.5, -0.25], [1, 2], {"label": ["cat", "=dog"], "loss": [None, 0.5]})
    ranking.save(tmp_path / "x.parquet")
    frame = pd.read_parquet(tmp_path / "x.parquet")
    pd.testing.assert_frame_equal(frame, ranking.to_pandas(), check_dtype=False)
    assert frame["label"].tolist() == ["=dog", "cat"]  # no spreadsheet will open it, so nothing is guarded
    assert str(frame["sample_id"].dtype) == "int64"


def written(tmp_path, **changes):
    good = {
        "rank": [1, 2],
        "sample_id": [4, 1],
        "influence": [-0.25, 0.5],
        "effect": ["harmful", "helpful"],
        "visits": [2, 1],
    }
    parquet.write_table(pa.table({**good, **changes}), tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": [2, 1]}, "do not fit together"),
        ({"influence": [0.5, -0.25], "effect": ["helpful", "harmful"]}, "do not fit together"),
        ({"effect": ["harmful", "none"]}, "do not fit together"),
        ({"visits": [1, None]}, "visits of type int64 without gaps, found int64 with 1 gaps"),
        ({"sample_id": [0.5, 1.0]}, "sample_id of type int64 or string without gaps, found double"),
        ({"influence": ["-0.25", "0.5"]}, "influence of type double"),
        ({"influence": [-math.inf, 0.5]}, "finite"),
        ({"sample_id": [4, 4]}, "4 twice"),
    ],
)
def test_what_is_no_ranking_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Ranking.load(written(tmp_path, **changes))


def test_other_columns_first_are_refused(tmp_path):
    parquet.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"expected the columns rank, .*, found a"):
        Ranking.load(tmp_path / "x.parquet")


def test_a_damaged_file_is_named(tmp_path):
    path = written(tmp_path)
    content = path.read_bytes()
    for damaged in (b"", b"rank,sample_id\n", content[:-9], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.parquet: no Parquet file, or a damaged one"):
            Ranking.load(path)
    with pytest.raises(FileNotFoundError):
        Ranking.load(tmp_path / "none.parquet")


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    ranking = Ranking.from_influence([1], np.zeros(1), [1])
    with pytest.raises(ImportError, match=r"pip install lightning-sgdclean\[parquet\]"):
        ranking.save(tmp_path / "x.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_fit_writes_it_beside_the_csv_and_a_later_one_replaces_both(tmp_path):
    for _ in range(2):
        callback = SGDInfluence(formats=["parquet"], columns=["label"], dirpath=tmp_path / "run", overwrite=True)
        fit(Case("parquet", trainer={"max_epochs": 1}), callback)
        assert Ranking.load(tmp_path / "run" / "influence.parquet") == callback.ranking
        assert Ranking.load(tmp_path / "run") == callback.ranking
    fit(Case("csv", trainer={"max_epochs": 1}), SGDInfluence(dirpath=tmp_path / "run", overwrite=True))
    assert not (tmp_path / "run" / "influence.parquet").exists()


def test_formats_are_checked_when_the_callback_is_made(monkeypatch):
    with pytest.raises(ValueError, match="formats holds 'xlsx'; expected a sequence of some of csv, parquet"):
        SGDInfluence(formats=("xlsx",))
    with pytest.raises(ValueError, match="formats holds 'parquet'"):
        SGDInfluence(formats="parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install"):
        SGDInfluence(formats=("parquet",))
