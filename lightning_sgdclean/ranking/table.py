# SPDX-License-Identifier: Apache-2.0
"""Rankings as CSV: columns checked, written and read."""

import csv
import io
import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_sgdclean.base.files import appearing_whole
from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.base.summary import check_as_written, summary_beside

if TYPE_CHECKING:
    from torch import Tensor

CSV_NAME = "influence.csv"
COLUMNS = ("rank", "sample_id", "influence", "effect", "visits")
_INT64 = np.iinfo(np.int64)
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?")
_FORMULA_START = (*"=+-@\t\r\n'", *"\uff1d\uff0b\uff0d\uff20")  # the last four: = + - @ in full width


class Table(NamedTuple):
    """The columns of a ranking, in the order of the ranks; ``columns`` are those behind the first five."""

    sample_id: list[Any]
    influence: list[float]
    visits: list[int]
    columns: dict[str, list[Any]]


def effect_of(influence: float) -> str:
    """The sign in words: ``harmful``, ``helpful``, or ``none`` at exactly 0."""
    return "harmful" if influence < 0 else "helpful" if influence > 0 else "none"


def typed(cells: list[str]) -> list[Any]:
    """What the cells of a column look like: whole numbers, else numbers (empty: NaN), else text."""
    if all(map(_is_int64, cells)):
        return [int(cell) for cell in cells]
    if any(cells) and all(not cell or _is_finite(cell) for cell in cells):
        return [float(cell) if cell else math.nan for cell in cells]
    return cells


def counts_of(table: Table) -> dict[str, Any]:
    """What ``summary.json`` says of a table itself."""
    is_text = any(isinstance(name, str) for name in table.sample_id)
    harmful = sum(influence < 0 for influence in table.influence)
    return {"id_type": "str" if is_text else "int", "num_samples": len(table.influence), "num_harmful": harmful}


def write_table(path: Path, table: Table) -> None:
    """Write under a temporary name until it is complete; see :meth:`lightning_sgdclean.Ranking.save`."""
    write_rows(path, [*COLUMNS, *table.columns], _rows(table))


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write any table under a temporary name until it is complete: numbers that round-trip, NaN empty, text guarded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing_whole(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(_UnixLines(file), lineterminator="\r\n")
        writer.writerow(map(guarded, header))
        writer.writerows(map(_cell, row) for row in rows)


def _rows(table: Table) -> Iterator[list[Any]]:
    columns = zip(*table[:3], *table.columns.values(), strict=True)
    for rank, (sample, influence, *others) in enumerate(columns, start=1):
        yield [rank, sample, influence, effect_of(influence), *others]


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return guarded(value)


class _UnixLines:
    # Before Python 3.13 csv quotes a carriage return in a field only if it is part of the line end.
    # So csv writes \r\n, of which the file gets \n.
    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file = file

    def write(self, row: str) -> None:
        self._file.write(row.removesuffix("\r\n") + "\n")


def guarded(value: Any) -> Any:
    """Text that a spreadsheet could take for a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_START) else value


def _read_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: expected UTF-8, found {error.reason}.") from error
    if not text.endswith("\n"):
        last = text.count("\n") + 1
        raise ValueError(f"{path}, line {last}: the line does not end; the file seems cut off.")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}, line {line}: {error}.") from error
        yield line, row


def read_table(path: Path) -> Table:
    """Read what :func:`write_table` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or not what the ``summary.json`` beside it says was written; the message
            names file and line.
    """
    check_as_written(path)
    table = _read_lines(path)
    _, header = next(table)
    if tuple(header[: len(COLUMNS)]) != COLUMNS:
        raise ValueError(f"{path}, line 1: expected {','.join(COLUMNS)}, found {','.join(header)}.")
    names = [name.removeprefix("'") for name in header[len(COLUMNS) :]]
    lines: list[int] = []
    rows: list[list[str]] = []
    influences: list[float] = []
    visits: list[int] = []
    for line, row in table:
        try:
            influence, count = _read_row(row, len(header), rank=len(lines) + 1)
            if influences and influence < influences[-1]:
                raise ValueError(f"influence {influence} is below that of the rank before")
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}.") from error
        lines.append(line)
        rows.append(row)
        influences.append(influence)
        visits.append(count)
    columns = {name: _column([row[len(COLUMNS) + i] for row in rows]) for i, name in enumerate(names)}
    return Table(_read_ids(path, lines, [row[1] for row in rows]), influences, visits, columns)


def _read_row(row: list[str], width: int, rank: int) -> tuple[float, int]:
    if len(row) != width:
        raise ValueError(f"expected {width} fields, found {len(row)}")
    if row[0] != str(rank):
        raise ValueError(f"expected rank {rank}, found {row[0]!r}")
    if not _is_finite(row[2]):
        raise ValueError(f"expected a finite number as influence, found {row[2]!r}")
    influence = float(row[2])
    if row[3] != effect_of(influence):
        raise ValueError(f"expected effect {effect_of(influence)!r} of influence {row[2]}, found {row[3]!r}")
    if not _is_int64(row[4]) or int(row[4]) < 0:
        raise ValueError(f"expected a number of visits, found {row[4]!r}")
    return influence, int(row[4])


def _column(cells: list[str]) -> list[Any]:
    found = typed(cells)
    return [cell.removeprefix("'") for cell in cells] if found is cells else found


def _is_finite(text: str) -> bool:
    return bool(_NUMBER.fullmatch(text)) and math.isfinite(float(text))


def _is_int64(text: str) -> bool:
    # Length first: Python refuses to convert thousands of digits.
    return bool(_INTEGER.fullmatch(text)) and len(text) <= 20 and _INT64.min <= int(text) <= _INT64.max


def _id_type_beside(path: Path) -> str | None:
    id_type = summary_beside(path).get("id_type")
    if id_type not in (None, "int", "str"):
        raise ValueError(f"{path.with_name('summary.json')}: expected id_type 'int' or 'str', found {id_type!r}.")
    return id_type


def _read_ids(path: Path, lines: list[int], cells: list[str]) -> list[SampleId]:
    id_type = _id_type_beside(path)
    as_int = id_type == "int" or (id_type is None and all(map(_is_int64, cells)))
    first_line: dict[SampleId, int] = {}
    for line, cell in zip(lines, cells, strict=True):
        if as_int and not _is_int64(cell):
            raise ValueError(f"{path}, line {line}: expected an integer sample id, found {cell!r}.")
        sample = int(cell) if as_int else cell.removeprefix("'")
        if first_line.setdefault(sample, line) != line:
            raise ValueError(f"{path}, line {line}: sample id {sample!r} stands in line {first_line[sample]} too.")
    return list(first_line)


def as_numpy(values: Any) -> Any:
    """A tensor as an array, anything else as it is. Torch is not imported: runs are looked at without it."""
    if not hasattr(values, "detach"):
        return values
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()  # NumPy has no bfloat16


def checked_count(value: int, name: str) -> int:
    """A number from 0 on.

    Raises:
        ValueError: If it is below.
    """
    count = operator.index(value)
    if count < 0:
        raise ValueError(f"Expected {name} to be 0 or more, found {count}.")
    return count


def checked_ids(sample_id: "Iterable[SampleId] | NDArray[Any] | Tensor") -> list[Any]:
    """Ids as int or str.

    Raises:
        TypeError: If one is neither.
        ValueError: If they are of both types, or one cannot be written.
    """
    ids = [_plain_id(value) for value in as_numpy(sample_id)]
    texts = sum(isinstance(value, str) for value in ids)
    if 0 < texts < len(ids):
        raise ValueError(f"Expected sample ids of one type, found {len(ids) - texts} integers and {texts} str.")
    return ids


def _plain_id(value: object) -> SampleId:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"Sample id {value!r} cannot be written as UTF-8.") from error
        return str(value)
    if not isinstance(value, int | np.integer | np.bool_):
        raise TypeError(f"Expected sample ids of type int or str, found {value!r} of type {type(value).__name__}.")
    number = int(value)
    if not _INT64.min <= number <= _INT64.max:
        raise ValueError(f"Sample id {number} does not fit into 64 bits.")
    return number


def as_vector(values: Any, name: str, kinds: str) -> NDArray[Any]:
    """Values as one row of an array.

    Raises:
        ValueError: If they are not one row, or not numbers of one of the ``kinds`` (letters of NumPy's dtypes).
    """
    array = np.asarray(as_numpy(values))
    if array.ndim != 1:
        raise ValueError(f"Expected {name} as one row of numbers, found shape {array.shape}.")
    if array.size and array.dtype.kind not in kinds:
        raise ValueError(f"Expected {name} as {'whole ' * ('f' not in kinds)}numbers, found {array.dtype}.")
    return array


def check_values(ids: list[Any], influence: NDArray[np.float64], visits: NDArray[np.int64]) -> None:
    """Are these the ids, influences and visits of a ranking?

    Raises:
        ValueError: If an influence is not finite, a number of visits negative, or an id there twice.
    """
    bad = np.flatnonzero(~np.isfinite(influence))
    if len(bad):
        raise ValueError(
            f"Expected finite influences, found {influence[bad[0]]} for sample {ids[bad[0]]!r} "
            f"({len(bad)} of {len(ids)} samples)."
        )
    negative = np.flatnonzero(visits < 0)
    if len(negative):
        raise ValueError(f"Sample {ids[negative[0]]!r} has {visits[negative[0]]} visits, expected 0 or more.")
    seen: set[Any] = set()
    for sample in ids:
        if sample in seen:
            raise ValueError(f"Expected every sample id once, found {sample!r} twice or more.")
        seen.add(sample)
