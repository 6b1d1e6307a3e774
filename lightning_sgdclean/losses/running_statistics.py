# SPDX-License-Identifier: Apache-2.0
"""BatchNorm's and InstanceNorm's running statistics as part of the derivative, and buffers that are not followed.

Training moves running statistics by ``b <- (1 - m) b + m * statistic(batch)`` where autograd does not look, and
evaluation reads them through an operation that has no gradient for them. Both are written out here.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_sgdclean.base.errors import UnsupportedOperationError, UnsupportedTrainingError
from lightning_sgdclean.losses.loss_functions import passed_on
from lightning_sgdclean.losses.loss_inputs import without_tangent
from lightning_sgdclean.losses.stopped_values import TeachersOutputs

_SIGNATURES = {norm: inspect.signature(norm) for norm in (nn.functional.batch_norm, nn.functional.instance_norm)}


@dataclass
class BatchStatistic:
    """One update of one running statistic: which buffer, how far, towards what (with its graph)."""

    name: str
    momentum: float
    value: Tensor


class RunningStatistics(TorchFunctionMode):
    """Watches ``batch_norm`` and ``instance_norm``.

    A call that moves the running statistics adds its batch mean and unbiased variance to ``updates``, in
    order. One that reads them is written out with the statistics as leaves, found in ``leaves``; its value
    stays that of torch's own kernel, to the last bit.

    Args:
        module: The LightningModule.
        stopped: What watches its teachers, entered before; None where there are none.
    """

    def __init__(self, module: nn.Module, stopped: TeachersOutputs | None = None) -> None:
        super().__init__()
        self.stopped = stopped
        self._names = {id(buffer): name for name, buffer in module.named_buffers()}
        self.updates: list[BatchStatistic] = []
        self.leaves: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass everything on but norms over buffers of the module."""
        kwargs = kwargs or {}
        if func not in _SIGNATURES:
            return passed_on(func, args, kwargs)
        options = _options(func, args, kwargs)
        mean_name = self._names.get(id(options["running_mean"]))
        var_name = self._names.get(id(options["running_var"]))
        output: Tensor = func(*args, **kwargs)
        if mean_name is None or var_name is None:
            return output
        if options["training"] if func is nn.functional.batch_norm else options["use_input_stats"]:
            self._note(func, options, mean_name, var_name)
            return output
        written = self._written_out(options, mean_name, var_name)
        if self.stopped is not None:
            return self.stopped.stand_for(output, written)
        return output.detach() + (written - written.detach())

    def _note(self, func: Callable[..., Any], options: dict[str, Any], mean_name: str, var_name: str) -> None:
        batch = without_tangent(options["input"]).to(options["running_mean"].dtype)  # nobody asks how they move
        per_sample = func is nn.functional.instance_norm  # each sample has statistics of its own: their mean counts
        dims = [dim for dim in range(batch.ndim) if dim != 1 and not (per_sample and dim == 0)]
        mean, var = batch.mean(dims), batch.var(dims, unbiased=True)
        if per_sample:
            mean, var = mean.mean(0), var.mean(0)
        self.updates.append(BatchStatistic(mean_name, options["momentum"], mean))
        self.updates.append(BatchStatistic(var_name, options["momentum"], var))

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
        if torch.is_grad_enabled() and any(update.name == name for update in self.updates):
            raise UnsupportedOperationError(
                f"A norm layer moves its running statistics ({name!r}) and then reads them in one training_step, which "
                "is not followed. Evaluate it in one mode, or read under torch.no_grad()."
            )
        if name not in self.leaves:
            self.leaves[name] = buffer.detach().clone().requires_grad_()
            if self.stopped is not None:
                self.stopped.track(self.leaves[name])
        return self.leaves[name]


def _options(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    call = _SIGNATURES[func].bind(*args, **kwargs)
    call.apply_defaults()
    return dict(call.arguments)


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


# Rows of dropout's mask shift with the lengths of packed sequences, and rrelu draws for negative entries only.
_MIXING = {
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


class IndependentSamples(TorchFunctionMode):
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
        if func not in _MIXING:
            return func(*args, **kwargs)
        call = _MIXING[func].bind(*args, **kwargs)
        call.apply_defaults()
        options = call.arguments
        if func is nn.functional.batch_norm and options["training"] and options["running_mean"] is None:
            zeros = options["input"].new_zeros(options["input"].shape[1])
            options |= {"running_mean": zeros, "running_var": zeros + 1}
        return func(**options | {"training": False})


def check_moved_buffers(
    index: int,
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    updates: list[BatchStatistic],
    scratch: frozenset[str] = frozenset(),
) -> None:
    """Did the step move buffers only as the updates that are followed backwards say?

    Buffers of integers and of bool, such as counters, carry no derivative and may move.

    Args:
        index: The step's number, for the message.
        before: The buffers as they were recorded before the step, by name.
        after: Likewise after it.
        updates: Those that the step's batches made when it was run again, in order.
        scratch: Buffers that nothing reads, which may move.

    Raises:
        UnsupportedTrainingError: Naming the first buffer that moved otherwise.
    """
    followed = {update.name for update in updates}
    for name, was in before.items():
        if (not was.is_floating_point() and not was.is_complex()) or name in scratch:
            continue
        if name not in followed:
            if not torch.equal(was.nan_to_num(), after[name].nan_to_num()):
                raise UnsupportedTrainingError(
                    f"Training moves the buffer {name!r} (step {index}), which carries influence that is not "
                    "followed; only the running statistics of BatchNorm and InstanceNorm are. Remove it, or keep it "
                    "fixed in the retraced epochs."
                )
        elif not torch.allclose(
            _moved(name, was, updates), after[name], rtol=_tolerance(was), atol=_tolerance(was) / 100
        ):
            raise UnsupportedTrainingError(
                f"Step {index} moves the running statistics {name!r} otherwise than the norm layer's calls in "
                "training_step say. Likely causes: activation checkpointing, which runs BatchNorm once more within "
                "backward (move it out of the checkpointed part), or code that writes into them."
            )


def buffer_is_read(name: str, where: str) -> UnsupportedTrainingError:
    """The error for a buffer that training moves, and that is read in spite of that, ``where`` in words."""
    return UnsupportedTrainingError(
        f"Training moves the buffer {name!r}, and {where} reads it, so it carries influence that is not followed. Only "
        "the running statistics of BatchNorm and InstanceNorm are followed, and buffers that are overwritten before "
        "they are read carry none. Remove it, or keep it fixed in the retraced epochs."
    )


def _tolerance(buffer: Tensor) -> float:
    return max(1e-3, 4 * torch.finfo(buffer.dtype).eps)


def _moved(name: str, was: Tensor, updates: list[BatchStatistic]) -> Tensor:
    for update in updates:
        if update.name == name:
            was = (1 - update.momentum) * was + update.momentum * update.value.detach().to(was)
    return was
