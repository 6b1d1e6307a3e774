# SPDX-License-Identifier: Apache-2.0
"""A module in training mode whose samples do not feel each other, for probes of who owns which loss."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_sgdclean.losses.running_statistics import BatchStatistic

# Rows of dropout's mask shift with the lengths of packed sequences, and rrelu draws for negative entries only.
_SIGNATURES = {
    function: inspect.signature(function)
    for function in (
        nn.functional.batch_norm,
        nn.functional.dropout,
        nn.functional.dropout1d,
        nn.functional.dropout2d,
        nn.functional.dropout3d,
        nn.functional.alpha_dropout,
        nn.functional.feature_alpha_dropout,
        nn.functional.rrelu,
    )
}
_RECURRENT: tuple[Callable[..., Any], ...] = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


class SamplesApart(TorchFunctionMode):
    """Lets norms use running statistics, or none, where they would use the batch's, and draws nothing.

    All else stays as in training, so that what a ``training_step`` does only there, such as mixup, is seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[BatchStatistic] = []
        self.leaves: dict[str, torch.Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass everything on but what ties samples together."""
        kwargs = kwargs or {}
        if func in _RECURRENT:
            return func(*(0.0 if isinstance(argument, float) else argument for argument in args), **kwargs)  # dropout
        if func not in _SIGNATURES:
            return func(*args, **kwargs)
        call = _SIGNATURES[func].bind(*args, **kwargs)
        call.apply_defaults()
        options = call.arguments
        if func is nn.functional.batch_norm and options["training"] and options["running_mean"] is None:
            zeros = options["input"].new_zeros(options["input"].shape[1])
            options |= {"running_mean": zeros, "running_var": zeros + 1}
        return func(**options | {"training": False})
