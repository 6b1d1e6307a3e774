# SPDX-License-Identifier: Apache-2.0
"""The loss calls of a training step, with their arguments: what each says of every sample of the batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.adjoint.curvature import gradient
from lightning_sgdclean.losses.loss_functions import shares_of
from lightning_sgdclean.losses.readings import Number, Reading, plain_numbers, read_call
from lightning_sgdclean.losses.weighting import Plan, SampleWeights, Term


class WatchedLosses(SampleWeights):
    """Notes with what arguments torch's losses are called.

    Args:
        weights: ``(B,)`` of ones.
        plan: As for the class that this one extends.
    """

    def __init__(self, weights: Tensor, plan: Plan | None) -> None:
        super().__init__(weights, plan)
        self._plan_given, self._num = plan or (), len(weights)
        self._calls: list[tuple[Callable[..., Any], dict[str, Any]]] = []

    def _weighted(self, func: Callable[..., Any], options: dict[str, Any]) -> Tensor:
        self._calls.append((func, dict(options)))
        return super()._weighted(func, options)

    def own(self, losses: Tensor) -> None:
        """Give rows owners that are, number for number, the samples' losses ``(B,)`` as somebody else split them.

        Losses that two samples have in common tell nothing of their rows' order.
        """
        if len(set(losses.tolist())) < self._num:
            return
        for term in self.terms:
            rows = term.rows.reshape(-1)
            same = rows.shape == losses.shape and torch.equal(rows, losses.to(rows))
            term.owners = torch.arange(self._num).view(term.rows.shape) if same else None

    def labels_and_predictions(self) -> tuple[list[Number | None], list[Number | None]]:
        """For each sample, what all calls with one row a sample say alike; classes count before values."""
        found: list[tuple[Reading, list[int]]] = []
        for term, (func, options) in zip(self.terms, self._calls, strict=True):
            if term.owners is None or term.owners.numel() != self._num:
                continue
            reading = read_call(func, options, self._num)
            if reading is not None:
                found.append((reading, term.owners.reshape(-1).argsort().tolist()))
        if any(reading.is_class for reading, _ in found):
            found = [pair for pair in found if pair[0].is_class]
        labels = [_in_order(reading.numbers(reading.label), order) for reading, order in found]
        predictions = [_in_order(reading.numbers(reading.prediction), order) for reading, order in found]
        return _agreed(labels, self._num), _agreed(predictions, self._num)

    def own_losses(self, loss: Tensor) -> list[float | None]:
        """For each sample, what the training loss of a batch of that sample alone is; without penalties.

        Where torch's own mean reduces the rows, that is the mean of the sample's rows, and where the
        loss is the plain sum of rows, the sum of the sample's. Where the module reduces them by hand it is the
        sample's share of the batch's loss times the batch's size. None where the loss is not linear in the rows.

        Args:
            loss: The batch's training loss, with its graph.
        """
        if not all(call.is_linear for call in self._plan_given):
            return [None] * self._num
        total = torch.zeros(self._num, dtype=torch.float64, device=loss.device)
        for term, (func, options) in zip(self.terms, self._calls, strict=True):
            if term.owners is None or not term.entering.requires_grad:
                continue
            (pull,) = gradient([loss], [term.entering], retain_graph=True)
            share = term.sums(pull * term.entering.detach())
            total += (share * self._scale(term, pull, shares_of(func, options))).to(total.device)
        return plain_numbers(total.to(loss.dtype))

    def _scale(self, term: Term, pull: Tensor, shares: Tensor | None) -> Tensor | int:
        """What turns a sample's share of the batch's loss into its loss alone."""
        if shares is not None:
            shares = shares.expand(term.rows.shape).double()
            return shares.sum() / term.sums(shares)
        return 1 if bool((pull == 1).all()) else self._num


def _in_order(values: Sequence[Number | None], order: list[int]) -> list[Number | None]:
    return [values[row] for row in order]


def _agreed(said: list[list[Number | None]], num: int) -> list[Number | None]:
    """What several calls say of each sample, where they all say the same."""
    if not said:
        return [None] * num
    return [values[0] if len(set(values)) == 1 else None for values in zip(*said, strict=True)]
