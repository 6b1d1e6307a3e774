# SPDX-License-Identifier: Apache-2.0
"""What recording adds to a training step: of one fit every other step is recorded, and compared with its neighbours.

Machines change their speed from second to second by more than recording takes; from one step to the next they do not.
Steps are compared in blocks, each of which has all that is done once in a while: batches are read 32 at a time. By how
much the thread that writes holds up training is what steps take longer, bare ones or recorded ones, while it writes.
"""

import time
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
from scipy.stats import trim_mean
from torch.utils.data import DataLoader

from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.trajectory.writer import Background
from silent import silent_trainer

BLOCK = 32  # recorded steps


class TimedStep(NamedTuple):
    """A step after the first epoch, from one batch's start to the next's."""

    began: float
    ended: float
    is_recorded: bool


class EveryOtherStep(SGDInfluence):
    """Records each second step and leaves it at that; its first epoch, with proof and rehearsal, is whole.

    Attributes:
        steps: Those after the first epoch.
    """

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.steps = []
        self._records, self._began = False, None
        recording, optimizer = self._recording, trainer.optimizers[0]
        recording._hook.remove()
        recording._hook = optimizer.register_step_post_hook(
            lambda *given: recording._after_optimizer_step(trainer, *given) if self._records else None
        )

    def on_train_epoch_start(self, trainer, pl_module):
        self._began = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self._began is not None and trainer.current_epoch > 0:
            self.steps.append(TimedStep(self._began, time.perf_counter(), self._records))
        self._records = trainer.current_epoch == 0 or not self._records
        if not self._records:
            self._loaders.next_positions(trainer, batch)  # counted for neither; or else they would be the next batch's
        self._began = time.perf_counter()
        if self._records:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer, pl_module, loss):
        if self._records:
            super().on_before_backward(trainer, pl_module, loss)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self._records:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_fit_end(self, trainer, pl_module):
        recording = self._recording
        self._stop(trainer)
        self.num_steps, self.num_bytes = recording.recorder.num_steps, recording.writer.bytes_written
        if recording.failure is not None:
            raise recording.failure


@contextmanager
def writing_timed(spans, seconds):
    """Within the block, when every job in the background began and ended, and its CPU time."""
    run = Background._run

    def timing(self, job):
        began, cpu = time.perf_counter(), time.thread_time()
        run(self, job)
        spans.append((began, time.perf_counter()))
        seconds.append(time.thread_time() - cpu)

    Background._run = timing
    try:
        yield
    finally:
        Background._run = run


def recording_ratio(make_module, train, val, folder, *, batch, snapshots, steps):
    """What recording adds to a step, of so many: a ratio, milliseconds, and bytes on disk."""
    callback, spans, written = EveryOtherStep("val_loss", dirpath=folder, overwrite=True, snapshots=snapshots), [], []
    epochs = 1 + -(-steps * batch // len(train))
    pl.seed_everything(0, verbose=False)
    trainer = silent_trainer(epochs, [callback])
    with writing_timed(spans, written):
        trainer.fit(make_module(), DataLoader(train, batch, shuffle=True), DataLoader(val, 128))
    return {
        "batch": batch,
        "snapshots": snapshots,
        **added_by(callback.steps, spans),
        "writing_ms": 1000 * sum(written) / callback.num_steps,
        "bytes": callback.num_bytes / callback.num_steps,
    }


def added_by(steps, spans):
    """What recording adds, from steps one after another and the spans of time in which files were written.

    Returns:
        Milliseconds a step: of a bare one, what is added on the thread that trains and that figure's standard error,
        and what the thread that writes holds up; and the ratio of all to the bare step.
    """
    busy = {step for step in steps if any(began < step.ended and step.began < ended for began, ended in spans)}
    size = 2 * BLOCK
    blocks = [_means(steps[first : first + size], busy) for first in range(0, len(steps) - size + 1, size)]
    bare, recorded = np.array([means for means in blocks if None not in means]).T
    usual = {False: trim_mean(bare, 0.1), True: trim_mean(recorded, 0.1)}
    num_recorded = sum(step.is_recorded for step in steps)
    held_up = sum(step.ended - step.began - usual[step.is_recorded] for step in busy) / num_recorded
    added = trim_mean(recorded - bare, 0.1)
    return {
        "bare_ms": 1000 * usual[False],
        "added_ms": 1000 * added,
        "error_ms": 1000 * float(np.std(recorded - bare)) / len(bare) ** 0.5,
        "held_up_ms": 1000 * held_up,
        "ratio": 1 + (added + held_up) / usual[False],
    }


def _means(block, busy):
    """Of bare steps and of recorded ones, while nothing was written."""
    found = {False: [], True: []}
    for step in block:
        if step not in busy:
            found[step.is_recorded].append(step.ended - step.began)
    return [float(np.mean(times)) if len(times) > BLOCK // 2 else None for times in found.values()]
