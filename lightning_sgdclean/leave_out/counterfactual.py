# SPDX-License-Identifier: Apache-2.0
"""`counterfactual`: what leaving samples out really does, beside what was predicted."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_sgdclean.adjoint.objective_check import compare_where_unsure
from lightning_sgdclean.base.errors import warn_of
from lightning_sgdclean.base.options import THE_RUNS, ObjectiveFn, SampleId
from lightning_sgdclean.leave_out.leave_out import Batched, leave_out
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.replay.open import reopened
from lightning_sgdclean.replay.replay import OpenedRun
from lightning_sgdclean.replay.sample_order import prove_ids
from lightning_sgdclean.trajectory.records import Step, window_in_words
from lightning_sgdclean.trajectory.store import options_for

SampleGroups = Iterable[Any] | Mapping[Any, Iterable[SampleId]]


def named_groups(without: SampleGroups) -> tuple[list[Any], list[list[SampleId]]]:
    """Names and ids of the groups; see :func:`lightning_sgdclean.counterfactual`.

    Raises:
        TypeError: If it holds anything but ids, or lists of ids.
    """
    if isinstance(without, str | bytes) or not isinstance(without, Iterable):
        raise TypeError(f"without must be ids, lists of ids, or a mapping from names to lists, got {without!r:.80}.")
    if isinstance(without, Mapping):
        return list(without), [_ids_in(group) for group in without.values()]
    entries = _plain(without)
    if all(isinstance(entry, int | str) for entry in entries):
        return entries, [[entry] for entry in entries]
    return list(range(len(entries))), [_ids_in(entry) for entry in entries]


def check_drawn(groups: Iterable[Iterable[SampleId]], drawn: Collection[SampleId]) -> list[str]:
    """Are the ids those of the run?

    Args:
        groups: The ids asked for.
        drawn: The ids that were drawn in the window, at least one.

    Returns:
        What to warn of: ids that were never drawn.

    Raises:
        TypeError: If the run's ids are of another type.
    """
    asked = list(dict.fromkeys(name for group in groups for name in group))
    known = next(iter(drawn))
    foreign = [name for name in asked if isinstance(name, str) != isinstance(known, str)]
    if foreign:
        raise TypeError(
            f"without= holds {foreign[0]!r} of type {type(foreign[0]).__name__} ({len(foreign)} of {len(asked)} ids "
            f"are of that type), but the ids of this run are of type {type(known).__name__}, such as {known!r}. "
            "Give the ids as they stand in ranking.sample_id."
        )
    unknown = [name for name in asked if name not in drawn]
    if not unknown:
        return []
    return [
        f"{len(unknown)} of the {len(asked)} ids in without= were never drawn in the window (the first: "
        f"{unknown[0]!r}), so leaving them out changes nothing."
    ]


def _ids_in(group: Any) -> list[SampleId]:
    is_list = isinstance(group, Iterable) and not isinstance(group, str | bytes)
    ids = _plain(group) if is_list else []
    if not is_list or not all(isinstance(entry, int | str) for entry in ids):
        raise TypeError(f"A group of without= must be a list of ids (int or str), got {group!r:.80}.")
    return list(dict.fromkeys(ids))


def _plain(entries: Iterable[Any]) -> list[Any]:
    """Numbers of NumPy and torch as Python's; anything else as it is.

    Raises:
        TypeError: If one is a bool, which Python takes for the integer 0 or 1.
    """
    found = [entry.item() if _is_scalar(entry) else entry for entry in entries]
    if any(isinstance(entry, bool) for entry in found):
        raise TypeError(
            "without= holds True or False, expected ids (int or str): a mask names no samples. Give the ids it "
            "stands for, such as ranking.sample_id[mask], or np.flatnonzero(mask) where ids are positions."
        )
    return found


def _is_scalar(entry: Any) -> bool:
    return isinstance(entry, np.generic) or (isinstance(entry, Tensor) and not entry.ndim)


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """What leaving out each of ``R`` groups of samples really does, beside what was predicted.

    Attributes:
        names: A name for each group: the id of a single sample, the key in a mapping, else its position.
        without: The ids of each group.
        whole: The objective with nobody left out.
        values: The objective without each group, shape ``(R,)``; NaN or infinite where training diverged without it.
        differences: ``values - whole``, for ``mode="max"`` with its sign turned: like an influence, **negative
            means harmful**. Shape ``(R,)``. Runs that did not fit in one pass over the window are each compared with
            the whole run of their own pass.
        predicted: The sum of the influences of each group in the ranking of the run directory, shape ``(R,)``; None
            if there is none, or one of another objective or window.
        visits: How often samples of each group were drawn in the window, shape ``(R,)``. Where they never were, the
            difference is exactly zero, and a warning names the first of them.
        is_batched: Whether the runs were made at once, by ``torch.func.vmap``.
        is_bitwise: Whether the window, gone over again with nobody left out, came to its end to the last bit.
        partial: Whether the fit of the run did not come to its end, so that ``whole`` is of a model half trained.
        words: What was run, in words, and which options were other than the run's.
    """

    names: list[Any]
    without: list[list[SampleId]]
    whole: float
    values: NDArray[np.float64]
    differences: NDArray[np.float64]
    predicted: NDArray[np.float64] | None
    visits: NDArray[np.int64]
    is_batched: bool
    is_bitwise: bool
    partial: bool
    words: str


def counterfactual(
    run_dir: str | Path,
    model: Any,
    *,
    without: SampleGroups,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: Any = None,
    monitor: str = THE_RUNS,
    mode: Literal["min", "max"] = THE_RUNS,
    objective: ObjectiveFn | dict[str, ObjectiveFn] | None = THE_RUNS,
    limit_val_batches: float | None = None,
    epochs: int | Literal["all"] = THE_RUNS,
    at: Literal["last", "best"] = THE_RUNS,
    sample_losses: Callable[[Any, Any], Tensor] | None = THE_RUNS,
    weighted_loss: Callable[[Any, Any, Tensor], Tensor] | None = THE_RUNS,
    batched: bool | Literal["auto"] = "auto",
    on_mismatch: Literal["raise", "warn"] = THE_RUNS,
    tolerance: float | None = THE_RUNS,
    trainer: Any = None,
) -> Counterfactual:
    """Run the recorded window again without some samples, and see what becomes of the objective.

    The batches, their order, the randomness, the schedules and the user's own optimizer are those of the run. A sample
    that is left out has weight zero in place, from the window's first step on: no other sample moves up, divisors
    stay as they are, and it still counts in BatchNorm's statistics.

    Args:
        run_dir: The run directory, with its ``trajectory``.
        model: The LightningModule, made as for the run.
        without: What to leave out: ids, each for a run of its own; or lists of ids that are left out together; or a
            mapping from names to such lists.
        train_dataloaders: The training data, as ``fit`` got them.
        val_dataloaders: The data that the objective is the mean over.
        datamodule: Instead of the two.
        monitor: Name of the value that ``validation_step`` logs. This option and those below are described in full at
            :class:`SGDInfluence`. Those that are not given are the run's, as for :func:`retrace`.
        mode: Whether the value should be low (``"min"``) or high (``"max"``).
        objective: A callable, or several by name, of which the first counts, instead of ``monitor``.
        limit_val_batches: As for :func:`retrace`.
        epochs: How many of the last epochs to run again, or ``"all"``; no more than were kept.
        at: End point, ``"last"`` or ``"best"``; the latter needs a run that was recorded with it.
        sample_losses: Callable to the samples' losses, where these cannot be found.
        weighted_loss: Callable to the loss with weights on its samples, where it is no mean over them.
        batched: Whether to make the runs at once, by ``torch.func.vmap``. ``"auto"`` does it where the module allows it
            (whether it does is checked against single runs), and where it is faster: where networks are small.
        on_mismatch: Whether a replay that differs from the record is an error (``"raise"``) or a warning.
        tolerance: Largest relative difference of a loss.
        trainer: As for :func:`retrace`.

    Returns:
        The objectives, their differences, and what the ranking of the run directory had predicted.

    Raises:
        RunDirectoryError: If the directory holds no whole trajectory, or that of another model or optimizer.
        ReplayMismatchError: If the window, run again with nobody left out, is not what was recorded.
        SGDInfluenceError: One of its other subclasses, as from ``fit``.
        UnsupportedOperationError: If the runs are to be made at once and cannot.
        TypeError: If ``without`` is something else, a mask of bool, or holds str where the run's ids are integers, or
            integers where they are str.
        ValueError: If an option is wrong.
    """
    given = {**locals(), "val_dataloaders": None}  # those given here are the run's
    options, others = options_for(run_dir, given)
    names, groups = named_groups(without)
    if batched not in (True, False, "auto"):
        raise ValueError(f'batched must be True, False or "auto", got {batched!r}.')
    found, complaints = reopened(
        run_dir,
        model,
        options,
        lambda this: _counterfactual(this, names, groups, batched, others),
        train_dataloaders=train_dataloaders,
        val_dataloaders=val_dataloaders,
        datamodule=datamodule,
        limit_val_batches=limit_val_batches,
        trainer=trainer,
    )
    warn_of(complaints)
    return found


def _counterfactual(
    this: OpenedRun, names: list[Any], groups: list[list[SampleId]], batched: Batched, others: list[str]
) -> tuple[Counterfactual, list[str]]:
    steps, replay = this.steps, this.replay
    drawn = _drawn(steps)
    unknown = check_drawn(groups, drawn)
    complaints = compare_where_unsure(this)
    complaints += prove_ids(replay, steps, loader_of=this.loader_of, prepare=this.prepare)
    found = leave_out(this, [frozenset(group) for group in groups], batched=batched)
    sign = 1.0 if this.options.mode == "min" else -1.0
    values = np.array(found.values, dtype=np.float64)
    predicted, unread = _predicted(this, groups, found.whole)
    last = steps[-1]
    window = window_in_words(steps[0], last, sum(step.epoch == last.epoch for step in steps))
    unlike = f"; unlike the run: {', '.join(others)}" if others else ""
    result = Counterfactual(
        names=names,
        without=groups,
        whole=found.whole,
        values=values,
        differences=sign * np.array(found.differences, dtype=np.float64),
        predicted=predicted,
        visits=np.array([sum(drawn.get(name, 0) for name in group) for group in groups], dtype=np.int64),
        is_batched=found.is_batched,
        is_bitwise=found.is_bitwise,
        partial=this.is_partial,
        words=f"{len(groups)} runs over {window}, {found.words}{unlike}",
    )
    return result, [*this.partial_in_words(), *replay.fidelity.complaints[:3], *complaints, *unknown, *unread]


def _drawn(steps: list[Step]) -> dict[SampleId, int]:
    """How often each sample was drawn."""
    drawn: dict[SampleId, int] = {}
    for micro in (micro for step in steps if step.is_update for micro in step.micro):
        for name in micro.ids:
            drawn[name] = drawn.get(name, 0) + 1
    return drawn


def _predicted(
    this: OpenedRun, groups: list[list[SampleId]], whole: float
) -> tuple[NDArray[np.float64] | None, list[str]]:
    """What the ranking in the run directory says, if it is one of this objective, of that value, over this window.

    And what to warn of, if it cannot be read.
    """
    try:
        ranking = Ranking.load(this.run.folder)
    except OSError:
        return None, []
    except ValueError as error:
        return None, [f"The ranking of the run cannot be read, so there is nothing predicted to compare with: {error}"]
    if ranking.summary is None:
        return None, []
    objective, window = ranking.summary["objective"], ranking.summary["window"]
    if (objective["name"], objective["mode"]) != (next(iter(this.options.objectives)), this.options.mode):
        return None, []
    if not math.isclose(objective["recomputed"], whole, rel_tol=1e-3):
        return None, []
    if (window["first_step"], window["last_step"]) != (this.steps[0].index, this.steps[-1].index):
        return None, []
    predicted = ranking.columns.get("predicted", ranking.influence)  # in a ranking that was reranked
    influence = dict(zip(ranking.sample_id.tolist(), predicted.tolist(), strict=True))
    return np.array([sum(influence.get(name, 0.0) for name in group) for group in groups], dtype=np.float64), []
