# SPDX-License-Identifier: Apache-2.0
"""Really leave samples out of a recorded window: runs beside the one that happened.

A sample that is left out has weight zero in place: divisors, randomness, schedules and every other sample's place stay
as they were, and so does its share in BatchNorm's statistics. A run equals the recorded one until the first step that
draws a left-out sample; it starts there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lightning_sgdclean.adjoint.objective import objective_values
from lightning_sgdclean.base.errors import UnsupportedOperationError
from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.base.resources import slots_for
from lightning_sgdclean.leave_out.stacked import NotVmappedError, VmappedRuns
from lightning_sgdclean.losses.evaluate import RecordedBatch
from lightning_sgdclean.losses.weighting import unit_weights
from lightning_sgdclean.replay.fidelity import compare
from lightning_sgdclean.replay.forward import Borrowed, Weights, borrowed, live_state, load_all, losses_of, take_step
from lightning_sgdclean.replay.replay import OpenedRun, Replay
from lightning_sgdclean.trajectory.averages import Drift
from lightning_sgdclean.trajectory.records import State, Step, copied, nudged


class Runs(Protocol):
    """Runs that go over the steps beside the one that happened, which is that of the live module and optimizer."""

    def join(self, seeds: list[int | None]) -> None:
        """One more for each seed, as a copy of the one that happened; with a seed, off by rounding errors."""

    def step(self, step: Step, batches: list[RecordedBatch], weights: list[Weights]) -> None:
        """Take all of them over a step; live module and optimizer are left as they were."""

    def values(self) -> list[float]:
        """The objective of the run that happened, as these are computed, and of each in the order of joining."""


class SequentialRuns:
    """Every run by itself, with the live module and the live optimizer."""

    def __init__(self, this: OpenedRun, optimizer: Borrowed) -> None:
        self._this, self._replay, self._optimizer = this, this.replay, optimizer
        self._states: list[State] = []
        self._drifts: list[Drift] = []  # of the averages, where these are the end point
        self._last: Step | None = None

    @staticmethod
    def at_once(this: OpenedRun) -> int:
        """How many runs fit in memory."""
        return max(1, slots_for(this.trajectory.state_bytes, this.replay.surroundings.device))

    def join(self, seeds: list[int | None]) -> None:
        """See :class:`Runs`."""
        for seed in seeds:
            state = copied(live_state(self._replay, self._optimizer))
            if seed is not None:
                state.params = nudged(state.params, seed)
            self._states.append(state)
            self._drifts += [] if self._this.averages is None else [Drift(self._this.averages)]

    def step(self, step: Step, batches: list[RecordedBatch], weights: list[Weights]) -> None:
        """See :class:`Runs`."""
        happened = copied(live_state(self._replay, self._optimizer))
        self._average(happened)
        self._last = step
        for number, each in enumerate(weights):
            load_all(self._replay, self._optimizer, self._states[number])
            take_step(step, self._replay, self._optimizer, losses_of(batches, each))
            self._states[number] = copied(live_state(self._replay, self._optimizer))
        load_all(self._replay, self._optimizer, happened)

    def values(self) -> list[float]:
        """See :class:`Runs`."""
        end = copied(live_state(self._replay, self._optimizer))
        self._average(end)
        states = [end, *self._states]
        if self._this.averages is not None:
            ends = [drift.state(state) for drift, state in zip(self._drifts, self._states, strict=True)]
            states = [self._this.averages.state(end), *ends]

        def everywhere(value: Callable[[], Tensor]) -> Tensor:
            found = []
            for state in states:
                self._replay.load(state)
                found.append(value())
            return torch.stack(found)

        return objective_values(self._replay, *self._this.validation(), self._this.options, everywhere)

    def _average(self, happened: State) -> None:
        """Take the averages over the last step, which the run that happened has made by now, too."""
        for drift, state in zip(self._drifts, self._states, strict=bool(self._drifts)):
            if self._last is not None:
                drift.add(self._last.index, state, happened)


Batched = bool | Literal["auto"]
Progress = Callable[[int, int], None]  # steps of all runs done, of how many


@dataclass(frozen=True)
class LeftOut:
    """What leaving samples out led to.

    Attributes:
        whole: The objective of the run with nobody left out, computed as the others were.
        values: The objective without each group, in the order in which they were asked for; not finite where the run
            diverged.
        differences: Objective minus that of the full run computed in the same pass, since passes may be rounded
            differently.
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
    replay, steps = this.replay, this.steps
    start = this.states.state(steps[0].index)
    with this.replay.surroundings.as_stage("train"), borrowed(this.run.optimizer) as optimizer:
        load_all(replay, optimizer, start)
        beside = kind(this, optimizer)
        for position, step in enumerate(steps):
            beside.join([run.seed for run in runs if run.first == position])
            gone = [run.without for run in runs if run.first <= position]
            batches = [replay.batch(step, number) for number in range(len(step.micro))]
            if gone:
                weights = _weights(step, gone, replay)
                _find_plans(step, batches, weights, replay)
                beside.step(step, batches, weights)
            _as_recorded(step, batches, replay, optimizer)
            made(1 + len(gone))
        changes, is_bitwise = compare(live_state(replay, optimizer), this.end, start)
        replay.fidelity.compare_segment(steps, changes, is_bitwise)
        whole, *values = beside.values()
        return _Pass(whole, values, is_bitwise)


def _as_recorded(step: Step, batches: list[RecordedBatch], replay: Replay, optimizer: Borrowed) -> None:
    take_step(
        step,
        replay,
        optimizer,
        loss_of=lambda number: batches[number].loss(),
        check=lambda losses: replay.fidelity.compare_losses(step, losses, counts=False),
    )


def _weights(step: Step, gone: list[frozenset[SampleId]], replay: Replay) -> list[Weights]:
    """For each run, the weights of each micro-batch's samples."""
    runs_without: dict[SampleId, list[int]] = {}
    for run, group in enumerate(gone):
        for name in group:
            runs_without.setdefault(name, []).append(run)
    found: list[Weights] = [[None] * len(step.micro) for _ in gone]
    if not step.is_update:
        return found
    params = list(replay.params.values())
    for number, micro in enumerate(step.micro):
        for row, name in enumerate(micro.ids):
            for run in runs_without.get(name, ()):
                weights = found[run][number]
                if weights is None:
                    found[run][number] = weights = unit_weights(len(micro.ids), params).detach()
                weights[row] = 0.0
    return found


def _find_plans(step: Step, batches: list[RecordedBatch], weights: list[Weights], replay: Replay) -> None:
    """Where somebody is left out, find out whose parts the loss has, at the parameters of the run that happened."""
    losses = [batch.micro.loss for batch in batches]
    touched = {number for each in weights for number, one in enumerate(each) if one is not None}
    for number in touched:
        losses[number] = batches[number].find_plan() / step.divisor * step.micro[number].scale
    if touched:  # the losses of a callable of the user's might have another mean
        found = [loss for loss in losses if loss is not None]
        replay.fidelity.compare_losses(step, found, counts=False, batches=batches)
