# SPDX-License-Identifier: Apache-2.0
"""Whether two sets of loaders deliver samples of the same data."""

from typing import Any

from torch.utils.data import Subset

from lightning_sgdclean.adjoint.objective import loaders_in


def share_samples(one: Any, other: Any) -> bool:
    """Whether loaders, single or nested, go over a common dataset, and over a common position where both are subsets.

    Two datasets that hold the same data in other objects are taken for different ones.
    """
    pairs = ((first, second) for first in _datasets(one) for second in _datasets(other))
    return any(first[0] is second[0] and _meet(first[1], second[1]) for first, second in pairs)


def _datasets(loaders: Any) -> list[tuple[Any, set[int] | None]]:
    return [_innermost(loader.dataset) for loader in loaders_in(loaders) if hasattr(loader, "dataset")]


def _innermost(dataset: Any) -> tuple[Any, set[int] | None]:
    """The dataset behind subsets, and which of its positions they hold; None for all."""
    positions: list[int] | None = None
    while isinstance(dataset, Subset):
        indices = [int(index) for index in dataset.indices]
        positions = indices if positions is None else [indices[position] for position in positions]
        dataset = dataset.dataset
    return dataset, None if positions is None else set(positions)


def _meet(one: set[int] | None, other: set[int] | None) -> bool:
    return one is None or other is None or not one.isdisjoint(other)
