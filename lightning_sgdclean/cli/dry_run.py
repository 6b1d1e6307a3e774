# SPDX-License-Identifier: Apache-2.0
"""The first steps of a training, recorded, retraced and thrown away: what would come of the whole?"""

import statistics
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_sgdclean.base.errors import SGDInfluenceError, SGDInfluenceWarning
from lightning_sgdclean.base.lightning import CALLBACK_BASES, silent_logger
from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.callback import SGDInfluence
from lightning_sgdclean.losses.weighting import SplitPlan
from lightning_sgdclean.record.budget import Budget
from lightning_sgdclean.trajectory.store import Trajectory

NUM_STEPS = 3  # the first is rehearsed after the second
_VAL_BATCHES = 2

TRAINER_OPTIONS: dict[str, Any] = {
    "logger": False,
    "limit_val_batches": lambda given: 0 if given == 0 else _VAL_BATCHES,
    "num_sanity_val_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass
class Findings:
    """What a dry run found out, as far as it came.

    Attributes:
        refusal: Why the training cannot be followed; None if it can, as far as its first steps show.
        notes: Warnings.
        split: Whose the rows of the first batch's loss calls are.
        first_ids: Samples of the first batch.
        dataset_size: Samples of the training data, if their ids are positions.
        budget: What the trajectory takes.
        num_steps: Steps of the whole training, if known.
        step_seconds: What one of them takes, without loading its batches; None if none was made.
    """

    refusal: SGDInfluenceError | None = None
    notes: list[str] = field(default_factory=list)
    split: SplitPlan | None = None
    first_ids: list[SampleId] = field(default_factory=list)
    dataset_size: int | None = None
    budget: Budget | None = None
    num_steps: int | None = None
    step_seconds: float | None = None


def dry_run(trainer: Any, module: Any, datamodule: Any, callback: SGDInfluence, folder: Path) -> Findings:
    """Train a few steps with the callback and retrace them.

    Args:
        trainer: Made with :data:`TRAINER_OPTIONS`; of no use afterwards.
        module: Its weights move.
        datamodule: Or None.
        callback: One of the Trainer's.
        folder: For all files; whoever made it deletes it.

    Returns:
        What was found. Errors of the training itself are raised.
    """
    if trainer.fast_dev_run:
        raise ValueError("With fast_dev_run the callback does nothing, so there is nothing to try.")
    found, clock = Findings(), _Clock()
    _redirect(trainer, callback, folder)
    trainer.callbacks = [_BatchEnds(clock), *trainer.callbacks, _BatchStarts(clock, found)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, datamodule=datamodule)
        except SGDInfluenceError as error:
            found.refusal = error
    found.notes = [str(one.message) for one in caught if issubclass(one.category, SGDInfluenceWarning)]
    batch_seconds = clock.batch_seconds
    found.step_seconds = None if batch_seconds is None else batch_seconds * trainer.accumulate_grad_batches
    found.dataset_size = callback.summary.get("dataset_size")
    recording = callback._recording
    if recording is not None:
        found.budget, found.split = recording.outlook.budget, recording.split
        found.first_ids = _ids_of_first_batch(callback)
    return found


def _redirect(trainer: Any, callback: SGDInfluence, folder: Path) -> None:
    """Let everything that is written go to the folder, and the walk start where the few steps end."""
    trainer.loggers = [silent_logger(trainer)]  # some callbacks want one
    callback.options = replace(callback.options, dirpath=folder / "run", at="last", overwrite=False)
    for number, checkpoint in enumerate(trainer.checkpoint_callbacks):
        checkpoint.dirpath = str(folder / f"checkpoints-{number}")


def _ids_of_first_batch(callback: SGDInfluence) -> list[SampleId]:
    if callback.run_dir is None or not (callback.run_dir / "trajectory" / "manifest.json").is_file():
        return []
    steps = Trajectory(callback.run_dir / "trajectory").steps
    return steps[0].micro[0].ids if steps else []


class _Clock:
    """Times from the moment a batch is handed to ``training_step`` to that at which its step has been made."""

    def __init__(self) -> None:
        self._began = 0.0
        self._seconds: list[float] = []

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> None:
        self._seconds.append(time.perf_counter() - self._began)

    @property
    def batch_seconds(self) -> float | None:
        """Median, the first one aside, which waits for much that is done once."""
        return statistics.median(self._seconds[1:] or self._seconds) if self._seconds else None


class _BatchEnds(*CALLBACK_BASES):  # type: ignore[misc]
    """Stands before the callback, so that its work after a batch is not counted."""

    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self._clock = clock

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop the clock."""
        self._clock.stop()


class _BatchStarts(*CALLBACK_BASES):  # type: ignore[misc]
    """Stands behind the callback: its work before a batch is not counted, and its plan is of the whole training."""

    def __init__(self, clock: _Clock, found: Findings) -> None:
        super().__init__()
        self._clock, self._found = clock, found

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the training end soon."""
        whole = trainer.estimated_stepping_batches
        self._found.num_steps = int(whole) if whole != float("inf") else None
        loop = trainer.fit_loop.epoch_loop
        loop.max_steps = NUM_STEPS if loop.max_steps < 0 else min(NUM_STEPS, loop.max_steps)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._clock.start()
