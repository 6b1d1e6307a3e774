# SPDX-License-Identifier: Apache-2.0
"""The folder that a run writes to: found, refused or made empty; and what its summary says."""

import json
import shutil
from pathlib import Path
from typing import Any

from lightning_sgdclean.base.errors import RunDirectoryError


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
    path = folder / "summary.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error}). Mend or remove it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}. Mend or remove it.")
    return content


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
