# SPDX-License-Identifier: Apache-2.0
"""The page of a run: samples fetched, labels found, written; what goes wrong is a warning."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from lightning_sgdclean.base.errors import warn_of
from lightning_sgdclean.base.run_directory import check_dataset, read_summary
from lightning_sgdclean.data.classes import ClassNames, class_names_of, listed_labels
from lightning_sgdclean.data.labels import Label
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.ranking.table import SampleId
from lightning_sgdclean.report.appearance import Render
from lightning_sgdclean.report.content import Labels
from lightning_sgdclean.report.page import PAGE_NAME, write_page
from lightning_sgdclean.report.samples import Shown, fetch_shown, ids_to_show

Positions = Mapping[SampleId, Any]


class Seen(Protocol):
    """What is known of a sample; see :class:`lightning_sgdclean.replay.inspection.Seen`."""

    @property
    def label(self) -> Label | None:
        """What the loss held it to."""

    @property
    def prediction(self) -> Label | None:
        """What the model predicts."""

    @property
    def loss(self) -> float | None:
        """Its loss."""


def write_report(
    run_dir: "str | os.PathLike[str]",
    dataset: Any = None,
    *,
    render: Render | None = None,
    class_names: ClassNames | None = None,
    positions: Positions | None = None,
) -> Path:
    """Write ``report.html`` into a run directory anew, from its ranking and summary and from the dataset.

    Args:
        run_dir: The run directory, with ``influence.csv``.
        dataset: The training data, for pictures, text or values of the worst and the best samples and for their
            labels. Without it the page holds no data beyond what is in the directory already.
        render: What to show of a sample, from the sample to an image (PIL, tensor or array), text or a dict of these;
            by default found from the sample itself.
        class_names: Names of the classes, a sequence or a mapping from label to name; by default ``dataset.classes``.
        positions: Where each sample id lies in the dataset, if ids are not positions.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: If there is no ranking.
        TypeError: If the ids are not positions and ``positions=`` is missing.
        ValueError: If ranking or summary are damaged, or the dataset is of another size than the run's.

    Warns:
        SGDInfluenceWarning: If samples could not be shown.
    """
    folder = Path(run_dir)
    ranking = Ranking.load(folder)
    summary = read_summary(folder)
    if dataset is not None and positions is None:
        check_dataset(summary, dataset, "positions=")
    shown, complaints = shown_of(ranking, dataset, positions, render)
    labels = None if dataset is None else labels_of(ranking, dataset, positions)
    path = write_page(
        folder / PAGE_NAME, ranking, summary, shown, labels=labels, class_names=names_of(class_names, dataset, shown)
    )
    warn_of(complaints)
    return path


def shown_of(
    ranking: Ranking, dataset: Any, positions: Positions | None = None, render: Render | None = None
) -> tuple[list[Shown], list[str]]:
    """The worst and the best samples, fetched; and complaints."""
    if dataset is None:
        return [], []
    return fetch_shown(dataset, ids_to_show(ranking), positions, render)


def with_seen(shown: Sequence[Shown], seen: Mapping[SampleId, Seen], sources: Mapping[SampleId, str]) -> list[Shown]:
    """Samples with what the model makes of them, where that is known."""
    found = []
    for row in shown:
        at_end = seen.get(row.sample_id)
        changes: dict[str, Any] = {"source": sources.get(row.sample_id)}
        if at_end is not None:
            changes |= {"target": at_end.label, "prediction": at_end.prediction, "loss": at_end.loss}
        found.append(replace(row, **changes))
    return found


def labels_of(ranking: Ranking, dataset: Any, positions: Positions | None = None) -> Labels | None:
    """The dataset's label of each sample by rank, where they can be had without fetching all samples."""
    ids = ranking.sample_id.tolist()
    if positions is None:
        return None if ranking.sample_id.dtype == object else listed_labels(dataset, ids)
    is_known = all(name in positions for name in ids)
    return listed_labels(dataset, [positions[name] for name in ids]) if is_known else None


def names_of(given: ClassNames | None, dataset: Any, shown: Sequence[Shown]) -> ClassNames | None:
    """Class names: those given, the dataset's, or those that the shown samples have where the loss has numbers."""
    if given is not None:
        return given
    names = [] if dataset is None else class_names_of(dataset)
    if names:
        return names
    found = {row.target: row.label for row in shown if isinstance(row.target, int) and isinstance(row.label, str)}
    is_clear = all(found.get(row.target) == row.label for row in shown if isinstance(row.target, int))
    return {target: str(label) for target, label in found.items()} if found and is_clear else None
