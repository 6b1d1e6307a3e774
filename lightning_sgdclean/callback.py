# SPDX-License-Identifier: Apache-2.0
"""The callback: Lightning's hooks wired to the stages. No arithmetic here."""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from tqdm.auto import tqdm

from lightning_sgdclean.adjoint.objective_check import SanityCheck
from lightning_sgdclean.adjoint.optimizers import update_of
from lightning_sgdclean.adjoint.rehearsal import rehearse
from lightning_sgdclean.base.errors import NonFiniteError, warn_of
from lightning_sgdclean.base.files import fresh_directory
from lightning_sgdclean.base.lightning import (
    CALLBACK_BASES,
    CopiesResults,
    OfLastFit,
    check_alone,
    check_module,
    check_optimizers,
    check_validation,
    hooks_of,
    shown_bar,
)
from lightning_sgdclean.base.options import Options
from lightning_sgdclean.base.resources import Portable
from lightning_sgdclean.base.summary import write_summary
from lightning_sgdclean.losses.evaluate import RecordedBatch
from lightning_sgdclean.losses.own_loss import prove_loss
from lightning_sgdclean.losses.surroundings import surroundings_of
from lightning_sgdclean.losses.verified import VerifiedSplit
from lightning_sgdclean.losses.weighting import SplitPlan
from lightning_sgdclean.ranking.figures import Exhibit, worst_pictures
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.record.budget import has_steps_left
from lightning_sgdclean.record.loaders import TrainLoaders
from lightning_sgdclean.record.recording import EarlyFindings, Recording
from lightning_sgdclean.replay.open import opened
from lightning_sgdclean.replay.replay import RecordedRun
from lightning_sgdclean.report.page import PageOfRun
from lightning_sgdclean.report.publish import publish
from lightning_sgdclean.report.words import closing_text
from lightning_sgdclean.retracing import call_of, rank
from lightning_sgdclean.trajectory.joining import join
from lightning_sgdclean.trajectory.live_state import trained_parameters
from lightning_sgdclean.trajectory.records import KeptStep, MicroBatch


class SGDInfluence(Portable, *CALLBACK_BASES):  # type: ignore[misc]
    """Ranks the training samples of a run by the harm they did to its validation loss.

    Records every optimizer step while ``fit`` trains (the training itself stays as it is, to the last bit), retraces
    the last epochs backwards when it is done, and writes a ranked ``influence.csv``. A negative influence is harmful:
    the validation loss would be lower had training gone without the sample.

    Followed: most of torch's optimizers with any options, groups and schedules, gradient accumulation and clipping,
    BatchNorm with its running statistics, dropout, any sampler. What is not supported raises an error, before the first
    step where that can be known.

    Example::

        callback = SGDInfluence(monitor="val_loss")
        trainer = Trainer(callbacks=[callback])
        trainer.fit(model, datamodule)
        callback.ranking.harmful(20)  # ids of the 20 worst samples

    Args:
        monitor: Name of the value that ``validation_step`` logs for each batch; the objective is its
            mean over the validation set, as Lightning computes it.
        mode: ``"min"`` if the value should be low, ``"max"`` if it should be high.
        objective: Instead of ``monitor``, a callable ``(pl_module, batch)`` to a differentiable scalar, or to that and
            its weight (by default the batch's size). Or several by name: the first ranks, the others are columns.
        val_dataloaders: Loader or loaders for the objective, if not the Trainer's validation data; in a YAML file the
            import path of a loader, or of a function that makes one.
        epochs: Window: how many of the last completed epochs to retrace (besides a started one), or ``"all"``.
        at: Where the walk starts: behind the ``"last"`` step (or at the averages of the weights that a callback of
            Lightning's ends the training with), or at the ``"best"`` model of the Trainer's
            ModelCheckpoint, whose steps are then the last ones that count.
        curvature: ``"exact"`` (double backward), ``"gauss-newton"`` (the loss's curvature alone; cheaper), ``"finite"``
            (central difference; any operation) or ``"none"`` (no Hessian; for comparison).
        finite_radius: Radius of ``"finite"`` relative to the parameters' length.
        dirpath: Run directory; by default ``sgd_influence`` in the logger's directory, the next free name.
        overwrite: Whether ``dirpath`` may hold another run, which is then deleted.
        sample_ids: Callable from a batch to its samples' ids (int or str), or ``"content"``: 16 hexadecimal digits
            of what a sample holds. By default their positions in the loader's dataset, of several ``loader:position``.
        keep_batches: Whether to store the batches as they were trained on: ``"auto"`` does it where samples hold other
            data each time, by random augmentation say, ``True`` from the first batch, ``False`` never.
        sample_losses: Callable ``(pl_module, batch)`` to losses ``(B,)`` whose mean is the training loss, if not found.
        weighted_loss: Callable ``(pl_module, batch, weights)`` to the training loss with weights ``(B,)`` on its
            samples, where that is no mean over samples.
        snapshots: Which steps' states are kept on disk: ``"every"``, one in ``k``, or ``"sqrt"`` (a number and a
            distance that grow with the square root of the window); those between are recomputed for the retrace.
            ``"auto"`` keeps every one where that takes 1 GiB at most, else ``"sqrt"``, else as many as fit.
        max_bytes: Disk that the trajectory may take, kept batches included; by default what is free.
        on_mismatch: Whether a replay that differs from the record is an error or a warning.
        tolerance: Largest relative difference of a loss; default 1e-5, in float64 1e-12.
        retrace_precision: Precision of the derivatives of a run in 16 bits: the ``"run"``'s own, or ``"float32"``,
            which takes half as long again and is less noisy; ``"auto"`` takes the latter for float16.
        verify: How many samples to really leave out once they are ranked (the worst, the best, any others), to see how
            far to trust the ranking. ``"auto"``: 4, and up to 32 as a tenth of the fit's time allows; 0: none.
        rerank: How many of the worst samples to really leave out, and to rank by what that does.
        columns: Further columns of the CSV: ``"label"``, ``"prediction"`` and ``"loss"`` of each sample at the end
            point, as the loss calls of ``training_step`` show them; ``"source"``, which leads to the innermost dataset;
            ``"by_epoch"``, what each epoch of the window adds to the influence; ``"relabel"``, what the objective would
            change by had the sample had the class that the final model predicts (negative: for the better).
        formats: What the ranking is written as: ``"csv"``, in any case, and ``"parquet"``, which needs pyarrow.
        page: Whether to write ``report.html``, on which the worst and the best samples are looked at.
        render: What the page shows of a sample: callable from a sample to an image, text or a dict of these. By default
            it is found from the sample.
        class_names: Names of the classes, a sequence or by label; by default the dataset's ``classes``.
        show_samples: Whether the page shows samples and the loggers get pictures of the worst ones; ``False`` keeps
            samples out of both. Batches that ``keep_batches`` stores lie in ``trajectory/`` all the same.
        keep_trajectory: Whether to keep the recorded steps once the ranking is written.

    Attributes:
        options: What was asked for, checked. Each option can be read as an attribute of the callback, too.
        ranking: The :class:`Ranking` of the last fit.
        run_dir: Where its files lie.
        summary: What ``summary.json`` holds.

    Raises:
        ValueError: If an option is wrong.
        SGDInfluenceError: One of its subclasses, from ``fit``, each saying what was found and what to do.
    """

    ranking = OfLastFit[Ranking | None](None)
    run_dir = OfLastFit[Path | None](None)
    summary = OfLastFit[dict[str, Any]]({})

    def __init__(
        self,
        monitor: str = "val_loss",
        *,
        mode: Literal["min", "max"] = "min",
        objective: dict[str, Callable[[Any, Any], Any]] | Callable[[Any, Any], Any] | None = None,
        val_dataloaders: Any = None,
        epochs: int | Literal["all"] = 1,
        at: Literal["last", "best"] = "last",
        curvature: Literal["exact", "gauss-newton", "finite", "none"] = "exact",
        finite_radius: float = 0.03,
        dirpath: str | Path | None = None,
        overwrite: bool = False,
        sample_ids: Callable[[Any], Any] | Literal["content"] | None = None,
        keep_batches: bool | Literal["auto"] = "auto",
        sample_losses: Callable[[Any, Any], Any] | None = None,
        weighted_loss: Callable[[Any, Any, Any], Any] | None = None,
        snapshots: Literal["auto", "every", "sqrt"] | int = "auto",
        max_bytes: int | None = None,
        on_mismatch: Literal["raise", "warn"] = "raise",
        tolerance: float | None = None,
        retrace_precision: Literal["auto", "run", "float32"] = "auto",
        verify: int | Literal["auto"] = "auto",
        rerank: int = 0,
        columns: Sequence[Literal["label", "prediction", "loss", "source", "by_epoch", "relabel"]] = (),
        formats: Sequence[Literal["csv", "parquet"]] = ("csv",),
        page: bool = True,
        render: Callable[[Any], Any] | None = None,
        class_names: Sequence[str] | dict[Any, str] | None = None,
        show_samples: bool = True,
        keep_trajectory: bool = True,
    ) -> None:
        given = dict(locals())
        super().__init__()
        self.options = Options.among(given)
        self._of_copies = CopiesResults()
        # Lightning asks for it at every hook, a dozen times a step.
        self._state_key: str = self._generate_state_key(monitor=monitor, curvature=curvature, dirpath=str(dirpath))
        self._forget()

    def _forget(self) -> None:
        """Be as before any fit."""
        self._active = False
        self._mark: dict[str, Any] = {}  # what the checkpoint says that a fit goes on from
        self._loaders: TrainLoaders | None = None
        self._recording: Recording | None = None
        self._split = VerifiedSplit()
        self._plan: SplitPlan | None = None  # of the first batch's loss
        self._sanity: SanityCheck | None = None
        self._seconds = {"fit": 0.0, "retrace": 0.0}

    # Recording -------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check what is known by now, and watch for the training loader."""
        if stage != "fit":  # a checkpoint that is written later still says which trajectory led to it
            return
        self._forget()
        if trainer.fast_dev_run:
            return
        self.options.check_whole()
        check_alone(trainer, SGDInfluence)
        check_module(trainer, pl_module, self.options.objective is not None)
        self._sanity, self._loaders = SanityCheck(self.options), TrainLoaders(self.options)
        self._loaders.watch(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the optimizer, choose the run directory, and listen to the optimizer's steps."""
        log_dir = trainer.log_dir or trainer.default_root_dir  # on every rank: it broadcasts
        if self._loaders is None or not (self._mark or has_steps_left(trainer)):
            return
        check_optimizers(trainer)
        update_of(trainer.optimizers[0])
        check_validation(trainer, self.options.objective is not None, self.options.val_dataloaders is not None)
        dirpath, overwrite = self.options.dirpath, self.options.overwrite
        self.run_dir = join(self._mark, dirpath, log_dir, overwrite) if self._mark else None
        joined = self._mark if self.run_dir else {}
        if self.run_dir is None:
            self.run_dir = fresh_directory(dirpath, log_dir, overwrite)
        say = tqdm.write if shown_bar(trainer) is not None else (lambda text: None)
        prove, rehearses = partial(self._prove_split, trainer, pl_module), partial(self._rehearse, trainer, pl_module)
        given = trainer, pl_module, self._loaders, self.run_dir, self.options, say
        self._recording = Recording(*given, on_first_batch=prove, rehearse=rehearses, joined=joined)
        self._active = True
        self._seconds["fit"] = -time.perf_counter()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the training loader, which exists by now, and say what recording takes."""
        if self._active and self._recording is not None and self._loaders is not None:
            self._loaders.check(trainer)
            if not self._mark:
                self._recording.check_reach(trainer)
            self._recording.plan_snapshots(trainer)

    def _prove_split(self, trainer: Any, pl_module: Any, micro: MicroBatch, content: Any) -> None:
        """On the first batch: does the loss split by sample, or is the user's own that of training?"""
        params = list(trained_parameters(pl_module, trainer.optimizers[0]).values())
        batch = RecordedBatch(pl_module, params, micro, content, surroundings_of(trainer, pl_module), lambda: None)
        batch.sample_losses, batch.weighted_loss = self.options.sample_losses, self.options.weighted_loss
        self._plan = prove_loss(batch, self._split, self.options.on_mismatch)

    def _rehearse(self, trainer: Any, pl_module: Any, kept: KeptStep, forward: bool) -> list[str]:
        """Retrace an early step; what to warn of."""
        around, hooks = surroundings_of(trainer, pl_module), hooks_of(trainer, pl_module)
        optimizer = trainer.optimizers[0]
        return rehearse(kept, pl_module, optimizer, around, self.options, hooks, self._split, forward=forward)

    @property
    def early_findings(self) -> EarlyFindings:
        """What is known of a training by its first steps."""
        recording = self._recording
        if recording is None:
            return EarlyFindings()
        return EarlyFindings(self._plan, recording.first_ids, recording.outlook.budget)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep what the validation will draw."""
        if self._active and self._recording is not None:
            self._recording.begin_validation()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """In the first validation, if only a sanity check: is there a value of that name, with its whole gradient?"""
        if self._active and self._sanity is not None and not self._sanity.is_done:
            num_loaders = len(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
            around = surroundings_of(trainer, pl_module)
            params = list(trained_parameters(pl_module, trainer.optimizers[0]).values())
            self._sanity.batch_ends(pl_module, params, outputs, (batch, batch_idx, dataloader_idx), num_loaders, around)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Name the batch's samples; on the first one, prove that the loss splits by sample."""
        if self._active and self._recording is not None:
            self._recording.begin_batch(trainer, batch, batch_idx)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Note the loss, as it is differentiated."""
        if self._active and self._recording is not None:
            self._recording.note_loss(loss)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Rehearse a step of the retrace, once."""
        if self._active and self._recording is not None:
            if batch is None:
                self._recording.skip_batch(trainer)
            self._recording.end_batch()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep what was logged, to hold the recomputed objective against."""
        if self._active and self._recording is not None and self._sanity is not None:
            self._recording.note_validation(trainer)
            self._sanity.run_ends(trainer.callback_metrics.get(self.options.monitor))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of epochs that no window reaches any more."""
        if self._active and self._recording is not None:
            self._recording.end_epoch(trainer)

    @property
    def state_key(self) -> str:
        """Tells the states in a checkpoint apart, should it be of a training with several of these callbacks."""
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        """Which trajectory led to the checkpoint, and how far."""
        mark = None if self._recording is None else self._recording.mark()
        return {} if mark is None else asdict(mark)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Remember what to join, also where this callback has another monitor, curvature or dirpath than that one."""
        states = checkpoint.get("callbacks", {})
        ours = [state for key, state in states.items() if str(key).startswith(f"{type(self).__qualname__}{{")]
        self._mark = states.get(self.state_key, ours[0] if len(ours) == 1 else {})

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """What leads to the checkpoint has to be on disk before it is."""
        if self._active and self._recording is not None:
            self._recording.flush(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave a whole trajectory and a Trainer without our hooks."""
        self._stop(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the hooks of a fit that ended early."""
        self._stop(trainer)

    def _stop(self, trainer: Any, is_complete: bool = False) -> None:
        if self._active and self._recording is not None:
            self._recording.close(trainer, is_complete)
        if self._loaders is not None:
            self._loaders.unwatch(trainer)
        self._active = False

    # Retracing -------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Retrace the window, rank, write, tell the loggers."""
        if not self._active:
            return
        assert self._recording is not None and self._loaders is not None and self.run_dir is not None  # noqa: PT018
        self._seconds["fit"] += time.perf_counter()
        self._stop(trainer, is_complete=True)
        if self._recording.failure is not None:
            raise self._recording.failure
        self._seconds["retrace"] = -time.perf_counter()
        run = RecordedRun(
            self.run_dir,
            self._loaders.loaders,
            trainer.optimizers[0],
            self._recording.ending(trainer),
            trainer.val_dataloaders,
            trainer.num_val_batches,
            is_of_fit=True,
            hooks=hooks_of(trainer, pl_module),
            classes=self._recording.keeper.classes,
            as_delivered=self._loaders.as_delivered,
            fit=self._recording.writer.fit,
            split=self._split,
        )
        page = PageOfRun(self.options)
        try:
            self._recording.recorder.check_frozen()
            with opened(trainer, pl_module, run, self.options) as this:
                ranking, about, complaints = rank(this, bar=shown_bar(trainer), seconds=self._seconds["fit"])
                self._write(trainer, ranking, about)  # files first: whatever comes after cannot cost the ranking
                page.look(this, ranking)
        except (Exception, KeyboardInterrupt) as error:
            self._tell_how_to_go_on(error)
            raise
        self._show(trainer, page, complaints)

    def _tell_how_to_go_on(self, error: BaseException) -> None:
        text = (
            f"The training is complete and untouched; its trajectory lies in {str(self.run_dir)!r}. To rank by it once "
            f"the cause is gone: {call_of(self.run_dir, self.options)}"
        )
        error.add_note(text)
        if isinstance(error, KeyboardInterrupt):  # of which Lightning shows nothing: it ends the process
            tqdm.write(text, file=sys.stderr)

    def _write(self, trainer: Any, ranking: Ranking, about: dict[str, Any]) -> None:
        """The ranking and its summary."""
        assert self._recording is not None and self.run_dir is not None  # noqa: PT018
        if not len(ranking):
            raise NonFiniteError("No sample was drawn in the window, so there is nothing to rank.")
        self._seconds["retrace"] += time.perf_counter()
        seconds = {name: round(value, 3) for name, value in self._seconds.items()}
        self.summary = {**about, "seconds": seconds, **self._recording.summary(trainer)}
        names = [ranking.save(self.run_dir / f"influence.{kind}").name for kind in self.options.formats]
        write_summary(self.run_dir, self.summary, names)
        self.ranking = replace(ranking, summary=self.summary)

    def _show(self, trainer: Any, page: PageOfRun, complaints: list[str]) -> None:
        """The page, the loggers, the last word; warnings at the very end, since they may be errors."""
        assert self.ranking is not None and self.run_dir is not None  # noqa: PT018
        complaints = complaints + page.write(self.run_dir, self.ranking, self.summary)
        names = [*(f"influence.{kind}" for kind in self.options.formats), "summary.json", "report.html"]
        if trainer.is_global_zero:
            complaints += publish(
                trainer.loggers,
                self.ranking,
                [self.run_dir / name for name in names if (self.run_dir / name).exists()],
                summary=self.summary,
                step=trainer.global_step,
                pictures=partial(self._pictures, self.ranking),
            )
        if not self.options.keep_trajectory:
            shutil.rmtree(self.run_dir / "trajectory")
        if shown_bar(trainer) is not None:
            tqdm.write(closing_text(self.ranking, self.summary, self.run_dir))
        warn_of(complaints)

    def _pictures(self, ranking: Ranking) -> list[Exhibit]:
        """The worst samples, where the ids are known to be positions in the one dataset that there was."""
        loaders = self._loaders.loaders if self._loaders is not None else []
        if not self.options.show_samples or self.summary["dataset_size"] is None or len(loaders) != 1:
            return []
        return worst_pictures(ranking, loaders[0].dataset)


for _option in fields(Options):  # read as attributes; an assignment is an error, since it would not be checked
    setattr(SGDInfluence, _option.name, property(attrgetter(f"options.{_option.name}")))
