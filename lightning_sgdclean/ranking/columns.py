# SPDX-License-Identifier: Apache-2.0
"""Columns in the types that files keep, the same after writing and reading; as Parquet, and as pandas DataFrames."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from lightning_sgdclean.base.errors import DamagedFileError
from lightning_sgdclean.base.files import appearing_whole
from lightning_sgdclean.base.resources import pyarrow
from lightning_sgdclean.base.summary import check_as_written
from lightning_sgdclean.ranking.table import (
    COLUMNS,
    Table,
    as_numpy,
    as_objects,
    check_values,
    effects_of,
    read_table,
    typed,
    write_table,
)

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


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
    values = as_numpy(values)
    if isinstance(values, np.ndarray) and values.ndim == 1:  # as they are, unless nothing is known: then all are empty
        if values.dtype.kind == "i":
            return values.astype(np.int64)
        if values.dtype.kind == "f" and not bool(np.isnan(values).all()):
            return _finite(values.astype(np.float64), name)
    cells: list[Any] = list(values.tolist() if isinstance(values, np.ndarray) else values)
    cells = [cell.item() if hasattr(cell, "item") else cell for cell in cells]
    if cells and (any(isinstance(cell, str) for cell in cells) or all(map(_is_unknown, cells))):
        return typed([_text(cell, name) for cell in cells])
    for cell in cells:
        if not isinstance(cell, int | float | str | None):
            raise TypeError(f"Column {name!r} holds {cell!r:.40}; expected numbers or text.")
    if cells and all(isinstance(cell, int) for cell in cells):
        try:
            return np.array(cells, dtype=np.int64)
        except OverflowError as error:
            raise ValueError(f"Column {name!r} holds a number that does not fit into 64 bits.") from error
    return _finite(np.array([np.nan if cell is None else cell for cell in cells], dtype=np.float64), name)


def _finite(array: NDArray[Any], name: str) -> NDArray[Any]:
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


def ranked(ids: NDArray[Any], influence: NDArray[np.float64]) -> NDArray[np.intp]:
    """Places in the order of the ranks: ascending by influence, ties by id."""
    by_id = np.argsort(ids, kind="stable")
    return by_id[np.argsort(influence[by_id], kind="stable")]


SUFFIX = ".parquet"


def write_parquet(path: Path, table: Table) -> None:
    """Write under a temporary name until it is complete; unknown numbers are null.

    Raises:
        ImportError: If pyarrow is not installed.
    """
    pa, parquet = pyarrow()
    columns = table.whole()
    arrays = [
        pa.array(column, pa.string()) if column.dtype == object else pa.array(column, from_pandas=True)  # NaN: null
        for column in columns.values()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing_whole(path) as temporary:
        parquet.write_table(pa.table(arrays, names=list(columns)), temporary, write_page_checksum=True)


def read_parquet(path: Path) -> Table:
    """Read what :func:`write_parquet` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If pyarrow is not installed.
        DamagedFileError: If it is damaged, not what the ``summary.json`` beside it says was written, or no ranking.
    """
    pa, parquet = pyarrow()
    check_as_written(path)
    try:
        found = parquet.read_table(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise DamagedFileError(f"{path}: no Parquet file, or a damaged one ({str(error).splitlines()[0]}).") from error
    names = found.column_names
    if tuple(names[: len(COLUMNS)]) != COLUMNS or len({*names}) < len(names):
        raise DamagedFileError(f"{path}: expected the columns {', '.join(COLUMNS)} once, found {', '.join(names)}.")
    _check_types(path, pa, found)
    columns = {name: _as_array(pa, path, name, found.column(name)) for name in names}
    rank, ids, influence, effect, visits = (columns.pop(name) for name in COLUMNS)
    try:
        check_values(ids, influence, visits)
    except ValueError as error:
        raise DamagedFileError(f"{path}: {error}") from error
    is_in_order = np.array_equal(rank, np.arange(1, len(rank) + 1)) and bool((np.diff(influence) >= 0).all())
    if not is_in_order or effect.tolist() != effects_of(influence):
        raise DamagedFileError(f"{path}: ranks, influences and effects do not fit together.")
    return Table(ids, influence, visits, columns)


def _as_array(pa: Any, path: Path, name: str, column: Any) -> NDArray[Any]:
    """A column as int64, float64 (null: NaN) or objects of str (null: empty)."""
    if pa.types.is_integer(column.type) and not column.null_count:
        return cast(NDArray[Any], column.to_numpy().astype(np.int64))
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type):
        return cast(NDArray[Any], column.cast(pa.float64()).to_numpy().astype(np.float64))
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return as_objects([cell or "" for cell in column.to_pylist()])
    raise DamagedFileError(f"{path}: expected numbers or text in column {name!r}, found {column.type}.")


def _check_types(path: Path, pa: Any, found: Any) -> None:
    wanted = (pa.int64(), None, pa.float64(), pa.string(), pa.int64())
    for name, kind in zip(COLUMNS, wanted, strict=True):
        column = found.column(name)
        kinds = (pa.int64(), pa.string()) if kind is None else (kind,)
        if column.type not in kinds or column.null_count:
            raise DamagedFileError(
                f"{path}: expected column {name} of type {' or '.join(map(str, kinds))} without gaps, "
                f"found {column.type} with {column.null_count} gaps."
            )


def read_ranking(path: Path) -> Table:
    """Read a ranking of either kind: :func:`read_parquet` where the name ends so, else :func:`read_table`."""
    return (read_parquet if path.suffix == SUFFIX else read_table)(path)


def write_ranking(path: Path, table: Table) -> None:
    """Write a ranking as its name says: :func:`write_parquet` or :func:`write_table`."""
    (write_parquet if path.suffix == SUFFIX else write_table)(path, table)


def data_frame(table: Any, columns: Any = None) -> "pd.DataFrame":
    """What pandas makes of columns by name, or of rows.

    Raises:
        ImportError: If pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("to_pandas() needs pandas: pip install lightning-sgdclean[pandas]") from error
    return pd.DataFrame(table, columns=columns)
