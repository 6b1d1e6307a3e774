# SPDX-License-Identifier: Apache-2.0
"""Which trainings a cleansing takes, and their results as arrays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_sgdclean.ranking.ranking import Ranking

Loop = Literal["val", "test"]
Arm = Literal["none", "worst", "random"]
Action = Literal["drop", "relabel"]


@dataclass(frozen=True)
class Trial:
    """Which training: its seed, and which samples are left out or relabelled.

    Attributes:
        seed: Of weights, data order and all else.
        arm: ``"none"`` trains on everything, and ranks; ``"worst"`` changes the most harmful samples, ``"random"`` as
            many random ones.
        count: How many samples.
        draw: Number of the random draw.
    """

    seed: int
    arm: Arm = "none"
    count: int = 0
    draw: int = 0

    @property
    def name(self) -> str:
        """Unique among the trials of a cleansing, and fit for a file."""
        which = {"none": "", "worst": f"-{self.count}", "random": f"-{self.count}-{self.draw}"}[self.arm]
        return f"seed{self.seed}-{self.arm}{which}"

    def __str__(self) -> str:
        changed = {
            "none": "nothing changed",
            "worst": f"the {self.count} worst changed",
            "random": f"{self.count} random ones changed ({self.draw + 1})",
        }
        return f"seed {self.seed}, {changed[self.arm]}"

    def ids(self, ranking: Ranking, action: Action) -> list[Any]:
        """The samples that are changed; random ones depend on seed, number, draw and what can be changed alone."""
        ids = ranking.sample_id[changeable(ranking, action)]
        if self.arm == "random":
            ids = np.sort(ids)
            draw = np.random.default_rng((self.seed, self.count, self.draw))
            return sorted(ids[draw.permutation(len(ids))[: self.count]].tolist())
        return list(ids[: self.count].tolist())


def changeable(ranking: Ranking, action: Action) -> NDArray[np.bool_]:
    """Which samples the action does something to, ``(N,)``: all can be dropped.

    Relabelled are those whose prediction is not their label. Were all drawn from, most random ones would keep their
    label, as models mostly agree with their data: few changes would be held against many.
    """
    if action == "drop":
        return np.ones(len(ranking), dtype=np.bool_)
    differs: NDArray[np.bool_] = ranking.columns["prediction"] != ranking.columns["label"]  # also where unknown: NaN
    return differs


@dataclass(frozen=True)
class Settings:
    """What all trials have in common.

    Attributes:
        folder: Rankings go to ``rankings`` in it.
        influence: Options of :class:`SGDInfluence`; None where the built Trainer has one, or for the defaults.
        on: Loop whose metric the verdict is on.
        ckpt_path: As ``Trainer.test`` takes it: None for the weights after ``fit``, ``"best"`` for the best ones.
        action: Whether samples are left out, or given the label that the ranked model predicts.
        set_label: How a sample gets another label, where that is not plain.
    """

    folder: Path
    influence: Mapping[str, Any] | None
    on: Loop
    ckpt_path: str | None
    action: Action = "drop"
    set_label: Callable[[Any, Any], Any] | None = None

    @property
    def loops(self) -> tuple[Loop, ...]:
        """Loops that measure: one chooses how many samples to remove, the other judges."""
        return ("val",) if self.on == "val" else ("val", "test")

    def ranking_of(self, seed: int) -> Path:
        """Run directory of that seed's training on everything."""
        return self.folder / "rankings" / f"seed{seed}"

    def checkpoints_of(self, trial: Trial) -> Path:
        """Where that training keeps checkpoints until it is measured."""
        return self.folder / "trials" / f"{trial.name}.checkpoints"


Numbers: TypeAlias = NDArray[np.float64]


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
class CleansingPlan:
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
    results: Mapping[Trial, Mapping[str, Any]],
    plan: CleansingPlan,
    seeds: tuple[int, ...],
    loop: str,
    name: str,
    mode: Mode,
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
