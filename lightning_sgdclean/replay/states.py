# SPDX-License-Identifier: Apache-2.0
"""The states of a recorded run, those between the snapshots recomputed just before they are needed."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sgdclean.base.errors import RunDirectoryError
from lightning_sgdclean.base.resources import slots_for
from lightning_sgdclean.replay.fidelity import Changes
from lightning_sgdclean.replay.forward import Borrowed, borrowed, live_state, load_all, repeat_step
from lightning_sgdclean.replay.walk import Walk
from lightning_sgdclean.trajectory.flat_state import flatten, unflatten
from lightning_sgdclean.trajectory.records import State
from lightning_sgdclean.trajectory.schedule import Move, reversal, revolve
from lightning_sgdclean.trajectory.store import Trajectory


class RecomputedStates:
    """Gives states by step, cheapest last first: read where they were kept, else recomputed forward.

    Besides what is held for the visits to come there are a handful of states in memory: the one at work,
    the one handed out, and the two that a segment is checked against.

    Args:
        trajectory: What was recorded.
        walk: The live module and what its steps need.
        optimizer: The user's optimizer, borrowed where a step is to be repeated.
        slots: States to hold in memory; by default what fits into half of the free memory.
    """

    def __init__(self, trajectory: Trajectory, walk: Walk, optimizer: Optimizer, slots: int | None = None) -> None:
        self._trajectory, self._walk, self._optimizer = trajectory, walk, optimizer
        self._slots = slots
        self._moves: Iterator[Move] = iter(())
        self._last: tuple[int, State] | None = None  # what was handed out last, and its position
        self._held: dict[int, State] = {}
        self._work: State | None = None  # None: it is that of the live module
        self._start: tuple[int, State] | None = None  # the kept state that the segment began with

    def state(self, index: int) -> State:
        """The state before step ``index`` (after the last step, for the end point), on the CPU.

        Raises:
            RunDirectoryError: If no state from which it could be recomputed was kept.
            ReplayMismatchError: If steps, repeated, differ from what was recorded.
        """
        position = self._trajectory.position(index)
        if self._last is None or self._last[0] != position:
            if self._last is None or self._last[0] != position + 1:
                self._begin(position)
            with self._walk.surroundings.as_stage("train"), borrowed(self._optimizer) as optimizer:
                self._last = position, self._run_to_visit(optimizer)
        return self._last[1]

    def _begin(self, position: int) -> None:
        kept = self._trajectory.kept
        if not kept or kept[0] > position:
            raise RunDirectoryError("The trajectory keeps no state from which the window could be recomputed.")
        if self._slots is None:
            self._slots = slots_for(self._trajectory.state_bytes)
        self._held.clear()
        self._moves = reversal(kept, kept[0], position, revolve(self._slots))

    def _run_to_visit(self, optimizer: Borrowed) -> State:
        """Make moves until one hands out a state; see :func:`~lightning_sgdclean.trajectory.schedule.reversal`."""
        for word, position in self._moves:
            match word:
                case "load":
                    self._work = self._kept(position)
                case "recall":
                    self._work = self._held[position]
                case "step":
                    self._step(position, optimizer)
                case "hold":
                    self._held[position] = self._copy(optimizer)
                case "drop":
                    del self._held[position]
                case "check":
                    self._check(position, optimizer)
                case "visit":
                    break
        return self._copy(optimizer)

    def _kept(self, position: int) -> State:
        if self._start is None or self._start[0] != position:
            self._start = position, self._read(position)
        return self._start[1]

    def _read(self, position: int) -> State:
        steps = self._trajectory.steps
        return self._trajectory.state(steps[position].index if position < len(steps) else steps[-1].index + 1)

    def _copy(self, optimizer: Borrowed) -> State:
        if self._work is not None:  # recorded or copied already, and never written to
            return self._work
        return unflatten(*flatten(live_state(self._walk, optimizer)))

    def _step(self, position: int, optimizer: Borrowed) -> None:
        if self._work is not None:
            load_all(self._walk, optimizer, self._work)
            self._work = None
        repeat_step(self._trajectory.steps[position], self._walk, optimizer)

    def _check(self, position: int, optimizer: Borrowed) -> None:
        """Repeat the segment's last step, too, and hold the outcome against what was kept after it."""
        assert self._start is not None
        before = self._copy(optimizer)
        self._step(position - 1, optimizer)
        segment = self._trajectory.steps[self._start[0] : position]
        changes, is_bitwise = compare(live_state(self._walk, optimizer), self._read(position), self._start[1])
        self._walk.fidelity.compare_segment(segment, changes, is_bitwise)
        self._work = before


def compare(live: State, recorded: State, start: State) -> tuple[Changes, bool]:
    """What the steps since ``start`` led to, now and then; and whether all of it is the same to the last bit."""
    changes, is_bitwise = Changes(), True
    now, then, before = dict(_entries(live)), dict(_entries(recorded)), dict(_entries(start))
    for kind, name in now.keys() | then.keys():  # an entry that one of them lacks counts as zero
        one, other = now.get((kind, name)), then.get((kind, name))
        one = torch.zeros_like(then[kind, name]) if one is None else one.detach().cpu()
        other = torch.zeros_like(one) if other is None else other
        is_same = _same_bits(one, other)
        is_bitwise &= is_same
        if not (is_same and kind == "buffer"):  # buffers may hold infinities, whose difference is none
            changes.add(kind, one, other, before.get((kind, name)))
    return changes, is_bitwise


def _entries(state: State) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """All tensors by their kind (that of an optimizer's entry is its key) and the name of the parameter or buffer."""
    for name, tensor in state.params.items():
        yield ("param", name), tensor
    for name, tensor in state.buffers.items():
        yield ("buffer", name), tensor
    for name, entries in state.optimizer.items():
        for key, tensor in entries.items():
            yield (key, name), tensor


def _same_bits(one: Tensor, other: Tensor) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1).view(torch.uint8)

    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))
