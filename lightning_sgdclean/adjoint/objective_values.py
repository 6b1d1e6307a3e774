# SPDX-License-Identifier: Apache-2.0
"""The objective's value alone, in many states of a module: the validation data are gone through once."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_sgdclean.adjoint.objective import ValidationBatch, no_mean, value_of
from lightning_sgdclean.base.randomness import random_state, set_random_state
from lightning_sgdclean.data.batches import cloned
from lightning_sgdclean.losses.evaluate import eagerly
from lightning_sgdclean.replay.open import OpenedRun

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
