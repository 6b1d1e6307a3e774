# SPDX-License-Identifier: Apache-2.0
"""From a finished fit to a ranking: the objective, the walk backwards, and what is to be said of them."""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from lightning_sgdclean.adjoint.backward import retrace_steps
from lightning_sgdclean.adjoint.bookmark import Bookmark, key_of
from lightning_sgdclean.adjoint.influences import Influences
from lightning_sgdclean.adjoint.objective import ObjectiveGradient
from lightning_sgdclean.adjoint.rehearsal import float32_agreement
from lightning_sgdclean.base.errors import ReplayMismatchError
from lightning_sgdclean.base.lightning import shown_bar
from lightning_sgdclean.base.options import Options
from lightning_sgdclean.leave_out.trust import put_to_the_test
from lightning_sgdclean.losses.evaluate import is_low
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.replay.inspection import predicted_labels, sample_columns
from lightning_sgdclean.replay.open import OpenedRun, RecordedRun, opened
from lightning_sgdclean.replay.sample_order import prove_ids
from lightning_sgdclean.replay.walk import Adjoint, Walk, adjoint_of
from lightning_sgdclean.report.progress import retrace_bar, runs_bar
from lightning_sgdclean.report.words import replay_in_words
from lightning_sgdclean.trajectory.records import MicroBatch, Step, window_in_words


def rank_run(
    trainer: Any,
    module: Any,
    run: RecordedRun,
    options: Options,
    ready: Callable[[OpenedRun, Ranking, dict[str, Any]], None],
) -> list[str]:
    """Rank the samples of a run that has just ended; the module is left as it was found.

    Args:
        trainer: The Trainer of the fit.
        module: Its module.
        run: What the recording left.
        options: What is asked of it.
        ready: Called with the ranking and the summary's entries about it, while the run is still open.

    Returns:
        Complaints to warn of.

    Raises:
        SGDInfluenceError: If the run cannot be ranked right.
    """
    with opened(trainer, module, run, options) as this:
        ranking, about, complaints = rank_opened(this, bar=shown_bar(trainer))
        ready(this, ranking, about)
        return complaints


def rank_opened(this: OpenedRun, *, bar: Any) -> tuple[Ranking, dict[str, Any], list[str]]:
    """Rank the samples of an opened run, under a bar in the style of ``bar``.

    Returns:
        The ranking, the summary's entries about it, and complaints to warn of.
    """
    walk, steps, run, options = this.walk, this.steps, this.run, this.options
    objectives = this.objectives_at(this.end, this.surroundings)
    complaints = [f"{text} So only what was kept is ranked." for text in this.complaints]
    if not run.averaging:
        complaints += _compare_objective(objectives[0].value, steps[-1], run, walk, options)
    if walk.split is not None:
        complaints += prove_ids(walk, steps, loader_of=this.loader_of, prepare=this.prepare)

    def start(walk: Walk) -> list[Adjoint]:
        """The objectives' gradients, in the precision that the walk takes derivatives in."""
        with walk.pulling() as wide:
            at_end = objectives if wide is this.surroundings else this.objectives_at(this.end, wide)
        return [adjoint_of(one, walk, sign=1.0 if options.mode == "min" else -1.0) for one in at_end]

    with this.surroundings.as_stage("train"), retrace_bar(bar, len(steps)) as advance:
        agreement = None
        if is_low(this.surroundings, walk.module) and not walk.widens:
            agreement = float32_agreement(this.states, steps, walk, start)
            if agreement.is_noise:
                complaints.append(agreement.complaint(this.surroundings.precision))
        if "relabel" in options.columns:
            drawn = (name for step in steps for micro in step.micro for name in micro.ids)
            walk.labels_of, problems = predicted_labels(this, drawn)
            complaints += problems
        adjoints = start(walk)
        bookmark = Bookmark(this.trajectory.folder, _key(this, adjoints))
        found = retrace_steps(this.states, steps, adjoints, walk, lambda found: advance(found.values[0]), bookmark)
        columns, gaps = sample_columns(this, found.ids, options.columns)
    about = _about(objectives, steps, walk, run, options) | {"float32_agreement": agreement and asdict(agreement)}
    ranking = Ranking.from_influence(found.ids, found.values[0], found.visits, _columns(found, this) | columns)
    ranking, about["trust"], doubts = _tested(this, ranking, bar)
    return ranking, about, [*walk.fidelity.complaints[:3], *complaints, *gaps, *doubts]


def _tested(this: OpenedRun, ranking: Ranking, bar: Any) -> tuple[Ranking, dict[str, Any] | None, list[str]]:
    """The ranking put to the test, if that is wanted; what came of it, and why it could not be."""
    if not len(ranking) or not (this.options.verify or this.options.rerank):
        return ranking, None, []
    try:
        with runs_bar(bar) as progress:
            return *put_to_the_test(this, ranking, progress), []
    except (Exception, KeyboardInterrupt) as error:  # the ranking is there, and right: nothing here may cost it
        cause = "it was interrupted." if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        return ranking, None, [f"The ranking is there, but could not be put to the test (verify=, rerank=): {cause}"]


def _key(this: OpenedRun, adjoints: list[Adjoint]) -> str:
    """What tells this walk from others over the same run."""
    options = this.options
    matters = {
        "curvature": [options.curvature, options.finite_radius],
        "widens": this.walk.widens,
        "sample_losses": options.sample_losses,
        "relabel": "relabel" in options.columns,
        "refuses": [
            options.on_mismatch,
            this.walk.fidelity.tolerance,
        ],  # what was only warned of is not to pass for checked
    }
    return key_of(this.trajectory.run, [step.index for step in this.steps], matters, adjoints)


def _columns(found: Influences, this: OpenedRun) -> dict[str, Any]:
    """Influences on the further objectives, and what each epoch and another label did, where that was asked for."""
    wanted, others = this.options.columns, list(this.options.objectives)[1:]
    columns: dict[str, Any] = {
        f"influence:{name}": values for name, values in zip(others, found.values[1:], strict=True)
    }
    by_epoch = {f"by_epoch:{epoch}": values for epoch, values in found.by_epoch.items()}
    columns |= by_epoch if "by_epoch" in wanted else {}
    changes = [None] * len(found.ids) if this.walk.labels_of is None else found.relabelled
    return columns | ({"relabel": changes} if "relabel" in wanted else {})


def _compare_objective(value: float, last: Step, run: RecordedRun, walk: Walk, options: Options) -> list[str]:
    """Hold the recomputed value against the logged one, where both are of the same weights and data."""
    if options.objective is not None or options.val_dataloaders is not None:
        return []
    at_end = run.ending.logged_at(options.monitor, last.index + 1)
    # Lightning sums over batches in the precision of what is logged.
    slack = 4 * max(torch.finfo(param.dtype).eps for param in walk.params.values())
    if at_end is None or math.isclose(value, at_end, rel_tol=max(1e-4, slack), abs_tol=1e-12):
        return []
    text = (
        f"{options.monitor!r} recomputed on the final weights is {value!r}, but {at_end!r} was logged for them. "
        "Likely causes: random validation data, weights moved after the last step, "
        f"{'' if run.is_of_fit else 'other validation data than the fit had, '}or a value not averaged by batch size."
    )
    if options.on_mismatch == "raise" and run.is_of_fit:
        raise ReplayMismatchError(f'{text} on_mismatch="warn" ranks all the same.')
    return [text]


def _about(
    objectives: list[ObjectiveGradient], steps: list[Step], walk: Walk, run: RecordedRun, options: Options
) -> dict[str, Any]:
    last, fidelity = steps[-1], walk.fidelity
    names = list(options.objectives)
    return {
        "objective": {
            "name": names[0],
            "mode": options.mode,
            "recomputed": objectives[0].value,
            "logged": run.ending.logged_at(options.monitor, last.index + 1),
            "others": {name: one.value for name, one in zip(names[1:], objectives[1:], strict=True)},
        },
        "end_point": _end_point_in_words(last, run, options),
        "dataset_size": _dataset_size([micro for step in steps for micro in step.micro], run),
        "window": {
            "words": window_in_words(steps[0], last, sum(step.epoch == last.epoch for step in steps)),
            "first_step": steps[0].index,
            "last_step": last.index,
            "num_steps": sum(step.is_update for step in steps),
            "num_without_update": sum(not step.is_update for step in steps),
        },
        "replay": {
            "words": replay_in_words(fidelity),
            "loss_error": fidelity.loss,
            "update_error": fidelity.update,
            "batches": fidelity.num_batches,
            "batches_bit_for_bit": fidelity.num_bitwise,
            "segments": fidelity.num_segments,
            "segments_bit_for_bit": fidelity.segments_bitwise,
            "complaints": fidelity.complaints,
        },
    }


def _dataset_size(batches: list[MicroBatch], run: RecordedRun) -> int | None:
    """How many positions the ids could be of; None where they are names."""
    dataset = run.loaders[batches[-1].loader].dataset
    # A name may equal a position by chance, hence all batches are asked.
    are_positions = all(micro.ids == micro.positions for micro in batches)
    return len(dataset) if are_positions and hasattr(dataset, "__len__") else None


def _end_point_in_words(last: Step, run: RecordedRun, options: Options) -> str:
    """Which weights the objective is of, e.g. ``after step 811, the ModelCheckpoint's best model``."""
    words = f"after step {last.index}, {'the last' if options.at == 'last' else 'at which the best model was saved'}"
    if run.averaging:
        words += f"; the averaged weights of {', '.join(run.averaging)} are not what is ranked"
    return words
