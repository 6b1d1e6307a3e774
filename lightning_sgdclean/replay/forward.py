# SPDX-License-Identifier: Apache-2.0
"""Repeat a recorded step forward, bit for bit: the user's module, the user's optimizer, torch's own functions.

Nothing of the closed forms is used here, and nothing of Lightning's loop: what moves the parameters is the
live optimizer's own ``step`` with the flags it was given, its options set from the record.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sgdclean.replay.batch import BatchAgain
from lightning_sgdclean.replay.walk import Walk, load_state
from lightning_sgdclean.trajectory.live_state import current_state
from lightning_sgdclean.trajectory.records import State, Step


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
    return tuple(value) if isinstance(live, tuple) else value


def load_all(walk: Walk, borrowed_optimizer: Borrowed, state: State) -> None:
    """Put a recorded state into the live module and optimizer."""
    load_state(walk.module, walk.params, state)
    borrowed_optimizer.load(walk.params, state)


def live_state(walk: Walk, borrowed_optimizer: Borrowed) -> State:
    """That of the live module and optimizer, not copied."""
    return current_state(walk.module, walk.params, borrowed_optimizer.optimizer)


def repeat_step(step: Step, walk: Walk, borrowed_optimizer: Borrowed) -> None:
    """Take the live module and optimizer over a recorded step, as training did.

    Raises:
        ReplayMismatchError: If a batch or a loss is not what was recorded.
    """
    take_step(
        step,
        walk,
        borrowed_optimizer,
        loss_of=lambda number: BatchAgain(step, number, walk).loss(),
        check=lambda losses: walk.fidelity.compare_losses(step, losses, counts=False),
    )


def take_step(
    step: Step,
    walk: Walk,
    borrowed_optimizer: Borrowed,
    loss_of: Callable[[int], Tensor],
    check: Callable[[list[Tensor]], None] = lambda losses: None,
) -> None:
    """Take the live module and optimizer over a step as training does: accumulated, scaled, clipped.

    Args:
        step: Its record, which says how.
        walk: The live module.
        borrowed_optimizer: The live optimizer.
        loss_of: The loss of a micro-batch, by number.
        check: Gets the losses as they were differentiated, before the optimizer steps.
    """
    losses, scaler = accumulate(step, walk, borrowed_optimizer, loss_of)
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


def accumulate(
    step: Step, walk: Walk, borrowed_optimizer: Borrowed, loss_of: Callable[[int], Tensor]
) -> tuple[list[Tensor], torch.amp.GradScaler | None]:
    """Leave a step's gradients in the live parameters; the losses as they were differentiated, and what scaled them."""
    for param in borrowed_optimizer.params:
        param.grad = None
    scale = step.micro[0].scale
    scaler = None if scale == 1.0 else torch.amp.GradScaler(walk.surroundings.device.type, init_scale=scale)
    losses = []
    for number in range(len(step.micro)):
        loss = loss_of(number) / step.divisor
        if scaler is not None:
            loss = scaler.scale(loss)
        if step.is_update:
            walk.module.backward(loss)
        walk.restore_attributes()
        losses.append(loss.detach())
    return losses, scaler
