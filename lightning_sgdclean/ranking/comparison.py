# SPDX-License-Identifier: Apache-2.0
"""What a comparison of runs found: the systematically harmful samples, their noise, the runs' agreement."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_sgdclean.base.errors import shown
from lightning_sgdclean.ranking.columns import data_frame
from lightning_sgdclean.ranking.csv_files import write_rows
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.ranking.table import cells_of

if TYPE_CHECKING:
    import pandas as pd

Matrix: TypeAlias = NDArray[np.float64]

_MEASURES = {
    "kendall_tau": "Kendall's tau",
    "spearman": "Spearman's correlation",
    "top_k_jaccard": "Jaccard index of both ends",
}
COLUMNS = ("sample_id", "worst_share", "mean_rank", "mean_influence", "noise", "num_runs")


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Samples of ``R`` runs, the systematically harmful ones first: by ``worst_share``, then by ``mean_rank``.

    ``print`` it for a summary in words.

    Attributes:
        names: Of the runs.
        worst: How many samples of each run count as its worst.
        sample_id: Ids of all samples, shape ``(N,)``.
        influence: Influence of each sample in each run, NaN where the run did not draw it, ``(N, R)``.
        rank: Its rank there, 1 = most harmful, equal influences sharing their average rank, ``(N, R)``.
        in_worst: Whether it is harmful and among the run's worst: 1, 0, a part where it ties for the last
            places, NaN where the run did not draw it, ``(N, R)``.
        visits: How often it was drawn, all runs together, ``(N,)``.
        agreement: ``"kendall_tau"``, ``"spearman"`` and ``"top_k_jaccard"`` of each pair of runs over the samples
            that both drew, each ``(R, R)``; NaN where a pair has too few of them.
        num_shared: How many samples each pair of runs has in common, ``(R, R)``.
    """

    names: tuple[str, ...]
    worst: tuple[int, ...]
    sample_id: NDArray[Any]
    influence: Matrix
    rank: Matrix
    in_worst: Matrix
    visits: NDArray[np.int64]
    agreement: dict[str, Matrix]
    num_shared: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.sample_id)

    @property
    def num_runs(self) -> NDArray[np.int64]:
        """In how many runs each sample was drawn."""
        number: NDArray[np.int64] = (~np.isnan(self.influence)).sum(1)
        return number

    @property
    def worst_share(self) -> Matrix:
        """Share of the runs, of all of them, in which each sample is among the worst."""
        share: Matrix = np.nansum(self.in_worst, axis=1) / len(self.names)
        return share

    @property
    def mean_rank(self) -> Matrix:
        """Mean of each sample's ranks over the runs that drew it."""
        mean: Matrix = np.nanmean(self.rank, axis=1)
        return mean

    @property
    def mean_influence(self) -> Matrix:
        """Mean of each sample's influences over the runs that drew it."""
        mean: Matrix = np.nanmean(self.influence, axis=1)
        return mean

    @property
    def noise(self) -> Matrix:
        """Standard deviation of each sample's influence from run to run; NaN where only one run drew it."""
        return np.array([np.std(row, ddof=1) if len(row) > 1 else np.nan for row in map(_present, self.influence)])

    @property
    def missing(self) -> dict[Any, list[str]]:
        """Samples that some runs did not draw, with the names of those runs."""
        absent = np.isnan(self.influence)
        rows = np.flatnonzero(absent.any(1))
        return {self.sample_id[row]: [self.names[run] for run in np.flatnonzero(absent[row])] for row in rows}

    @property
    def ranking(self) -> Ranking:
        """Ranking by the mean influence, to drop or keep samples by all runs together."""
        columns = {name: getattr(self, name) for name in ("worst_share", "mean_rank", "noise", "num_runs")}
        return Ranking.from_influence(self.sample_id, self.mean_influence, self.visits, columns)

    def systematic(self, share: float = 1.0) -> list[Any]:
        """Ids of the samples that are among the worst in at least that share of the runs, in their order."""
        return list(self.sample_id[self.worst_share >= share - 1e-9].tolist())

    def to_pandas(self) -> "pd.DataFrame":
        """The table of the CSV as a pandas DataFrame.

        Raises:
            ImportError: If pandas is not installed.
        """
        return data_frame(self._table())

    def save(self, path: "str | os.PathLike[str]") -> Path:
        """Write the table as CSV, under a temporary name until it is complete; empty where there is no number.

        Args:
            path: The file; its folder is made if missing, an older file is replaced.

        Returns:
            ``path``.
        """
        table = self._table()
        columns = map(cells_of, table.values())
        write_rows(Path(path), list(table), zip(*columns, strict=True))
        return Path(path)

    def _table(self) -> dict[str, NDArray[Any]]:
        by_run = {f"influence:{name}": self.influence[:, run] for run, name in enumerate(self.names)}
        return {name: getattr(self, name) for name in COLUMNS} | by_run

    def __str__(self) -> str:
        return "\n".join(_in_words(self))

    def __repr__(self) -> str:
        systematic = len(self.systematic())
        return f"Comparison({len(self.names)} runs, {len(self)} samples, {systematic} among the worst of all runs)"


def _present(row: Matrix) -> Matrix:
    return row[~np.isnan(row)]


def _in_words(this: Comparison) -> Iterator[str]:
    num, in_all = len(this.names), int((this.num_runs == len(this.names)).sum())
    rest = f", {len(this) - in_all} more in some of them only" if in_all < len(this) else ""
    yield f"{num} runs, {in_all} samples in all of them{rest}"
    pairs = np.triu_indices(num, k=1)
    for name, words in _MEASURES.items():
        values = _present(this.agreement[name][pairs])
        if len(values):
            yield f"  {words}: {values.mean():.3f} on average of two runs ({values.min():.3f} to {values.max():.3f})"
    sizes = (~np.isnan(this.influence)).sum(0)
    by_chance = in_all * float(np.prod(np.array(this.worst) / sizes))
    worst = " or ".join(map(str, sorted(set(this.worst))))
    systematic = len(this.systematic())
    yield f"  {systematic} samples are among the worst {worst} of every run ({by_chance:.2g} would be by chance)"
    spread = np.std(this.mean_influence)
    noise = np.median(_present(this.noise))
    yield f"  noise of an influence from run to run: {noise:.3g} (median); spread of the means: {spread:.3g}"
    yield f"  systematic first: {', '.join(map(shown, this.sample_id[:10].tolist()))}"
