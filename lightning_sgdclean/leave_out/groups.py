# SPDX-License-Identifier: Apache-2.0
"""What ``without=`` asks for: groups of sample ids, with names, and whether the run knows these ids."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lightning_sgdclean.trajectory.records import SampleId

Groups = Iterable[Any] | Mapping[Any, Iterable[SampleId]]


def named_groups(without: Groups) -> tuple[list[Any], list[list[SampleId]]]:
    """Names and ids of the groups; see :func:`lightning_sgdclean.counterfactual`.

    Raises:
        TypeError: If it holds anything but ids, or lists of ids.
    """
    if isinstance(without, str | bytes) or not isinstance(without, Iterable):
        raise TypeError(f"without must be ids, lists of ids, or a mapping from names to lists, got {without!r:.80}.")
    if isinstance(without, Mapping):
        return list(without), [_ids_in(group) for group in without.values()]
    entries = _plain(without)
    if all(isinstance(entry, int | str) for entry in entries):
        return entries, [[entry] for entry in entries]
    return list(range(len(entries))), [_ids_in(entry) for entry in entries]


def check_drawn(groups: Iterable[Iterable[SampleId]], drawn: Collection[SampleId]) -> list[str]:
    """Are the ids those of the run?

    Args:
        groups: The ids asked for.
        drawn: The ids that were drawn in the window, at least one.

    Returns:
        What to warn of: ids that were never drawn.

    Raises:
        TypeError: If the run's ids are of another type.
    """
    asked = list(dict.fromkeys(name for group in groups for name in group))
    known = next(iter(drawn))
    foreign = [name for name in asked if isinstance(name, str) != isinstance(known, str)]
    if foreign:
        raise TypeError(
            f"without= holds {foreign[0]!r} of type {type(foreign[0]).__name__} ({len(foreign)} of {len(asked)} ids "
            f"are of that type), but the ids of this run are of type {type(known).__name__}, such as {known!r}. "
            "Give the ids as they stand in ranking.sample_id."
        )
    unknown = [name for name in asked if name not in drawn]
    if not unknown:
        return []
    return [
        f"{len(unknown)} of the {len(asked)} ids in without= were never drawn in the window (the first: "
        f"{unknown[0]!r}), so leaving them out changes nothing."
    ]


def _ids_in(group: Any) -> list[SampleId]:
    is_list = isinstance(group, Iterable) and not isinstance(group, str | bytes)
    ids = _plain(group) if is_list else []
    if not is_list or not all(isinstance(entry, int | str) for entry in ids):
        raise TypeError(f"A group of without= must be a list of ids (int or str), got {group!r:.80}.")
    return list(dict.fromkeys(ids))


def _plain(entries: Iterable[Any]) -> list[Any]:
    """Numbers of NumPy and torch as Python's; anything else as it is.

    Raises:
        TypeError: If one is a bool, which Python takes for the integer 0 or 1.
    """
    found = [entry.item() if _is_scalar(entry) else entry for entry in entries]
    if any(isinstance(entry, bool) for entry in found):
        raise TypeError(
            "without= holds True or False, expected ids (int or str): a mask names no samples. Give the ids it "
            "stands for, such as ranking.sample_id[mask], or np.flatnonzero(mask) where ids are positions."
        )
    return found


def _is_scalar(entry: Any) -> bool:
    return isinstance(entry, np.generic) or (isinstance(entry, Tensor) and not entry.ndim)
