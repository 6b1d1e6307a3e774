# SPDX-License-Identifier: Apache-2.0
"""What the loggers are given, the same to each of them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_sgdclean.ranking.exhibits import Exhibit
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.ranking.table import COLUMNS

GROUP = "sgd_influence"
Parts: TypeAlias = dict[str, Callable[[], object]]  # what is handed over, in words, and the call that does it

_TOPS = (10, 100, 1000)


@dataclass(frozen=True)
class Drawing:
    """A figure that has been drawn.

    Attributes:
        name: ``influence`` or ``worst_samples``.
        file: Its PNG.
        pixels: The same, ``(H, W, 3)``.
    """

    name: str
    file: Path
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Results:
    """What there is to log.

    Attributes:
        ranking: The ranking.
        files: ``influence.csv``, ``summary.json``, and ``report.html`` where there is one.
        drawings: Its figures, if they could be drawn.
        exhibits: The worst samples with their pictures, if they have any.
        numbers: Worth plotting, by tag.
        step: The Trainer's ``global_step``.
    """

    ranking: Ranking
    files: tuple[Path, ...]
    drawings: tuple[Drawing, ...]
    exhibits: tuple[Exhibit, ...]
    numbers: dict[str, float]
    step: int


def tag(name: str) -> str:
    """A name among a logger's others."""
    return f"{GROUP}/{name}"


def numbers_of(ranking: Ranking, summary: Mapping[str, Any]) -> dict[str, float]:
    """Numbers worth plotting over runs, without those that are not finite.

    Returns:
        ``objective``; ``replay_loss_error`` and ``replay_update_error``; ``harm``, the sum of the negative influences;
        ``harmful_share``, the share of samples that have one; ``harm_in_worst_10`` (100, 1000), the share of the harm
        that the worst so many samples did.
    """
    found = {
        "objective": summary.get("objective", {}).get("recomputed"),
        "replay_loss_error": summary.get("replay", {}).get("loss_error"),
        "replay_update_error": summary.get("replay", {}).get("update_error"),
    }
    harmful = ranking.influence[ranking.influence < 0].tolist()  # the worst first
    harm = math.fsum(harmful)
    found |= {"harm": harm, "harmful_share": len(harmful) / len(ranking) if len(ranking) else None}
    for top in _TOPS:
        if harm < 0 and top <= len(ranking):
            found[f"harm_in_worst_{top}"] = math.fsum(harmful[:top]) / harm
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def worst_rows(ranking: Ranking, n: int) -> tuple[list[str], list[list[Any]]]:
    """Names of the columns, and the rows of the ``n`` most harmful samples; fewer if fewer are harmful."""
    count = len(ranking.harmful(n))
    columns = (ranking.rank, ranking.sample_id, ranking.influence, np.array(ranking.effect, object), ranking.visits)
    values = [column[:count].tolist() for column in (*columns, *ranking.columns.values())]
    return [*COLUMNS, *ranking.columns], [list(row) for row in zip(*values, strict=True)]
