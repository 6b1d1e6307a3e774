# SPDX-License-Identifier: Apache-2.0
"""``summary.json``: what was run and how far to trust it, and the checksums of the tables beside it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

from msgspec import Meta

from lightning_sgdclean.base.errors import DamagedFileError
from lightning_sgdclean.base.files import checked_as, checksum_of, read_json, write_json

Count = Annotated[int, Meta(ge=0)]


class _Objective(TypedDict):
    name: str
    mode: Literal["min", "max"]
    recomputed: NotRequired[float | None]
    logged: NotRequired[float | None]


class _Window(TypedDict):
    words: str
    partial: NotRequired[bool]
    first_step: NotRequired[Count]
    num_steps: NotRequired[Count]


class _Replay(TypedDict):
    words: str
    complaints: NotRequired[list[str]]
    loss_error: NotRequired[float | None]
    update_error: NotRequired[float | None]


class _Rates(TypedDict):
    of_step_alone: bool | None
    words: str


class _Rounding(TypedDict):
    cosine: float | None
    num_steps: Count


class _Batches(TypedDict):
    kept: Count
    why: str


class _Trust(TypedDict, total=False):
    words: str
    verdict: str
    doubts: list[str]
    verify: Count | Literal["auto"]
    num_reranked: Count


class Summary(TypedDict, total=False):
    """What is read of a ``summary.json``; ``docs/outputs.md`` has all of it."""

    versions: dict[str, str]
    id_type: Literal["int", "str"]
    engine: str
    precision: str
    options: dict[str, Any]
    objective: _Objective
    end_point: str
    dataset_size: Count | None
    window: _Window
    replay: _Replay
    rates: _Rates | None
    float32_agreement: _Rounding | None
    trust: _Trust | None
    batches: _Batches
    checksums: dict[str, str]


_NAME = "summary.json"
_REMEDY = "Mend or remove it."


def read_summary(folder: Path) -> dict[str, Any]:
    """What ``summary.json`` holds; nothing where there is none.

    Raises:
        DamagedFileError: If it is damaged.
    """
    return _content_of(folder, may_be_others=False)


def summary_beside(path: Path) -> dict[str, Any]:
    """What the ``summary.json`` beside a table says; nothing where there is none, or it is another program's.

    Raises:
        DamagedFileError: If it is damaged.
    """
    return _content_of(path.parent, may_be_others=True)


def _content_of(folder: Path, *, may_be_others: bool) -> dict[str, Any]:
    path = folder / _NAME
    if not path.exists():
        return {}
    try:
        content = read_json(path)
        is_object = isinstance(content, dict)
        if may_be_others and not (is_object and Summary.__annotations__.keys() & content.keys()):
            return {}
        if not is_object:
            raise DamagedFileError(f"{path}: expected a JSON object, found {type(content).__name__}.")
        return cast(dict[str, Any], checked_as(Summary, content, path))
    except DamagedFileError as error:
        raise DamagedFileError(f"{error} {_REMEDY}") from error


_CHECKSUMS = "checksums"  # of the tables, by name, in summary.json


def write_summary(folder: Path, summary: dict[str, Any], tables: Iterable[str]) -> None:
    """Write ``summary.json`` with the checksums of the tables that were written just before; they enter ``summary``."""
    summary[_CHECKSUMS] = {name: checksum_of(folder / name) for name in tables}
    write_json(folder / _NAME, summary)


def check_as_written(path: Path) -> dict[str, Any]:
    """Is a table what the ``summary.json`` beside it says was written? Where that says nothing, nothing is checked.

    Returns:
        What the summary says.

    Raises:
        FileNotFoundError: If there is no such table.
        DamagedFileError: If it is not, or no file, or the summary is damaged.
    """
    if path.exists() and not path.is_file():
        raise DamagedFileError(f"{path} is a pipe, a device or a folder; expected a file.")
    summary = summary_beside(path)
    expected = summary.get(_CHECKSUMS, {}).get(path.name)
    if expected is None or checksum_of(path) == expected:
        return summary
    raise DamagedFileError(
        f"{path} is damaged, or was edited: its checksum is not the one that {path.with_name(_NAME)} has of "
        "it. Restore it from a copy, or rank the run again (lightning_sgdclean.retrace). If it was edited on purpose, "
        f'copy it into a folder of its own and load it there, or remove "{path.name}" from "{_CHECKSUMS}" in '
        "summary.json."
    )


def note_saved(path: Path, about: dict[str, Any]) -> None:
    """A table was saved where a run's own lay: have the ``summary.json`` beside it say so.

    Args:
        path: The table.
        about: Entries of the summary that the table brings along; those of the run that it lacks stay.

    Raises:
        DamagedFileError: If the summary is damaged.
    """
    summary = summary_beside(path)
    tables = summary.get(_CHECKSUMS, {})
    if path.name in tables:
        tables = tables | {path.name: checksum_of(path)}
        write_json(path.with_name(_NAME), summary | about | {_CHECKSUMS: tables})


def check_dataset(summary: dict[str, Any], dataset: Any, remedy: str) -> None:
    """Are the run's sample ids positions in this dataset, as far as its summary says?

    Args:
        summary: The run's.
        dataset: What the ids are to be positions in.
        remedy: The option that says where samples lie whose ids are names.

    Raises:
        TypeError: If they are names.
        ValueError: If the run drew from a dataset of another size.
    """
    if "dataset_size" not in summary:
        return
    if summary["dataset_size"] is None:
        raise TypeError(f"The run's sample ids are names, not positions in its dataset. Give {remedy}.")
    if hasattr(dataset, "__len__") and len(dataset) != summary["dataset_size"]:
        raise ValueError(
            f"The run drew from a dataset of {summary['dataset_size']} samples, but this one has {len(dataset)}. "
            "Give the dataset that the training loader had."
        )
