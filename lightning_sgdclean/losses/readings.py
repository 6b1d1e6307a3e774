# SPDX-License-Identifier: Apache-2.0
"""What a loss call says of a sample: the label that it held the sample to, and what the model predicted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

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
