# SPDX-License-Identifier: Apache-2.0
"""How a recorded fit came to its end: what a later retrace cannot know otherwise, in a file beside the trajectory."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_sgdclean.base.errors import RunDirectoryError
from lightning_sgdclean.base.files import checksum_of, read_sealed, write_sealed

_NAME = "ending.json"


@dataclass(frozen=True)
class Ending:
    """What the Trainer knew when its fit was over.

    Attributes:
        monitor: The value that was watched.
        logged: That value after each validation, by the number of steps made by then.
        best_step: Steps made when the ModelCheckpoint saved its best model; None where none was watched or saved.
        num_val_batches: How many batches of each validation loader Lightning took, infinity where all; None where
            it never validated.
        is_complete: Whether the fit came to its end, rather than to an exception.
    """

    monitor: str
    logged: dict[int, float] = field(default_factory=dict)
    best_step: int | None = None
    num_val_batches: list[float] | None = None
    is_complete: bool = False

    def logged_at(self, monitor: str, index: int) -> float | None:
        """The value of ``monitor`` that was logged after so many steps."""
        return self.logged.get(index) if monitor == self.monitor else None


def write_ending(folder: Path, run: str, ending: Ending) -> str:
    """Write it beside the trajectory of ``run``; its checksum, for the manifest."""
    content = asdict(ending) | {"run": run, "logged": [[step, repr(value)] for step, value in ending.logged.items()]}
    if ending.num_val_batches is not None:
        content["num_val_batches"] = [None if math.isinf(number) else number for number in ending.num_val_batches]
    write_sealed(folder / _NAME, content)
    return checksum_of(folder / _NAME)


def read_ending(folder: Path, run: str, checksum: str | None) -> Ending | None:
    """Undo :func:`write_ending`; None where the fit was killed before it.

    Args:
        folder: The trajectory's.
        run: Its run.
        checksum: What :func:`write_ending` returned, as the manifest has it; None where it was not called.

    Raises:
        RunDirectoryError: If the file is gone or damaged, or of another run.
    """
    if checksum is None:
        return None
    if not (folder / _NAME).exists():
        raise RunDirectoryError(
            f"{folder / _NAME} is missing, though the manifest says that the fit was over. Restore it from a copy."
        )
    content: dict[str, Any] = read_sealed(folder / _NAME)
    if content.pop("run") != run:
        raise RunDirectoryError(f"{folder / _NAME} belongs to another run. Restore the run directory from a copy.")
    if checksum_of(folder / _NAME) != checksum:
        raise RunDirectoryError(f"{folder / _NAME} is that of another fit. Restore the run directory from a copy.")
    content["logged"] = {step: float(value) for step, value in content["logged"]}
    if content["num_val_batches"] is not None:
        content["num_val_batches"] = [math.inf if n is None else n for n in content["num_val_batches"]]
    return Ending(**content)


def forget_ending(folder: Path) -> None:
    """Remove it: the fit goes on."""
    (folder / _NAME).unlink(missing_ok=True)
