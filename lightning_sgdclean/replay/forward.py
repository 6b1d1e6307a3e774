# SPDX-License-Identifier: Apache-2.0
"""Recorded steps repeated forward, bit for bit, and the states between snapshots that this gives.

The user's module, the user's optimizer, torch's own functions: nothing of the closed forms is used here, and nothing of
Lightning's loop. The live optimizer's own ``step``, with the flags it was given and its options set from the record,
moves the parameters.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sgdclean.base.errors import RunDirectoryError
from lightning_sgdclean.base.resources import slots_for
from lightning_sgdclean.losses.evaluate import RecordedBatch
from lightning_sgdclean.replay.fidelity import compare
from lightning_sgdclean.replay.replay import Replay
from lightning_sgdclean.trajectory.flat_state import flatten, unflatten
from lightning_sgdclean.trajectory.live_state import current_state
from lightning_sgdclean.trajectory.records import State, Step
from lightning_sgdclean.trajectory.schedule import Move, reversal, revolve
from lightning_sgdclean.trajectory.store import Trajectory


@contextmanager
def borrowed(optimizer: Optimizer) -> Iterator["Borrowed"]:
    """The live optimizer for repeating steps; afterwards options, state, gradients and hooks are as they were.

    Its hooks do not run meanwhile: the record holds what they led to, and ours must not record again.
    """
    groups = [dict(group) for group in optimizer.param_groups]
    params = [param for group in groups for param in group["params"]]
    state = {param: optimizer.state[param] for param in params if param in optimizer.state}
    gradients = [param.grad for param in params]
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield Borrowed(optimizer, state)
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = hooks
        for live, group in zip(optimizer.param_groups, groups, strict=True):
            live.clear()
            live.update(group)
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
            optimizer.state.pop(param, None)
        optimizer.state.update(state)


class Borrowed:
    """An optimizer whose options and state may be overwritten; see :func:`borrowed`."""

    def __init__(self, optimizer: Optimizer, state: dict[Tensor, dict[str, Any]]) -> None:
        self.optimizer = optimizer
        self._was = state  # tells the kinds of its entries

    @property
    def params(self) -> list[nn.Parameter]:
        """All of them, in the order in which gradients are clipped."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def load(self, params: dict[str, nn.Parameter], state: State) -> None:
        """Give it copies of a recorded state."""
        groups = {param: group for group in self.optimizer.param_groups for param in group["params"]}
        for name, param in params.items():
            self.optimizer.state.pop(param, None)
            was = self._was.get(param, {})
            entries = {
                key: _as_it_was(value, was.get(key), param, groups[param])
                for key, value in state.optimizer.get(name, {}).items()
            }
            if entries:
                self.optimizer.state[param] = entries

    def set_options(self, groups: list[dict[str, Any]]) -> None:
        """Give its groups the recorded options, each in the type that it has there."""
        for live, recorded in zip(self.optimizer.param_groups, groups, strict=True):
            for key, value in recorded.items():
                if key != "params":
                    live[key] = _like(value, live.get(key))

    def step(self, scaler: torch.amp.GradScaler | None) -> None:
        """One step of its class: the instance's ``step`` may be a scheduler's counter."""
        if scaler is None:
            type(self.optimizer).step(self.optimizer)
        else:
            scaler.step(self.optimizer)


def _as_it_was(recorded: Tensor, was: Any, param: Tensor, group: dict[str, Any]) -> Any:
    if isinstance(was, int | float):
        return type(was)(recorded.item())
    # Counters stay on the CPU unless the update runs as one kernel.
    on_device = recorded.ndim or group.get("capturable") or group.get("fused")
    return recorded.to(param.device if on_device else "cpu", copy=True)


def _like(value: Any, live: Any) -> Any:
    if isinstance(live, Tensor):
        return torch.full_like(live, value)
    if isinstance(value, Tensor):
        return value.clone()  # a step may count in it
    return tuple(value) if isinstance(live, tuple) else value


def load_all(replay: Replay, borrowed_optimizer: Borrowed, state: State) -> None:
    """Put a recorded state into the live module and optimizer."""
    replay.load(state)
    borrowed_optimizer.load(replay.params, state)


def live_state(replay: Replay, borrowed_optimizer: Borrowed) -> State:
    """That of the live module and optimizer, not copied."""
    return current_state(replay.module, replay.params, borrowed_optimizer.optimizer)


def repeat_step(step: Step, replay: Replay, borrowed_optimizer: Borrowed) -> None:
    """Take the live module and optimizer over a recorded step, as training did.

    Raises:
        ReplayMismatchError: If a batch or a loss is not what was recorded.
    """
    take_step(
        step,
        replay,
        borrowed_optimizer,
        loss_of=lambda number: replay.batch(step, number).loss(),
        check=lambda losses: replay.fidelity.compare_losses(step, losses, counts=False),
    )


def take_step(
    step: Step,
    replay: Replay,
    borrowed_optimizer: Borrowed,
    loss_of: Callable[[int], Tensor],
    check: Callable[[list[Tensor]], None] = lambda losses: None,
) -> None:
    """Take the live module and optimizer over a step as training does: accumulated, scaled, clipped.

    Args:
        step: Its record, which says how.
        replay: The live module.
        borrowed_optimizer: The live optimizer.
        loss_of: The loss of a micro-batch, by number.
        check: Gets the losses as they were differentiated, before the optimizer steps.
    """
    replay.teachers.move(step, replay.params, ("before", False))
    losses, scaler = accumulate(step, replay, borrowed_optimizer, loss_of)
    replay.teachers.move(step, replay.params, ("after", False))
    if not step.is_update:
        return
    check(losses)
    params = borrowed_optimizer.params
    if scaler is not None and not getattr(borrowed_optimizer.optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(borrowed_optimizer.optimizer)
    if step.clip is not None:
        algorithm, value = step.clip
        if algorithm == "value":
            nn.utils.clip_grad_value_(params, value)
        else:
            nn.utils.clip_grad_norm_(params, value)
    borrowed_optimizer.set_options(step.groups)
    borrowed_optimizer.step(scaler)
    replay.teachers.move(step, replay.params, ("after", True))


def accumulate(
    step: Step, replay: Replay, borrowed_optimizer: Borrowed, loss_of: Callable[[int], Tensor]
) -> tuple[list[Tensor], torch.amp.GradScaler | None]:
    """Leave a step's gradients in the live parameters; the losses as they were differentiated, and what scaled them."""
    for param in borrowed_optimizer.params:
        param.grad = None
    scaler = None
    if step.scale != 1.0:
        scaler = torch.amp.GradScaler(replay.surroundings.device.type, init_scale=step.scale)
    losses = []
    for number in range(len(step.micro)):
        loss = loss_of(number) / step.divisor
        if scaler is not None:
            loss = scaler.scale(loss)
        is_kept = bool(step.micro[number].scale)
        if step.is_update and is_kept:
            replay.module.backward(loss)
        replay.restore()
        losses.append(loss.detach() * is_kept)
    return losses, scaler


class RecomputedStates:
    """Gives states by step, cheapest last first: read where they were kept, else recomputed forward.

    Besides what is held for the visits to come there are a handful of states in memory: the one at work,
    the one handed out, and the two that a segment is checked against.

    Args:
        trajectory: What was recorded.
        replay: The live module and what its steps need.
        optimizer: The user's optimizer, borrowed where a step is to be repeated.
        slots: States to hold in memory; by default what fits into half of the free memory.
    """

    def __init__(self, trajectory: Trajectory, replay: Replay, optimizer: Optimizer, slots: int | None = None) -> None:
        self._trajectory, self._replay, self._optimizer = trajectory, replay, optimizer
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
            with self._replay.surroundings.as_stage("train"), borrowed(self._optimizer) as optimizer:
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
        return unflatten(*flatten(live_state(self._replay, optimizer)))

    def _step(self, position: int, optimizer: Borrowed) -> None:
        if self._work is not None:
            load_all(self._replay, optimizer, self._work)
            self._work = None
        repeat_step(self._trajectory.steps[position], self._replay, optimizer)

    def _check(self, position: int, optimizer: Borrowed) -> None:
        """Repeat the segment's last step, too, and hold the outcome against what was kept after it."""
        assert self._start is not None
        before = self._copy(optimizer)
        self._step(position - 1, optimizer)
        segment = self._trajectory.steps[self._start[0] : position]
        changes, is_bitwise = compare(
            live_state(self._replay, optimizer), self._read(position), self._start[1], self._replay.scratch
        )
        self._replay.fidelity.compare_segment(segment, changes, is_bitwise)
        self._work = before


Weights = list[Tensor | None]  # one for each micro-batch, (B,) of zeros and ones; None where nobody is left out


def losses_of(batches: list[RecordedBatch], weights: Weights) -> Callable[[int], Tensor]:
    """The loss of each micro-batch, by number, for a run with such weights."""
    return lambda number: batches[number].loss(weights[number])
