# SPDX-License-Identifier: Apache-2.0
"""What pandas and PIL put into batches: told by value, whatever it has cached, and put together again."""

import copy
import io
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lightning_sgdclean.base.errors import RunDirectoryError, UnsupportedTrainingError
from lightning_sgdclean.data.batches import cloned, with_neighbours
from lightning_sgdclean.data.fingerprints import batch_digest
from lightning_sgdclean.data.packing import pack_batch
from lightning_sgdclean.data.unpacking import pack_surely, unpack_batch
from processes import python

CPU = torch.device("cpu")
DAYS = pd.date_range("2026-01-01", periods=3, freq="D")


def frame(last=3):
    made = pd.DataFrame({"a": [1, 2, last], "b": [0.5, np.nan, 1], "c": ["x", "y", None]}, index=[5, 6, 9])
    return made.assign(d=DAYS, e=pd.Categorical(["u", "v", "u"]), f=pd.array([1, None, 3], "Int64"))


def picture(mode="RGB", color=7):
    return Image.new(mode, (4, 3), color)


def read(color=7):
    """A picture of a class that reads files."""
    file = io.BytesIO()
    picture(color=color).save(file, "PNG")
    file.seek(0)
    return Image.open(file)


def with_palette(color):
    made = picture("P", 1)
    made.putpalette([0, 0, 0, color, 2, 3])
    return made


VALUES = {
    "index": (pd.Index(["a", "b", "y"]), pd.Index(["a", "b", "x"])),
    "index of objects": (pd.Index(["a", 1], dtype=object), pd.Index(["a", 2], dtype=object)),
    "named index": (pd.Index([1, 2], name="n"), pd.Index([1, 2], name="m")),
    "range": (pd.RangeIndex(3), pd.RangeIndex(4)),
    "many levels": (pd.MultiIndex.from_product([[1, 2], ["a", "b"]]), pd.MultiIndex.from_product([[1, 2], ["a", "c"]])),
    "dates": (DAYS, DAYS + pd.Timedelta("1h")),
    "dates of a zone": (DAYS.tz_localize("Europe/Berlin"), DAYS.tz_localize("UTC")),
    "spans": (pd.timedelta_range("1D", periods=2), pd.timedelta_range("2D", periods=2)),
    "periods": (pd.period_range("2026-01", periods=2, freq="M"), pd.period_range("2026-02", periods=2, freq="M")),
    "intervals": (pd.interval_range(0, 2), pd.interval_range(1, 3)),
    "classes": (pd.CategoricalIndex(["a", "b"]), pd.CategoricalIndex(["a", "c"])),
    "series": (pd.Series([1.0, 2.0], name="s"), pd.Series([1.0, 3.0], name="s")),
    "series of dates": (pd.Series(DAYS), pd.Series(DAYS + pd.Timedelta("1h"))),
    "series of words": (pd.Series(["a", None]), pd.Series(["b", None])),
    "series of strings": (pd.Series(["a", None], dtype="string"), pd.Series(["b", None], dtype="string")),
    "frame": (frame(), frame(4)),
    "empty frame": (pd.DataFrame(index=[1, 2]), pd.DataFrame(index=[1, 3])),
    "columns of one name": (
        pd.DataFrame([[1, 2]], columns=["a", "a"]),
        pd.DataFrame([[1, 3]], columns=["a", "a"]),
    ),
    "categorical": (pd.Categorical(["a", "b"], ordered=True), pd.Categorical(["a", "b"])),
    "masked": (pd.array([1, None]), pd.array([2, None])),
    "timestamp": (pd.Timestamp("2026-01-02 03:04"), pd.Timestamp("2026-01-02 03:05")),
    "timestamp of a zone": (pd.Timestamp("2026-01-02", tz="Asia/Tokyo"), pd.Timestamp("2026-01-02", tz="UTC")),
    "timedelta": (pd.Timedelta("1h"), pd.Timedelta("2h")),
    "period": (pd.Period("2026-01"), pd.Period("2026-02")),
    "interval": (pd.Interval(0, 1), pd.Interval(0, 1, "both")),
    "nothing": (pd.NA, pd.NaT),
    "picture": (picture(), picture(color=8)),
    "gray picture": (picture("L"), picture("L", 8)),
    "picture with a palette": (with_palette(1), with_palette(2)),
    "picture read from a file": (read(), read(8)),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_told_from_others_copied_and_put_together_again(name):
    (value, other), classes = VALUES[name], {}
    packed = pack_surely([value], 7, classes)
    (back,), (copied,) = unpack_batch(packed, classes, CPU), cloned([value])
    assert type(back) is type(value)
    assert back == value if isinstance(value, Image.Image) else str(back) == str(value)
    if hasattr(value, "dtypes"):
        assert str(back.dtypes) == str(value.dtypes)
    if hasattr(value, "equals"):
        assert back.equals(value)
    if hasattr(value, "freq"):
        assert back.freq == value.freq
    digest = batch_digest([value], 7)
    assert torch.equal(batch_digest([back], 7), digest)
    assert torch.equal(batch_digest([copied], 7), digest)
    assert not torch.equal(batch_digest([other], 7), digest)


def test_what_was_asked_of_it_does_not_change_the_value():
    index, table, shot = pd.Index(["a", "b", "y"]), frame(), read()
    batch = {"cols": index, "table": table, "shot": shot}
    before, packed = batch_digest(batch, 3), pack_batch(batch, {})
    assert index.get_loc("y") == 2
    assert index.is_unique
    assert table["a"].sum() == 6
    shot.load()
    assert torch.equal(batch_digest(batch, 3), before)
    assert pack_batch(batch, {}).skeleton == packed.skeleton


def test_a_row_of_a_table_is_a_samples():
    table = frame()
    other = table.copy()
    other.loc[6, "a"] = 7
    assert (batch_digest(table, 3) != batch_digest(other, 3)).tolist() == [False, True, False]
    changed = with_neighbours({"t": table, "s": table["a"]}, torch.tensor([True, False, True]))
    assert changed["s"].tolist() == changed["t"]["a"].tolist() == [3, 2, 2]
    assert changed["t"].index.tolist() == [5, 6, 9]


class Table(pd.DataFrame):
    """Somebody's own, which may hold more."""

    @property
    def _constructor(self):
        return Table


def test_a_class_derived_by_somebody_else_is_compared_but_not_kept():
    batch = {"x": torch.zeros(3), "t": Table({"a": [1, 2, 3]})}
    assert torch.equal(batch_digest(batch, 3), batch_digest(copy.deepcopy(batch), 3))
    with pytest.raises(UnsupportedTrainingError, match=r"test_kinds_of_libraries\.Table.*derived from"):
        pack_batch(batch, {})


def test_a_file_that_names_a_library_does_not_import_it():
    skeleton = {"kind": "pandas.Index", "parts": {"value": None}}
    python(
        "-c",
        "import sys, torch\n"
        "from lightning_sgdclean.base.errors import RunDirectoryError\n"
        "from lightning_sgdclean.data.packing import PackedBatch, pack_batch\n"
        "from lightning_sgdclean.data.unpacking import unpack_batch\n"
        "pack_batch({'x': torch.zeros(2), 'p': [b'a', {1}]}, {})\n"
        f"try: unpack_batch(PackedBatch({skeleton}, []), {{}}, None)\n"
        "except RunDirectoryError: pass\n"
        "assert not {'pandas', 'PIL', 'torch_geometric'} & {*sys.modules}, 'imported'",
    )
    assert "pandas" in sys.modules
    with pytest.raises(RunDirectoryError, match=r"pandas\.Index, which no batch"):
        unpack_batch(pack_batch(VALUES["index"][0], {}), {}, CPU)
