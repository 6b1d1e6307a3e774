# SPDX-License-Identifier: Apache-2.0
"""A fit while it is recorded: what the hooks hand over, in the order of a run."""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_sgdclean.base.errors import (
    RunDirectoryError,
    SampleIdError,
    SGDInfluenceError,
    SGDInfluenceWarning,
    warn_of,
)
from lightning_sgdclean.base.lightning import best_model_checkpoint, is_at_end_of_epoch
from lightning_sgdclean.base.options import Options, SampleId
from lightning_sgdclean.base.randomness import RandomState, RandomStates, has_drawn
from lightning_sgdclean.data.fetching import validation_limits
from lightning_sgdclean.data.fingerprints import fingerprints
from lightning_sgdclean.losses.weighting import SplitPlan
from lightning_sgdclean.record.averaging import averaging_of
from lightning_sgdclean.record.budget import Budget, Forecast
from lightning_sgdclean.record.keeping import BatchKeeper, FingerprintQueue, Taken
from lightning_sgdclean.record.loaders import TrainLoaders
from lightning_sgdclean.record.loop import Guard, loop_of
from lightning_sgdclean.record.rates import RateNotes
from lightning_sgdclean.record.recorder import BestModel, EarlyStep, Recorder
from lightning_sgdclean.trajectory.joining import CheckpointMark, without_mark
from lightning_sgdclean.trajectory.records import KeptStep, MicroBatch, first_epoch_kept
from lightning_sgdclean.trajectory.store import FitEnd, fit_of, steps_written, write_ending, write_options
from lightning_sgdclean.trajectory.writer import TrajectoryWriter


@dataclass(frozen=True)
class EarlyFindings:
    """What the first steps of a training show.

    Attributes:
        split: Whose the rows of the first batch's loss calls are; None where that was not proved.
        first_ids: Samples of the first batch.
        budget: What the trajectory takes.
    """

    split: SplitPlan | None = None
    first_ids: list[SampleId] = field(default_factory=list)
    budget: Budget | None = None


class Recording:
    """From the first batch to the last: names, fingerprints, steps and snapshots, on disk.

    An error of ours ends the recording, never the training; it is kept in ``failure``. Only what is refused at the
    first batch, or by the rehearsal of an early step, ends the training, too.

    Attributes:
        failure: Why nothing is recorded any more, if so.
        logged: The monitored value after each validation, by the number of steps made by then.
        averages: Follows a callback that puts averaged weights in the place of the trained ones.
        best: Where the best model was saved, if that is where the walk is to start.
        first_ids: Samples of the first batch.
        outlook: What the trajectory will take.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        loaders: TrainLoaders,
        folder: Path,
        options: Options,
        say: Callable[[str], None],
        *,
        on_first_batch: Callable[[MicroBatch, Any], None],
        rehearse: Callable[[KeptStep, bool], list[str]],
        joined: dict[str, Any] | None = None,
    ) -> None:
        self._module, self._rates = module, RateNotes(trainer, goes_on=bool(joined))
        self._unexplained: dict[str, Any] | None = None  # not known yet
        joined = joined or {}  # what the checkpoint said that this fit goes on from, a CheckpointMark as a dict
        self._loaders, self._folder, self._options = loaders, folder, options
        self.failure: Exception | None = None
        self.logged: dict[int, float] = {}
        self.averages = averaging_of(trainer, options.at, folder / "trajectory", self.logged)
        self.best = BestModel(best_model_checkpoint(trainer), joined.get("best")) if options.at == "best" else None
        self.first_ids: list[SampleId] = []
        self._on_first_batch, self._rehearse = on_first_batch, rehearse
        optimizer = trainer.optimizers[0]
        trained = {
            "precision": str(trainer.precision),
            "device": trainer.strategy.root_device.type,
            "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
            "averaging": self.averages.names,
        }
        self._waiting = FingerprintQueue(self._read)
        self.writer = TrajectoryWriter(folder / "trajectory", trained=trained, complete=self._waiting.read_all)
        write_options(folder / "trajectory", options)
        self.recorder = Recorder(module, optimizer, self.writer, self.averages)
        self.outlook = Forecast(folder, options, say)
        self.keeper = BatchKeeper(
            options.keep_batches, lambda: self.outlook.of_batches(trainer, self.writer.bytes_written), say
        )
        self.keeper.watch.evidence = joined.get("evidence", "")
        self._never_breaking_the_training = Guard(partial(self._stop, trainer))
        self._random = RandomStates(trainer.strategy.root_device)
        self._before_validation: RandomState | None = None
        self._drawing: dict[int, RandomState] = {}  # before validations that drew, by the number of steps made
        self._early: EarlyStep | None = EarlyStep()
        self._hook = optimizer.register_step_post_hook(partial(self._after_optimizer_step, trainer))
        self._loop = loop_of(trainer, module, self.recorder, self._refusing)

    def plan_snapshots(self, trainer: Any) -> None:
        """Say what the trajectory will take.

        Raises:
            BudgetError: If that is too much.
        """
        budget = self.outlook.plan(trainer, self.recorder.state(), self.writer.bytes_written)
        self.writer.interval, self.writer.max_bytes = budget.interval, self._options.max_bytes or math.inf
        self.writer.keeps_epochs = self._options.epochs != "all"

    def check_reach(self, trainer: Any) -> None:
        """Warn where the window may begin before what this fit records."""
        epochs, max_epochs = self._options.epochs, trainer.max_epochs
        reaches = epochs == "all" or max_epochs in (None, -1) or max_epochs - epochs < trainer.current_epoch
        if trainer.global_step and reaches:
            warn_of([without_mark(trainer.global_step)])

    def begin_batch(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        """Name the batch's samples.

        Raises:
            SGDInfluenceError: On the first batch, if it cannot be followed.
        """
        if self.failure is not None:
            return
        self._look_for_best(trainer)
        self.outlook.batch_begins(trainer)
        if self._loop.was_passed(batch_idx):
            self._leave(trainer, trainer.global_step - 1, ends_epoch=False)
        is_first = self.recorder.num_steps == 0 and not self.recorder.has_pending
        try:
            positions = self._loaders.next_positions(trainer, batch)
            micro = MicroBatch(
                ids=self._loaders.names(batch, positions),
                positions=positions,
                epoch=trainer.current_epoch,
                batch_idx=batch_idx,
                random=self._random.now(),
                loader=self._loaders.number(trainer.current_epoch),
                global_step=trainer.global_step,
                sizes=self._loaders.sizes,
            )
            taken = Taken(micro, batch, self.keeper.watch.batch_begins(micro.random))
            self._waiting.take(taken, may_wait=self._early is None)
        except Exception as error:  # theirs, too: sample_ids= is the user's
            if is_first:
                raise
            known = isinstance(error, SGDInfluenceError | OSError)
            text = f"The samples of a batch could not be named: {type(error).__name__}: {error}"
            self._stop(trainer, error if known else SampleIdError(text))
            return
        self.recorder.begin_batch(micro)
        if self._early is not None:
            self._early.begin_batch(micro, batch, self.recorder.state())
        if is_first:
            self.first_ids = micro.ids
            self._on_first_batch(micro, batch)
        self._loop.batch_begins()

    def _read(self, taken: list[Taken]) -> None:
        """Take in what batches hold."""
        prints = fingerprints([(one.batch, len(one.micro.ids)) for one in taken])
        for (micro, batch, drew), found in zip(taken, prints, strict=True):
            micro.digest = found.digest
            micro.batch = self.keeper.packed(batch, micro.positions, found, micro.epoch, drew)
            self.writer.hold(0 if micro.batch is None else micro.batch.nbytes)

    def skip_batch(self, trainer: Any) -> None:
        """A batch that is None never started, but was drawn all the same."""
        if self.failure is None:
            self._loaders.next_positions(trainer, None)
            self.recorder.skip_batch()

    def note_loss(self, loss: Tensor) -> None:
        """The batch's loss, as it is differentiated."""
        if self.failure is None:
            self._loop.note_loss(loss, is_early=self._early is not None)

    def _refusing(self) -> AbstractContextManager[None]:
        """Takes what is refused of a step; before the rehearsal nobody does, so that it ends the training."""
        return nullcontext() if self._early is not None else self._never_breaking_the_training

    def _after_optimizer_step(self, trainer: Any, optimizer: Any, *_: Any) -> None:
        if self.failure is not None or bool(getattr(optimizer, "found_inf", False)):
            return  # a fused optimizer is called for a step that the GradScaler skips, too, and does nothing
        clip = self._loop.stepped()
        if self.failure is not None:
            return
        with self._never_breaking_the_training:
            step = self.recorder.commit(
                ends_epoch=is_at_end_of_epoch(trainer),
                clip=clip,
                divisor=trainer.accumulate_grad_batches,
                last_index=trainer.max_steps - 1,
            )
            if step is not None:
                self._rates.note(trainer, step.index, step.groups)
            if self._early is not None:
                self._early.commit(step, self.recorder.state())

    def end_batch(self) -> None:
        """Rehearse a step of the retrace, once.

        Raises:
            SGDInfluenceError: If it cannot be followed.
        """
        self._loop.batch_ends()
        self.keeper.watch.batch_ends(self._random.now)
        if self._early is None or not self._early.is_due or self.failure is not None:
            return
        early, self._early = self._early, None
        self.recorder.check_frozen()
        if early.kept is not None:
            warn_of(self._rehearse(early.kept, self.writer.interval != 1))

    def begin_validation(self) -> None:
        """Keep the random state, so that the validation can be had again, and teachers as they are validated."""
        if self.failure is None and self.recorder.num_steps:
            self.recorder.note_teachers()
        self._before_validation = self._random.now()

    def note_validation(self, trainer: Any) -> None:
        """Keep what was logged, to hold the recomputed objective against."""
        self.keeper.watch.is_interrupted()
        self.outlook.is_interrupted()
        value = trainer.callback_metrics.get(self._options.monitor)
        if trainer.sanity_checking:
            return
        if value is not None:
            self.logged[trainer.global_step] = float(value)
        best, before = None if self.best is None else self.best.step, self._before_validation
        self._drawing = {step: state for step, state in self._drawing.items() if step == best}  # the end points
        if before is not None and has_drawn(before, self._random.now()):
            self._drawing[trainer.global_step] = before

    def end_epoch(self, trainer: Any) -> None:
        """Let go of epochs that no window reaches any more."""
        self.keeper.watch.is_interrupted()
        self.outlook.is_interrupted()
        if self.failure is not None:
            return
        self._look_for_best(trainer)
        if (left := self._loop.left_at_end_of_epoch()) is not None:
            self._leave(trainer, left, is_at_end_of_epoch(trainer))
        epochs = self._options.epochs
        windows = [(first_epoch_kept(trainer.current_epoch, is_at_end_of_epoch(trainer), epochs), math.inf)]
        if self.best is not None and self.best.epoch is not None and self.best.step is not None:
            windows.append((first_epoch_kept(*self.best.epoch, epochs), self.best.step))
        with self._never_breaking_the_training:
            self.writer.keep_only(*windows)
        self._loaders.let_go(min(epoch for epoch, _ in windows) - self._loop.carries_over)

    def flush(self, trainer: Any) -> None:
        """Write what is held in memory."""
        if self.failure is None:
            with self._never_breaking_the_training:
                self.recorder.flush()

    def close(self, trainer: Any, is_complete: bool) -> None:
        """Leave a whole trajectory, and the optimizer without our hook.

        Args:
            trainer: The Trainer.
            is_complete: Whether the fit came to its end.
        """
        self._look_for_best(trainer)  # a ModelCheckpoint saves after our hooks of the last epoch
        if is_complete and self.failure is None and (left := self._loop.left_at_end()) is not None:
            self._leave(trainer, left, is_at_end_of_epoch(trainer))  # what was validated since is of the state after
            for noted in (self.logged, self._drawing):
                noted.update({left + 1: noted[left]} if left in noted else {})  # type: ignore[dict-item]
        if self.failure is None:
            with self._never_breaking_the_training:
                self.recorder.note_teachers_at_end()
                self.writer.close()
                if is_complete:
                    written = steps_written(self._folder / "trajectory")
                    self._unexplained = self._rates.unexplained(trainer, self._module, written)
                    self.averages.close()
                ending = self.ending(trainer, is_complete)
                self.writer.seal(write_ending(self._folder / "trajectory", self.writer.run, ending))
        self._hook.remove()
        self._loop.unwatch()

    def ending(self, trainer: Any, is_complete: bool = True) -> FitEnd:
        """What is known when the fit is over."""
        num_val_batches = validation_limits(trainer.val_dataloaders, trainer.num_val_batches)
        best = None if self.best is None else self.best.step
        noted = self.logged, best, num_val_batches, is_complete, self._unexplained, self._drawing
        return FitEnd(self._options.monitor, *noted, self.averages.said)

    def summary(self, trainer: Any) -> dict[str, Any]:
        """What was recorded, for the summary."""
        return {
            "batches": self.keeper.summary(),
            "budget": self.outlook.summary(trainer),
            "trajectory_bytes": self.writer.bytes_written,
        }

    def mark(self) -> CheckpointMark | None:
        """What a checkpoint written now is to say of the trajectory."""
        with self._never_breaking_the_training:
            self._waiting.read_all()  # which may show that the data are random
        if self.failure is not None:
            return None
        folder, best = str(self._folder.resolve()), self.best
        if best is not None:  # the checkpoint may be that of the best model itself
            best.look(self.writer.next_index, self.recorder.last_epoch)
        known, is_between_steps = None if best is None else best.known, not self.recorder.has_pending
        step, evidence = self.writer.next_index, self.keeper.watch.evidence
        fit = fit_of(self.writer.fits, step - 1)
        return CheckpointMark(self.writer.run, step, folder, is_between_steps, fit, known, evidence)

    def _leave(self, trainer: Any, index: int, ends_epoch: bool) -> None:
        with self._never_breaking_the_training:
            self.recorder.leave(index, ends_epoch, trainer.accumulate_grad_batches)
        if self._early is not None and self._early.kept is None:
            self._early.leave()

    def _look_for_best(self, trainer: Any) -> None:
        if self.best is not None:
            self.best.look(trainer.global_step, self.recorder.last_epoch)

    def _stop(self, trainer: Any, error: Exception) -> None:
        if not isinstance(error, SGDInfluenceError):
            cause, error = error, RunDirectoryError(f"The trajectory could not be written any more: {error}")
            error.__cause__ = cause
        self.failure = error
        self._loop.unwatch()
        warnings.warn(
            f"Recording stopped at step {trainer.global_step}, training goes on: {error}",
            SGDInfluenceWarning,
            stacklevel=2,
        )
