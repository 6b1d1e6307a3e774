# SPDX-License-Identifier: Apache-2.0
"""What the loss calls of a step show of each sample: label, prediction and loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lightning_sgdclean.losses.kernels import gradient
from lightning_sgdclean.losses.loss_functions import shares_of
from lightning_sgdclean.losses.own_rows import OwnRows, is_own
from lightning_sgdclean.losses.weighting import LossCall, SampleWeights, SplitPlan

Number = int | float


@dataclass(frozen=True)
class Reading:
    """Label and prediction of each row of a loss call; NaN where there is none.

    Attributes:
        label: As the call's target has it, flat.
        prediction: As the call's input has it, flat.
        is_class: Whether they are numbers of classes, not measured values.
    """

    label: Tensor
    prediction: Tensor
    is_class: bool

    def numbers(self, values: Tensor) -> list[Number | None]:
        """Label or prediction as plain numbers, None where there is none."""
        found = plain_numbers(values)
        return [None if number is None else int(number) for number in found] if self.is_class else found


def read_call(func: Callable[..., Any], options: dict[str, Any], num: int) -> Reading | None:
    """Read a loss call with one label a sample.

    Args:
        func: One of torch's loss functions.
        options: Its arguments by name.
        num: Rows that are expected.

    Returns:
        Label and prediction of each row in order; None if the call has several labels a sample, or none that
        stands for one number (a distance, a ranking, an alignment, several outputs).
    """
    read = _READERS.get(func)
    if read is None:
        return None
    label, prediction, is_class = read(options)
    if label.numel() != num or prediction.numel() != num:
        return None
    return Reading(label.reshape(-1), prediction.reshape(-1), is_class)


def plain_numbers(values: Tensor) -> list[Number | None]:
    """Floats with no more digits than their precision holds: 0.3 in float32 is 0.3; None for what is not finite."""
    array = values.detach().cpu()
    array = array.float() if array.dtype in (torch.float16, torch.bfloat16) else array
    return [float(str(number)) if np.isfinite(number) else None for number in array.numpy().reshape(-1)]


_Read = tuple[Tensor, Tensor, bool]


def _classes(options: dict[str, Any]) -> _Read:
    """Class numbers, or a probability for each class; the scores stand along the second dimension, or the only one."""
    scores, target = options["input"], options["target"]
    dim = min(1, scores.ndim - 1)
    if target.is_floating_point():
        return _highest(target, dim), _highest(scores, dim), True
    counted = target != options.get("ignore_index", -100)
    return torch.where(counted, target.double(), torch.nan), _highest(scores, dim), True


def _distributions(options: dict[str, Any]) -> _Read:
    scores, target = options["input"], options["target"]
    if scores.ndim != 2 or scores.shape != target.shape:
        return scores.new_empty(0), scores.new_empty(0), True
    return _highest(target, 1), _highest(scores, 1), True


def _probabilities(options: dict[str, Any]) -> _Read:
    return _side(options["target"], 0.5), _side(options["input"], 0.5), True


def _logits(options: dict[str, Any]) -> _Read:
    return _side(options["target"], 0.5), _side(options["input"], 0.0), True


def _signs(options: dict[str, Any]) -> _Read:
    return 2 * _side(options["target"], 0.0) - 1, 2 * _side(options["input"], 0.0) - 1, True


def _values(options: dict[str, Any]) -> _Read:
    return options["target"], options["input"], False


def _rates(options: dict[str, Any]) -> _Read:
    rate = options["input"].exp() if options["log_input"] else options["input"]
    return options["target"], rate, False


def _highest(scores: Tensor, dim: int) -> Tensor:
    """Place of the highest score; NaN where two are equal, or any is NaN."""
    top = scores.amax(dim, keepdim=True)
    is_clear = (scores == top).sum(dim) == 1
    return torch.where(is_clear, scores.argmax(dim).double(), torch.nan)


def _side(values: Tensor, middle: float) -> Tensor:
    """1 above the middle, 0 below, NaN on it."""
    values = values.double()
    known = (values > middle) | (values < middle)
    return torch.where(known, (values > middle).double(), torch.nan)


_READERS: dict[Callable[..., Any], Callable[[dict[str, Any]], _Read]] = {
    functional.cross_entropy: _classes,
    functional.nll_loss: _classes,
    functional.multi_margin_loss: _classes,
    functional.kl_div: _distributions,
    functional.binary_cross_entropy: _probabilities,
    functional.binary_cross_entropy_with_logits: _logits,
    functional.soft_margin_loss: _signs,
    functional.mse_loss: _values,
    functional.l1_loss: _values,
    functional.smooth_l1_loss: _values,
    functional.huber_loss: _values,
    functional.gaussian_nll_loss: _values,
    functional.poisson_nll_loss: _rates,
}


class WatchedLosses(SampleWeights):
    """Notes with what arguments torch's losses are called.

    Args:
        weights: ``(B,)`` of ones.
        plan: As for the class that this one extends.
        sizes: See there.
    """

    def __init__(self, weights: Tensor, plan: SplitPlan | None, sizes: Sequence[int] = ()) -> None:
        super().__init__(weights, plan, sizes=sizes)
        self._plan_given, self._num = plan or (), len(weights)
        self._arguments: list[tuple[Callable[..., Any], dict[str, Any]]] = []

    def _weighted(self, func: Callable[..., Any], options: dict[str, Any]) -> Tensor:
        self._arguments.append((func, dict(options)))
        return super()._weighted(func, options)

    def own(self, losses: Tensor) -> None:
        """Match rows to samples by equal loss values ``(B,)``, which ``sample_losses=`` gave.

        Losses that two samples have in common tell nothing of their rows' order.
        """
        if len(set(losses.tolist())) < self._num:
            return
        for term in self.calls:
            rows = term.rows.reshape(-1)
            same = rows.shape == losses.shape and torch.equal(rows, losses.to(rows))
            term.owners = torch.arange(self._num).view(term.rows.shape) if same else None

    def _calls_of_torch(self) -> Sequence[LossCall | None]:
        """What is known of the rows of each of torch's losses."""
        return self.calls

    def labels_and_predictions(self) -> tuple[list[Number | None], list[Number | None]]:
        """For each sample, what all calls with one row a sample say alike; classes count before values."""
        found: list[tuple[Reading, list[int]]] = []
        for term, (func, options) in zip(self._calls_of_torch(), self._arguments, strict=True):
            if term is None or term.owners is None or term.owners.numel() != _num_owners(term):
                continue
            reading = read_call(func, options, term.owners.numel())
            if reading is not None:
                found.append((reading, term.owners.reshape(-1).tolist()))
        if any(reading.is_class for reading, _ in found):
            found = [pair for pair in found if pair[0].is_class]
        labels = [(owners, reading.numbers(reading.label)) for reading, owners in found]
        predictions = [(owners, reading.numbers(reading.prediction)) for reading, owners in found]
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
        for term, (func, options) in zip(self.calls, self._arguments, strict=True):
            if term.owners is None or not term.entering.requires_grad:
                continue
            (pull,) = gradient([loss], [term.entering], retain_graph=True)
            share = term.sums(pull * term.entering.detach())
            total += (share * self._scale(term, pull, shares_of(func, options))).to(total.device)
        return plain_numbers(total.to(loss.dtype))

    def _scale(self, term: LossCall, pull: Tensor, shares: Tensor | None) -> Tensor | int:
        """What turns a sample's share of the batch's loss into its loss alone."""
        if shares is not None:
            shares = shares.expand(term.rows.shape).double()
            return shares.sum() / term.sums(shares)
        return 1 if bool((pull == 1).all()) else _num_owners(term)


class WatchedOwnRows(WatchedLosses, OwnRows):
    """The same, where the rows were found in the loss's graph: some may be those of torch's losses."""

    def _calls_of_torch(self) -> Sequence[LossCall | None]:
        places = {(term.rows.data_ptr(), term.rows.shape): term for term in self.calls}
        return [places.get((rows.data_ptr(), rows.shape)) for rows in self.rows_of_torch]

    def own_losses(self, loss: Tensor) -> list[float | None]:
        """For each sample its share of the batch's loss, times the batch's size; without penalties.

        Args:
            loss: The batch's training loss, with its graph.
        """
        terms = [term for term in self.calls if term.owners is not None and term.entering.requires_grad]
        pulls = gradient([loss], [term.entering for term in terms], retain_graph=True)
        shares = [term.sums(pull * term.entering.detach()) for term, pull in zip(terms, pulls, strict=True)]
        return plain_numbers(self._num * sum(shares, torch.zeros(self._num)).to(loss.dtype))


def watched_under(plan: SplitPlan | None, weights: Tensor, sizes: Sequence[int] = ()) -> WatchedLosses:
    """What notes the losses of a step under a plan, for weights ``(B,)`` of ones."""
    return (WatchedOwnRows if is_own(plan) else WatchedLosses)(weights, plan, sizes)


def _num_owners(term: LossCall) -> int:
    """How many samples have rows: all of the batch, or those of one of its loaders."""
    return 0 if term.owners is None else len({*term.owners.reshape(-1).tolist()})


def _agreed(said: list[tuple[list[int], list[Number | None]]], num: int) -> list[Number | None]:
    """What several calls say of each sample, where all that speak of it say the same."""
    found: list[set[Number | None]] = [set() for _ in range(num)]
    for owners, values in said:
        for owner, value in zip(owners, values, strict=True):
            found[owner].add(value)
    return [next(iter(values)) if len(values) == 1 else None for values in found]
