# SPDX-License-Identifier: Apache-2.0
"""Samples asked of the user's dataset once more, after training, as the loader asks for them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sgdclean.base.errors import ReplayMismatchError
from lightning_sgdclean.data.batches import cloned
from lightning_sgdclean.data.fingerprints import batch_digest
from lightning_sgdclean.trajectory.records import SampleId


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
