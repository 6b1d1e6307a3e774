# SPDX-License-Identifier: Apache-2.0
"""A person's decisions on ranked samples, read from ``decisions.csv`` and applied to the dataset."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset, Subset

from lightning_sgdclean.base.errors import DamagedFileError
from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.base.summary import check_dataset, read_summary
from lightning_sgdclean.data.labels import Label, LabelSetter, Place, RelabelledDataset, label_of, likely_place_of_label
from lightning_sgdclean.ranking.csv_files import read_rows, unguarded
from lightning_sgdclean.ranking.ranking import Ranking, run_id
from lightning_sgdclean.ranking.table import CSV_NAME

DECISIONS_NAME = "decisions.csv"
DECISION_COLUMNS = ("sample_id", "decision", "label", "was", "run")
CHOICES = ("keep", "drop", "relabel")

Relabel = Callable[[Any, str], Any]

_WAY_OUT = (
    "give label=, its index or key, or a callable from the sample and the new label's text to the relabelled sample"
)


@dataclass(frozen=True)
class Decision:
    """One line of the file.

    Attributes:
        sample_id: Of the ranking.
        choice: ``keep``, ``drop`` or ``relabel``.
        label: The new label as text; empty but for ``relabel``.
        was: The dataset's label when the decision was made, as text; empty where it was not known.
        where: File and line, for messages.
    """

    sample_id: SampleId
    choice: str
    label: str
    was: str
    where: str


def apply_decisions(
    dataset: "Dataset[Any]",
    path: "str | os.PathLike[str]",
    *,
    run: "Ranking | str | os.PathLike[str] | None" = None,
    label: "Place | Relabel | None" = None,
    ids: "Sequence[SampleId] | None" = None,
) -> "Subset[Any]":
    """The dataset as decided: without what was to be dropped, with new labels where they were to be changed.

    Which part of a sample is its label is found as :func:`lightning_sgdclean.relabelling.with_label` says, or given by
    ``label``. A new label gets the type of the old one. All of it is checked before anything is returned; the dataset
    itself is left as it is.

    Args:
        dataset: The dataset that the ranked training drew from.
        path: ``decisions.csv``, as the page ``report.html`` gave it.
        run: The run that was decided on: its :class:`Ranking`, its directory or its ``influence.csv``. By default
            the directory that ``path`` lies in.
        label: Where a sample has its label, if not as said there: an index or a key; or a callable from the sample
            and the new label, as text, to the relabelled sample.
        ids: The id of each of the dataset's samples in order, if ids are not positions (``sample_ids=`` of the
            callback).

    Returns:
        A subset with the remaining positions in ascending order. Samples without a decision stay.

    Raises:
        FileNotFoundError: If there is no such file.
        IndexError: If an id is no position in the dataset.
        TypeError: If the dataset has no positions, ids are names without ``ids=``, or a label's place is not clear.
        ValueError: If the file is damaged, of another run, names unknown ids, or does not fit the dataset; the
            message names file and line.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(f"Decisions need a dataset with a length and positions, found {type(dataset).__name__}.")
    path = Path(path)
    ranking, summary = _run_of(path, run)
    decisions = read_decisions(path, ranking)
    if ids is None:
        check_dataset(summary, dataset, "ids=, the id of each of the dataset's samples")
    position_of = _positions(decisions, len(dataset), ids)
    set_label = label if callable(label) else LabelSetter(_WAY_OUT, label)
    dropped, labels = set(), {}
    for decision in decisions:
        position = position_of[decision.sample_id]
        if decision.choice == "relabel" or (decision.choice == "drop" and decision.was):
            _check_sample(dataset[position], decision, set_label, getattr(dataset, "classes", None))
        if decision.choice == "drop":
            dropped.add(position)
        elif decision.choice == "relabel":
            labels[position] = decision.label
    changed = RelabelledDataset(dataset, labels, set_label) if labels else dataset
    return Subset(changed, [position for position in range(len(dataset)) if position not in dropped])


def read_decisions(path: Path, ranking: Ranking) -> list[Decision]:
    """Read a file of decisions on this ranking.

    Raises:
        FileNotFoundError, ValueError: As :func:`apply_decisions`.
    """
    known: dict[str, SampleId] = {str(sample): sample for sample in ranking.sample_id.tolist()}
    wanted = run_id(ranking)
    found: dict[SampleId, Decision] = {}
    for where, row in _rows(path):
        name, choice, label, was, run = (unguarded(cell) for cell in row)
        if run != wanted:
            raise ValueError(f"{where}: the decision was made on run {run!r}, but the ranking is of run {wanted!r}.")
        if name not in known:
            raise ValueError(f"{where}: the ranking has no sample {name!r}.")
        if choice not in CHOICES:
            raise ValueError(f"{where}: expected {', '.join(CHOICES)} as decision, found {choice!r}.")
        if (choice == "relabel") != bool(label):
            expected = "a label" if choice == "relabel" else "no label"
            raise ValueError(f"{where}: expected {expected} with {choice!r}, found {label!r}.")
        sample = known[name]
        if sample in found:
            raise ValueError(f"{where}: sample {name!r} has a decision in {found[sample].where} already.")
        found[sample] = Decision(sample, choice, label, was, where)
    return list(found.values())


def _rows(path: Path) -> list[tuple[str, list[str]]]:
    """Each row with its file and line; the header is checked and left out."""
    rows = [(f"{path}, line {line}", row) for line, row in read_rows(path, may_end_open=True)]
    if not rows or tuple(rows[0][1]) != DECISION_COLUMNS:
        found = ",".join(rows[0][1]) if rows else "nothing"
        raise DamagedFileError(f"{path}, line 1: expected {','.join(DECISION_COLUMNS)}, found {found}.")
    for where, row in rows[1:]:
        if len(row) != len(DECISION_COLUMNS):
            raise DamagedFileError(f"{where}: expected {len(DECISION_COLUMNS)} fields, found {len(row)}.")
    return rows[1:]


def _run_of(path: Path, run: "Ranking | str | os.PathLike[str] | None") -> tuple[Ranking, dict[str, Any]]:
    """Ranking and summary of the run that was decided on."""
    if isinstance(run, Ranking):
        return run, {}
    if run is not None:
        folder = Path(run) if Path(run).is_dir() else Path(run).parent
        return Ranking.load(run), read_summary(folder)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if not (path.parent / CSV_NAME).is_file():
        raise ValueError(
            f"Which run was decided on? There is no {CSV_NAME} beside {path}. Give run=, the Ranking or the run "
            f"directory, or put {path.name} into that directory."
        )
    return Ranking.load(path.parent), read_summary(path.parent)


def _positions(decisions: list[Decision], size: int, ids: "Sequence[SampleId] | None") -> dict[SampleId, int]:
    if ids is not None:
        if len(ids) != size:
            raise ValueError(f"ids= has {len(ids)} entries for a dataset of {size} samples.")
        position_of = {sample: position for position, sample in enumerate(ids)}
        if len(position_of) != size:
            raise ValueError("ids= names a sample twice.")
    else:
        if any(isinstance(decision.sample_id, str) for decision in decisions):
            raise TypeError("The sample ids are str, no positions. Give ids=, the id of each of the dataset's samples.")
        position_of = {position: position for position in range(size)}
    for decision in decisions:
        if decision.sample_id not in position_of:
            what = f"a dataset of {size} samples" if ids is None else "ids="
            raise IndexError(f"{decision.where}: sample {decision.sample_id!r} is none of {what}.")
    return position_of


def _check_sample(sample: Any, decision: Decision, set_label: "LabelSetter | Relabel", classes: Any) -> None:
    """Is the sample the one that was decided on, and can it get the new label?"""
    if not isinstance(set_label, LabelSetter):
        return
    try:
        place = set_label.place_in(sample)
    except TypeError as error:
        if decision.choice == "relabel":
            raise TypeError(f"{decision.where}: {error}.") from error
        return
    now = label_of(sample, place)
    likely = label_of(sample, likely_place_of_label(sample))  # where the page looked, which was not told of label=
    is_as_then = any(_same(decision.was, value) for value in (now, likely) if value is not None)
    if decision.was and now is not None and not is_as_then:
        raise ValueError(
            f"{decision.where}: sample {decision.sample_id!r} had the label {decision.was!r} when it was decided on, "
            f"but has {str(now)!r} now. Give the dataset that the ranked training drew from."
        )
    if decision.choice != "relabel":
        return
    try:
        new = label_of(set_label(sample, decision.label), place)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{decision.where}: {error}.") from error
    if isinstance(new, int) and isinstance(classes, Sequence) and not 0 <= new < len(classes):
        raise ValueError(f"{decision.where}: the new label is {decision.label}, but there are {len(classes)} classes.")


def _same(text: str, label: Label) -> bool:
    try:
        return float(text) == label if isinstance(label, float) else text == str(label)
    except ValueError:
        return False
