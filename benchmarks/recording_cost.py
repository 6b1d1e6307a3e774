# SPDX-License-Identifier: Apache-2.0
"""What recording adds to a training step: of one fit every other step is recorded, and compared with its neighbours.

Machines change their speed from second to second by more than recording takes; from one step to the next they do not.
What the thread that writes takes is added in full, as if it never found a core free.
"""

import time
from contextlib import contextmanager

import pytorch_lightning as pl
from scipy.stats import trim_mean
from torch.utils.data import DataLoader

from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.background import Background
from silent import silent_trainer


class EveryOtherStep(SGDInfluence):
    """Records each second step and leaves it at that; its first epoch, with proof and rehearsal, is whole.

    Attributes:
        seconds: Of the steps after the first epoch, from one batch's start to the next's: bare ones and recorded ones.
    """

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.seconds = {False: [], True: []}
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
            self.seconds[self._records].append(time.perf_counter() - self._began)
        self._records = trainer.current_epoch == 0 or not self._records
        if not self._records:
            self._loaders.next_positions(trainer)  # counted for neither; or else they would be the next batch's
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
def writing_timed(seconds):
    """Within the block the CPU time of every job in the background is appended to ``seconds``."""
    run = Background._run

    def timing(self, job):
        began = time.thread_time()
        run(self, job)
        seconds.append(time.thread_time() - began)

    Background._run = timing
    try:
        yield
    finally:
        Background._run = run


def recording_ratio(make_module, train, val, folder, *, batch, snapshots, steps):
    """What recording adds to a step, of so many: a ratio, milliseconds, and bytes on disk."""
    callback, written = EveryOtherStep("val_loss", dirpath=folder, overwrite=True, snapshots=snapshots), []
    epochs = 1 + -(-steps * batch // len(train))
    pl.seed_everything(0, verbose=False)
    trainer = silent_trainer(epochs, [callback])
    with writing_timed(written):
        trainer.fit(make_module(), DataLoader(train, batch, shuffle=True), DataLoader(val, 128))
    bare, recorded = (1000 * trim_mean(callback.seconds[kind], 0.02) for kind in (False, True))  # each eighth does more
    writing = 1000 * sum(written) / callback.num_steps
    return {
        "batch": batch,
        "snapshots": snapshots,
        "bare_ms": bare,
        "recorded_ms": recorded,
        "writing_ms": writing,
        "ratio": (recorded + writing) / bare,
        "bytes": callback.num_bytes / callback.num_steps,
    }
