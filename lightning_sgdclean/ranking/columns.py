# SPDX-License-Identifier: Apache-2.0
"""Columns beside the five of every ranking: labels, losses, influences on other objectives."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_sgdclean.ranking.table import COLUMNS, typed

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
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values  # NumPy has no bfloat16
    cells = list(values.tolist() if isinstance(values, Tensor | np.ndarray) else values)
    cells = [cell.item() if isinstance(cell, Tensor | np.generic) else cell for cell in cells]
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
