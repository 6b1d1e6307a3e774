# SPDX-License-Identifier: Apache-2.0
"""How a recorded fit came to its end: what a later retrace cannot know otherwise, in a file beside the trajectory."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_sgdclean.errors import RunDirectoryError
from lightning_sgdclean.files import read_sealed, write_sealed

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
    """

    monitor: str
    logged: dict[int, float] = field(default_factory=dict)
    best_step: int | None = None
    num_val_batches: list[float] | None = None

    def logged_at(self, monitor: str, index: int) -> float | None:
        """The value of ``monitor`` that was logged after so many steps."""
        return self.logged.get(index) if monitor == self.monitor else None


def write_ending(folder: Path, run: str, ending: Ending) -> None:
    """Write it beside the trajectory of ``run``."""
    content = asdict(ending) | {"run": run, "logged": [[step, repr(value)] for step, value in ending.logged.items()]}
    if ending.num_val_batches is not None:
        content["num_val_batches"] = [None if math.isinf(number) else number for number in ending.num_val_batches]
    write_sealed(folder / _NAME, content)


def read_ending(folder: Path, run: str) -> Ending | None:
    """Undo :func:`write_ending`; None where the fit did not come to its end.

    Raises:
        RunDirectoryError: If the file is damaged, or of another run.
    """
    if not (folder / _NAME).exists():
        return None
    content: dict[str, Any] = read_sealed(folder / _NAME)
    if content.pop("run") != run:
        raise RunDirectoryError(f"{folder / _NAME} belongs to another run. Restore the run directory from a copy.")
    content["logged"] = {step: float(value) for step, value in content["logged"]}
    if content["num_val_batches"] is not None:
        content["num_val_batches"] = [math.inf if n is None else n for n in content["num_val_batches"]]
    return Ending(**content)


def forget_ending(folder: Path) -> None:
    """Remove it: the fit goes on."""
    (folder / _NAME).unlink(missing_ok=True)
