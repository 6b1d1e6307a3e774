# SPDX-License-Identifier: Apache-2.0
"""Rankings as Parquet, written and read, and tables as pandas DataFrames."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sgdclean.base.files import appearing_whole, pyarrow
from lightning_sgdclean.ranking.table import COLUMNS, Table, effect_of

SUFFIX = ".parquet"


def write_parquet(path: Path, table: Table) -> None:
    """Write under a temporary name until it is complete; unknown numbers are null.

    Raises:
        ImportError: If pyarrow is not installed.
    """
    pa, parquet = pyarrow()
    effects = [effect_of(influence) for influence in table.influence]
    ranks = range(1, len(effects) + 1)
    columns: dict[str, Any] = {
        **dict(zip(COLUMNS, (ranks, table.sample_id, table.influence, effects, table.visits), strict=True)),
        **{name: [None if _is_nan(value) else value for value in values] for name, values in table.columns.items()},
    }
    ids = pa.string() if any(isinstance(name, str) for name in table.sample_id) else pa.int64()
    types = dict(zip(COLUMNS, (pa.int64(), ids, pa.float64(), pa.string(), pa.int64()), strict=True))
    arrays = [pa.array(list(values), types.get(name) or _type_of(pa, values)) for name, values in columns.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing_whole(path) as temporary:
        parquet.write_table(pa.table(arrays, names=list(columns)), temporary)


def read_parquet(path: Path) -> Table:
    """Read what :func:`write_parquet` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If pyarrow is not installed.
        ValueError: If the file is damaged, or no ranking.
    """
    pa, parquet = pyarrow()
    try:
        found = parquet.read_table(path)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: no Parquet file, or a damaged one ({str(error).splitlines()[0]}).") from error
    names = found.column_names
    if tuple(names[: len(COLUMNS)]) != COLUMNS:
        raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}, found {', '.join(names)}.")
    _check_types(path, pa, found)
    columns = {name: found.column(name).to_pylist() for name in names}
    rank, ids, influence, effect, visits = (columns.pop(name) for name in COLUMNS)
    ordered = rank == list(range(1, len(rank) + 1)) and influence == sorted(influence)
    if not ordered or effect != [effect_of(value) for value in influence]:
        raise ValueError(f"{path}: ranks, influences and effects do not fit together.")
    return Table(ids, influence, visits, {name: _without_null(values) for name, values in columns.items()})


def _check_types(path: Path, pa: Any, found: Any) -> None:
    wanted = (pa.int64(), None, pa.float64(), pa.string(), pa.int64())
    for name, kind in zip(COLUMNS, wanted, strict=True):
        column = found.column(name)
        kinds = (pa.int64(), pa.string()) if kind is None else (kind,)
        if column.type not in kinds or column.null_count:
            raise ValueError(
                f"{path}: expected column {name} of type {' or '.join(map(str, kinds))} without gaps, "
                f"found {column.type} with {column.null_count} gaps."
            )


def _without_null(values: list[Any]) -> list[Any]:
    return [math.nan if value is None else value for value in values]


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _type_of(pa: Any, values: Any) -> Any:
    kinds = {type(value) for value in values if value is not None}
    return pa.string() if str in kinds else pa.int64() if kinds == {int} else pa.float64()


if TYPE_CHECKING:
    import pandas as pd


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
