# SPDX-License-Identifier: Apache-2.0
"""What came of leaving samples out, and how far it agrees with what was predicted."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.ranking.agreement import kendall_tau, spearman, top_k_jaccard


@dataclass(frozen=True)
class Outcome:
    """What came of leaving samples out.

    Attributes:
        strata: Which samples were chosen to verify, and as what.
        predicted: What the ranking says of each sample that was left out by itself.
        real: What leaving it out did, with the sign of an influence; None: training diverged.
        together: The same for all verified samples left out together, and for the worst ones; fewer where not run.
        noise: What rounding alone does; infinite: training diverges.
        num_reranked: How many were chosen to be ranked by that.
        runs: How the runs were made.
        seconds: What all of it took.
    """

    strata: dict[SampleId, str]
    predicted: dict[SampleId, float]
    real: dict[SampleId, float | None]
    together: list[float | None]
    noise: float
    num_reranked: int
    runs: str
    seconds: float


NOTHING_RUN = Outcome({}, {}, {}, [], math.nan, 0, "", 0.0)


@dataclass(frozen=True)
class Together:
    """Samples left out together: the sum of their influences beside what really happened.

    Attributes:
        predicted: The sum.
        real: The difference that leaving all of them out made; None if training diverged.
        error: How far the sum is off, relative to the difference; None if that is zero, or none.
    """

    predicted: float
    real: float | None
    error: float | None


@dataclass(frozen=True)
class Agreement:
    """How predicted and real differences agree over the chosen samples; what is not defined is None.

    Samples without which training diverged have no difference, and are left aside.

    Attributes:
        kendall_tau: Kendall's rank correlation.
        kendall_tau_random: The same among the random ones alone. The ends of a ranking are easier to tell apart, so
            that this is nearer to what holds for any two samples.
        pairs_in_order: Pairs of samples that are in the predicted order.
        pairs: All pairs.
        spearman: Spearman's.
        jaccard: Jaccard index of both ends, ``jaccard_k`` samples each.
        jaccard_k: See there.
        together: All of them left out together; None where that was not run.
        worst_together: Those that rank first, left out together; likewise.
    """

    kendall_tau: float | None
    kendall_tau_random: float | None
    pairs_in_order: int
    pairs: int
    spearman: float | None
    jaccard: float | None
    jaccard_k: int
    together: Together | None
    worst_together: Together | None


def agreement_of(outcome: Outcome) -> Agreement:
    """How predicted and real differences of the verified samples agree."""
    strata, predicted, real = outcome.strata, outcome.predicted, outcome.real

    def columns(*wanted: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        ended = [name for name, stratum in strata.items() if stratum in wanted and real[name] is not None]
        return np.array([predicted[name] for name in ended]), np.array([real[name] for name in ended], dtype=np.float64)

    def together(number: int, *wanted: str) -> Together | None:
        if len(outcome.together) <= number:
            return None
        of_all = sum(predicted[name] for name, stratum in strata.items() if stratum in wanted)
        return _together(of_all, outcome.together[number])

    kinds = ("worst", "best", "random")
    both = columns(*kinds)
    k = max(1, len(both[0]) // 3)
    in_order, pairs = _pairs(*both)
    return Agreement(
        kendall_tau=_if_defined(kendall_tau, *both),
        kendall_tau_random=_if_defined(kendall_tau, *columns("random")),
        pairs_in_order=in_order,
        pairs=pairs,
        spearman=_if_defined(spearman, *both),
        jaccard=_if_defined(lambda a, b: top_k_jaccard(a, b, k), *both),
        jaccard_k=k,
        together=together(0, *kinds),
        worst_together=together(1, "worst"),
    )


def _pairs(predicted: NDArray[np.float64], real: NDArray[np.float64]) -> tuple[int, int]:
    """How many pairs of samples are in the same order in both columns, of how many."""
    rows, columns = np.triu_indices(len(real), k=1)
    same = (predicted[rows] - predicted[columns]) * (real[rows] - real[columns]) > 0
    return int(same.sum()), len(same)


def _if_defined(
    measure: Callable[[NDArray[np.float64], NDArray[np.float64]], float],
    a: NDArray[np.float64],
    b: NDArray[np.float64],
) -> float | None:
    try:
        return measure(a, b)
    except ValueError:  # too few samples, or all alike
        return None


def _together(predicted: float, real: float | None) -> Together:
    return Together(predicted, real, abs(predicted - real) / abs(real) if real else None)


def row_by_row(outcome: Outcome) -> dict[str, list[Any]]:
    """The samples left out one by one; see ``trust.samples`` in ``docs/outputs.md``."""
    return {
        "id": [*outcome.real],
        "stratum": [outcome.strata.get(name, "reranked") for name in outcome.real],
        "predicted": [*outcome.predicted.values()],
        "real": [*outcome.real.values()],
    }
