# SPDX-License-Identifier: Apache-2.0
"""Memory for states that are to be written: rows of larger tensors, so that many states are written at one go.

A file system takes one large piece in half the time that it takes for many small ones.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lightning_sgdclean.trajectory.flat_state import DTYPES, Flat

_PIECE_BYTES, _PIECE_ROWS = 4 << 20, 256


class StateRows:
    """Hands out rows, those that came back first to begin with.

    Who takes rows one after another, and gives them back in that order, mostly gets rows that lie one behind the other.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.dtype, int], deque[Tensor]] = defaultdict(deque)

    def take(self, dtype: str, length: int) -> Tensor:
        """A row of so many numbers."""
        free = self._free[DTYPES[dtype], length]
        if not free:
            num = min(_PIECE_ROWS, _PIECE_BYTES // (length * DTYPES[dtype].itemsize or 1))
            free.extend(torch.empty(max(1, num), length, dtype=DTYPES[dtype]).unbind())
        return free.popleft()

    def give_back(self, flat: Flat) -> None:
        """The rows of a state are needed no more."""
        for row in flat.values():
            self._free[row.dtype, row.numel()].append(row)

    def clear(self) -> None:
        """Let go of the memory of free rows."""
        self._free.clear()

    def __len__(self) -> int:
        return sum(map(len, self._free.values()))


def stretches(rows: Iterable[Tensor]) -> Iterator[Tensor]:
    """Rows that lie one behind the other as one tensor each, ``(N, length)``, without a copy."""
    held: list[Tensor] = []
    for row in rows:
        if held and not _follows(row, held[-1]):
            yield _as_one(held)
            held = []
        held.append(row)
    if held:
        yield _as_one(held)


def _follows(row: Tensor, before: Tensor) -> bool:
    same = row.dtype == before.dtype and row.numel() == before.numel()
    behind = row.storage_offset() == before.storage_offset() + before.numel()
    return same and behind and row.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()


def _as_one(rows: list[Tensor]) -> Tensor:
    length = rows[0].numel()
    return rows[0].as_strided((len(rows), length), (length, 1)) if len(rows) > 1 else rows[0].reshape(1, -1)
