# SPDX-License-Identifier: Apache-2.0
"""A folder of its own for a training's checkpoints, so that no other training's are taken for them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_sgdclean.base.lightning import CALLBACK_BASES


class OwnCheckpoints(*CALLBACK_BASES):  # type: ignore[misc]
    """Sends every checkpoint callback, the module's own included, to a folder of this training alone.

    Args:
        folder: Each gets a folder in it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before checkpoint callbacks choose their folder: Lightning calls those last."""
        for number, callback in enumerate(trainer.checkpoint_callbacks):
            if stage == "fit" and hasattr(callback, "dirpath"):
                callback.dirpath = str(self.folder / str(number))


@contextmanager
def own_checkpoints(trainer: Any, folder: Path) -> Iterator[None]:
    """Have the Trainer write checkpoints to ``folder``, which is gone afterwards."""
    folder = folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)  # of a training that was killed
    trainer.callbacks.insert(0, OwnCheckpoints(folder))
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
