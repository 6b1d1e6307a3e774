# SPDX-License-Identifier: Apache-2.0
"""A batch of several loaders, taken apart into the batches that they gave."""

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.data.batches import Variant, cloned, with_neighbours


def loader_parts(batch: Any) -> list[Any]:
    """What each loader gave, in order: the values of a mapping, or the entries of a sequence."""
    return list(batch.values() if isinstance(batch, Mapping) else batch)


def part_and_row(sizes: Sequence[int], row: int) -> tuple[int, int]:
    """Which loader's a sample of the whole batch is, and which row it has in that loader's part.

    Args:
        sizes: How many samples each loader gave.
        row: Place of the sample in the whole batch.
    """
    for part, size in enumerate(sizes):
        if row < size:
            return part, row
        row -= size
    raise IndexError(row)


def neighbour_variant(batch: Any, sizes: Sequence[int] = ()) -> Variant:
    """:func:`~lightning_sgdclean.data.batches.with_neighbours` of a batch that ``training_step`` may write to.

    Args:
        batch: The batch; of several loaders, a mapping or sequence of what each gave.
        sizes: How many samples each of several loaders gave; a sample is replaced by another one of its loader.
    """
    if not sizes:
        return lambda replaced: with_neighbours(cloned(batch), replaced)

    def variant(replaced: Tensor) -> Any:
        pairs = zip(loader_parts(cloned(batch)), torch.split(replaced, list(sizes)), strict=True)
        return _of_parts(batch, [with_neighbours(part, mask) if len(mask) else part for part, mask in pairs])

    return variant


def _of_parts(batch: Any, parts: list[Any]) -> Any:
    """A batch like this one, of other parts."""
    if isinstance(batch, MutableMapping):
        changed = copy.copy(batch)
        changed.update(zip(batch, parts, strict=True))
        return changed
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
