# SPDX-License-Identifier: Apache-2.0
"""Rankings as CSV: columns checked, written and read."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_sgdclean.base.files import appearing_whole

if TYPE_CHECKING:
    from torch import Tensor

SampleId = int | str
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
        ValueError: If the file is damaged; the message names file and line.
    """
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


def _id_type_of(summary: Path) -> str | None:
    if not summary.is_file():
        return None
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{summary}: expected JSON ({error}). Mend or remove it.") from error
    id_type = content.get("id_type") if isinstance(content, dict) else None
    if id_type not in (None, "int", "str"):
        raise ValueError(f"{summary}: expected id_type 'int' or 'str', found {id_type!r}.")
    return id_type


def _read_ids(path: Path, lines: list[int], cells: list[str]) -> list[SampleId]:
    id_type = _id_type_of(path.with_name("summary.json"))
    as_int = id_type == "int" or (id_type is None and all(map(_is_int64, cells)))
    first_line: dict[SampleId, int] = {}
    for line, cell in zip(lines, cells, strict=True):
        if as_int and not _is_int64(cell):
            raise ValueError(f"{path}, line {line}: expected an integer sample id, found {cell!r}.")
        sample = int(cell) if as_int else cell.removeprefix("'")
        if first_line.setdefault(sample, line) != line:
            raise ValueError(f"{path}, line {line}: sample id {sample!r} stands in line {first_line[sample]} too.")
    return list(first_line)


Columns = Mapping[str, "Sequence[Any] | NDArray[Any] | Tensor"]


def as_columns(columns: Columns | None, length: int) -> dict[str, NDArray[Any]]:
    """Each column as one array; see :func:`as_column`.

    Raises:
        ValueError: If a name is taken or not one of text, or a column has another length.
        TypeError: If a value is neither number nor text.
    """
    found = {}
    for name, values in (columns or {}).items():
        if not isinstance(name, str) or not name or name in COLUMNS:
            raise ValueError(f"Expected a name for a further column that is none of {', '.join(COLUMNS)}: {name!r}.")
        found[name] = as_column(values, name)
        if found[name].shape != (length,):
            raise ValueError(f"Expected {length} values in column {name!r}, found shape {found[name].shape}.")
    return found


def as_column(values: "Sequence[Any] | NDArray[Any] | Tensor", name: str) -> NDArray[Any]:
    """Values as an array that is the same when it has been written as text and read again.

    Args:
        values: Whole numbers, numbers (NaN or None: unknown), or text (None: empty). Text that looks like numbers
            throughout becomes numbers, since a CSV has no types.
        name: For messages.

    Returns:
        An array ``(N,)`` of int64, float64 or str objects.

    Raises:
        ValueError: If a number is infinite or does not fit into 64 bits.
        TypeError: If a value is neither number nor text.
    """
    if hasattr(values, "detach"):  # a tensor; torch is not imported, since runs are looked at without it
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()  # NumPy has no bfloat16
    cells = list(values.tolist() if isinstance(values, np.ndarray) else values)
    cells = [cell.item() if hasattr(cell, "item") else cell for cell in cells]
    if cells and (any(isinstance(cell, str) for cell in cells) or all(map(_is_unknown, cells))):
        cells = typed([_text(cell, name) for cell in cells])
    for cell in cells:
        if not isinstance(cell, int | float | str | None):
            raise TypeError(f"Column {name!r} holds {cell!r:.40}; expected numbers or text.")
    if cells and all(isinstance(cell, str) for cell in cells):
        return np.array(cells, dtype=object)
    if cells and all(isinstance(cell, int) for cell in cells):
        try:
            return np.array(cells, dtype=np.int64)
        except OverflowError as error:
            raise ValueError(f"Column {name!r} holds a number that does not fit into 64 bits.") from error
    array = np.array([np.nan if cell is None else cell for cell in cells], dtype=np.float64)
    if bool(np.isinf(array).any()):
        raise ValueError(f"Column {name!r} holds an infinite number; expected finite ones, or NaN where unknown.")
    return array


def _is_unknown(cell: Any) -> bool:
    return cell is None or cell != cell


def _text(cell: Any, name: str) -> str:
    """A cell of a column that holds text somewhere."""
    if _is_unknown(cell):
        return ""
    text = str(cell)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"Column {name!r} holds {text!r:.40}, which cannot be written as UTF-8.") from error
    return text


def same_columns(mine: Mapping[str, NDArray[Any]], theirs: Mapping[str, NDArray[Any]]) -> bool:
    """Whether names, their order and all values are the same; unknown equals unknown."""
    return list(mine) == list(theirs) and all(
        np.array_equal(mine[name], theirs[name], equal_nan=mine[name].dtype == theirs[name].dtype == np.float64)
        for name in mine
    )
