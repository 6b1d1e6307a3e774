# SPDX-License-Identifier: Apache-2.0
"""Which step led to the ModelCheckpoint's best model, seen from outside as the run goes on."""

from typing import Any


class BestModel:
    """Looks, between two optimizer steps, whether the ModelCheckpoint has saved a better model since.

    No step lies between a save and the next look, so the step count at the look is the saved model's.

    Attributes:
        step: Optimizer steps made when the best model was saved; None before the first one.
    """

    def __init__(self, checkpoint: Any) -> None:
        self._checkpoint = checkpoint
        self._seen = self._now()
        self.step: int | None = None

    def look(self, num_steps: int) -> bool:
        """Note ``num_steps`` if there is a new best model; whether there is one."""
        now = self._now()
        is_new = bool(now[0]) and (now[0] != self._seen[0] or now[1] is not self._seen[1])
        if is_new:
            self.step, self._seen = num_steps, now
        return is_new

    def _now(self) -> tuple[str, Any]:
        return self._checkpoint.best_model_path, self._checkpoint.best_model_score
