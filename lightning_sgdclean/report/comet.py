# SPDX-License-Identifier: Apache-2.0
"""Comet: files as assets, a table, and figures as images."""

from typing import Any

from lightning_sgdclean.ranking.table import guarded
from lightning_sgdclean.report.results import Parts, Results, tag, worst_rows

_ROWS = 100


def parts_for_comet(logger: Any, results: Results) -> Parts:
    """What a CometLogger gets; the experiment stays open, as Lightning leaves it."""
    return {
        "files": lambda: _log_assets(logger.experiment, results),
        "figures": lambda: _log_images(logger.experiment, results),
        "table": lambda: _log_table(logger.experiment, results),
    }


def _log_assets(experiment: Any, results: Results) -> None:
    for file in results.files:
        experiment.log_asset(str(file), file_name=tag(file.name), step=results.step)


def _log_images(experiment: Any, results: Results) -> None:
    for drawing in results.drawings:
        experiment.log_image(drawing.pixels, name=tag(drawing.name), step=results.step)


def _log_table(experiment: Any, results: Results) -> None:
    names, rows = worst_rows(results.ranking, _ROWS)
    safe = [[guarded(value) for value in row] for row in rows]  # Comet makes a CSV of them
    experiment.log_table(tag("worst.csv"), tabular_data=safe, headers=[guarded(name) for name in names])
