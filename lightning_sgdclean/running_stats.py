# SPDX-License-Identifier: Apache-2.0
"""BatchNorm's running statistics as part of the derivative: moved by training, read by evaluation.

Training moves them by ``b <- (1 - m) b + m * statistic(batch)`` where autograd does not look, and
evaluation reads them through an operation that has no gradient for them. Both are written out here.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SIGNATURE = inspect.signature(nn.functional.batch_norm)


@dataclass
class BatchStatistic:
    """One update of one running statistic: which buffer, how far, towards what (with its graph)."""

    name: str
    momentum: float
    value: Tensor


class RunningStatistics(TorchFunctionMode):
    """Watches ``batch_norm``.

    In training mode each call adds its batch mean and unbiased variance to ``updates``, in order. In
    evaluation mode the call is written out, with the running statistics as leaves found in ``leaves``.
    """

    def __init__(self, module: nn.Module, collect: bool = True) -> None:
        super().__init__()
        self._names = {id(buffer): name for name, buffer in module.named_buffers()}
        self._collect = collect
        self.updates: list[BatchStatistic] = []
        self.leaves: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass everything on but ``batch_norm`` over buffers of the module."""
        kwargs = kwargs or {}
        if func is not nn.functional.batch_norm or not self._collect:
            return func(*args, **kwargs)
        call = _SIGNATURE.bind(*args, **kwargs)
        call.apply_defaults()
        options = call.arguments
        mean_name = self._names.get(id(options["running_mean"]))
        var_name = self._names.get(id(options["running_var"]))
        if mean_name is None or var_name is None:
            return func(*args, **kwargs)
        if options["training"]:
            output = func(*args, **kwargs)
            self._note(options["input"], mean_name, var_name, options["momentum"])
            return output
        return self._written_out(options, mean_name, var_name)

    def _note(self, batch: Tensor, mean_name: str, var_name: str, momentum: float) -> None:
        dims = [dim for dim in range(batch.ndim) if dim != 1]
        self.updates.append(BatchStatistic(mean_name, momentum, batch.mean(dims)))
        self.updates.append(BatchStatistic(var_name, momentum, batch.var(dims, unbiased=True)))

    def _written_out(self, options: dict[str, Any], mean_name: str, var_name: str) -> Tensor:
        batch = options["input"]
        shape = [1, -1] + [1] * (batch.ndim - 2)
        mean = self._leaf(mean_name, options["running_mean"])
        var = self._leaf(var_name, options["running_var"])
        output: Tensor = (batch - mean.view(shape)) * torch.rsqrt(var.view(shape) + options["eps"])
        if options["weight"] is not None:
            output = output * options["weight"].view(shape)
        if options["bias"] is not None:
            output = output + options["bias"].view(shape)
        return output.to(batch.dtype)

    def _leaf(self, name: str, buffer: Tensor) -> Tensor:
        if name not in self.leaves:
            self.leaves[name] = buffer.detach().clone().requires_grad_()
        return self.leaves[name]


def pull_back_updates(
    updates: list[BatchStatistic], adjoint: dict[str, Tensor]
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Transpose ``b <- (1 - m) b + m * value`` over one batch's updates, last first.

    Args:
        updates: In the order in which they were made.
        adjoint: ``nu`` after the batch, by buffer.

    Returns:
        The updates' values, the cotangent of each (``m * nu``), and ``nu`` before the batch.
    """
    before = dict(adjoint)
    values, cotangents = [], []
    for update in reversed(updates):
        nu = before.get(update.name)
        if nu is None:
            continue
        values.append(update.value)
        cotangents.append((update.momentum * nu).to(update.value.dtype))
        before[update.name] = (1 - update.momentum) * nu
    return values, cotangents, before
