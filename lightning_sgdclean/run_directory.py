# SPDX-License-Identifier: Apache-2.0
"""The folder that a run writes to: found, refused or made empty."""

import shutil
from pathlib import Path

from lightning_sgdclean.errors import RunDirectoryError


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
            for name in ("influence.csv", "influence.parquet", "summary.json"):
                (folder / name).unlink(missing_ok=True)
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
