# SPDX-License-Identifier: Apache-2.0
"""Runs beside the one that happened: one after another, and the states of many side by side."""

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_sgdclean.adjoint.objective import no_mean, value_of
from lightning_sgdclean.adjoint.optimizers import Gradients, clipped
from lightning_sgdclean.base.randomness import random_state, set_random_state
from lightning_sgdclean.base.resources import slots_for
from lightning_sgdclean.data.batches import cloned
from lightning_sgdclean.data.fetching import ValidationBatch
from lightning_sgdclean.losses.module_state import eagerly
from lightning_sgdclean.replay.batch import BatchAgain
from lightning_sgdclean.replay.forward import Borrowed, live_state, load_all, take_step
from lightning_sgdclean.replay.open import OpenedRun
from lightning_sgdclean.replay.walk import Walk, load_state
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


class SequentialRuns:
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


class BatchedStates:
    """The states of ``K`` runs. The first is that of the live module and optimizer when this is made.

    Attributes:
        params: By name, each ``(K, ...)``.
        buffers: Likewise.
    """

    def __init__(self, walk: Walk, optimizer: Borrowed) -> None:
        self._walk, self._optimizer = walk, optimizer
        self.params = {name: param.detach()[None].clone().requires_grad_() for name, param in walk.params.items()}
        self.buffers = {name: buffer.detach()[None].clone() for name, buffer in walk.module.named_buffers()}
        self._entries = {name: self._entries_of(param) for name, param in walk.params.items()}

    def __len__(self) -> int:
        return len(next(iter(self.params.values())))

    def _entries_of(self, param: Tensor) -> dict[str, Any]:
        entries = self._optimizer.optimizer.state.get(param, {})
        return {
            key: value[None].clone() if self._has_rows(key, value) else copy.copy(value)
            for key, value in entries.items()
        }

    def _has_rows(self, key: str, value: Any) -> bool:
        """Whether an entry of the optimizer's state has a part for each run; counters are the same for all."""
        return isinstance(value, Tensor) and self._walk.update.is_followed(key, value)

    def append(self, seeds: list[int | None]) -> None:
        """Copies of the first row, one for each seed; with a seed, off by rounding errors."""
        first_new, num = len(self), len(seeds)
        self.params = {name: _more(tensor, num) for name, tensor in self.params.items()}
        self.buffers = {name: _more(tensor, num) for name, tensor in self.buffers.items()}
        for entries in self._entries.values():
            entries |= {key: _more(value, num) for key, value in entries.items() if self._has_rows(key, value)}
        for number, seed in enumerate(seeds, first_new):
            if seed is not None:
                for name, param in nudged({name: t[number] for name, t in self.params.items()}, seed).items():
                    self.params[name][number] = param
        for tensor in self.params.values():
            tensor.requires_grad_()

    def state(self, number: int) -> State:
        """The state of one run, in tensors of its own."""
        optimizer = {
            name: {
                key: value[number] if self._has_rows(key, value) else value
                for key, value in entries.items()
                if isinstance(value, Tensor)
            }
            for name, entries in self._entries.items()
        }
        params = {name: tensor[number] for name, tensor in self.params.items()}
        return copied(State(params, {name: tensor[number] for name, tensor in self.buffers.items()}, optimizer))

    @torch.no_grad()
    def step(self, step: Step, gradients: Gradients) -> None:
        """Clip each run's gradients by themselves, then let the user's optimizer step them all as one tensor."""
        optimizer = self._optimizer.optimizer
        for name, gradient in clipped(gradients, step.clip).items():
            self.params[name].grad = gradient
        held = [group["params"] for group in optimizer.param_groups]
        rows = {id(param): self.params[name] for name, param in self._walk.params.items()}
        self._optimizer.set_options(step.groups)
        for group, params in zip(optimizer.param_groups, held, strict=True):
            group["params"] = [rows.get(id(param), param) for param in params]
        optimizer.state.update({self.params[name]: entries for name, entries in self._entries.items() if entries})
        try:
            self._optimizer.step(None)
        finally:
            for name, tensor in self.params.items():
                self._entries[name] = optimizer.state.pop(tensor, {})
                tensor.grad = None
            for group, params in zip(optimizer.param_groups, held, strict=True):
                group["params"] = params


def _more(tensor: Tensor, num: int) -> Tensor:
    """The rows, and copies of the first."""
    return torch.cat([tensor.detach(), tensor.detach()[:1].expand(num, *tensor.shape[1:])])


Everywhere = Callable[[Callable[[], Tensor]], Tensor]


def objective_values(this: OpenedRun, everywhere: Everywhere) -> list[float]:
    """Mean over the validation set of the objective that ranks, in each of several states.

    Args:
        this: The run; its live module is in the modes of training afterwards.
        everywhere: Calls a function of the live module in each state, and gives its values ``(K,)``.

    Raises:
        ObjectiveError: If no batch gives such a value.
    """
    name, objective = next(iter(this.options.objectives.items()))
    batches, num_loaders = this.validation()
    total, weights = torch.zeros(()), 0.0
    names: dict[str, None] = {}
    this.walk.module.eval()
    with this.surroundings.as_stage("validate"):
        for content, batch_idx, number in batches:
            value = _Value(this, (this.surroundings.prepare(content, number), batch_idx, number), num_loaders)
            values = everywhere(value)
            names |= dict.fromkeys(value.names)
            if value.weight:
                total, weights = total + value.weight * values, weights + value.weight
    this.restore()  # validation had put the module into evaluation mode
    if not weights:
        raise no_mean(name, objective, this.options.monitor, list(names))
    means: list[float] = (total / weights).tolist()
    return means


class _Value:
    """The objective of one batch, at the same random numbers wherever it is asked for.

    Attributes:
        weight: What it weighs in the mean, once it was asked for; zero if the batch says nothing of it.
        names: All values that were logged.
    """

    def __init__(self, this: OpenedRun, batch: ValidationBatch, num_loaders: int) -> None:
        self._this, self._batch, self._num_loaders = this, batch, num_loaders
        self._random = random_state(this.surroundings.device)
        self.weight = 0.0
        self.names: list[str] = []

    def __call__(self) -> Tensor:
        """In float64, on the CPU."""
        this, (content, batch_idx, number) = self._this, self._batch
        objective = next(iter(this.options.objectives.values()))
        set_random_state(self._random, this.surroundings.device)
        with eagerly(), this.surroundings.val_context():
            found, self.weight, self.names = value_of(
                objective,
                this.walk.module,
                (cloned(content), batch_idx, number),
                this.options.monitor,
                self._num_loaders,
                needs_graph=False,
            )
        return torch.zeros((), dtype=torch.float64) if found is None else found.detach().double().cpu()
