# SPDX-License-Identifier: Apache-2.0
"""A recorded run, opened: its window, its module and data at hand, to go over the steps again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_sgdclean.adjoint.objective import ObjectiveGradient, objective_gradients
from lightning_sgdclean.base.errors import ObjectiveError, RunDirectoryError, UnsupportedTrainingError
from lightning_sgdclean.base.options import Options
from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.data.fetching import ValidationBatch, fetch_batch, loaders_in, validation_batches
from lightning_sgdclean.data.packing import Classes, unpack_batch
from lightning_sgdclean.losses.evaluate import Surroundings, surroundings_of
from lightning_sgdclean.losses.module_state import untouched_module
from lightning_sgdclean.replay.sample_order import check_positions
from lightning_sgdclean.replay.states import RecomputedStates
from lightning_sgdclean.replay.walk import Walk, check_finite, load_state, walk_of
from lightning_sgdclean.trajectory.records import MicroBatch, State, Step, first_epoch_kept
from lightning_sgdclean.trajectory.store import FitEnd, Trajectory


@dataclass(frozen=True)
class RecordedRun:
    """What the recording left.

    Attributes:
        folder: The run directory.
        loaders: The training loaders, whose datasets hold the samples; several if they were made anew.
        optimizer: The user's optimizer.
        ending: How its fit ended.
        val_dataloaders: The validation loaders that the Trainer had; None where it made none.
        limits: How many batches of each of them count; None: all.
        is_of_fit: Whether those are surely the data that were validated on.
        hooks: Hooks of the user's that could have edited gradients.
        averaging: Callbacks that put averaged weights in the place of the trained ones.
        classes: Classes that kept batches are made of, by name.
        as_delivered: A loader's batch as the Trainer delivers it: in a dict, say, where the loader was given in one.
        fit: Name of the fit that recorded its last steps; empty where that may be any.
    """

    folder: Path
    loaders: list[Any]
    optimizer: Optimizer
    ending: FitEnd
    val_dataloaders: Any
    limits: list[float] | None
    is_of_fit: bool
    hooks: list[str]
    averaging: list[str]
    classes: Classes
    as_delivered: Callable[[Any], Any]
    fit: str = ""


@dataclass
class OpenedRun:
    """A recorded run whose steps can be gone over again; see :func:`opened`.

    Attributes:
        run: What the recording left.
        options: What is asked of it.
        trajectory: What was recorded.
        steps: The window.
        walk: The live module and what its steps need.
        states: The states between the steps.
        surroundings: What stands for the Trainer.
        restore: Puts the module's modes and plain attributes back.
        end: The state at the window's end.
        complaints: What is to be said of the window.
        validation: What the objectives are means over, and of how many loaders it comes.
    """

    run: RecordedRun
    options: Options
    trajectory: Trajectory
    steps: list[Step]
    walk: Walk
    states: RecomputedStates
    surroundings: Surroundings
    restore: Callable[[], None]
    end: State
    complaints: list[str]
    validation: Callable[[], tuple[Iterator[ValidationBatch], int]]

    def loader_of(self, micro: MicroBatch) -> Any:
        """The loader that delivered it; what a fit before this one had is gone, and this one's stands for it."""
        return _loader_of(self.run, self.trajectory, micro)

    def prepare(self, batch: Any) -> Any:
        """A training loader's batch as ``training_step`` gets it."""
        return self.surroundings.prepare(self.run.as_delivered(batch), 0)

    def objectives_at(self, state: State, surroundings: Surroundings) -> list[ObjectiveGradient]:
        """The objectives in a state; the module is in the modes of training afterwards."""
        load_state(self.walk.module, self.walk.params, state)
        batches, num_loaders = self.validation()
        params, options = list(self.walk.params.values()), self.options
        with surroundings.as_stage("validate"):
            found = objective_gradients(
                self.walk.module, params, batches, surroundings, options.monitor, options.objectives, num_loaders
            )
        self.restore()  # validation had put the module into evaluation mode
        return found


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
            yield _opened(module, run, options, surroundings, restore)
    finally:
        module.to(home)


def _opened(
    module: Any,
    run: RecordedRun,
    options: Options,
    surroundings: Surroundings,
    restore: Callable[[], None],
) -> OpenedRun:
    end = run.ending.best_step if options.at == "best" else None
    trajectory = Trajectory(run.folder / "trajectory", end)
    if run.fit and run.fit != trajectory.fits[-1][1]:
        raise RunDirectoryError(
            f"{run.folder} holds the steps of another fit, which wrote there at the same time. Give each a dirpath= of "
            "its own, or go on from a checkpoint with one at a time."
        )
    steps, complaints = _window(trajectory, run, options)
    check_finite(steps)
    check_positions(steps, lambda micro: _loader_of(run, trajectory, micro))
    walk = walk_of(
        module,
        run.optimizer,
        surroundings,
        options,
        run.hooks,
        batch_of=lambda step, number: _batch_again(trajectory, run, surroundings, step, number),
        random_of=trajectory.random,
        restore_attributes=restore,
    )
    walk.fidelity.joints = trajectory.joints
    states = RecomputedStates(trajectory, walk, run.optimizer)
    return OpenedRun(
        run=run,
        options=options,
        trajectory=trajectory,
        steps=steps,
        walk=walk,
        states=states,
        surroundings=surroundings,
        restore=restore,
        end=states.state(steps[-1].index + 1),
        complaints=complaints,
        validation=lambda: _validation(run, options),
    )


def _window(trajectory: Trajectory, run: RecordedRun, options: Options) -> tuple[list[Step], list[str]]:
    """The steps to retrace, the last of which is the end point, and what is missing of a fit's.

    Raises:
        RunDirectoryError: If not all of them were kept.
        UnsupportedTrainingError: If there are none.
    """
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


def _validation(run: RecordedRun, options: Options) -> tuple[Iterator[ValidationBatch], int]:
    own = options.val_dataloaders is not None
    loaders = options.val_dataloaders if own else run.val_dataloaders
    if loaders is None:
        raise ObjectiveError(
            "Validation never ran, so its loaders were never made. Validate at least once, or give val_dataloaders=."
        )
    batches = validation_batches(loaders, None if own else run.limits)
    return batches, len(loaders_in(loaders))


def _loader_of(run: RecordedRun, trajectory: Trajectory, micro: MicroBatch) -> Any:
    joint = max(trajectory.joints, default=-1)
    return run.loaders[micro.loader if micro.global_step > joint else 0]


def _batch_again(trajectory: Trajectory, run: RecordedRun, surroundings: Surroundings, step: Step, number: int) -> Any:
    """Micro-batch ``number`` as it was kept, when the transfer hooks had seen it already, or fetched again."""
    kept, micro = trajectory.batch(step, number), step.micro[number]
    if kept is not None:
        return unpack_batch(kept, run.classes, surroundings.device)
    assert micro.positions is not None
    fetched = fetch_batch(_loader_of(run, trajectory, micro), micro.positions)
    return surroundings.prepare(run.as_delivered(fetched), 0)
