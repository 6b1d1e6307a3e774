# SPDX-License-Identifier: Apache-2.0
"""Samples to be looked at: the picture of each, with what the ranking says of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.data.pictures import picture_of

_NOTES = ("label", "prediction")  # columns that are worth a line under a picture
_LONGEST = 22  # characters of a line


class Ranked(Protocol):
    """What is needed of a :class:`lightning_sgdclean.Ranking`."""

    @property
    def sample_id(self) -> NDArray[Any]:
        """Ids, ``(N,)``."""

    @property
    def influence(self) -> NDArray[np.float64]:
        """Influences, ``(N,)``."""

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """Further columns by name, each ``(N,)``."""


@dataclass(frozen=True)
class Exhibit:
    """One sample.

    Attributes:
        rank: 1 is the most harmful sample.
        sample_id: Its id.
        influence: Negative: harmful.
        notes: Its label and prediction, where they are known.
        pixels: Grey values ``(H, W)`` or colours ``(H, W, 3)``.
    """

    rank: int
    sample_id: int | str
    influence: float
    notes: dict[str, Any]
    pixels: NDArray[np.uint8]

    @property
    def lines(self) -> list[str]:
        """What stands under its picture."""
        notes = [f"{name} {value}" for name, value in self.notes.items()]
        return [short(line) for line in (f"#{self.rank}: {self.influence:.3g}", f"sample {self.sample_id}", *notes)]


def worst_pictures(ranked: Ranked, dataset: Any, n: int = 16) -> list[Exhibit]:
    """The ``n`` most harmful samples, fewer if fewer are harmful, none if the worst one holds no picture.

    Args:
        ranked: The ranking.
        dataset: The dataset in which the sample ids are positions.
        n: How many.
    """
    places = range(min(n, int((ranked.influence < 0).sum())))
    if not places or not hasattr(dataset, "__getitem__"):
        return []
    with untouched_randomness(torch.device("cpu")):
        has_picture = picture_of(dataset[ranked.sample_id.tolist()[0]]) is not None
    return exhibits(ranked, places, dataset) if has_picture else []


def exhibits(
    ranked: Ranked, places: Sequence[int], dataset: Any, render: Callable[[Any], Any] | None = None
) -> list[Exhibit]:
    """The samples at these places of a ranking, fetched from the dataset; random states are left as they were.

    Args:
        ranked: The ranking.
        places: Ranks, counted from 0.
        dataset: The dataset in which the sample ids are positions.
        render: Makes a sample into what :func:`picture_of` takes; by default the first picture in it is taken.

    Raises:
        ValueError: If there is no picture in a sample.
    """
    found = []
    with untouched_randomness(torch.device("cpu")):
        for place in places:
            sample_id, influence = ranked.sample_id[place : place + 1].tolist()[0], float(ranked.influence[place])
            sample = dataset[sample_id]
            pixels = picture_of(sample if render is None else render(sample))
            if pixels is None:
                raise ValueError(
                    f"There is no picture in sample {sample_id!r}, a {type(sample).__name__}. Give "
                    "render=, a callable from a sample to a PIL image, an array or a tensor of grey values or colours."
                )
            notes = {name: ranked.columns[name].tolist()[place] for name in _NOTES if name in ranked.columns}
            found.append(Exhibit(place + 1, sample_id, influence, notes, pixels))
    return found


def short(value: Any) -> str:
    """A value in a few characters, on one line; of a long one, both ends."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]}…{text[1 - half :]}"
