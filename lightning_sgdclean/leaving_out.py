# SPDX-License-Identifier: Apache-2.0
"""Go over a recorded window again without some of its samples: real runs, in step with the one that happened.

A sample that is left out has weight zero in place: divisors, randomness, schedules and every other sample's place
stay as they were, and so does its share in BatchNorm's statistics. Until one of its samples is drawn, a run is that
which happened, so it joins there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_sgdclean.batch_again import BatchAgain
from lightning_sgdclean.forward import Borrowed, borrowed, live_state, load_all, take_step
from lightning_sgdclean.memory import slots_for
from lightning_sgdclean.opened import OpenedRun
from lightning_sgdclean.states import compare
from lightning_sgdclean.trajectory import SampleId, State, Step
from lightning_sgdclean.walk import Walk
from lightning_sgdclean.weighting import unit_weights

Weights = list[Tensor | None]  # one for each micro-batch, (B,) of zeros and ones; None where nobody is left out


@dataclass(frozen=True)
class LeftOut:
    """What leaving samples out led to.

    Attributes:
        whole: The objective of the run with nobody left out, computed as the others were.
        values: The objective of each run, in the order in which they were asked for.
        is_bitwise: Whether the run with nobody left out came to the recorded end to the last bit.
    """

    whole: float
    values: list[float]
    is_bitwise: bool


class Runs(Protocol):
    """Runs that go over the steps beside the one that happened, which is that of the live module."""

    def join(self, num: int) -> None:
        """So many more, as copies of the one that happened."""

    def step(self, step: Step, batches: list[BatchAgain], weights: list[Weights]) -> None:
        """Take all of them over a step; the live module is left in the state that it was in."""

    def values(self) -> list[float]:
        """The objective of the run that happened, as these are computed, and of each in the order of joining."""


class OneByOne:
    """Every run by itself, with the live module and the live optimizer: what training itself would have done."""

    def __init__(self, this: OpenedRun, optimizer: Borrowed) -> None:
        self._this, self._walk, self._optimizer = this, this.walk, optimizer
        self._states: list[State] = []

    def join(self, num: int) -> None:
        """See the base class."""
        self._states += [copied(live_state(self._walk, self._optimizer)) for _ in range(num)]

    def step(self, step: Step, batches: list[BatchAgain], weights: list[Weights]) -> None:
        """See the base class."""
        happened = copied(live_state(self._walk, self._optimizer))
        for number, each in enumerate(weights):
            load_all(self._walk, self._optimizer, self._states[number])
            take_step(step, self._walk, self._optimizer, _losses(batches, each))
            self._states[number] = copied(live_state(self._walk, self._optimizer))
        load_all(self._walk, self._optimizer, happened)

    def values(self) -> list[float]:
        """See the base class."""
        states = [live_state(self._walk, self._optimizer), *self._states]
        return [self._this.objectives_at(copied(state), self._this.surroundings)[0].value for state in states]


def _losses(batches: list[BatchAgain], weights: Weights) -> Callable[[int], Tensor]:
    def loss_of(number: int) -> Tensor:
        each = weights[number]
        return batches[number].loss() if each is None else batches[number].weighted_loss(each)

    return loss_of


def copied(state: State) -> State:
    """The state in tensors of its own, where it is."""
    return State(
        {name: tensor.detach().clone() for name, tensor in state.params.items()},
        {name: tensor.detach().clone() for name, tensor in state.buffers.items()},
        {
            name: {key: tensor.detach().clone() for key, tensor in entries.items()}
            for name, entries in state.optimizer.items()
        },
    )


def leave_out(
    this: OpenedRun,
    groups: Sequence[frozenset[SampleId]],
    advance: Callable[[], None] = lambda: None,
    make_runs: Callable[[OpenedRun, Borrowed], Runs] = OneByOne,
) -> LeftOut:
    """Really run the window without each of some groups of samples.

    Args:
        this: The run.
        groups: The samples that each run leaves out.
        advance: Called after every step of each pass over the window; see :func:`num_passes`.
        make_runs: How they are run.

    Raises:
        ReplayMismatchError: If the window, run again with nobody left out, does not come to the recorded end.
        LossSplitError: If a loss cannot be split by sample.
    """
    first_drawn = _first_drawn(this.steps)
    firsts = [min((first_drawn[name] for name in group if name in first_drawn), default=None) for group in groups]
    joining = sorted((first, i) for i, first in enumerate(firsts) if first is not None)
    at_once = _at_once(this)
    values: list[float | None] = [None] * len(groups)
    whole, is_bitwise = 0.0, True
    for begin in range(0, max(1, len(joining)), at_once):
        chosen = joining[begin : begin + at_once]
        drawn = [(first, groups[i]) for first, i in chosen]
        (whole, *found), same = _pass_over(this, drawn, advance, make_runs)
        is_bitwise &= same
        for (_, i), value in zip(chosen, found, strict=True):
            values[i] = value
    return LeftOut(whole, [whole if value is None else value for value in values], is_bitwise)


def num_passes(this: OpenedRun, num_groups: int) -> int:
    """How often the window is gone over for so many groups, each pass with as many of them as fit in memory."""
    return max(1, math.ceil(num_groups / _at_once(this)))


def _at_once(this: OpenedRun) -> int:
    return max(1, slots_for(this.trajectory.state_bytes))


def _first_drawn(steps: list[Step]) -> dict[SampleId, int]:
    """Position of the first step that draws each sample."""
    found: dict[SampleId, int] = {}
    for position, step in enumerate(steps):
        for micro in step.micro if step.is_update else ():
            for name in micro.ids:
                found.setdefault(name, position)
    return found


def _pass_over(
    this: OpenedRun,
    groups: list[tuple[int, frozenset[SampleId]]],
    advance: Callable[[], None],
    make_runs: Callable[[OpenedRun, Borrowed], Runs],
) -> tuple[list[float], bool]:
    """Run the window with nobody left out and, beside it, without each group from the step that first draws it.

    Returns:
        The objective of each, nobody left out first; and whether that one came to its end to the last bit.
    """
    walk, steps = this.walk, this.steps
    start = this.states.state(steps[0].index)
    with this.surroundings.as_stage("train"), borrowed(this.run.optimizer) as optimizer:
        load_all(walk, optimizer, start)
        runs = make_runs(this, optimizer)
        for position, step in enumerate(steps):
            runs.join(sum(first == position for first, _ in groups))
            gone = [group for first, group in groups if first <= position]
            batches = [BatchAgain(step, number, walk) for number in range(len(step.micro))]
            if gone:
                weights = _weights(step, gone, walk)
                _find_plans(step, batches, weights, walk)
                runs.step(step, batches, weights)
            _as_recorded(step, batches, walk, optimizer)
            advance()
        changes, is_bitwise = compare(live_state(walk, optimizer), this.end, start)
        walk.fidelity.compare_segment(steps, changes, is_bitwise)
        return runs.values(), is_bitwise


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
