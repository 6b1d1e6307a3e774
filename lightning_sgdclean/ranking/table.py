# SPDX-License-Identifier: Apache-2.0
"""Rankings as CSV: columns checked, written and read. A million rows are read in stretches, whole columns at a time."""

import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from lightning_sgdclean.base.errors import DamagedFileError
from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.base.summary import check_as_written
from lightning_sgdclean.ranking.csv_files import read_rows, read_stretches, unguarded, write_rows, written

if TYPE_CHECKING:
    from torch import Tensor

CSV_NAME = "influence.csv"
COLUMNS = ("rank", "sample_id", "influence", "effect", "visits")
_INT64 = np.iinfo(np.int64)
# Of whole columns, a line a cell; digits are bounded, since Python refuses to convert thousands of them.
_NUMBER = r"-?[0-9]{1,400}(?:\.[0-9]{1,400})?(?:e[-+]?[0-9]{1,9})?"
_INTEGERS = re.compile(r"(?:(?:0|-?[1-9][0-9]{0,18})\n)*+")
_COUNTS = re.compile(r"(?:(?:0|[1-9][0-9]{0,18})\n)*+")
_NUMBERS = re.compile(rf"(?:{_NUMBER}\n)*+")
_NUMBERS_OR_NONE = re.compile(rf"(?:(?:{_NUMBER})?\n)*+")


class Table(NamedTuple):
    """The columns of a ranking of ``N`` samples, in the order of the ranks; ``columns``: those behind the first five.

    Ids are int64 or objects of str, influences float64, visits int64, others any of these; each ``(N,)``.
    """

    sample_id: NDArray[Any]
    influence: NDArray[np.float64]
    visits: NDArray[np.int64]
    columns: dict[str, NDArray[Any]]

    def whole(self) -> dict[str, NDArray[Any]]:
        """All columns of the file by name, in their order: those that follow from others, too."""
        ranks = np.arange(1, len(self.influence) + 1)
        first = ranks, self.sample_id, self.influence, as_objects(effects_of(self.influence)), self.visits
        return {**dict(zip(COLUMNS, first, strict=True)), **self.columns}


def effect_of(influence: float) -> str:
    """The sign in words: ``harmful``, ``helpful``, or ``none`` at exactly 0."""
    return "harmful" if influence < 0 else "helpful" if influence > 0 else "none"


def effects_of(influence: NDArray[np.float64]) -> list[str]:
    """:func:`effect_of` for each of many."""
    return cast(list[str], _EFFECTS[np.sign(influence).astype(np.intp)].tolist())


_EFFECTS = np.array(["none", "helpful", "harmful"], dtype=object)  # of signs 0, 1, -1


def typed(cells: list[str]) -> NDArray[Any]:
    """What the cells of a column look like: whole numbers, else numbers (empty: NaN), else text."""
    if _are_all(_INTEGERS, cells):
        try:
            return np.fromiter(map(int, cells), np.int64, len(cells))
        except OverflowError:
            pass
    if any(cells) and _are_all(_NUMBERS_OR_NONE, cells):
        found = np.fromiter((float(cell) if cell else math.nan for cell in cells), np.float64, len(cells))
        if not bool(np.isinf(found).any()):
            return found
    return as_objects(cells)


def as_objects(texts: Sequence[str]) -> NDArray[Any]:
    """An array of str."""
    found = np.empty(len(texts), dtype=object)
    found[:] = texts
    return found


def counts_of(table: Table) -> dict[str, Any]:
    """What ``summary.json`` says of a table itself."""
    is_text = table.sample_id.dtype == object and len(table.sample_id) > 0
    harmful = int((table.influence < 0).sum())
    return {"id_type": "str" if is_text else "int", "num_samples": len(table.influence), "num_harmful": harmful}


def write_table(path: Path, table: Table) -> None:
    """Write under a temporary name until it is complete; see :meth:`lightning_sgdclean.Ranking.save`."""
    columns = table.whole()
    write_rows(path, [*columns], zip(*map(cells_of, columns.values()), strict=True))


def cells_of(column: NDArray[Any]) -> list[Any]:
    """A column as it is written: NaN empty, text guarded."""
    cells: list[Any] = column.tolist()
    return cells if column.dtype.kind == "i" else [*map(written, cells)]


def read_table(path: Path) -> Table:
    """Read what :func:`write_table` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If the file is damaged, or not what the ``summary.json`` beside it says was written; the
            message names file and line.
    """
    id_type = check_as_written(path).get("id_type")
    stretches = read_stretches(path, _ROWS)
    header, *rows = next(stretches, [list[str]()])
    first = [rows] if rows else []
    names = _names_in(path, header)
    found, ids, cells = _Numbers(), list[str](), [list[str]() for _ in names]
    for some in chain(first, stretches):
        read = _columns_of(some, len(header))
        if read is None or not found.take(read):
            _say_what_is_wrong(path, len(header))
        ids += read[1]
        for column, more in zip(cells, read[len(COLUMNS) :], strict=True):
            column.extend(map(unguarded, more))
    columns = {name: typed(column) for name, column in zip(names, cells, strict=True)}
    table = Table(_ids_in(path, ids, id_type), *found.columns(), columns)
    if not are_different(table.sample_id):
        _say_where_ids_repeat(path, table.sample_id)
    return table


_ROWS = 1 << 16  # read at once


def _names_in(path: Path, header: list[str]) -> list[str]:
    if tuple(header[: len(COLUMNS)]) != COLUMNS:
        raise DamagedFileError(f"{path}, line 1: expected {','.join(COLUMNS)}, found {','.join(header)}.")
    names = [unguarded(name) for name in header[len(COLUMNS) :]]
    twice = [name for name, times in Counter([*COLUMNS, *names]).items() if times > 1]
    if twice or "" in names:
        raise DamagedFileError(f"{path}, line 1: expected every column once and with a name, found {twice or ['']}.")
    return names


def _columns_of(rows: list[list[str]], width: int) -> list[Sequence[str]] | None:
    """Rows as columns; None where one has another width."""
    try:
        columns = [*zip(*rows, strict=True)]
    except ValueError:
        return None
    return [*columns] if len(columns) == width else None


class _Numbers:
    """Influences and visits, taken in a stretch of rows at a time, where those are right."""

    def __init__(self) -> None:
        self._influence: list[NDArray[np.float64]] = []
        self._visits: list[NDArray[np.int64]] = []
        self._num = 0
        self._largest = -math.inf

    def take(self, columns: list[Sequence[str]]) -> bool:
        """Whether these rows go on where the last ones ended, and say of each sample what can be."""
        ranks, _, influences, effects, visits, *_ = columns
        first, self._num = self._num + 1, self._num + len(ranks)
        if [*ranks] != [*map(str, range(first, self._num + 1))]:
            return False
        if not (_are_all(_NUMBERS, influences) and _are_all(_COUNTS, visits)):
            return False
        influence = np.fromiter(map(float, influences), np.float64, len(ranks))
        if not bool(np.isfinite(influence).all()) or bool((np.diff(influence, prepend=self._largest) < 0).any()):
            return False
        if [*effects] != effects_of(influence):
            return False
        try:
            self._visits.append(np.fromiter(map(int, visits), np.int64, len(ranks)))
        except OverflowError:
            return False
        self._influence.append(influence)
        self._largest = float(influence[-1])
        return True

    def columns(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """All that was taken in."""
        return np.concatenate([np.empty(0), *self._influence]), np.concatenate([np.empty(0, np.int64), *self._visits])


def _are_all(pattern: re.Pattern[str], cells: Sequence[str]) -> bool:
    """Whether each of the cells, made a line, is of a pattern for many lines."""
    lines = "".join(f"{cell}\n" for cell in cells)
    return lines.count("\n") == len(cells) and bool(pattern.fullmatch(lines))  # a cell may hold lines itself


def _say_what_is_wrong(path: Path, width: int) -> NoReturn:
    """Go over a table row by row, since something is wrong in it.

    Raises:
        DamagedFileError: Naming the line.
    """
    rows, before = read_rows(path), -math.inf
    next(rows)
    for rank, (line, row) in enumerate(rows, start=1):
        try:
            before = _check_row(row, width, rank, before)
        except ValueError as error:
            raise DamagedFileError(f"{path}, line {line}: {error}.") from error
    raise DamagedFileError(f"{path}: what stands there is no ranking.")


def _check_row(row: list[str], width: int, rank: int, before: float) -> float:
    if len(row) != width:
        raise ValueError(f"expected {width} fields, found {len(row)}")
    if row[0] != str(rank):
        raise ValueError(f"expected rank {rank}, found {row[0]!r}")
    if not _are_all(_NUMBERS, row[2:3]) or not math.isfinite(float(row[2])):
        raise ValueError(f"expected a finite number as influence, found {row[2]!r}")
    influence = float(row[2])
    if influence < before:
        raise ValueError(f"influence {influence} is below that of the rank before")
    if row[3] != effect_of(influence):
        raise ValueError(f"expected effect {effect_of(influence)!r} of influence {row[2]}, found {row[3]!r}")
    if not _are_all(_COUNTS, row[4:5]) or not _is_int64(row[4]):
        raise ValueError(f"expected a number of visits, found {row[4]!r}")
    return influence


def _is_int64(text: str) -> bool:
    # Length first: Python refuses to convert thousands of digits.
    return _are_all(_INTEGERS, [text]) and len(text) <= 20 and _INT64.min <= int(text) <= _INT64.max


def _ids_in(path: Path, cells: list[str], id_type: str | None) -> NDArray[Any]:
    if id_type != "str":
        try:
            if _are_all(_INTEGERS, cells):
                return np.fromiter(map(int, cells), np.int64, len(cells))
        except OverflowError:
            pass
    if id_type == "int":
        for line, row in islice(read_rows(path), 1, None):
            if not _is_int64(row[1]):
                raise DamagedFileError(f"{path}, line {line}: expected an integer sample id, found {row[1]!r}.")
    return as_objects([unguarded(cell) for cell in cells])


def are_different(ids: NDArray[Any]) -> bool:
    """Whether no id stands there twice."""
    num = len(set(ids.tolist())) if ids.dtype == object else len(np.unique(ids))
    return num == len(ids)


def _say_where_ids_repeat(path: Path, ids: NDArray[Any]) -> NoReturn:
    first_line: dict[SampleId, int] = {}
    for sample, (line, _) in zip(ids.tolist(), islice(read_rows(path), 1, None), strict=True):
        if first_line.setdefault(sample, line) != line:
            first = first_line[sample]
            raise DamagedFileError(f"{path}, line {line}: sample id {sample!r} stands in line {first} too.")
    raise DamagedFileError(f"{path}: a sample id stands there twice.")


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


def checked_ids(sample_id: "Iterable[SampleId] | NDArray[Any] | Tensor") -> NDArray[Any]:
    """Ids as an array, of int64 or of objects of str.

    Raises:
        TypeError: If one is neither.
        ValueError: If they are of both types, or one cannot be written.
    """
    given = as_numpy(sample_id)
    if isinstance(given, np.ndarray) and given.ndim == 1 and given.dtype.kind == "i":
        return given.astype(np.int64)
    ids = [_plain_id(value) for value in given]
    texts = sum(isinstance(value, str) for value in ids)
    if 0 < texts < len(ids):
        raise ValueError(f"Expected sample ids of one type, found {len(ids) - texts} integers and {texts} str.")
    return as_objects(cast(list[str], ids)) if texts else np.array(ids, dtype=np.int64)


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


def check_values(ids: NDArray[Any], influence: NDArray[np.float64], visits: NDArray[np.int64]) -> None:
    """Are these the ids, influences and visits of a ranking?

    Raises:
        ValueError: If an influence is not finite, a number of visits negative, or an id there twice.
    """
    bad = np.flatnonzero(~np.isfinite(influence))
    if len(bad):
        raise ValueError(
            f"Expected finite influences, found {influence[bad[0]]} for sample {ids.tolist()[bad[0]]!r} "
            f"({len(bad)} of {len(ids)} samples)."
        )
    negative = np.flatnonzero(visits < 0)
    if len(negative):
        raise ValueError(f"Sample {ids.tolist()[negative[0]]!r} has {visits[negative[0]]} visits, expected 0 or more.")
    if not are_different(ids):
        twice = next(sample for sample, times in Counter(ids.tolist()).items() if times > 1)
        raise ValueError(f"Expected every sample id once, found {twice!r} twice or more.")
