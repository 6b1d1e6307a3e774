# SPDX-License-Identifier: Apache-2.0
"""Which step led to the ModelCheckpoint's best model, seen from outside as the run goes on."""

from typing import Any


class BestModel:
    """Looks, between two optimizer steps, whether the ModelCheckpoint has saved a better model since.

    No step lies between a save and the next look, so the step count at the look is the saved model's.

    Attributes:
        step: Optimizer steps made when the best model was saved; None before the first one.
        epoch: Epoch of the last of these steps, and whether it ended that epoch.

    Args:
        checkpoint: The ModelCheckpoint.
        known: ``step``, epoch and whether it ended, of a best model that was saved in the fit that this one continues.
    """

    def __init__(self, checkpoint: Any, known: list[int] | None = None) -> None:
        self._checkpoint = checkpoint
        self._seen = self._now()
        self.step: int | None = None if known is None else known[0]
        self.epoch: tuple[int, bool] | None = None if known is None else (known[1], bool(known[2]))

    def look(self, num_steps: int, epoch: tuple[int, bool]) -> None:
        """Note ``num_steps``, and the epoch of the last of them, if there is a new best model."""
        now = self._now()
        if bool(now[0]) and (now[0] != self._seen[0] or now[1] is not self._seen[1]):
            self.step, self.epoch, self._seen = num_steps, epoch, now

    @property
    def known(self) -> list[int] | None:
        """What a checkpoint is to say of it."""
        return None if self.step is None or self.epoch is None else [self.step, *map(int, self.epoch)]

    def _now(self) -> tuple[str, Any]:
        return self._checkpoint.best_model_path, self._checkpoint.best_model_score
