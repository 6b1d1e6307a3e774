# SPDX-License-Identifier: Apache-2.0
"""Samples fetched from the dataset once more, and what loaders deliver."""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from lightning_sgdclean.base.errors import ReplayMismatchError
from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.data.batches import cloned
from lightning_sgdclean.data.datasets import innermost_parts
from lightning_sgdclean.data.fingerprints import batch_digest


def fetch_batch(loader: "DataLoader[Any]", positions: "list[SampleId] | SampleId") -> Any:
    """The batch that the loader makes of these dataset positions, in this process.

    Args:
        loader: A loader over a map-style dataset.
        positions: Positions in ``loader.dataset``; a single one where the sampler hands out single ones.

    Raises:
        ReplayMismatchError: If the dataset or the collate function cannot do now what it did in training.
    """
    return collate_items(loader, fetch_items(loader, positions))


def fetch_items(loader: "DataLoader[Any]", positions: "list[SampleId] | SampleId") -> Any:
    """What the loader hands its collate function, asked of the dataset as the loader itself asks for it.

    Raises:
        ReplayMismatchError: As :func:`fetch_batch`.
    """
    dataset: Any = loader.dataset

    def fetch() -> Any:
        if loader.batch_sampler is None or not isinstance(positions, list):
            return dataset[positions]
        at_once = getattr(dataset, "__getitems__", None)
        return list(at_once(positions)) if at_once is not None else [dataset[index] for index in positions]

    return _asked_again("dataset", fetch)


def moved_positions(first: "DataLoader[Any]", other: "DataLoader[Any]", positions: list[Any]) -> list[Any]:
    """Of these positions, those at which the loaders' datasets hold different samples, none of them random."""
    if first.dataset is other.dataset:
        return []
    size = len(first.dataset)  # type: ignore[arg-type]
    return [
        index
        for index in positions
        if isinstance(index, int)
        and index < size
        and len(known := _item_digests(first, index)) == len(now := _item_digests(other, index)) == 1
        and known != now
    ]


def _item_digests(loader: "DataLoader[Any]", index: Any) -> set[int]:
    """Several fetches of one sample, as fingerprints: augmentation by a coin may give the same one twice."""
    return {int(batch_digest(fetch_items(loader, [index])[0], 1)) for _ in range(8)}


def collate_items(loader: "DataLoader[Any]", items: Any) -> Any:
    """Samples to a batch, as the loader makes one.

    Raises:
        ReplayMismatchError: As :func:`fetch_batch`.
    """
    collate: Callable[[Any], Any] = loader.collate_fn
    return _asked_again("collate function", lambda: collate(items))


def has_own_collate(loader: Any) -> bool:
    """Whether batches are put together by a function that is not torch's, which keeps samples in their order."""
    is_batching = isinstance(loader, DataLoader) and loader.batch_sampler is not None
    return is_batching and loader.collate_fn is not default_collate


def _asked_again(who: str, what: Callable[[], Any]) -> Any:
    try:
        return what()
    except Exception as error:  # theirs: of any kind
        raise ReplayMismatchError(
            f"The {who}, asked again after training, failed with {error!r}. If it works only once, or only in a "
            "worker, let the batches be kept as they were trained on: keep_batches=True."
        ) from error


def fetched_variants(
    loader: "DataLoader[Any]",
    positions: "list[SampleId]",
    others: "list[SampleId]",
    prepare: Callable[[Any], Any],
    reseed: Callable[[], None],
) -> Callable[[Tensor], Any]:
    """Batches in which some samples are replaced by others before they are collated.

    The samples are fetched once, so random augmentation in the dataset leaves them comparable; for that in the
    collate function and the transfer hooks the random state is set anew for each batch.

    Args:
        loader: The training loader.
        positions: The batch's samples.
        others: What to replace each of them by.
        prepare: Converts and moves a batch, through the transfer hooks.
        reseed: Sets the random state.

    Returns:
        Mask ``(B,)`` of the samples to replace -> batch.

    Raises:
        ReplayMismatchError: As :func:`fetch_batch`.
    """
    known = list(dict.fromkeys([*positions, *others]))
    items = dict(zip(known, fetch_items(loader, known), strict=True)) if loader.batch_sampler is not None else None

    def variant(replaced: Tensor) -> Any:
        chosen = [others[i] if replaced[i] else positions[i] for i in range(len(positions))]
        reseed()
        if items is None:
            return prepare(fetch_batch(loader, chosen))
        return prepare(collate_items(loader, [cloned(items[position]) for position in chosen]))

    return variant


def share_samples(one: Any, other: Any) -> bool:
    """Whether loaders, single or nested, go over a common sample of a dataset, also behind subsets and unions.

    Two datasets that hold the same data in other objects are taken for different ones.
    """
    pairs = ((first, second) for first in _datasets(one) for second in _datasets(other))
    return any(first[0] is second[0] and _meet(first[1], second[1]) for first, second in pairs)


def _datasets(loaders: Any) -> list[tuple[Any, set[int] | None]]:
    """The datasets behind subsets and unions, and which of their positions are in use; None for all."""
    parts = [
        part for loader in loaders_in(loaders) if hasattr(loader, "dataset") for part in innermost_parts(loader.dataset)
    ]
    return [(dataset, None if within is None else set(map(int, within))) for dataset, _, within, _ in parts]


def _meet(one: set[int] | None, other: set[int] | None) -> bool:
    return one is None or other is None or not one.isdisjoint(other)


ValidationBatch = tuple[Any, int, int]  # batch, batch_idx, dataloader_idx


def loaders_in(loaders: Any) -> list[Any]:
    """The loaders in one loader, or in a list, tuple or dict of them, in Lightning's order."""
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        return [found for inner in loaders for found in loaders_in(inner)]
    return [loaders]


def validation_batches(
    loaders: Any, limits: list[float] | None, begin: Callable[[], None] = lambda: None
) -> Iterator[ValidationBatch]:
    """All batches of one loader or several, cut to Lightning's limits.

    Args:
        loaders: See :func:`loaders_in`.
        limits: How many batches of each count; None: all.
        begin: Called where Lightning's hooks begin: once the first loader's iterator is made, which draws a seed, and
            before its first batch.
    """
    for number, loader in enumerate(loaders_in(loaders)):
        limit = limits[number] if limits is not None and number < len(limits) else math.inf
        iterator = iter(loader)
        if number == 0:
            begin()
        for batch_idx, batch in enumerate(islice(iterator, None if math.isinf(limit) else int(limit))):
            yield batch, batch_idx, number


def validation_limits(loaders: Any, numbers: list[float]) -> list[float] | None:
    """How many batches of each validation loader counted, infinity where all did; None where there was no loader."""
    if loaders is None:
        return None
    lengths = [_length_of(loader) for loader in loaders_in(loaders)]
    return [number if number < length else math.inf for number, length in zip(numbers, lengths, strict=False)]


def _length_of(loader: Any) -> float:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # a stream
        return math.inf
