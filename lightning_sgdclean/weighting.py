# SPDX-License-Identifier: Apache-2.0
"""Sample weights inside the loss of an unmodified ``training_step``, by watching torch's loss functions."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_CLASS_LOSSES = (functional.cross_entropy, functional.nll_loss)
_LOSSES = (
    *_CLASS_LOSSES,
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
    functional.kl_div,
    functional.gaussian_nll_loss,
    functional.poisson_nll_loss,
)
_SIGNATURES: dict[Callable[..., Any], inspect.Signature] = {loss: inspect.signature(loss) for loss in _LOSSES}


class SampleWeights(TorchFunctionMode):
    """Multiplies each sample's rows of every torch loss by the sample's weight; divisors stay as they were.

    The loss keeps its value to the last bit; only its derivatives learn of the weights.

    Args:
        weights: ``(B,)``, all one, requiring a gradient.

    Attributes:
        unsplit: Loss calls left alone, in words, because their rows are not one block a sample.
    """

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self._weights = weights
        self.unsplit: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass everything on but the losses."""
        kwargs = kwargs or {}
        if func not in _SIGNATURES:
            return func(*args, **kwargs)
        call = _SIGNATURES[func].bind(*args, **kwargs)
        call.apply_defaults()
        options = call.arguments
        if options.get("size_average") is not None or options.get("reduce") is not None:
            self.unsplit.append(f"{func.__name__} with the old size_average= or reduce=")
            return func(*args, **kwargs)
        return self._weighted(func, options)

    def _weighted(self, func: Callable[..., Any], options: dict[str, Any]) -> Any:
        reduction = options["reduction"]
        rows = func(**{**options, "reduction": "none"})
        num = self._weights.shape[0]
        # Of a batch of one sample, collated or not, every row is that sample's.
        if num > 1 and (rows.ndim == 0 or rows.shape[0] != num):
            got = "a single number" if rows.ndim == 0 else f"{rows.shape[0]} rows"
            self.unsplit.append(f"{func.__name__} made {got} of a batch of {num} samples")
            return rows if reduction == "none" else func(**options)
        weights = self._weights[0] if num == 1 else self._weights.view(-1, *[1] * (rows.ndim - 1))
        weighted = rows * weights
        if reduction == "none":
            return weighted
        whole = func(**options)
        total = weighted.sum()
        if reduction != "sum":
            total = total / _divisor(func, options, rows)
        return whole.detach() + (total - total.detach())


def _divisor(func: Callable[..., Any], options: dict[str, Any], rows: Tensor) -> Tensor | int:
    if options["reduction"] == "batchmean":
        return rows.shape[0]
    target = options["target"] if func in _CLASS_LOSSES else None
    if target is None or target.is_floating_point():
        return rows.numel()
    counted = target != options["ignore_index"]
    if options["weight"] is None:
        return int(counted.sum())
    class_weights: Tensor = options["weight"]
    return torch.where(counted, class_weights[target.clamp(min=0)], 0).sum()
