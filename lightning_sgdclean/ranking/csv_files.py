# SPDX-License-Identifier: Apache-2.0
"""CSV files: one writer and one reader for all tables, with what spreadsheets do to them."""

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_sgdclean.base.errors import DamagedFileError
from lightning_sgdclean.base.files import appearing_whole

# A cell is taken for a formula if it begins so (the last four: = + - @ in full width), also behind blanks and what has
# no width. Where the list separator is a semicolon, a cell begins behind each of them, too.
_BLANK = r"[ \n\u00a0\u200b-\u200f\u2060\ufeff]*"
_FORMULA = _BLANK + r"['=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"
_UNGUARDED = re.compile(rf"(?:\A|(?<=;))(?={_FORMULA})")
_GUARDED = re.compile(rf"(?:\A|(?<=;))'(?={_FORMULA})")


def written(value: Any) -> Any:
    """A value as it stands in a cell: NaN empty, text guarded."""
    return "" if isinstance(value, float) and math.isnan(value) else guarded(value)


def guarded(value: Any) -> Any:
    """Text that a spreadsheet could take for a formula gets an apostrophe in front; see :func:`unguarded`."""
    return _UNGUARDED.sub("'", value) if isinstance(value, str) else value


def unguarded(text: str) -> str:
    """Undo :func:`guarded`."""
    return _GUARDED.sub("", text) if "'" in text else text


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    r"""Write a table under a temporary name until it is complete: UTF-8, one header line, ``\n`` line ends.

    Args:
        path: The file; its folder is made if missing.
        header: Names of the columns; guarded here.
        rows: Cells as :func:`written` gives them; numbers round-trip.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing_whole(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(_UnixLines(file), lineterminator="\r\n")
        writer.writerow(map(guarded, header))
        writer.writerows(rows)


class _UnixLines:
    # Before Python 3.13 csv quotes a carriage return in a field only if it is part of the line end.
    # So csv writes \r\n, of which the file gets \n.
    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file = file

    def write(self, row: str) -> None:
        self._file.write(row.removesuffix("\r\n") + "\n")


def read_rows(path: Path, *, may_end_open: bool = False) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table, the header first, each with the number of its first line; see :func:`read_stretches`.

    Args:
        path: The file.
        may_end_open: Whether the last line may lack its end, as one that was written by hand.

    Raises:
        FileNotFoundError, DamagedFileError: As there.
    """
    empty: list[tuple[int, list[str]]] = []
    line = 1
    with _opened(path, may_end_open) as reader:
        for row in reader:
            if any(row):
                yield from empty
                yield line, row
                empty.clear()
            else:
                empty.append((line, row))
            line = reader.line_num + 1


def read_stretches(path: Path, num: int) -> Iterator[list[list[str]]]:
    """The rows of a table, the header first, about ``num`` at a time; cells as they stand, guarded.

    A byte order mark, line ends of Windows and empty rows at the end are taken: spreadsheets write them.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is no CSV in UTF-8, or cut off within a line; names the line.
    """
    empty: list[list[str]] = []
    with _opened(path) as reader:
        while some := [*islice(reader, num)]:
            rows, empty = [*empty, *some], []
            while rows and not any(rows[-1]):
                empty.append(rows.pop())
            if rows:
                yield rows


@contextmanager
def _opened(path: Path, may_end_open: bool = False) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            yield reader
        except UnicodeDecodeError as error:
            line = _undecodable_line(path)
            raise DamagedFileError(f"{path}, line {line}: expected UTF-8, found {error.reason}.") from error
        except csv.Error as error:
            raise DamagedFileError(f"{path}, line {_line_of_last_row(path)}: {error}.") from error
    if not (may_end_open or _ends_its_last_line(path)):
        line = max(1, reader.line_num)
        raise DamagedFileError(f"{path}, line {line}: the line does not end; the file seems cut off.")


def _line_of_last_row(path: Path) -> int:
    """Number of the first line of the row at which reading stops."""
    line = 1
    with path.open(encoding="utf-8-sig", newline="") as file, suppress(csv.Error):
        reader = csv.reader(file, strict=True)
        for _ in reader:
            line = reader.line_num + 1
    return line


def _undecodable_line(path: Path) -> int:
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return data.count(b"\n", 0, error.start) + 1
    return 1


def _ends_its_last_line(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"\n", b"\r")
