# SPDX-License-Identifier: Apache-2.0
"""What is ahead of a run that is recorded: bytes and minutes, said before the first step and once its pace is known."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_sgdclean.base.resources import slots_for
from lightning_sgdclean.record.budget import (
    Budget,
    Needs,
    SnapshotPolicy,
    budget_for,
    expected_state_bytes,
    window_length,
)
from lightning_sgdclean.record.keeping import Plan
from lightning_sgdclean.record.pace import Pace
from lightning_sgdclean.replay.walk import RetraceOptions
from lightning_sgdclean.trajectory.records import State


class Outlook:
    """Foresees what a trajectory takes, from what a Trainer is to do.

    Args:
        folder: Where the trajectory goes.
        snapshots: The callback's option.
        max_bytes: The callback's option.
        retrace: Options of the retrace that is to follow.
        say: Prints a line.

    Attributes:
        budget: What the trajectory will take, once training has started.
    """

    def __init__(
        self,
        folder: Path,
        snapshots: SnapshotPolicy,
        max_bytes: int | None,
        retrace: RetraceOptions,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._snapshots, self._max_bytes, self._say = folder, snapshots, max_bytes, say
        self._epochs, self._curvature, self._is_at_best = retrace.epochs, retrace.curvature, retrace.at == "best"
        self.budget: Budget | None = None
        self._pace = Pace()

    def plan(self, trainer: Any, state: State, bytes_written: int) -> Budget:
        """Say what the trajectory will take.

        Args:
            trainer: The Trainer.
            state: The state before the first step.
            bytes_written: Bytes of the trajectory that are on disk by now.

        Raises:
            BudgetError: If that is too much.
        """
        state_bytes = expected_state_bytes(state, trainer.optimizers[0])
        num_windows = 2 if self._is_at_best and self._epochs != "all" else 1
        needs = Needs(
            num_steps=self._num_steps(trainer, trainer.max_epochs),
            batches_a_step=trainer.accumulate_grad_batches,
            state_bytes=state_bytes,
            slots=slots_for(state_bytes),
            max_bytes=self._allowed_bytes(bytes_written),
            curvature=self._curvature,
            num_epochs=0 if self._epochs == "all" else num_windows * (int(self._epochs) + 1),
            num_kept=None if num_windows == 1 else self._num_steps(trainer, trainer.max_epochs, num_windows),
        )
        self.budget = budget_for(self._snapshots, needs)
        self._say(self.budget.text)
        return self.budget

    def batch_begins(self, trainer: Any) -> None:
        """Once the first batches were timed, say how long it all will take."""
        if self._pace.batch_begins() and self.budget is not None:
            num_batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
            in_all = window_length(num_batches, accumulated, trainer.max_epochs, trainer.max_steps, "all")
            self._say(self.budget.at_pace(accumulated * (self._pace.seconds or 0.0), in_all))

    def is_interrupted(self) -> None:
        """More than loading happens before the next batch: validation, or another epoch."""
        self._pace.is_interrupted()

    def summary(self, trainer: Any) -> dict[str, Any] | None:
        """The budget as plain values."""
        batch = self._pace.seconds
        step = None if batch is None else batch * trainer.accumulate_grad_batches
        return None if self.budget is None else self.budget.summary(step)

    def of_batches(self, trainer: Any, bytes_written: int) -> Plan:
        """What is known of the run when batches are first to be kept."""
        is_endless = trainer.max_epochs in (None, -1)
        left = -1 if is_endless else trainer.max_epochs - trainer.current_epoch
        num_steps = self._num_steps(trainer, left, num_windows=1 + self._is_at_best)
        num_batches = math.inf if num_steps is None else num_steps * trainer.accumulate_grad_batches
        reaches_all = self._epochs == "all" or self._is_at_best
        first_epoch = 0 if reaches_all else (math.inf if is_endless else trainer.max_epochs) - int(self._epochs)
        planned = 0 if self.budget is None else self.budget.nbytes or 0
        return Plan(num_batches, first_epoch, max(0, self._allowed_bytes(bytes_written) - planned))

    def _allowed_bytes(self, bytes_written: int) -> float:
        """Bytes that the trajectory may take, those already written included."""
        free = shutil.disk_usage(self._folder).free + bytes_written
        return min(free, self._max_bytes or math.inf)

    def _num_steps(self, trainer: Any, max_epochs: int | None, num_windows: int = 1) -> int | None:
        """Steps that a window, or so many of them, can have in so many epochs."""
        num_batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
        return window_length(num_batches, accumulated, max_epochs, trainer.max_steps, self._epochs, num_windows)
