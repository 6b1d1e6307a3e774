# SPDX-License-Identifier: Apache-2.0
"""What a finished run left, read without torch: its ranking as a table, and its summary."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_sgdclean.base.run_directory import read_summary
from lightning_sgdclean.ranking.parquet import SUFFIX, read_parquet
from lightning_sgdclean.ranking.table import CSV_NAME, Table, effect_of, read_table

RUN_HELP = "run directory, or a ranking saved as CSV or Parquet"


@dataclass(frozen=True)
class FinishedRun:
    """A run's ranking and summary.

    Attributes:
        file: The ranking.
        table: What it holds.
        summary: What the ``summary.json`` beside it holds; empty where there is none.
    """

    file: Path
    table: Table
    summary: dict[str, Any]

    @property
    def num_harmful(self) -> int:
        """Samples with a negative influence, which stand first."""
        return sum(influence < 0 for influence in self.table.influence)

    def records(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Lines of the ranking, from ``start`` (0: rank 1) up to ``stop``, by column."""
        first = self.table
        return [
            {
                "rank": i + 1,
                "sample_id": first.sample_id[i],
                "influence": first.influence[i],
                "effect": effect_of(first.influence[i]),
                "visits": first.visits[i],
                **{name: values[i] for name, values in first.columns.items()},
            }
            for i in range(start, min(stop, len(first.sample_id)))
        ]


def read_run(path: str) -> FinishedRun:
    """Read a run directory, or the file of a ranking.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a file is damaged.
    """
    file = Path(path)
    if file.is_dir():
        file = file / CSV_NAME
        if not file.is_file():
            raise FileNotFoundError(f"{path} holds no {CSV_NAME}: no run that came to its end.")
    if not file.is_file():
        raise FileNotFoundError(f"There is neither a run directory nor a ranking at {path}.")
    table = read_parquet(file) if file.suffix == SUFFIX else read_table(file)
    return FinishedRun(file, table, read_summary(file.parent))
