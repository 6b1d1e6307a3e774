# SPDX-License-Identifier: Apache-2.0
"""From a finished fit to a ranking: the objective, the walk backwards, and what is to be said of them."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from tqdm.auto import tqdm

from lightning_sgdclean import report
from lightning_sgdclean.backward import check_finite, load_state, retrace_steps
from lightning_sgdclean.best_model import BestModel
from lightning_sgdclean.errors import ObjectiveError, ReplayMismatchError, UnsupportedTrainingError
from lightning_sgdclean.fetching import fetch_batch
from lightning_sgdclean.ids import check_positions, prove_ids
from lightning_sgdclean.noise import float32_agreement
from lightning_sgdclean.objective import ObjectiveGradient, loaders_in, objective_gradient, validation_batches
from lightning_sgdclean.packing import Classes, unpack_batch
from lightning_sgdclean.precision import is_low
from lightning_sgdclean.randomness import untouched_randomness
from lightning_sgdclean.ranking import Ranking
from lightning_sgdclean.replay import Surroundings, untouched_module
from lightning_sgdclean.states import RecomputedStates
from lightning_sgdclean.store import Trajectory
from lightning_sgdclean.surroundings import is_quiet, surroundings_of
from lightning_sgdclean.trajectory import MicroBatch, Step, first_epoch_kept, window_in_words
from lightning_sgdclean.walk import Adjoint, RetraceOptions, Walk, adjoint_of, walk_of


@dataclass(frozen=True)
class RecordedRun:
    """What the recording left.

    Attributes:
        folder: The run directory.
        loaders: The training loaders, whose datasets hold the samples; several if they were made anew.
        optimizer: The user's optimizer.
        logged: The monitored value after each validation, by the number of steps made by then.
        hooks: Hooks of the user's that could have edited gradients.
        averaging: Callbacks that put averaged weights in the place of the trained ones.
        best: Where the best model was saved, if that is where the walk is to start.
        classes: Classes that kept batches are made of, by name.
        as_delivered: A loader's batch as the Trainer delivers it: in a dict, say, where the loader was given in one.
    """

    folder: Path
    loaders: list[Any]
    optimizer: Optimizer
    logged: dict[int, float]
    hooks: list[str]
    averaging: list[str]
    best: BestModel | None
    classes: Classes
    as_delivered: Callable[[Any], Any]


def rank_run(
    trainer: Any, module: Any, run: RecordedRun, options: RetraceOptions
) -> tuple[Ranking, dict[str, Any], list[str]]:
    """Rank the samples of a run that has just ended; the module is left as it was found.

    Returns:
        The ranking, the summary's entries about it, and complaints to warn of.

    Raises:
        SGDInfluenceError: If the run cannot be ranked right.
    """
    surroundings = surroundings_of(trainer, module)
    home = next(module.parameters()).device
    module.to(surroundings.device)
    try:
        with torch.enable_grad(), untouched_randomness(surroundings.device), untouched_module(module) as restore:
            return _rank(trainer, module, run, options, surroundings, restore)
    finally:
        module.to(home)


def _rank(
    trainer: Any,
    module: Any,
    run: RecordedRun,
    options: RetraceOptions,
    surroundings: Surroundings,
    restore: Callable[[], None],
) -> tuple[Ranking, dict[str, Any], list[str]]:
    trajectory = Trajectory(run.folder / "trajectory")
    steps = _window(trajectory.steps, run, options)
    last = steps[-1]
    check_finite(steps)
    joint = max(trajectory.joints, default=-1)

    def loader_of(micro: MicroBatch) -> Any:
        """The loader that delivered it; what a fit before this one had is gone, and this one's stands for it."""
        return run.loaders[micro.loader if micro.global_step > joint else 0]

    check_positions(steps, loader_of)
    walk = walk_of(
        module,
        run.optimizer,
        surroundings,
        options,
        run.hooks,
        batch_of=lambda step, number: _batch_again(trajectory, run, surroundings, step, number, loader_of),
        random_of=trajectory.random,
        restore_attributes=restore,
    )
    walk.fidelity.joints = trajectory.joints
    states = RecomputedStates(trajectory, walk, run.optimizer)
    end = states.state(last.index + 1)
    load_state(module, walk.params, end)
    objective = _objective(trainer, walk, surroundings, options)
    complaints = [] if run.averaging else _compare_objective(objective.value, last, run.logged, walk, options)
    restore()  # validation had put the module into evaluation mode
    if walk.split is not None:
        complaints += prove_ids(
            walk,
            steps,
            loader_of=loader_of,
            prepare=lambda batch: surroundings.prepare(run.as_delivered(batch), 0),
        )

    def start(walk: Walk) -> Adjoint:
        """The objective's gradient, in the precision that the walk takes derivatives in."""
        load_state(module, walk.params, end)
        with walk.pulling() as wide:
            at_end = objective if wide is surroundings else _objective(trainer, walk, wide, options)
        restore()
        return adjoint_of(at_end, walk, sign=1.0 if options.mode == "min" else -1.0)

    with (
        surroundings.as_stage("train"),
        tqdm(total=len(steps), desc="Retracing", disable=is_quiet(trainer)) as progress,
    ):
        agreement = None
        if is_low(surroundings, module) and not walk.widens:
            agreement = float32_agreement(states, steps, walk, start)
            if agreement.is_noise:
                complaints.append(agreement.complaint(surroundings.precision))
        ids, influence, visits = retrace_steps(states, steps, start(walk), walk, lambda: progress.update() and None)
    about = _about(objective, steps, walk, run, options) | {"float32_agreement": agreement and asdict(agreement)}
    return Ranking.from_influence(ids, influence, visits), about, [*walk.fidelity.complaints[:3], *complaints]


def _window(recorded: list[Step], run: RecordedRun, options: RetraceOptions) -> list[Step]:
    """The steps to retrace, the last of which is the end point.

    Raises:
        UnsupportedTrainingError: If there are none.
    """
    steps = recorded
    if run.best is not None:
        if run.best.step is None:
            raise UnsupportedTrainingError(
                "The ModelCheckpoint saved no new best model in this fit, so there is no end point. "
                'Use at="last", or a ModelCheckpoint that monitors a value which is logged.'
            )
        steps = [step for step in recorded if step.index < run.best.step]
    if not any(step.is_update for step in steps):
        raise UnsupportedTrainingError("No optimizer step was recorded: the Trainer made none.")
    first_epoch = first_epoch_kept(steps[-1].epoch, steps[-1].ends_epoch, options.epochs)
    return [step for step in steps if step.epoch >= first_epoch]


def _objective(trainer: Any, walk: Walk, surroundings: Surroundings, options: RetraceOptions) -> ObjectiveGradient:
    own = options.val_dataloaders is not None
    loaders = options.val_dataloaders if own else trainer.val_dataloaders
    if loaders is None:
        raise ObjectiveError(
            "Validation never ran, so its loaders were never made. Validate at least once, or give val_dataloaders=."
        )
    num_loaders = len(loaders_in(loaders))
    batches = validation_batches(loaders, None if own else trainer.num_val_batches)
    params = list(walk.params.values())
    with surroundings.as_stage("validate"):
        return objective_gradient(
            walk.module, params, batches, surroundings, options.monitor, options.objective, num_loaders
        )


def _compare_objective(
    value: float, last: Step, logged: dict[int, float], walk: Walk, options: RetraceOptions
) -> list[str]:
    """Hold the recomputed value against the logged one, where both are of the same weights and data."""
    if options.objective is not None or options.val_dataloaders is not None:
        return []
    at_end = logged.get(last.index + 1)
    # Lightning sums over batches in the precision of what is logged.
    slack = 4 * max(torch.finfo(param.dtype).eps for param in walk.params.values())
    if at_end is None or math.isclose(value, at_end, rel_tol=max(1e-4, slack), abs_tol=1e-12):
        return []
    text = (
        f"{options.monitor!r} recomputed on the final weights is {value!r}, but {at_end!r} was logged for them. "
        "Likely causes: random validation data, weights moved after the last step, "
        "or a value not averaged by batch size."
    )
    if options.on_mismatch == "raise":
        raise ReplayMismatchError(f'{text} on_mismatch="warn" ranks all the same.')
    return [text]


def _batch_again(
    trajectory: Trajectory,
    run: RecordedRun,
    surroundings: Surroundings,
    step: Step,
    number: int,
    loader_of: Callable[[MicroBatch], Any],
) -> Any:
    """Micro-batch ``number`` as it was kept, when the transfer hooks had seen it already, or fetched again."""
    kept, micro = trajectory.batch(step, number), step.micro[number]
    if kept is not None:
        return unpack_batch(kept, run.classes, surroundings.device)
    assert micro.positions is not None
    return surroundings.prepare(run.as_delivered(fetch_batch(loader_of(micro), micro.positions)), 0)


def _about(
    objective: ObjectiveGradient, steps: list[Step], walk: Walk, run: RecordedRun, options: RetraceOptions
) -> dict[str, Any]:
    last, fidelity = steps[-1], walk.fidelity
    name = options.monitor if options.objective is None else getattr(options.objective, "__name__", "objective")
    return {
        "objective": {
            "name": name,
            "mode": options.mode,
            "recomputed": objective.value,
            "logged": run.logged.get(last.index + 1),
        },
        "end_point": _end_point_in_words(last, run),
        "window": {
            "words": window_in_words(steps[0], last, sum(step.epoch == last.epoch for step in steps)),
            "first_step": steps[0].index,
            "last_step": last.index,
            "num_steps": sum(step.is_update for step in steps),
            "num_without_update": sum(not step.is_update for step in steps),
        },
        "replay": {
            "words": report.replay_in_words(fidelity),
            "loss_error": fidelity.loss,
            "update_error": fidelity.update,
            "batches": fidelity.num_batches,
            "batches_bit_for_bit": fidelity.num_bitwise,
            "segments": fidelity.num_segments,
            "segments_bit_for_bit": fidelity.segments_bitwise,
            "complaints": fidelity.complaints,
        },
    }


def _end_point_in_words(last: Step, run: RecordedRun) -> str:
    """Which weights the objective is of, e.g. ``after step 811, the ModelCheckpoint's best model``."""
    words = f"after step {last.index}, {'the last' if run.best is None else 'at which the best model was saved'}"
    if run.averaging:
        words += f"; the averaged weights of {', '.join(run.averaging)} are not what is ranked"
    return words
