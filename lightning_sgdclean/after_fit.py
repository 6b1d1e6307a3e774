# SPDX-License-Identifier: Apache-2.0
"""From a finished fit to a ranking: the objective, the walk backwards, and what is to be said of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from lightning_sgdclean import report
from lightning_sgdclean.batches import collate_items, fetch_batch, fetch_items
from lightning_sgdclean.curvature import engine_named
from lightning_sgdclean.errors import ObjectiveError, ReplayMismatchError, UnsupportedTrainingError
from lightning_sgdclean.objective import ObjectiveGradient, objective_gradient, validation_batches
from lightning_sgdclean.randomness import untouched_randomness
from lightning_sgdclean.ranking import Ranking
from lightning_sgdclean.recorder import trained_parameters
from lightning_sgdclean.replay import Surroundings, untouched_module
from lightning_sgdclean.retrace import Walk, check_finite, load_state, retrace_steps
from lightning_sgdclean.split import prove_split
from lightning_sgdclean.store import Trajectory
from lightning_sgdclean.surroundings import is_quiet, surroundings_of
from lightning_sgdclean.trajectory import MicroBatch, Step, first_epoch_kept, window_in_words
from lightning_sgdclean.updates import update_of

Params = dict[str, nn.Parameter]


@dataclass(frozen=True)
class RetraceOptions:
    """The callback's options that matter once training is over; see there."""

    monitor: str
    mode: str
    objective: Callable[[Any, Any], Any] | None
    val_dataloaders: Any
    epochs: int | str
    curvature: str
    finite_radius: float
    sample_losses: Callable[[Any, Any], Tensor] | None
    on_mismatch: str
    tolerance: float | None


@dataclass(frozen=True)
class RecordedRun:
    """What the recording left.

    Attributes:
        folder: The run directory.
        loader: The training loader, whose dataset holds the samples.
        optimizer: The user's optimizer.
        logged: Step number and value of the last validation, if there was one.
    """

    folder: Path
    loader: Any
    optimizer: Optimizer
    logged: tuple[int, float] | None


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
    if not trajectory.steps:
        raise UnsupportedTrainingError("No optimizer step was recorded: the Trainer made none.")
    last = trajectory.steps[-1]
    from_epoch = first_epoch_kept(last.epoch, last.ends_epoch, options.epochs)
    steps = [step for step in trajectory.steps if step.epoch >= from_epoch]
    check_finite(steps)
    params = trained_parameters(module, run.optimizer)
    is_double = next(iter(params.values())).dtype is torch.float64
    walk = Walk(
        module=module,
        params=params,
        surroundings=surroundings,
        batch_of=lambda micro: _batch_again(run.loader, surroundings, micro),
        restore_attributes=restore,
        engine=engine_named(options.curvature, options.finite_radius),
        update=update_of(run.optimizer),
        optimizer_kind=type(run.optimizer),
        tolerance=(1e-12 if is_double else 1e-5) if options.tolerance is None else options.tolerance,
        on_mismatch=options.on_mismatch,
        sample_losses=options.sample_losses,
    )
    load_state(module, params, trajectory.state(last.index + 1))
    objective = _objective(trainer, module, params, surroundings, options)
    complaints = _compare_objective(objective.value, last, run.logged, options)
    restore()  # validation had put the module into evaluation mode
    if options.sample_losses is None:
        _prove_ids(module, params, run.loader, trajectory, steps[0], surroundings)
    start = objective if options.mode == "min" else _negative(objective)
    with (
        surroundings.as_stage("train"),
        tqdm(total=len(steps), desc="Retracing", disable=is_quiet(trainer)) as progress,
    ):
        ids, influence, visits = retrace_steps(trajectory, steps, start, walk, lambda: progress.update() and None)
    about = _about(objective, steps, walk, run, options)
    return Ranking.from_influence(ids, influence, visits), about, [*walk.error.complaints[:3], *complaints]


def _objective(
    trainer: Any, module: Any, params: Params, surroundings: Surroundings, options: RetraceOptions
) -> ObjectiveGradient:
    own = options.val_dataloaders is not None
    loaders = options.val_dataloaders if own else trainer.val_dataloaders
    if loaders is None:
        raise ObjectiveError(
            "Validation never ran, so its loaders were never made. Validate at least once, or give val_dataloaders=."
        )
    num_loaders = len(loaders) if isinstance(loaders, list | tuple) else 1
    batches = validation_batches(loaders, None if own else trainer.num_val_batches)
    with surroundings.as_stage("validate"):
        return objective_gradient(
            module, list(params.values()), batches, surroundings, options.monitor, options.objective, num_loaders
        )


def _negative(objective: ObjectiveGradient) -> ObjectiveGradient:
    buffers = {name: -grad for name, grad in objective.buffers.items()}
    return ObjectiveGradient(-objective.value, [-grad for grad in objective.params], buffers)


def _compare_objective(
    value: float, last: Step, logged: tuple[int, float] | None, options: RetraceOptions
) -> list[str]:
    """Hold the recomputed value against the logged one, where both are of the same weights and data."""
    if options.objective is not None or options.val_dataloaders is not None:
        return []
    if logged is None or logged[0] != last.index + 1 or math.isclose(value, logged[1], rel_tol=1e-4, abs_tol=1e-12):
        return []
    text = (
        f"{options.monitor!r} recomputed on the final weights is {value!r}, but {logged[1]!r} was logged for them. "
        "Likely causes: random validation data, weights moved after the last step, "
        "or a value not averaged by batch size."
    )
    if options.on_mismatch == "raise":
        raise ReplayMismatchError(f'{text} on_mismatch="warn" ranks all the same.')
    return [text]


def _batch_again(loader: Any, surroundings: Surroundings, micro: MicroBatch) -> Any:
    if micro.positions is not None:
        return surroundings.prepare(fetch_batch(loader, micro.positions), 0)

    def move(leaf: Any) -> Any:
        return leaf.to(surroundings.device) if isinstance(leaf, Tensor) else leaf

    return torch.utils._pytree.tree_map(move, micro.batch)


def _prove_ids(
    module: Any, params: Params, loader: Any, trajectory: Trajectory, step: Step, surroundings: Surroundings
) -> None:
    """Replace samples before they are collated: do the loss's rows belong to the ids, too?"""
    micro = step.micro[0]
    if micro.positions is None or loader.batch_sampler is None:
        return
    items = fetch_items(loader, micro.positions)

    def variant(replaced: Tensor) -> Any:
        changed = [items[i - 1] if replaced[i] else items[i] for i in range(len(items))]
        return surroundings.prepare(collate_items(loader, changed), 0)

    before = replace(micro, random=trajectory.random(step, 0))
    prove_split(module, list(params.values()), variant, before, surroundings)


def _about(
    objective: ObjectiveGradient, steps: list[Step], walk: Walk, run: RecordedRun, options: RetraceOptions
) -> dict[str, Any]:
    last, error = steps[-1], walk.error
    name = options.monitor if options.objective is None else getattr(options.objective, "__name__", "objective")
    return {
        "objective": {
            "name": name,
            "mode": options.mode,
            "recomputed": objective.value,
            "logged": run.logged[1] if run.logged else None,
            "logged_at_step": run.logged[0] if run.logged else None,
        },
        "window": {
            "words": window_in_words(steps[0], last, sum(step.epoch == last.epoch for step in steps)),
            "first_step": steps[0].index,
            "last_step": last.index,
            "num_steps": len(steps),
        },
        "replay": {
            "words": report.replay_in_words(error),
            "loss_error": error.loss,
            "update_error": error.update,
            "batches": error.num_batches,
            "batches_bit_for_bit": error.num_bitwise,
            "complaints": error.complaints,
        },
    }
