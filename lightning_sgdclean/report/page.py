# SPDX-License-Identifier: Apache-2.0
"""`report.html`, put together from template, style, script and data."""

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lightning_sgdclean.base.errors import warn_of
from lightning_sgdclean.base.files import appearing_whole
from lightning_sgdclean.base.options import Options, SampleId
from lightning_sgdclean.base.summary import check_dataset, read_summary
from lightning_sgdclean.data.datasets import ClassNames, class_names_of, listed_labels
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.replay.inspection import Seen, inspect_samples
from lightning_sgdclean.replay.replay import OpenedRun
from lightning_sgdclean.report.appearance import Render
from lightning_sgdclean.report.content import embedded, page_data
from lightning_sgdclean.report.samples import Labels, RunSamples, Shown, fetch_shown, ids_to_show
from lightning_sgdclean.report.words import trust_lines

PAGE_NAME = "report.html"
_SCRIPTS = ("dom", "data", "charts", "filters", "decisions", "samples", "tallies", "detail", "keys", "main")


def write_page(
    path: "str | os.PathLike[str]",
    ranking: Ranking,
    summary: Mapping[str, Any],
    shown: Sequence[Shown] = (),
    *,
    labels: Labels | None = None,
    class_names: ClassNames | None = None,
) -> Path:
    """Write the page, under a temporary name until it is complete.

    Args:
        path: The file, usually ``report.html`` in the run directory, whose name stands in the title.
        ranking: The ranking. Its columns ``label``, ``prediction``, ``loss`` and ``source`` are shown, and others that
            sort the samples into groups.
        summary: What ``summary.json`` holds; of what it lacks the page says nothing.
        shown: Samples to be shown with more than a row of the table.
        labels: The dataset's label of each sample by rank, for the harm by class.
        class_names: Names of labels.

    Returns:
        ``path``.
    """
    path = Path(path)
    text = page_text(page_data(ranking, shown, labels, class_names), summary, path.absolute().parent.name)
    with appearing_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n", errors="replace")
    return path


def page_text(data: Mapping[str, Any], summary: Mapping[str, Any], title: str) -> str:
    """The whole page from its parts."""
    style, script = _style(), _script()
    objective = summary.get("objective", {})
    return (
        _environment()
        .from_string(_part("template.html"))
        .render(
            title=title,
            style=Markup(style),
            script=Markup(script),
            data=Markup(embedded({**data, "objective": _objective(objective)})),
            policy=_policy(style, script),
            objective=objective.get("name", "the objective"),
            is_max=objective.get("mode") == "max",
            value=objective.get("recomputed"),
            window=summary.get("window", {}).get("words", ""),
            versions=summary.get("versions", {}),
            trust=trust_lines(summary),
            num=data["num"],
            counts=data["counts"],
            concentration=data["concentration"],
            worst=_worst(data),
            has_data=bool(data["samples"]),
        )
    )


def _objective(objective: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": str(objective.get("name", "the objective")), "isMax": objective.get("mode") == "max"}


def _worst(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The most harmful sample, as an example of what a number means."""
    if not data["counts"]["harmful"]:
        return None
    return {"id": data["ids"][0], "size": f"{-data['influence'][0]:.3g}"}


def _policy(style: str, script: str) -> str:
    """Content-Security-Policy under which this style and this script run, and nothing else, not even from data."""
    return (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters["digits"] = lambda number: f"{number:.4g}"
    environment.filters["percent"] = lambda share: f"{share:.0%}"
    return environment


@cache
def _style() -> str:
    return "\n" + _part("page.css")


@cache
def _script() -> str:
    bodies = [_part(f"{name}.js") for name in _SCRIPTS]
    return '\n(() => {\n"use strict";\n' + "\n".join(bodies) + "\n})();\n"


def _part(name: str) -> str:
    return files("lightning_sgdclean.report").joinpath(name).read_text(encoding="utf-8")


Positions = Mapping[SampleId, Any]


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


class PageOfRun:
    """Gathers and writes the page of one run.

    Args:
        options: The callback's. Without ``show_samples`` the page says no more than the files beside it.
    """

    def __init__(self, options: Options) -> None:
        self._wanted, self._show_samples = options.page, options.show_samples
        self._render, self._class_names = options.render, options.class_names
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
