# SPDX-License-Identifier: Apache-2.0
"""Really leave samples out of a recorded window: runs beside the one that happened."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_sgdclean.base.errors import UnsupportedOperationError
from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.leave_out.runs import SequentialRuns, Weights
from lightning_sgdclean.leave_out.stacked import NotVmappedError, VmappedRuns
from lightning_sgdclean.losses.weighting import unit_weights
from lightning_sgdclean.replay.batch import BatchAgain
from lightning_sgdclean.replay.forward import Borrowed, borrowed, live_state, load_all, take_step
from lightning_sgdclean.replay.open import OpenedRun
from lightning_sgdclean.replay.states import compare
from lightning_sgdclean.replay.walk import Walk
from lightning_sgdclean.trajectory.records import Step

Batched = bool | Literal["auto"]
Progress = Callable[[int, int], None]  # steps of all runs done, of how many


@dataclass(frozen=True)
class LeftOut:
    """What leaving samples out led to.

    Attributes:
        whole: The objective of the run with nobody left out, computed as the others were.
        values: The objective without each group, in the order in which they were asked for; not finite where the run
            diverged.
        differences: How far each of them is from that of the run with nobody left out which was made beside it. Runs
            that go over the window in another pass may be rounded otherwise.
        nudged: The same differences for runs with nobody left out that began off by rounding errors.
        is_bitwise: Whether the run with nobody left out came to the recorded end to the last bit.
        is_batched: Whether the runs were made at once.
        words: How they were made.
    """

    whole: float
    values: list[float]
    differences: list[float]
    nudged: list[float]
    is_bitwise: bool
    is_batched: bool
    words: str


@dataclass(frozen=True)
class _Run:
    """One of the runs to make: from which step on it differs, whom it leaves out, and by what it is nudged."""

    first: int
    without: frozenset[SampleId]
    seed: int | None = None


@dataclass(frozen=True)
class _Pass:
    """One pass over the window: the objective of the run with nobody left out, and of those beside it."""

    whole: float
    values: list[float]
    is_bitwise: bool


def leave_out(
    this: OpenedRun,
    groups: Sequence[frozenset[SampleId]],
    *,
    num_nudged: int = 0,
    batched: Batched = "auto",
    progress: Progress = lambda done, total: None,
) -> LeftOut:
    """Really run the window without each of some groups of samples.

    Args:
        this: The run.
        groups: The samples that each run leaves out.
        num_nudged: How many runs to make besides in which nobody is left out, off by rounding errors at the start.
        batched: Whether to make the runs at once; ``"auto"``: where that is possible, and faster.
        progress: Called after every step with the number of steps done, those of all runs counted, and of all.

    Raises:
        ReplayMismatchError: If the window, run again with nobody left out, does not come to the recorded end.
        LossSplitError: If a loss cannot be split by sample.
        UnsupportedOperationError: If they are to be made at once and cannot.
    """
    drawn = _first_drawn(this.steps)
    firsts = [min((drawn[name] for name in group if name in drawn), default=None) for group in groups]
    runs = {i: _Run(first, groups[i]) for i, first in enumerate(firsts) if first is not None}
    runs |= {len(groups) + seed: _Run(0, frozenset(), seed) for seed in range(num_nudged)}
    in_order = sorted(runs, key=lambda i: runs[i].first)
    passes, reason = _all_runs(this, [runs[i] for i in in_order], batched, progress)
    whole = passes[0].whole
    made = [(value, value - one.whole) for one in passes for value in one.values]
    by_number = dict(zip(in_order, made, strict=True))
    found = [by_number.get(i, (whole, 0.0)) for i in range(len(groups) + num_nudged)]
    values, differences = [value for value, _ in found], [difference for _, difference in found]
    words = "at once" if reason is None else f"one after another{reason and f': {reason}'}"
    is_bitwise = all(one.is_bitwise for one in passes)
    num = len(groups)
    return LeftOut(whole, values[:num], differences[:num], differences[num:], is_bitwise, reason is None, words)


def _all_runs(
    this: OpenedRun, runs: list[_Run], batched: Batched, progress: Progress
) -> tuple[list[_Pass], str | None]:
    """The passes over the window, and why the runs were not made at once."""
    reason: str | None = ""
    if batched is not False:
        reason = VmappedRuns.why_not(this, len(runs), is_wanted=batched is True)
        if reason is None:
            try:
                return _in_passes(this, runs, VmappedRuns, progress), None
            except NotVmappedError as error:
                reason = str(error)
        if batched is True:
            raise UnsupportedOperationError(f'The runs cannot be made at once: {reason}. Use batched="auto".')
    return _in_passes(this, runs, SequentialRuns, progress), reason


def _in_passes(
    this: OpenedRun, runs: list[_Run], kind: type[SequentialRuns] | type[VmappedRuns], progress: Progress
) -> list[_Pass]:
    """Go over the window as often as it takes, each time with as many runs as fit in memory."""
    at_once, num_steps = kind.at_once(this), len(this.steps)
    passes = [runs[begin : begin + at_once] for begin in range(0, max(1, len(runs)), at_once)]
    work = len(passes) * num_steps + sum(num_steps - run.first for run in runs)
    counter = accumulate_steps(progress, work)
    return [_pass_over(this, chosen, kind, counter) for chosen in passes]


def accumulate_steps(progress: Progress, total: int) -> Callable[[int], None]:
    """What to call with numbers of steps that have just been made."""
    done = 0

    def made(num: int) -> None:
        nonlocal done
        done += num
        progress(done, total)

    return made


def _first_drawn(steps: list[Step]) -> dict[SampleId, int]:
    """Position of the first step that draws each sample."""
    found: dict[SampleId, int] = {}
    for position, step in enumerate(steps):
        for micro in step.micro if step.is_update else ():
            for name in micro.ids:
                found.setdefault(name, position)
    return found


def _pass_over(
    this: OpenedRun, runs: list[_Run], kind: type[SequentialRuns] | type[VmappedRuns], made: Callable[[int], None]
) -> _Pass:
    """Run the window with nobody left out and, beside it, each run from the step on where it differs."""
    walk, steps = this.walk, this.steps
    start = this.states.state(steps[0].index)
    with this.surroundings.as_stage("train"), borrowed(this.run.optimizer) as optimizer:
        load_all(walk, optimizer, start)
        beside = kind(this, optimizer)
        for position, step in enumerate(steps):
            beside.join([run.seed for run in runs if run.first == position])
            gone = [run.without for run in runs if run.first <= position]
            batches = [BatchAgain(step, number, walk) for number in range(len(step.micro))]
            if gone:
                weights = _weights(step, gone, walk)
                _find_plans(step, batches, weights, walk)
                beside.step(step, batches, weights)
            _as_recorded(step, batches, walk, optimizer)
            made(1 + len(gone))
        changes, is_bitwise = compare(live_state(walk, optimizer), this.end, start)
        walk.fidelity.compare_segment(steps, changes, is_bitwise)
        whole, *values = beside.values()
        return _Pass(whole, values, is_bitwise)


def _as_recorded(step: Step, batches: list[BatchAgain], walk: Walk, optimizer: Borrowed) -> None:
    take_step(
        step,
        walk,
        optimizer,
        loss_of=lambda number: batches[number].loss(),
        check=lambda losses: walk.fidelity.compare_losses(step, losses, counts=False),
    )


def _weights(step: Step, gone: list[frozenset[SampleId]], walk: Walk) -> list[Weights]:
    """For each run, the weights of each micro-batch's samples."""
    runs_without: dict[SampleId, list[int]] = {}
    for run, group in enumerate(gone):
        for name in group:
            runs_without.setdefault(name, []).append(run)
    found: list[Weights] = [[None] * len(step.micro) for _ in gone]
    if not step.is_update:
        return found
    params = list(walk.params.values())
    for number, micro in enumerate(step.micro):
        for row, name in enumerate(micro.ids):
            for run in runs_without.get(name, ()):
                weights = found[run][number]
                if weights is None:
                    found[run][number] = weights = unit_weights(len(micro.ids), params).detach()
                weights[row] = 0.0
    return found


def _find_plans(step: Step, batches: list[BatchAgain], weights: list[Weights], walk: Walk) -> None:
    """Where somebody is left out, find out whose parts the loss has, at the parameters of the run that happened."""
    losses = [batch.micro.loss for batch in batches]
    touched = {number for each in weights for number, one in enumerate(each) if one is not None}
    for number in touched:
        losses[number] = batches[number].find_plan() / step.divisor * step.micro[number].scale
    if touched:  # the losses of a callable of the user's might have another mean
        walk.fidelity.compare_losses(step, [loss for loss in losses if loss is not None], counts=False)
