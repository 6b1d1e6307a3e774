# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole and show damage, and the folder that a run writes to."""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from lightning_sgdclean.base.errors import RunDirectoryError

_PIECE = 1 << 20  # bytes read at once


@contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name once the block is through and its content on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        put_on_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def put_on_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would outlast a power failure."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(number)


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, then rename; what is not finite becomes null."""
    with appearing_whole(path) as temporary:
        text = json.dumps(without_nan(content), indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def without_nan(value: Any) -> Any:
    """Plain values with None in the place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def checksum_of(path: Path) -> str:
    """XXH3 (64 bits) of a file's content: no proof against forgery, but it shows damage, and is taken in no time."""
    found, piece = xxhash.xxh3_64(), bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        while num := file.readinto(piece):
            found.update(memoryview(piece)[:num])
    return found.hexdigest()


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that holds its own checksum, on one line: with more, Python's lock would be held much longer."""
    with appearing_whole(path) as temporary:
        temporary.write_text(_sealed(content), encoding="utf-8")


def read_sealed(path: Path) -> dict[str, Any]:
    """Undo :func:`write_sealed`.

    Raises:
        RunDirectoryError: If the text is not, to the last byte, what was written.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RunDirectoryError(f"{path} holds no JSON object; it is not a file of this package.")
    content.pop("checksum", None)
    if text != _sealed(content):
        raise RunDirectoryError(f"{path} is damaged: what it holds is not what its checksum was taken of.")
    return content


def _sealed(content: dict[str, Any]) -> str:
    seal = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"checksum": seal}) + "\n"


def check_free(wanted: str | Path | None, overwrite: bool) -> None:
    """Before anything is set up.

    Raises:
        RunDirectoryError: If the wanted directory holds a run that may not be overwritten.
    """
    if wanted is not None and holds_run(Path(wanted)) and not overwrite:
        raise RunDirectoryError(
            f"{wanted} already holds a run. Give another dirpath=, or overwrite=True to delete that one."
        )


def holds_run(folder: Path) -> bool:
    """Whether there are files of a run in it."""
    return (folder / "trajectory").exists() or (folder / "influence.csv").exists()


def fresh_directory(wanted: str | Path | None, log_dir: Path, overwrite: bool) -> Path:
    """The wanted directory, emptied of a run if it may be, or the next free name in ``log_dir``.

    Raises:
        RunDirectoryError: If another run took the wanted directory at the same moment.
    """
    if wanted is not None:
        folder = Path(wanted)
        if overwrite and holds_run(folder):
            shutil.rmtree(folder / "trajectory", ignore_errors=True)
            remove_results(folder)
    else:
        folder, number = log_dir / "sgd_influence", 1
        while folder.exists():
            number += 1
            folder = log_dir / f"sgd_influence-{number}"
    try:
        (folder / "trajectory").mkdir(parents=True)
    except FileExistsError as error:
        raise RunDirectoryError(
            f"{folder} was just taken by another run. Give each run a dirpath= of its own."
        ) from error
    return folder


def remove_results(folder: Path) -> None:
    """Remove what a ranking left, but for the trajectory."""
    for name in ("influence.csv", "influence.parquet", "summary.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


def read_summary(folder: Path) -> dict[str, Any]:
    """What ``summary.json`` holds; nothing where there is none.

    Raises:
        ValueError: If it is damaged.
    """
    content = _json_in(folder / "summary.json")
    if not isinstance(content, dict):
        raise ValueError(
            f"{folder / 'summary.json'}: expected a JSON object, found {type(content).__name__}. Mend or remove it."
        )
    return content


def summary_beside(path: Path) -> dict[str, Any]:
    """What the ``summary.json`` beside a table says, which may be another program's; nothing where there is none.

    Raises:
        ValueError: If it is damaged.
    """
    content = _json_in(path.with_name("summary.json"))
    return content if isinstance(content, dict) else {}


def _json_in(path: Path) -> Any:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error}). Mend or remove it.") from error


_CHECKSUMS = "checksums"  # of the tables, by name, in summary.json


def write_summary(folder: Path, summary: dict[str, Any], tables: Iterable[str]) -> None:
    """Write ``summary.json`` with the checksums of the tables that were written just before; they enter ``summary``."""
    summary[_CHECKSUMS] = {name: checksum_of(folder / name) for name in tables}
    write_json(folder / "summary.json", summary)


def check_as_written(path: Path) -> None:
    """Is a table what the ``summary.json`` beside it says was written? Where that says nothing, nothing is checked.

    Raises:
        FileNotFoundError: If there is no such table.
        ValueError: If it is not, or the summary is damaged.
    """
    expected = _checksums_in(summary_beside(path)).get(path.name)
    if expected is None or checksum_of(path) == expected:
        return
    raise ValueError(
        f"{path} is damaged, or was edited: its checksum is not the one that {path.with_name('summary.json')} has of "
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
        ValueError: If the summary is damaged.
    """
    summary = summary_beside(path)
    tables = _checksums_in(summary)
    if path.name in tables:
        tables = tables | {path.name: checksum_of(path)}
        write_json(path.with_name("summary.json"), summary | about | {_CHECKSUMS: tables})


def _checksums_in(summary: dict[str, Any]) -> dict[str, str]:
    found = summary.get(_CHECKSUMS)
    return found if isinstance(found, dict) else {}


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
