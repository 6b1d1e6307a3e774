# SPDX-License-Identifier: Apache-2.0
"""The callback: Lightning's hooks wired to the stages. No arithmetic here."""

import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from lightning_sgdclean import checks, report
from lightning_sgdclean._lightning import CALLBACK_BASES
from lightning_sgdclean.after_fit import RecordedRun, rank_run
from lightning_sgdclean.artifacts import publish
from lightning_sgdclean.batches import cloned, fingerprint
from lightning_sgdclean.best_model import BestModel
from lightning_sgdclean.budget import Needs, budget_for, expected_state_bytes, window_length
from lightning_sgdclean.errors import (
    NonFiniteError,
    RunDirectoryError,
    SampleIdError,
    SGDInfluenceError,
    SGDInfluenceWarning,
)
from lightning_sgdclean.files import write_json
from lightning_sgdclean.joining import Mark, join
from lightning_sgdclean.keeping import BatchKeeper, Plan
from lightning_sgdclean.memory import slots_for
from lightning_sgdclean.objective import logged_value, no_such_value
from lightning_sgdclean.randomness import random_state, untouched_randomness
from lightning_sgdclean.ranking import Ranking
from lightning_sgdclean.recorder import Recorder, trained_parameters
from lightning_sgdclean.rehearsal import Rehearsal
from lightning_sgdclean.replay import untouched_module
from lightning_sgdclean.run_directory import check_free, fresh_directory
from lightning_sgdclean.sampling import NotingSampler, note_samples, stop_noting
from lightning_sgdclean.surroundings import is_quiet, surroundings_of
from lightning_sgdclean.trajectory import MicroBatch, Positions, SampleId, first_epoch_kept
from lightning_sgdclean.verified_split import VerifiedSplit
from lightning_sgdclean.walk import RetraceOptions
from lightning_sgdclean.writer import TrajectoryWriter


class SGDInfluence(*CALLBACK_BASES):  # type: ignore[misc]
    """Ranks the training samples of a run by the harm they did to its validation loss.

    Records every optimizer step while ``fit`` trains (the training itself stays as it is, to the last
    bit), retraces the last epochs backwards when it is done, and writes a ranked ``influence.csv``.
    A negative influence is harmful: the validation loss would be lower had training gone without
    the sample.

    Followed: most of torch's optimizers with any options, groups and schedules, gradient
    accumulation and clipping, BatchNorm with its running statistics, dropout, any sampler. What
    cannot be followed is refused, before the first step where it can be known by then.

    Example::

        callback = SGDInfluence(monitor="val_loss")
        trainer = Trainer(callbacks=[callback])
        trainer.fit(model, datamodule)
        callback.ranking.harmful(20)  # ids of the 20 worst samples

    Args:
        monitor: Name of the value that ``validation_step`` logs for each batch; the objective is its
            mean over the validation set, as Lightning computes it.
        mode: ``"min"`` if the value should be low, ``"max"`` if it should be high.
        objective: Instead of ``monitor``, a callable ``(pl_module, batch)`` that returns a
            differentiable scalar, or a scalar and its weight (by default the batch's size).
        val_dataloaders: Loader or loaders for the objective, if not the Trainer's validation data.
        epochs: Window: how many of the last completed epochs to retrace (besides a started one), or ``"all"``.
        at: Where the walk starts: behind the ``"last"`` step, or at the ``"best"`` model of the Trainer's
            ModelCheckpoint, whose steps are then the last ones that count.
        curvature: ``"exact"`` (double backward), ``"finite"`` (central difference; cheaper, follows any
            operation) or ``"none"`` (no Hessian; for comparison).
        finite_radius: Radius of ``"finite"`` relative to the parameters' length.
        dirpath: Run directory; by default ``sgd_influence`` in the logger's directory, the next free name.
        overwrite: Whether ``dirpath`` may hold another run, which is then deleted.
        sample_ids: Callable from a batch to its samples' ids (int or str); by default their positions
            in the training loader's dataset.
        keep_batches: Whether to store the batches as they were trained on: ``"auto"`` does it where samples hold other
            data each time, by random augmentation say, ``True`` from the first batch, ``False`` never.
        sample_losses: Callable ``(pl_module, batch)`` to losses ``(B,)`` whose mean is the training
            loss, for losses that cannot be split by themselves.
        snapshots: Which steps' states are kept on disk: ``"every"``, one in ``k``, or ``"sqrt"`` (a number and a
            distance that grow with the square root of the window); those between are recomputed for the retrace.
            ``"auto"`` keeps every one where that takes 1 GiB at most, else ``"sqrt"``, else as many as fit.
        max_bytes: Disk that the trajectory may take, kept batches included; by default what is free.
        on_mismatch: Whether a replay that differs from the record is an error or a warning.
        tolerance: Largest relative difference of a loss; default 1e-5, in float64 1e-12.
        retrace_precision: Precision of the derivatives of a run in 16 bits: the ``"run"``'s own, or ``"float32"``,
            which takes half as long again and is less noisy; ``"auto"`` takes the latter for float16.
        keep_trajectory: Whether to keep the recorded steps once the ranking is written.

    Attributes:
        ranking: The :class:`Ranking` of the last fit.
        run_dir: Where its files lie.
        summary: What ``summary.json`` holds.

    Raises:
        SGDInfluenceError: One of its subclasses, from ``fit``, each saying what was found and what to do.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        *,
        mode: Literal["min", "max"] = "min",
        objective: Callable[[Any, Any], Any] | None = None,
        val_dataloaders: Any = None,
        epochs: int | Literal["all"] = 1,
        at: Literal["last", "best"] = "last",
        curvature: Literal["exact", "finite", "none"] = "exact",
        finite_radius: float = 0.01,
        dirpath: str | Path | None = None,
        overwrite: bool = False,
        sample_ids: Callable[[Any], Any] | None = None,
        keep_batches: bool | Literal["auto"] = "auto",
        sample_losses: Callable[[Any, Any], Tensor] | None = None,
        snapshots: Literal["auto", "every", "sqrt"] | int = "auto",
        max_bytes: int | None = None,
        on_mismatch: Literal["raise", "warn"] = "raise",
        tolerance: float | None = None,
        retrace_precision: Literal["auto", "run", "float32"] = "auto",
        keep_trajectory: bool = True,
    ) -> None:
        super().__init__()
        _check_choice("mode", mode, ("min", "max"))
        _check_choice("retrace_precision", retrace_precision, ("auto", "run", "float32"))
        _check_choice("at", at, ("last", "best"))
        _check_choice("curvature", curvature, ("exact", "finite", "none"))
        _check_choice("on_mismatch", on_mismatch, ("raise", "warn"))
        if keep_batches not in (True, False, "auto"):
            raise ValueError(f'keep_batches must be True, False or "auto", got {keep_batches!r}.')
        if epochs != "all" and not (type(epochs) is int and epochs >= 1):
            raise ValueError(f'epochs must be a positive int or "all", got {epochs!r}.')
        if snapshots not in ("auto", "every", "sqrt") and not (type(snapshots) is int and snapshots >= 1):
            raise ValueError(f'snapshots must be "auto", "every", "sqrt" or a positive int, got {snapshots!r}.')
        if max_bytes is not None and not max_bytes > 0:
            raise ValueError(f"max_bytes must be positive, got {max_bytes!r}.")
        if finite_radius <= 0:
            raise ValueError(f"finite_radius must be positive, got {finite_radius}.")
        if objective is not None and not callable(objective):
            raise ValueError(
                f"objective must be a callable (pl_module, batch) -> scalar, got {type(objective).__name__}."
            )
        self.monitor, self.mode, self.objective, self.val_dataloaders = monitor, mode, objective, val_dataloaders
        self.epochs, self.at, self.curvature, self.finite_radius = epochs, at, curvature, finite_radius
        self.dirpath, self.overwrite, self.keep_trajectory = dirpath, overwrite, keep_trajectory
        self.sample_ids, self.keep_batches, self.sample_losses = sample_ids, keep_batches, sample_losses
        self.snapshots, self.max_bytes = snapshots, max_bytes
        self.on_mismatch, self.tolerance = on_mismatch, tolerance
        self.retrace_precision = retrace_precision
        self.ranking: Ranking | None = None
        self.run_dir: Path | None = None
        self.summary: dict[str, Any] = {}
        self._forget()

    def _forget(self) -> None:
        """Be as before any fit."""
        self._active = False
        self._mark: Mark | None = None
        self._loaders: list[Any] = []
        self._noting: NotingSampler | None = None
        self._as_delivered: Callable[[Any], Any] = lambda batch: batch
        self._keeper: BatchKeeper | None = None
        self._recorder: Recorder | None = None
        self._rehearsal: Rehearsal | None = None
        self._best: BestModel | None = None
        self._averaging: list[str] = []
        self._writer: TrajectoryWriter | None = None
        self._hook: Any = None
        self._failure: Exception | None = None
        self._best_epoch: tuple[int, bool] | None = None
        self._checked_validation = False
        self._logged: dict[int, float] = {}
        self._seconds = {"fit": 0.0, "retrace": 0.0}

    # Recording -------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check what is known by now, and shadow the strategy's hook that sees the training loader."""
        self._forget()
        if stage != "fit" or trainer.fast_dev_run:
            return
        checks.check_module(trainer, pl_module, self.objective is not None)
        process = trainer.strategy.process_dataloader

        def process_dataloader(loader: Any) -> Any:
            if trainer.training:
                self._see_train_loader(loader)
            return process(loader)

        trainer.strategy.process_dataloader = process_dataloader

    def _see_train_loader(self, loader: Any) -> None:
        checks.check_train_loader(loader, self.sample_ids is not None, self.keep_batches is not False)
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            self._noting = note_samples(loader)
        if not self._loaders or loader is not self._loaders[-1]:
            self._loaders.append(loader)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the optimizer, choose the run directory, and listen to the optimizer's steps."""
        log_dir = trainer.log_dir or trainer.default_root_dir  # on every rank: it broadcasts
        if trainer.fast_dev_run:
            return
        checks.check_optimizers(trainer)
        self._averaging = checks.check_callbacks(trainer)
        checks.check_validation(trainer, self.objective is not None, self.val_dataloaders is not None)
        self._best = BestModel(checks.best_model_checkpoint(trainer)) if self.at == "best" else None
        self.run_dir = join(self._mark, self.dirpath, Path(log_dir), self.overwrite) if self._mark else None
        if self.run_dir is None:
            check_free(self.dirpath, self.overwrite)
            self.run_dir = fresh_directory(self.dirpath, Path(log_dir), self.overwrite)
        optimizer = trainer.optimizers[0]
        trained = {
            "precision": str(trainer.precision),
            "device": trainer.strategy.root_device.type,
            "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        }
        self._writer = TrajectoryWriter(self.run_dir / "trajectory", trained=trained)
        self._recorder = Recorder(pl_module, trainer.optimizers[0], self._writer)
        self._keeper = BatchKeeper(
            self.keep_batches,
            plan=partial(self._plan, trainer),
            say=(lambda text: None) if is_quiet(trainer) else tqdm.write,
        )
        self._rehearsal = Rehearsal()
        self._hook = trainer.optimizers[0].register_step_post_hook(partial(self._after_optimizer_step, trainer))
        self._active = True
        self._seconds["fit"] = -time.perf_counter()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the training loader, which exists by now."""
        if not self._active:
            return
        if not self._loaders:
            raise SampleIdError(
                "The training loader was made before this callback was set up, so its samples were not seen. "
                "Do not ask for trainer.estimated_stepping_batches in DataModule.setup."
            )
        self._as_delivered = checks.one_loader(trainer)
        self._plan_snapshots(trainer)

    def _plan_snapshots(self, trainer: Any) -> None:
        """Say what the trajectory will take, or refuse if that is too much."""
        assert self._writer is not None and self._recorder is not None and self.run_dir is not None  # noqa: PT018
        accumulated = trainer.accumulate_grad_batches
        num_batches, max_steps = trainer.num_training_batches, trainer.max_steps
        state_bytes = expected_state_bytes(self._recorder.state(), trainer.optimizers[0])
        needs = Needs(
            num_steps=window_length(num_batches, accumulated, trainer.max_epochs, max_steps, self.epochs),
            batches_a_step=accumulated,
            state_bytes=state_bytes,
            slots=slots_for(state_bytes),
            max_bytes=min(self.max_bytes or math.inf, shutil.disk_usage(self.run_dir).free),
            curvature=self.curvature,
        )
        budget = budget_for(self.snapshots, needs)
        self._writer.interval, self._writer.max_bytes = budget.interval, self.max_bytes or math.inf
        if not is_quiet(trainer):
            tqdm.write(budget.text)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """In the sanity check already: is there a value of that name, and can it be differentiated?"""
        wanted = trainer.sanity_checking and self.objective is None and self.val_dataloaders is None
        if not self._active or self._checked_validation or not wanted:
            return
        num_loaders = len(trainer.num_sanity_val_batches)
        surroundings = surroundings_of(trainer, pl_module)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            untouched_randomness(surroundings.device),
            untouched_module(pl_module),
            surroundings.as_stage("validate"),
            surroundings.val_context(),
        ):
            value, _, names = logged_value(
                pl_module, (cloned(batch), batch_idx, dataloader_idx), self.monitor, num_loaders
            )
        if value is None and num_loaders == 1:
            raise no_such_value(self.monitor, names)
        self._checked_validation = value is not None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Name the batch's samples; on the first one, prove that the loss splits by sample."""
        if not self._active:
            return
        positions = self._noting.next_positions() if self._noting is not None else None
        if self._failure is not None:
            return
        assert self._recorder is not None and self._keeper is not None  # noqa: PT018 - made with _active
        self._look_for_best(trainer)
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._recorder.has_pending:
            self._leave(trainer, trainer.global_step - 1, ends_epoch=False)
        names = self._names(batch, positions)
        seen = fingerprint(batch, len(names))
        is_first = self._recorder.num_steps == 0 and not self._recorder.has_pending
        try:
            kept = self._keeper.packed(batch, positions, seen, trainer.current_epoch)
        except SGDInfluenceError as error:
            if is_first:
                raise
            self._stop_recording(trainer, error)
            return
        micro = MicroBatch(
            ids=names,
            positions=positions,
            epoch=trainer.current_epoch,
            batch_idx=batch_idx,
            random=random_state(trainer.strategy.root_device),
            digest=seen.digest,
            loader=len(self._loaders) - 1,
            global_step=trainer.global_step,
            batch=kept,
        )
        self._recorder.begin_batch(micro)
        if self._rehearsal is not None:
            self._rehearsal.begin_batch(micro, batch, self._recorder.state())
        if is_first and self.sample_losses is None:
            params = list(trained_parameters(pl_module, trainer.optimizers[0]).values())
            surroundings = surroundings_of(trainer, pl_module)
            VerifiedSplit(pl_module, params, surroundings).prove(micro, batch)

    def _names(self, batch: Any, positions: Positions | None) -> list[SampleId]:
        positions = positions if isinstance(positions, list | None) else [positions]
        if self.sample_ids is None:
            assert positions is not None
            return list(positions)
        given = self.sample_ids(batch)
        names = [_plain_id(name) for name in (given.tolist() if isinstance(given, Tensor) else given)]
        if positions is not None and len(names) != len(positions):
            raise SampleIdError(f"sample_ids= gave {len(names)} ids for a batch of {len(positions)} samples.")
        return names

    def _plan(self, trainer: Any) -> Plan:
        """What is known of the run when batches are first to be kept."""
        assert self.run_dir is not None
        num_epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
        num_kept = num_epochs if self.epochs == "all" else min(num_epochs, self.epochs + 1)
        num_batches = min(num_kept, num_epochs - trainer.current_epoch) * trainer.num_training_batches
        if trainer.max_steps != -1:
            num_batches = min(num_batches, trainer.max_steps * trainer.accumulate_grad_batches)
        first_epoch = 0 if self.epochs == "all" else num_epochs - self.epochs
        return Plan(num_batches, first_epoch, shutil.disk_usage(self.run_dir).free)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Note the loss, as it is differentiated."""
        if self._active and self._recorder is not None and self._failure is None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._recorder.note_loss(loss, 1.0 if scaler is None else scaler.get_scale())

    def _after_optimizer_step(self, trainer: Any, *_: Any) -> None:
        """Write the step; an error of ours ends the recording, never the training."""
        if not self._active or self._recorder is None or self._failure is not None:
            return
        if bool(getattr(trainer.optimizers[0], "found_inf", False)):
            return  # a fused optimizer is called for a step that the GradScaler skips, and does nothing
        clip_value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        with self._never_breaking_the_training(trainer):
            step = self._recorder.commit(
                index=trainer.global_step,
                ends_epoch=_is_at_end_of_epoch(trainer),
                clip=(str(getattr(algorithm, "value", algorithm or "norm")), float(clip_value)) if clip_value else None,
                divisor=trainer.accumulate_grad_batches,
                is_last=trainer.global_step + 1 == trainer.max_steps,
            )
            if self._rehearsal is not None:
                self._rehearsal.commit(step, self._recorder.state())

    def _leave(self, trainer: Any, index: int, ends_epoch: bool) -> None:
        assert self._recorder is not None
        with self._never_breaking_the_training(trainer):
            self._recorder.leave(index, ends_epoch, trainer.accumulate_grad_batches)

    @contextmanager
    def _never_breaking_the_training(self, trainer: Any) -> Iterator[None]:
        """An error of ours in this block ends the recording; it is raised when training is over."""
        try:
            yield
        except (SGDInfluenceError, OSError) as error:
            self._stop_recording(trainer, error)

    def _stop_recording(self, trainer: Any, error: Exception) -> None:
        if not isinstance(error, SGDInfluenceError):
            cause, error = error, RunDirectoryError(f"The trajectory could not be written any more: {error}")
            error.__cause__ = cause
        self._failure = error
        warnings.warn(
            f"Recording stopped at step {trainer.global_step}, training goes on: {error}",
            SGDInfluenceWarning,
            stacklevel=2,
        )

    def _look_for_best(self, trainer: Any) -> None:
        if self._best is not None and self._recorder is not None and self._best.look(trainer.global_step):
            self._best_epoch = self._recorder.last_epoch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Rehearse a step of the retrace, once; a batch that is None never started, but was drawn all the same."""
        if self._active and batch is None and self._noting is not None:
            self._noting.next_positions()
        if self._active and self._keeper is not None:
            self._keeper.watch.batch_ends()
        if not self._active or self._rehearsal is None or not self._rehearsal.is_due or self._failure is not None:
            return
        rehearsal, self._rehearsal = self._rehearsal, None
        assert self._recorder is not None
        self._recorder.check_constants()
        hooks = checks.gradient_hooks(trainer, pl_module)
        surroundings = surroundings_of(trainer, pl_module)
        assert self._writer is not None
        forward = self._writer.interval != 1
        optimizer, options = trainer.optimizers[0], self._options()
        for text in rehearsal.run(pl_module, optimizer, surroundings, options, hooks, forward=forward):
            warnings.warn(text, SGDInfluenceWarning, stacklevel=2)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep what was logged, to hold the recomputed objective against."""
        if self._keeper is not None:
            self._keeper.watch.is_interrupted()
        value = trainer.callback_metrics.get(self.monitor)
        if self._active and not trainer.sanity_checking and value is not None:
            self._logged[trainer.global_step] = float(value)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of epochs that no window reaches any more."""
        if self._keeper is not None:
            self._keeper.watch.is_interrupted()
        if not self._active or self._writer is None or self._recorder is None or self._failure is not None:
            return
        self._look_for_best(trainer)
        if self._recorder.has_pending:
            ends_epoch = _is_at_end_of_epoch(trainer)
            self._leave(trainer, trainer.global_step - ends_epoch, ends_epoch)
        kept = first_epoch_kept(trainer.current_epoch, True, self.epochs)
        if self._best_epoch is not None:
            kept = min(kept, first_epoch_kept(*self._best_epoch, self.epochs))
        with self._never_breaking_the_training(trainer):
            self._writer.drop_before(kept)

    @property
    def state_key(self) -> str:
        """Tells the states of several of these callbacks in a checkpoint apart."""
        key: str = self._generate_state_key(monitor=self.monitor, curvature=self.curvature, dirpath=str(self.dirpath))
        return key

    def state_dict(self) -> dict[str, Any]:
        """Which trajectory led to the checkpoint, and how far."""
        if not self._active or self._failure is not None:
            return {}
        assert self._writer is not None and self._recorder is not None and self.run_dir is not None  # noqa: PT018
        folder, between = str(self.run_dir.resolve()), not self._recorder.has_pending
        return asdict(Mark(self._writer.run, self._writer.next_index, folder, between))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what to join."""
        self._mark = Mark(**state_dict)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """What leads to the checkpoint has to be on disk before it is."""
        if self._active and self._writer is not None and self._failure is None:
            with self._never_breaking_the_training(trainer):
                self._writer.flush()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave a whole trajectory and a Trainer without our hooks."""
        if self._active and self._writer is not None and self._failure is None:
            with self._never_breaking_the_training(trainer):
                self._writer.close()
        self._unhook(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the hooks of a fit that ended early."""
        self._unhook(trainer)

    def _unhook(self, trainer: Any) -> None:
        trainer.strategy.__dict__.pop("process_dataloader", None)
        for loader in self._loaders:
            if isinstance(loader, DataLoader):
                stop_noting(loader)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._active = False

    # Retracing -------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Retrace the window, rank, write, tell the loggers."""
        if not self._active:
            return
        assert self._writer is not None and self._keeper is not None and self.run_dir is not None  # noqa: PT018
        self._seconds["fit"] += time.perf_counter()
        if self._failure is None:
            with self._never_breaking_the_training(trainer):
                self._writer.close()
        self._unhook(trainer)
        if self._failure is not None:
            raise self._failure
        began = time.perf_counter()
        run = RecordedRun(
            self.run_dir,
            self._loaders,
            trainer.optimizers[0],
            self._logged,
            hooks=checks.gradient_hooks(trainer, pl_module),
            averaging=self._averaging,
            best=self._best,
            classes=self._keeper.classes,
            as_delivered=self._as_delivered,
        )
        try:
            if self._recorder is not None:
                self._recorder.check_constants()
            ranking, about, complaints = rank_run(trainer, pl_module, run, self._options())
        except SGDInfluenceError as error:
            error.add_note(
                f"The training is complete and untouched; its trajectory lies in {self.run_dir}. To rank by it once "
                f"the cause is gone: lightning_sgdclean.retrace({str(self.run_dir)!r}, model, train_dataloaders=..., "
                "val_dataloaders=...)."
            )
            raise
        self._seconds["retrace"] = time.perf_counter() - began
        for text in complaints:
            warnings.warn(text, SGDInfluenceWarning, stacklevel=2)
        self._finish(trainer, ranking, about)

    def _options(self) -> RetraceOptions:
        return RetraceOptions(
            monitor=self.monitor,
            mode=self.mode,
            objective=self.objective,
            val_dataloaders=self.val_dataloaders,
            epochs=self.epochs,
            curvature=self.curvature,
            finite_radius=self.finite_radius,
            sample_losses=self.sample_losses,
            on_mismatch=self.on_mismatch,
            tolerance=self.tolerance,
            retrace_precision=self.retrace_precision,
        )

    def _finish(self, trainer: Any, ranking: Ranking, about: dict[str, Any]) -> None:
        assert self.run_dir is not None and self._writer is not None and self._keeper is not None  # noqa: PT018
        if not len(ranking):
            raise NonFiniteError("No sample was drawn in the window, so there is nothing to rank.")
        optimizer = trainer.optimizers[0]
        self.ranking = ranking
        self.summary = {
            "format": 1,
            "versions": report.versions(),
            "id_type": "int" if ranking.sample_id.dtype != object else "str",
            "num_samples": len(ranking),
            "num_harmful": int((ranking.influence < 0).sum()),
            "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
            "precision": str(trainer.precision),
            "engine": self.curvature,
            **about,
            "options": {"epochs": self.epochs, "finite_radius": self.finite_radius, "tolerance": self.tolerance},
            "seconds": {name: round(value, 3) for name, value in self._seconds.items()},
            "batches": self._keeper.summary(),
            "trajectory_bytes": self._writer.bytes_written,
        }
        csv_path = ranking.save(self.run_dir / "influence.csv")
        write_json(self.run_dir / "summary.json", self.summary)
        publish(trainer.loggers, ranking, [csv_path, self.run_dir / "summary.json"], trainer.global_step, self._unit)
        if not self.keep_trajectory:
            shutil.rmtree(self.run_dir / "trajectory")
        if not is_quiet(trainer):
            tqdm.write(report.closing_text(ranking, self.summary, self.run_dir))

    @property
    def _unit(self) -> str:
        return self.monitor if self.objective is None else "objective"


def _plain_id(name: Any) -> SampleId:
    value = name.item() if hasattr(name, "item") else name
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise SampleIdError(f"sample_ids= gave {value!r} of type {type(value).__name__}; expected int or str.")


def _is_at_end_of_epoch(trainer: Any) -> bool:
    return bool(trainer.is_last_batch) or trainer.fit_loop.epoch_loop.batch_idx + 1 >= trainer.num_training_batches


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
