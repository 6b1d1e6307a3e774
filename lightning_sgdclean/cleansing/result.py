# SPDX-License-Identifier: Apache-2.0
"""What a cleansing found: table, figure, verdict in words."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sgdclean.base.files import appearing_whole, write_json
from lightning_sgdclean.cleansing.gains import Estimate, Measured, Verdict, estimate
from lightning_sgdclean.cleansing.plan import Question
from lightning_sgdclean.ranking.frames import data_frame
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.ranking.table import write_rows

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

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
        from lightning_sgdclean.cleansing.figure import plot_cleansing

        question = self.question
        return plot_cleansing(self.metric, self.counts, question.metric, question.level, _DONE[question.action])

    def save(self) -> None:
        """Write ``table.csv``, ``report.json`` and, with matplotlib, ``figure.png`` into the folder."""
        write_rows(self.folder / "table.csv", _COLUMNS, [list(row.values()) for row in self.rows])
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
