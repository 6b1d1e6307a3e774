# SPDX-License-Identifier: Apache-2.0
"""`Cleansing`: what cleansing gained, its intervals and verdict; table and figure."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lightning_sgdclean.base.files import appearing_whole, write_json
from lightning_sgdclean.cleansing.plan import Measured, Numbers, Question
from lightning_sgdclean.ranking.columns import data_frame
from lightning_sgdclean.ranking.csv_files import write_rows, written
from lightning_sgdclean.ranking.ranking import Ranking

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


# Two colours of Okabe and Ito that stay apart in every common form of colour blindness.
_WORST, _RANDOM, _NONE = "#D55E00", "#0072B2", "#505050"


def plot_cleansing(metric: Measured, counts: tuple[int, ...], name: str, level: float, done: str) -> "Figure":
    """Draw the mean over seeds with its interval as a band, for the worst samples and for random ones.

    Built without pyplot, so it needs no display and leaves no global state behind.

    Args:
        metric: After every training.
        counts: Numbers of samples.
        name: Of the metric.
        level: Of the intervals.
        done: What was done to the samples, in a word.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install lightning-sgdclean[plot]") from error
    name = name.replace("$", r"\$")  # a pair of them would start a formula
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    removed = np.array([0, *counts])
    axes.axhline(metric.none.mean(), color=_NONE, linestyle="--", linewidth=1.2, label="nothing")
    for values, colour, label in (
        (metric.random.mean(-1), _RANDOM, "random samples"),
        (metric.worst, _WORST, "most harmful samples"),
    ):
        _draw_band(axes, removed, np.vstack([metric.none, values]), colour, label, level)
    axes.set_xlabel(f"training samples {done}")
    axes.set_ylabel(f"{name}: mean of {len(metric.none)} seeds, {level:.0%} interval")
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    return figure


def _draw_band(axes: "Axes", removed: Numbers, values: Numbers, colour: str, label: str, level: float) -> None:
    found = [estimate(row, level) for row in values]
    axes.plot(removed, [one.mean for one in found], "o-", color=colour, linewidth=2, markersize=4, label=label)
    axes.fill_between(
        removed, [one.low for one in found], [one.high for one in found], color=colour, alpha=0.15, linewidth=0
    )


_COLUMNS = ("arm", "samples", "mean", "low", "high", "gain", "gain_low", "gain_high")


@dataclass(frozen=True, eq=False, repr=False)
class Cleansing:
    """Trainings with and without the samples that rank first, compared. ``print`` it for table and verdict.

    Attributes:
        folder: Where everything lies.
        seeds: Of the trainings.
        counts: Numbers of samples that were removed, or relabelled.
        question: What was asked.
        metric: The metric of the verdict, after every training.
        selection: The validation metric that chose how many.
        verdict: Whether it helped; ``verdict.outcome`` in a word or two.
        notes: What should be known besides.
    """

    folder: Path
    seeds: tuple[int, ...]
    counts: tuple[int, ...]
    question: Question
    metric: Measured
    selection: Measured
    verdict: Verdict
    notes: tuple[str, ...]

    @property
    def rankings(self) -> dict[str, Ranking]:
        """The ranking of each seed, ready for :func:`lightning_sgdclean.compare`."""
        return {f"seed{seed}": Ranking.load(self.folder / "rankings" / f"seed{seed}") for seed in self.seeds}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the table, for each arm and number of samples, with the metric and the gain over changing nothing.

        Intervals are over seeds, each for itself: with many rows some gains are above 0 by chance.
        """
        found = [_row("none", 0, estimate(self.metric.none, self.question.level), None)]
        by_draws = self.metric.random.mean(-1)
        for arm, values in (("worst", self.metric.worst), ("random", by_draws)):
            for count, row in zip(self.counts, values, strict=True):
                gain = estimate(self.metric.sign * (self.metric.none - row), self.question.level)
                found.append(_row(arm, count, estimate(row, self.question.level), gain))
        return found

    def to_pandas(self) -> "pd.DataFrame":
        """The table as a pandas DataFrame.

        Raises:
            ImportError: If pandas is not installed.
        """
        return data_frame(self.rows, _COLUMNS)

    def plot(self) -> "Figure":
        """The metric against the number of samples removed, or relabelled.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        question = self.question
        return plot_cleansing(self.metric, self.counts, question.metric, question.level, _DONE[question.action])

    def save(self) -> None:
        """Write ``table.csv``, ``report.json`` and, with matplotlib, ``figure.png`` into the folder."""
        write_rows(self.folder / "table.csv", _COLUMNS, [[*map(written, row.values())] for row in self.rows])
        write_json(self.folder / "report.json", self._report())
        try:
            figure = self.plot()
        except ImportError:
            return
        with appearing_whole(self.folder / "figure.png") as temporary:
            figure.savefig(temporary, dpi=150, format="png")

    def _report(self) -> dict[str, Any]:
        return {
            "format": 1,
            "question": asdict(self.question),
            "seeds": self.seeds,
            "counts": self.counts,
            "random_draws": self.metric.random.shape[-1],
            "verdict": asdict(self.verdict),
            "words": str(self).splitlines(),
            "table": self.rows,
            "metric": _arrays(self.metric),
            "selection": _arrays(self.selection),
            "notes": self.notes,
        }

    def __str__(self) -> str:
        return "\n".join(_in_words(self))

    def __repr__(self) -> str:
        numbers = f"{', '.join(map(str, self.counts))} {_DONE[self.question.action]}"
        return f"Cleansing({self.verdict.outcome}; {len(self.seeds)} seeds, {numbers})"


def _row(arm: str, count: int, value: Estimate, gain: Estimate | None) -> dict[str, Any]:
    gain = gain or Estimate(*[float("nan")] * 3)
    return dict(zip(_COLUMNS, (arm, count, *asdict(value).values(), *asdict(gain).values()), strict=True))


def _arrays(measured: Measured) -> dict[str, Any]:
    return {"none": measured.none.tolist(), "worst": measured.worst.tolist(), "random": measured.random.tolist()}


def _in_words(this: Cleansing) -> Iterator[str]:
    question, verdict, done = this.question, this.verdict, _DONE[this.question.action]
    better = "low" if question.mode == "min" else "high"
    yield f"{question.metric} ({better} is better), mean of {len(this.seeds)} seeds and {question.level:.0%} interval"
    yield f"  {done:>10}  {'the worst':<34}{'random ones':<34}".rstrip()
    rows = {(row["arm"], row["samples"]): Estimate(row["mean"], row["low"], row["high"]) for row in this.rows}
    yield f"  {0:>10}  {rows['none', 0]!s:<34}".rstrip()
    for count in this.counts:
        yield f"  {count:>10}  {rows['worst', count]!s:<34}{rows['random', count]!s:<34}".rstrip()
    yield f"Verdict: {verdict.outcome}. {_REASONS[verdict.outcome].format(done=done)}"
    yield f"  gain over the data as they are:            {verdict.gain}"
    yield f"  gain over as many random samples {done}: {verdict.over_random}"
    chosen = ", ".join(map(str, verdict.chosen))
    yield f"  How many was chosen for each seed by {question.select} in validation with the others: {chosen}."
    yield f"  All seeds together choose {verdict.recommended}."
    yield from (f"  {note}" for note in this.notes)


_DONE = {"drop": "removed", "relabel": "relabelled"}
_REASONS = {
    "improvement": (
        "Training with the worst samples {done} was better than on the data as they are, and than with as many random "
        "ones {done}."
    ),
    "no more than random": (
        "Training with the worst samples {done} was better, but not shown to be better than with random ones {done}."
    ),
    "no improvement": (
        "Training with the worst samples {done} was not shown to be better than on the data as they are."
    ),
    "harm": "Training with the worst samples {done} was worse than on the data as they are.",
    "undecided": "Nothing can be concluded; the notes below say why.",
}
