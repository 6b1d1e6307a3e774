# SPDX-License-Identifier: Apache-2.0
"""Which trainings a cleansing takes, and their results as the arrays that the verdict is made from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from lightning_sgdclean.cleansing.gains import Measured
from lightning_sgdclean.cleansing.trials import Action, Settings, Trial
from lightning_sgdclean.ranking.ranking import Ranking

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Question:
    """What is asked of the trainings.

    Attributes:
        metric: Name of the value that the verdict is on.
        mode: Whether it should be low or high.
        select: Name of the value of the validation loop that the number of samples is chosen by; None: not said.
        select_mode: Whether that should be low or high.
        level: Of the intervals.
        action: What is done to samples.
    """

    metric: str
    mode: Mode
    select: str | None
    select_mode: Mode | None
    level: float
    action: Action = "drop"

    def completed(self, ranked: Mapping[str, Any]) -> "Question":
        """With what a ranked training says where nothing was said.

        Raises:
            ValueError: If nobody said whether the value that chooses should be low or high.
        """
        select = self.select or ranked["monitor"]
        known = {ranked["monitor"]: ranked["mode"], None: ranked["mode"]} | {self.metric: self.mode}
        mode = self.select_mode or known.get(select)
        if mode is None:
            raise ValueError(
                f"Expected select_mode= beside select={select!r}, which is neither the metric nor what the ranking is "
                'by: should it be low ("min") or high ("max")?'
            )
        return replace(self, select=select, select_mode=mode)


@dataclass
class Plan:
    """Unfolds the trials of each seed once its ranking is there, and holds each result against the others.

    Attributes:
        drop: Shares of the dataset, or numbers of samples.
        random_draws: Random trainings for each number.
    """

    drop: tuple[float, ...]
    random_draws: int
    question: Question
    settings: Settings
    _starts: dict[int, str] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)
    _rankings: dict[int, Ranking] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of samples to change, ascending; known once a ranking is there."""
        size = next(iter(self._sizes.values()))
        numbers = (max(1, round(amount * size)) if amount < 1 else int(amount) for amount in self.drop)
        return tuple(sorted(set(numbers)))

    def followers(self, trial: Trial, result: Mapping[str, Any]) -> list[Trial]:
        """What is to be trained next: after a ranked training all others of its seed.

        Raises:
            ValueError: If the result does not fit those of the same seed, or cannot be judged.
        """
        self._check_start(trial, result)
        if trial.arm != "none":
            if result["changed"] != trial.ids(self._rankings[trial.seed], self.settings.action):
                raise ValueError(
                    f"The kept training with {trial} changed other samples than that seed's ranking names now. "
                    f"Remove the files of seed {trial.seed} from {self.settings.folder}."
                )
            return []
        self._rankings[trial.seed] = Ranking.load(self.settings.ranking_of(trial.seed))
        self._check_ranked(trial, result)
        seed, draws = trial.seed, range(self.random_draws)
        return [
            follower
            for count in self.counts
            for follower in (Trial(seed, "worst", count), *(Trial(seed, "random", count, draw) for draw in draws))
        ]

    def _check_start(self, trial: Trial, result: Mapping[str, Any]) -> None:
        if self._starts.setdefault(trial.seed, result["start"]) != result["start"]:
            raise ValueError(
                f"The training with {trial} began with other weights than the first one of its seed, so they cannot be "
                "compared. Expected build(seed) to make a new module each time, from the random state that it finds."
            )

    def _check_ranked(self, trial: Trial, result: Mapping[str, Any]) -> None:
        size, available = result["num_samples"], result["num_changeable"]
        self._sizes[trial.seed] = size
        other = next(iter(self._sizes))
        if self._sizes[other] != size:
            raise ValueError(f"Seed {other} trained on {self._sizes[other]} samples, seed {trial.seed} on {size}.")
        if self.counts[-1] >= available:
            which = "that were ranked" if self.settings.action == "drop" else "whose prediction is not their label"
            raise ValueError(
                f"Expected to change fewer samples than there are to choose from, found {self.counts[-1]} in drop= and "
                f"{available} samples with seed {trial.seed} {which}. Give smaller numbers in drop=, or rank over more "
                'steps (epochs="all").'
            )
        if result["on_ranking_data"] and self.settings.on == "test":
            raise ValueError(
                "The test data hold samples of the data that the ranking is by, on which anything would look better. "
                'Give other test data, or on="val" to do without a verdict.'
            )
        question = self.question.completed(result)
        for loop, name in (("val", question.select), (self.settings.on, question.metric)):
            logged = result["metrics"][loop]
            if name not in logged:
                option = "select" if loop == "val" and name == question.select else "metric"
                raise ValueError(f"Expected {option}= to be one of {', '.join(logged)}, found {name!r}.")


def measured(
    results: Mapping[Trial, Mapping[str, Any]], plan: Plan, seeds: tuple[int, ...], loop: str, name: str, mode: Mode
) -> Measured:
    """One metric of all trainings, NaN where a training gave no number."""

    def value(trial: Trial) -> float:
        number = results[trial]["metrics"][loop][name]
        return float("nan") if number is None else float(number)

    draws = range(plan.random_draws)
    return Measured(
        none=np.array([value(Trial(seed)) for seed in seeds]),
        worst=np.array([[value(Trial(seed, "worst", count)) for seed in seeds] for count in plan.counts]),
        random=np.array(
            [[[value(Trial(seed, "random", n, draw)) for draw in draws] for seed in seeds] for n in plan.counts]
        ),
        mode=mode,
    )
