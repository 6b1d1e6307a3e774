# SPDX-License-Identifier: Apache-2.0
"""What cleansing gained, from the metrics of many trainings: intervals over seeds, and a verdict."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Numbers: TypeAlias = NDArray[np.float64]
Outcome: TypeAlias = Literal["improvement", "no more than random", "no improvement", "harm", "undecided"]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its t-interval.

    Attributes:
        mean: Of one number a seed.
        low: Lower end of the interval; NaN with a single seed.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class Measured:
    """One metric after every training, with ``S`` seeds, ``K`` numbers of samples and ``D`` random draws.

    Attributes:
        none: Nothing removed, shape ``(S,)``.
        worst: Without the most harmful samples, shape ``(K, S)``.
        random: Without as many random ones, shape ``(K, S, D)``.
        mode: Whether the metric should be low (``"min"``) or high (``"max"``).
    """

    none: Numbers
    worst: Numbers
    random: Numbers
    mode: Literal["min", "max"]

    @property
    def sign(self) -> float:
        """What turns a decrease of the metric into a gain."""
        return 1.0 if self.mode == "min" else -1.0

    @property
    def gains(self) -> Numbers:
        """By how much removing the worst was better than removing nothing, of the same seed, ``(K, S)``."""
        gains: Numbers = self.sign * (self.none - self.worst)
        return gains

    @property
    def gains_over_random(self) -> Numbers:
        """By how much it was better than removing random ones, on average over their draws, ``(K, S)``."""
        gains: Numbers = self.sign * (self.random.mean(-1) - self.worst)
        return gains


@dataclass(frozen=True)
class Verdict:
    """Whether cleansing helped.

    Attributes:
        outcome: ``"improvement"`` if both intervals are above 0; ``"no more than random"`` if only that of ``gain`` is;
            ``"harm"`` if that is below 0; ``"undecided"`` if a training gave no number or its data took part in the
            ranking; else ``"no improvement"``.
        gain: Over removing nothing, in the metric's unit; positive is better.
        over_random: Over removing as many random samples.
        chosen: For each seed the number of samples that the other seeds' validation chose.
        recommended: The number that the validation of all seeds chooses.
    """

    outcome: Outcome
    gain: Estimate
    over_random: Estimate
    chosen: tuple[int, ...]
    recommended: int


def estimate(values: Any, level: float = 0.95) -> Estimate:
    """Mean of independent numbers, one a seed, with Student's t-interval."""
    numbers = np.asarray(values, dtype=np.float64)
    mean, count = float(numbers.mean()), len(numbers)
    if count < 2:
        return Estimate(mean, float("nan"), float("nan"))
    half = float(stats.t.ppf((1 + level) / 2, count - 1) * numbers.std(ddof=1) / np.sqrt(count))
    return Estimate(mean, mean - half, mean + half)


def judge(
    counts: tuple[int, ...], verdict_on: Measured, chosen_on: Measured, level: float = 0.95, biased: bool = False
) -> Verdict:
    """Choose how many samples to remove on validation data, and measure on other data what that gains.

    Several numbers are tried, and the best of several is good by luck. So for each seed the number is chosen by the
    validation metric of the *other* seeds, removing nothing being among the choices; what the seed's own training
    gains with that number enters one mean with one interval.

    Args:
        counts: The ``K`` numbers of samples, in the order of the arrays.
        verdict_on: The metric on the data that ranking has not seen.
        chosen_on: The metric on validation data.
        level: Of the intervals.
        biased: Whether the data of the verdict took part in the ranking, so that nothing can be concluded.
    """
    num_seeds = len(verdict_on.none)
    choices = [_best(chosen_on, np.arange(num_seeds) != seed) for seed in range(num_seeds)]
    gains = [_at(verdict_on.gains, choice, seed) for seed, choice in enumerate(choices)]
    over = [_at(verdict_on.gains_over_random, choice, seed) for seed, choice in enumerate(choices)]
    gain, over_random = estimate(gains, level), estimate(over, level)
    by_choice = (0, *counts)
    return Verdict(
        "undecided" if biased else _outcome(gain, over_random),
        gain,
        over_random,
        tuple(by_choice[choice] for choice in choices),
        by_choice[_best(chosen_on, np.full(num_seeds, True))],
    )


def _best(measured: Measured, seeds: NDArray[np.bool_]) -> int:
    """0 for removing nothing, else the row of the best number plus 1; the smaller one of equals."""
    costs = np.vstack([measured.none, measured.worst])[:, seeds] * measured.sign
    means = np.where(np.isfinite(costs).all(1), costs.mean(1), np.inf)
    return int(means.argmin())


def _at(gains: Numbers, choice: int, seed: int) -> float:
    return 0.0 if choice == 0 else float(gains[choice - 1, seed])


def _outcome(gain: Estimate, over_random: Estimate) -> Outcome:
    ends = (gain.low, gain.high, over_random.low)
    if not np.isfinite(ends).all():
        return "undecided"
    if gain.high < 0:
        return "harm"
    if gain.low <= 0:
        return "no improvement"
    return "improvement" if over_random.low > 0 else "no more than random"
