# SPDX-License-Identifier: Apache-2.0
"""Sums over the ranking that the page draws: bars, running sum, harm by group, how harm is concentrated."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_sgdclean.ranking.bars import bin_edges, has_size, stretched_ticks
from lightning_sgdclean.ranking.groups import effects_by_group

_MAX_POINTS = 300  # of the running sum
_MAX_GROUPS = 1000
_PLACE_IN_FILE = re.compile(r"\[-?\d+\]$")


def histogram(influence: NDArray[np.float64]) -> dict[str, Any] | None:
    """How many samples have which influence.

    Returns:
        ``edges`` of the bars, 0 among them, ``counts`` between them, and for a heavy tail the ``stretch`` of its
        asinh scale and that scale's ``ticks``; exact zeros are counted apart as ``zeros``. None where there is
        nothing to draw.
    """
    if not has_size(influence):
        return None
    edges, stretch = bin_edges(influence)
    counts = np.histogram(influence[influence < 0], edges)[0] + np.histogram(influence[influence > 0], edges)[0]
    return {
        "edges": short(edges),
        "counts": counts.tolist(),
        "zeros": int((influence == 0).sum()),
        "stretch": short([stretch])[0],
        "ticks": short(stretched_ticks(edges, stretch)) if stretch else [],
    }


def running_sum(influence: NDArray[np.float64]) -> dict[str, Any] | None:
    """Influences added up from the most harmful sample on, thinned to some hundred points.

    Returns:
        ``ranks`` and ``sums`` of the points, the turning point ``harmful`` (how many are) among them.
    """
    if not has_size(influence):
        return None
    sums = np.concatenate([[0.0], np.cumsum(influence)])
    harmful = int((influence < 0).sum())
    ranks = np.unique(np.linspace(0, len(influence), _MAX_POINTS).round().astype(int))
    # The first samples carry most: they get points of their own.
    early = np.unique(np.geomspace(1, len(influence), _MAX_POINTS // 3).astype(int))
    ranks = np.unique(np.concatenate([ranks, early, [harmful]]))
    return {"ranks": ranks.tolist(), "sums": short(sums[ranks]), "harmful": harmful}


def concentration(influence: NDArray[np.float64]) -> float | None:
    """Share of all harm that the most harmful hundredth of the samples does; None without harm."""
    harm = -influence[influence < 0]
    total = float(harm.sum())
    worst = max(1, round(len(influence) / 100))
    return float(harm[:worst].sum()) / total if total > 0 else None


def tally(influence: NDArray[np.float64], groups: Sequence[int]) -> list[dict[str, Any]]:
    """What each group did, the one that was most harmful together first.

    Args:
        influence: ``(N,)``.
        groups: Number of each sample's group, -1 for none.

    Returns:
        For each group with samples: ``group``, ``count``, ``harmful`` (how many are), ``harm`` (sum of the negative
        influences) and ``help`` (sum of the positive ones).
    """
    return [
        {
            "group": effect.group,
            "count": effect.num_samples,
            "harmful": effect.num_harmful,
            "harm": short([effect.harm])[0],
            "help": short([effect.help])[0],
        }
        for effect in effects_by_group(groups, influence.tolist())
        if effect.group >= 0
    ]


def coded(values: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Different values in the order of their names, and each value's place among them; -1 for None."""
    found = {value for value in values if value is not None}
    distinct = sorted(found, key=lambda value: (isinstance(value, str), value))
    place = {value: i for i, value in enumerate(distinct)}
    return distinct, [-1 if value is None else place[value] for value in values]


def groups_of_sources(sources: Sequence[str | None]) -> list[str | None]:
    """The part of a union, or the folder of a file, that samples come from."""
    return [None if source is None else _PLACE_IN_FILE.sub("", _folder(source)) for source in sources]


def is_grouping(distinct: Sequence[Any], num_samples: int) -> bool:
    """Whether so many different values make groups worth comparing."""
    return 2 <= len(distinct) <= min(_MAX_GROUPS, max(2, num_samples // 2))


def short(values: Any) -> list[float]:
    """Numbers with six digits, which is what a page can show; signs and zeros stay."""
    return [float(f"{value:.6g}") for value in np.asarray(values, dtype=np.float64).tolist()]


def _folder(source: str) -> str:
    cut = max(source.rfind("/"), source.rfind("\\"))
    return source[:cut] if cut > 0 else source
