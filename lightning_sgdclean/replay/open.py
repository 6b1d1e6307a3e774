# SPDX-License-Identifier: Apache-2.0
"""Open a recorded run whose steps are to be run again: where its fit has just ended, or later, in another process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_sgdclean.base.errors import ObjectiveError, RunDirectoryError, SampleIdError, UnsupportedTrainingError
from lightning_sgdclean.base.lightning import (
    CALLBACK_BASES,
    check_optimizers,
    combined_loader,
    hooks_of,
    quiet_trainer,
    training_loader,
)
from lightning_sgdclean.base.options import Options
from lightning_sgdclean.base.randomness import set_random_state, untouched_randomness
from lightning_sgdclean.data.fetching import (
    ValidationBatch,
    loaders_in,
    moved_positions,
    validation_batches,
)
from lightning_sgdclean.data.packing import Classes, classes_of
from lightning_sgdclean.data.unpacking import unpack_batch
from lightning_sgdclean.losses.module_state import untouched_module
from lightning_sgdclean.losses.surroundings import surroundings_of
from lightning_sgdclean.replay.forward import RecomputedStates
from lightning_sgdclean.replay.replay import OpenedRun, RecordedRun, averages_of, check_finite, drawn_from, replay_of
from lightning_sgdclean.replay.sample_order import CollateProof, are_names
from lightning_sgdclean.replay.scratch import scratch_buffers
from lightning_sgdclean.trajectory.live_state import hyper_parameters, trained_parameters
from lightning_sgdclean.trajectory.records import MicroBatch, Step, first_epoch_kept
from lightning_sgdclean.trajectory.store import FitEnd, Trajectory, read_ending, states_around

T = TypeVar("T")


@contextmanager
def opened(trainer: Any, module: Any, run: RecordedRun, options: Options) -> Iterator[OpenedRun]:
    """Open a run whose fit has ended; module and random states are as they were afterwards.

    Raises:
        SGDInfluenceError: If its steps cannot be followed.
    """
    surroundings = surroundings_of(trainer, module)
    home = next(module.parameters()).device
    module.to(surroundings.device)
    try:
        with torch.enable_grad(), untouched_randomness(surroundings.device), untouched_module(module) as restore:
            trajectory = Trajectory(run.folder / "trajectory", run.ending.best_step if options.at == "best" else None)
            steps, complaints = _window(trajectory, run, options)
            collating = CollateProof(options.sample_ids is not None or are_names(trajectory.steps))

            def loader_of(micro: MicroBatch) -> Any:
                joint = max(trajectory.joints, default=-1)
                return run.loaders[micro.loader if micro.global_step > joint else 0]

            def content_of(step: Step, number: int) -> Any:
                """As it was kept, when the transfer hooks had seen it already, or fetched again."""
                kept, micro = trajectory.batch(step, number), step.micro[number]
                if kept is not None:
                    collating.check_kept(loader_of(micro), micro)
                    return unpack_batch(kept, run.classes, surroundings.device)
                return surroundings.prepare(run.as_delivered(collating.fetched(loader_of(micro), micro)), 0)

            check_finite(steps)
            check_positions(steps, loader_of)
            replay = replay_of(
                module,
                run.optimizer,
                surroundings,
                options,
                run.hooks,
                content_of=content_of,
                random_of=trajectory.random,
                restore=restore,
                split=run.split,
            )
            replay.fidelity.joints = trajectory.joints
            with surroundings.as_stage("train"):
                some = cache(lambda: states_around(trajectory, steps))
                last = next(step for step in reversed(steps) if step.micro)
                replay = replace(replay, scratch=scratch_buffers(replay, last, some))
                replay.teachers.settle_by_record(trajectory.state, some, steps, replay)
            states = RecomputedStates(trajectory, replay, run.optimizer)
            drawing = drawn_from(run, trajectory, steps)
            yield OpenedRun(
                run=run,
                options=options,
                trajectory=trajectory,
                steps=steps,
                replay=replay,
                states=states,
                end=states.state(steps[-1].index + 1),
                complaints=complaints,
                validation=lambda: _validation(run, options, lambda: set_random_state(drawing, surroundings.device)),
                loader_of=loader_of,
                averages=averages_of(run, trajectory, steps),
            )
    finally:
        module.to(home)


def _window(trajectory: Trajectory, run: RecordedRun, options: Options) -> tuple[list[Step], list[str]]:
    """The steps to retrace, the last of which is the end point, and what is missing of a fit's.

    Raises:
        RunDirectoryError: If not all of them were kept, or they are another fit's.
        UnsupportedTrainingError: If there are none.
    """
    if run.fit and run.fit != trajectory.fits[-1][1]:
        raise RunDirectoryError(
            f"{run.folder} holds the steps of another fit, which wrote there at the same time. Give each a dirpath= of "
            "its own, or go on from a checkpoint with one at a time."
        )
    steps = recorded = trajectory.steps
    if options.at == "best":
        best = run.ending.best_step
        if best is None:
            raise UnsupportedTrainingError(
                "The ModelCheckpoint saved no new best model in this fit, or none was watched, so there is no end "
                'point. Use at="last", or at="best" in the fit with a ModelCheckpoint that monitors a logged value.'
            )
        steps = [step for step in recorded if step.index < best]
    if not any(step.is_update for step in steps):
        raise UnsupportedTrainingError("No optimizer step was recorded: the Trainer made none.")
    first_epoch = first_epoch_kept(steps[-1].epoch, steps[-1].ends_epoch, options.epochs)
    complaints = _missing(trajectory, first_epoch, options)
    if complaints and not run.is_of_fit:  # a fit was not recorded from there on; nobody else has to take that
        raise RunDirectoryError(
            f"{complaints[0]} Ask for fewer epochs, or record more of them (epochs= of SGDInfluence)."
        )
    return [step for step in steps if step.epoch >= first_epoch], complaints


def _missing(trajectory: Trajectory, first_epoch: int, options: Options) -> list[str]:
    """That the window begins before what was kept, if so."""
    first = trajectory.steps[0]
    if first.epoch < first_epoch or (first.epoch == first_epoch and trajectory.begins_epoch):
        return []
    where = "at the start of" if trajectory.begins_epoch else "inside"
    return [
        f"What was kept of the run begins with step {first.index}, {where} epoch {first.epoch}; the window of "
        f"epochs={options.epochs!r} would begin with epoch {first_epoch}."
    ]


def _validation(run: RecordedRun, options: Options, begin: Callable[[], None]) -> tuple[Iterator[ValidationBatch], int]:
    own = options.val_dataloaders is not None
    loaders = options.val_dataloaders if own else run.val_dataloaders
    if loaders is None:
        raise ObjectiveError(
            "Validation never ran, so its loaders were never made. Validate at least once, or give val_dataloaders=."
        )
    batches = validation_batches(loaders, None if own else run.limits, begin)
    return batches, len(loaders_in(loaders))


def check_positions(steps: list[Step], loader_of: Callable[[MicroBatch], Any]) -> None:
    """Where loaders were made anew: is a position still the same sample?

    Raises:
        SampleIdError: If it is not, so that two samples would share an influence.
    """
    first: Any = None
    seen: set[int] = set()
    for micro in (micro for step in steps for micro in step.micro):
        if not isinstance(micro.positions, list) or micro.ids != micro.positions or micro.loader in seen:
            continue
        seen.add(micro.loader)
        loader = loader_of(micro)
        first = loader if first is None else first
        moved = moved_positions(first, loader, micro.positions)
        if moved:
            raise SampleIdError(
                f"After the training loader was made anew (epoch {micro.epoch}), position {moved[0]} of its dataset "
                "holds another sample than before, so positions are no names. "
                "Give sample_ids=, a callable from the batch to its samples' ids."
            )


def reopened(
    run_dir: str | Path,
    model: Any,
    options: Options,
    use: Callable[[OpenedRun], T],
    *,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: Any = None,
    limit_val_batches: float | None = None,
    trainer: Any = None,
) -> T:
    """What ``use`` makes of the run, opened without the Trainer that recorded it.

    Args:
        run_dir: The run directory.
        model: The LightningModule, made as for the run.
        options: What is asked of the run.
        use: What to do with it.
        train_dataloaders: The training data, as ``fit`` got them.
        val_dataloaders: The validation data.
        datamodule: Instead of the two.
        limit_val_batches: How many validation batches of each loader count, or which share (a float); None: as many as
            the fit took.
        trainer: What to open it under; by default a quiet Trainer with the precision and the kind of device that the
            run had. It takes no step.

    Raises:
        ObjectiveError: If there is nothing to validate on.
        RunDirectoryError: If the directory holds no whole trajectory, or that of another model or optimizer.
        SGDInfluenceError: One of its other subclasses, as from ``fit``.
    """
    trajectory = Trajectory(Path(run_dir) / "trajectory")
    if not trajectory.steps:
        raise RunDirectoryError(
            f"{run_dir} holds no step: its training made none, or was killed before the first ones were written."
        )
    if datamodule is None and val_dataloaders is None:
        raise ObjectiveError("There is nothing to validate on. Give val_dataloaders= or a datamodule=.")
    at_end = _AtEnd(Path(run_dir), trajectory, options, use, val_dataloaders, limit_val_batches)
    trainer = quiet_trainer(model, trajectory.trained) if trainer is None else trainer
    with _lent(trainer, at_end), untouched_randomness(trainer.strategy.root_device):
        trainer.fit(model, train_dataloaders, datamodule=datamodule)
    return at_end.results[0]


@contextmanager
def _lent(trainer: Any, callback: Any) -> Iterator[None]:
    """A Trainer whose ``fit`` takes no step, validates nothing, and calls ``callback`` and progress bars only."""
    bar = trainer.progress_bar_callback
    borrowed = trainer.callbacks, trainer.loggers, trainer.num_sanity_val_steps, trainer.fit_loop.max_epochs
    trainer.callbacks, trainer.loggers = [callback] if bar is None else [bar, callback], []
    trainer.num_sanity_val_steps, trainer.fit_loop.max_epochs = 0, 0
    try:
        yield
    finally:
        trainer.callbacks, trainer.loggers, trainer.num_sanity_val_steps, trainer.fit_loop.max_epochs = borrowed


class _AtEnd(*CALLBACK_BASES, Generic[T]):  # type: ignore[misc]
    """Opens the run where a fit has come to its end, which one without epochs does at once."""

    def __init__(
        self,
        run_dir: Path,
        trajectory: Trajectory,
        options: Options,
        use: Callable[[OpenedRun], T],
        val_dataloaders: Any,
        limit: float | None,
    ) -> None:
        super().__init__()
        self._run_dir, self._trajectory, self._options, self._use = run_dir, trajectory, options, use
        self._val_dataloaders, self._limit = val_dataloaders, limit
        self.results: list[T] = []

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Open, and use."""
        check_optimizers(trainer)
        optimizer = trainer.optimizers[0]
        check_model(self._trajectory, pl_module, optimizer)
        (loader, as_delivered), loaders = training_loader(trainer), self._val_dataloaders
        loaders = trainer.datamodule.val_dataloader() if loaders is None else loaders
        recorded = self._trajectory
        ending = read_ending(recorded.folder, recorded.run, recorded.ending) or FitEnd(self._options.monitor)
        run = RecordedRun(
            self._run_dir,
            [loader] * (1 + max(micro.loader for step in self._trajectory.steps for micro in step.micro)),
            optimizer,
            ending,
            loaders,
            batch_limits(self._limit, loaders_in(loaders), ending.num_val_batches),
            is_of_fit=False,
            hooks=hooks_of(trainer, pl_module),
            classes=self._classes(trainer, pl_module),
            as_delivered=as_delivered,
        )
        with opened(trainer, pl_module, run, self._options) as this:
            self.results.append(self._use(this))

    def _classes(self, trainer: Any, module: Any) -> Classes:
        """What kept batches may be made of: what a batch of the loader is made of, as training_step would get it."""
        if all(micro.batch is None for step in self._trajectory.steps for micro in step.micro):
            return {}
        of_each = combined_loader(trainer).flattened  # of several, each has a batch of its own
        batches = [next((batch for batch in one if batch is not None), None) for one in of_each]
        batch = batches if len(batches) > 1 else training_loader(trainer)[1](batches[0])
        return classes_of(surroundings_of(trainer, module).prepare(batch, 0))


def batch_limits(limit: float | None, loaders: list[Any], recorded: list[float] | None) -> list[float] | None:
    """How many batches of each loader count; None: all.

    Args:
        limit: A number of batches, or as a float a share of them; None: as ``recorded``.
        loaders: The validation loaders.
        recorded: How many the fit took of each of its own.

    Raises:
        ValueError: If ``limit`` is neither, or a share of a loader without a length.
    """
    if limit is None:
        return recorded if recorded is not None and len(recorded) == len(loaders) else None
    if isinstance(limit, int) and limit >= 1:
        return [limit] * len(loaders)
    if limit == 1.0:
        return None
    if not 0 < limit < 1 or not all(hasattr(loader, "__len__") for loader in loaders):
        raise ValueError(
            f"limit_val_batches must be a positive int, or a share of loaders with a length, got {limit!r}."
        )
    return [max(1, int(limit * len(loader))) for loader in loaders]


def check_model(trajectory: Trajectory, module: nn.Module, optimizer: Optimizer) -> None:
    """Is the model, with its optimizer, one that the trajectory could be of?

    Raises:
        RunDirectoryError: Naming the first difference.
    """
    found, wanted = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}", trajectory.trained["optimizer"]
    if found != wanted:
        raise RunDirectoryError(
            f"The run was trained by {wanted}, but configure_optimizers of this model gives {found}."
        )
    params = trained_parameters(module, optimizer)
    live = {name: list(param.shape) for name, param in params.items()}
    recorded = trajectory.shapes("param")
    other = sorted({*live} ^ {*recorded}) or [name for name in live if live[name] != recorded[name]]
    if other:
        raise RunDirectoryError(
            f"The run was of another model: the trained parameter {other[0]!r} has shape "
            f"{recorded.get(other[0], 'none')} in the trajectory and {live.get(other[0], 'none')} in this model."
        )
    groups = next((step.groups for step in reversed(trajectory.steps) if step.is_update), [])
    if [group["params"] for group in groups] != [group["params"] for group in hyper_parameters(optimizer, params)]:
        raise RunDirectoryError("The optimizer of this model has its parameters in other groups than the run's had.")
