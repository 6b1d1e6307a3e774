# SPDX-License-Identifier: Apache-2.0
"""Runs that go over recorded steps beside the one that happened, one by one: what training itself would have done."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lightning_sgdclean.adjoint.backward import load_state
from lightning_sgdclean.adjoint.objective_values import objective_values
from lightning_sgdclean.base.resources import slots_for
from lightning_sgdclean.replay.batch import BatchAgain
from lightning_sgdclean.replay.forward import Borrowed, live_state, load_all, take_step
from lightning_sgdclean.replay.open import OpenedRun
from lightning_sgdclean.trajectory.records import State, Step

Weights = list[Tensor | None]  # one for each micro-batch, (B,) of zeros and ones; None where nobody is left out


class Runs(Protocol):
    """Runs that go over the steps beside the one that happened, which is that of the live module and optimizer."""

    def join(self, seeds: list[int | None]) -> None:
        """One more for each seed, as a copy of the one that happened; with a seed, off by rounding errors."""

    def step(self, step: Step, batches: list[BatchAgain], weights: list[Weights]) -> None:
        """Take all of them over a step; live module and optimizer are left as they were."""

    def values(self) -> list[float]:
        """The objective of the run that happened, as these are computed, and of each in the order of joining."""


class OneByOne:
    """Every run by itself, with the live module and the live optimizer."""

    def __init__(self, this: OpenedRun, optimizer: Borrowed) -> None:
        self._this, self._walk, self._optimizer = this, this.walk, optimizer
        self._states: list[State] = []

    @staticmethod
    def at_once(this: OpenedRun) -> int:
        """How many runs fit in memory."""
        return max(1, slots_for(this.trajectory.state_bytes, this.surroundings.device))

    def join(self, seeds: list[int | None]) -> None:
        """See :class:`Runs`."""
        for seed in seeds:
            state = copied(live_state(self._walk, self._optimizer))
            if seed is not None:
                state.params = nudged(state.params, seed)
            self._states.append(state)

    def step(self, step: Step, batches: list[BatchAgain], weights: list[Weights]) -> None:
        """See :class:`Runs`."""
        happened = copied(live_state(self._walk, self._optimizer))
        for number, each in enumerate(weights):
            load_all(self._walk, self._optimizer, self._states[number])
            take_step(step, self._walk, self._optimizer, losses_of(batches, each))
            self._states[number] = copied(live_state(self._walk, self._optimizer))
        load_all(self._walk, self._optimizer, happened)

    def values(self) -> list[float]:
        """See :class:`Runs`."""
        states = [copied(live_state(self._walk, self._optimizer)), *self._states]

        def everywhere(value: Callable[[], Tensor]) -> Tensor:
            found = []
            for state in states:
                load_state(self._walk.module, self._walk.params, state)
                found.append(value())
            return torch.stack(found)

        return objective_values(self._this, everywhere)


def losses_of(batches: list[BatchAgain], weights: Weights) -> Callable[[int], Tensor]:
    """The loss of each micro-batch, by number, for a run with such weights."""
    return lambda number: batches[number].loss(weights[number])


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


def nudged(params: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every number moved by its rounding error, up or down as the seed says."""
    source = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in params.items():
        signs = (2 * torch.randint(0, 2, tensor.shape, generator=source) - 1).to(tensor)
        moved[name] = tensor * (1 + torch.finfo(tensor.dtype).eps * signs)
    return moved
