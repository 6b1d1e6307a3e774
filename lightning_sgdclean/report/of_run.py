# SPDX-License-Identifier: Apache-2.0
"""The page that the callback writes: what it shows is gathered while the run is open, and never costs the ranking."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_sgdclean.data.classes import ClassNames
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.replay.inspection import inspect_samples
from lightning_sgdclean.replay.open import OpenedRun
from lightning_sgdclean.report.appearance import Render
from lightning_sgdclean.report.building import names_of, with_seen
from lightning_sgdclean.report.content import Labels
from lightning_sgdclean.report.page import PAGE_NAME, write_page
from lightning_sgdclean.report.run_samples import RunSamples
from lightning_sgdclean.report.samples import Shown, fetch_shown, ids_to_show


class PageOfRun:
    """Gathers and writes the page of one run.

    Args:
        wanted: Whether there is to be a page.
        show_samples: Whether it shows samples; without, it says no more than the files beside it.
        render: What to show of a sample.
        class_names: Names of the classes.
    """

    def __init__(self, wanted: bool, show_samples: bool, render: Render | None, class_names: ClassNames | None) -> None:
        self._wanted, self._show_samples = wanted, show_samples
        self._render, self._class_names = render, class_names
        self._shown: list[Shown] = []
        self._labels: Labels | None = None
        self._complaints: list[str] = []

    def look(self, this: OpenedRun, ranking: Ranking) -> None:
        """Fetch and evaluate the samples to show; nothing is raised."""
        if not (self._wanted and self._show_samples):
            return
        try:
            self._look(this, ranking)
        except (Exception, KeyboardInterrupt) as error:  # the user's dataset and module, which may raise anything
            why = "it was interrupted." if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
            self._complaints.append(f"The page shows no samples: {why}")

    def _look(self, this: OpenedRun, ranking: Ranking) -> None:
        ids = ids_to_show(ranking)
        samples = RunSamples(this)
        self._shown, complaints = fetch_shown(samples, ids, render=self._render)
        inspection = inspect_samples(this, ids)
        self._shown = with_seen(self._shown, inspection.seen, inspection.sources)
        self._complaints += complaints + inspection.complaints
        self._labels = samples.labels(ranking)
        self._class_names = names_of(self._class_names, samples.dataset, self._shown)

    def write(self, folder: Path, ranking: Ranking, summary: Mapping[str, Any]) -> list[str]:
        """Write ``report.html``; nothing is raised.

        Returns:
            Complaints, each in words.
        """
        if not self._wanted:
            return []
        try:
            write_page(
                folder / PAGE_NAME,
                ranking,
                summary,
                self._shown,
                labels=self._labels,
                class_names=self._class_names,
            )
        except Exception as error:  # a page is not worth a ranking
            self._complaints.append(f"{PAGE_NAME} was not written: {type(error).__name__}: {error}")
        return self._complaints
