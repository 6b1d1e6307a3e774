# SPDX-License-Identifier: Apache-2.0
"""The user's own `training_step` evaluated again, outside the training loop, under what stands for the Trainer."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sgdclean.base.errors import LossSplitError
from lightning_sgdclean.base.lightning import silent_logger
from lightning_sgdclean.base.options import SampleLosses
from lightning_sgdclean.data.batches import SIXTEEN_BITS, as_float32
from lightning_sgdclean.losses.kernels import RefusedLookups
from lightning_sgdclean.losses.module_state import _ignore, eagerly, logging_to
from lightning_sgdclean.losses.running_statistics import BatchStatistic, IndependentSamples, RunningStatistics
from lightning_sgdclean.losses.weighting import LabelledWeights, LossCall, OtherLabels, SampleWeights, SplitPlan


@dataclass(frozen=True)
class Surroundings:
    """What a LightningModule sees around its steps, as callables: the later stages need no Trainer.

    Attributes:
        device: Where the module and its batches belong.
        prepare: ``(batch, dataloader_idx)`` -> the batch converted, moved and through the transfer hooks.
        train_context: Precision context of a training step.
        val_context: Precision context of a validation step.
        set_clock: ``(epoch, global_step)`` that ``current_epoch`` and ``global_step`` are to show.
        precision: The Trainer's, e.g. ``"32-true"`` or ``"bf16-mixed"``.
        as_stage: Context in which the Trainer claims to be ``"train"`` or ``"validate"`` and logs nowhere.
    """

    device: torch.device
    prepare: Callable[[Any, int], Any]
    train_context: Callable[[], AbstractContextManager[Any]]
    val_context: Callable[[], AbstractContextManager[Any]]
    set_clock: Callable[[int, int], None]
    precision: str
    as_stage: Callable[[str], AbstractContextManager[Any]]


def takes_batch_idx(step: Callable[..., Any]) -> bool:
    """Whether ``training_step`` or ``validation_step`` wants a ``batch_idx``, as Lightning decides it."""
    parameters = inspect.signature(step).parameters
    return "batch_idx" in parameters or len(parameters) >= 2


@dataclass
class Evaluated:
    """One training loss with its graph; running statistics that it moved, and read; loss calls that were seen."""

    loss: Tensor
    updates: list[BatchStatistic]
    calls: list[LossCall]
    leaves: dict[str, Tensor] = field(default_factory=dict)


def training_loss(
    module: Any,
    batch: Any,
    batch_idx: int,
    weights: Tensor,
    surroundings: Surroundings,
    sample_losses: SampleLosses | None = None,
    samples_apart: bool = False,
    plan: SplitPlan | None = None,
    references: dict[int, Tensor] | None = None,
    others: OtherLabels | None = None,
) -> Evaluated:
    """The loss of ``training_step`` as a function of parameters and sample weights.

    Args:
        module: The LightningModule, in the state that the loss is wanted for.
        batch: As ``training_step`` gets it.
        batch_idx: Likewise.
        weights: ``(B,)``, all one.
        surroundings: What stands for the Trainer.
        sample_losses: The user's own ``(module, batch) -> (B,)`` instead of ``training_step``.
        samples_apart: Whether BatchNorm and dropout are to be fixed, so that no sample feels another.
        plan: Which rows of which loss call belong to which sample.
        references: As :class:`lightning_sgdclean.losses.weighting.SampleWeights`.
        others: Labels that the samples could have had.

    Raises:
        LossSplitError: If ``sample_losses`` does not give one number a sample, or there is no loss.
    """
    norms = IndependentSamples() if samples_apart else RunningStatistics(module)
    weighing = SampleWeights(weights, plan, references)
    if others is not None:
        weighing = LabelledWeights(weights, plan, references, others)
    with eagerly(), logging_to(module, _ignore), surroundings.train_context(), norms, RefusedLookups(module):
        if sample_losses is not None:
            loss = _mean_of(sample_losses(module, batch), weights)
        else:
            with weighing:
                loss = _loss_of_step(module, batch, batch_idx)
    return Evaluated(loss, norms.updates, weighing.calls, norms.leaves)


def weighted_training_loss(
    module: Any,
    batch: Any,
    batch_idx: int,
    weights: Tensor,
    surroundings: Surroundings,
    sample_losses: SampleLosses | None,
    plan: SplitPlan | None,
) -> tuple[Tensor, list[LossCall]]:
    """The loss with samples' weights in it, to be trained on: first derivatives by the parameters, any kernel.

    Args:
        module: As in :func:`training_loss`, and so the rest.
        batch: See there.
        batch_idx: See there.
        weights: ``(B,)``, zero or one.
        surroundings: See there.
        sample_losses: See there.
        plan: See there.

    Returns:
        The loss, and the loss calls that were seen.
    """
    weighing = SampleWeights(weights, plan)
    with eagerly(), logging_to(module, _ignore), surroundings.train_context():
        if sample_losses is not None:
            return _mean_of(sample_losses(module, batch), weights), []
        with weighing:
            return _loss_of_step(module, batch, batch_idx), weighing.calls


def plain_training_loss(module: Any, batch: Any, batch_idx: int, surroundings: Surroundings) -> Tensor:
    """The loss of ``training_step`` as training had it: nothing watched, nothing weighted, any kernel.

    Raises:
        LossSplitError: If there is none.
    """
    with logging_to(module, _ignore), surroundings.train_context():
        return _loss_of_step(module, batch, batch_idx)


def _loss_of_step(module: Any, batch: Any, batch_idx: int) -> Tensor:
    step = module.training_step
    output = step(batch, batch_idx) if takes_batch_idx(step) else step(batch)
    loss = output["loss"] if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise LossSplitError(f"training_step gave {type(loss).__name__} where a loss was recorded, on the same batch.")
    return loss


def _mean_of(losses: Tensor, weights: Tensor) -> Tensor:
    if losses.shape != weights.shape:
        raise LossSplitError(
            f"sample_losses= gave a tensor of shape {tuple(losses.shape)} for a batch of {len(weights)} samples; "
            f"expected ({len(weights)},), one loss a sample, whose mean is the training loss."
        )
    return (losses * weights).sum() / len(weights)


def surroundings_of(trainer: Any, module: Any) -> Surroundings:
    """What ``module`` saw around its steps under this Trainer."""
    epochs = trainer.fit_loop.epoch_progress.current
    steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total

    def prepare(batch: Any, dataloader_idx: int) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)

    def set_clock(epoch: int, global_step: int) -> None:
        epochs.completed, steps.completed = epoch, global_step

    @contextmanager
    def as_stage(stage: str) -> Iterator[None]:
        loggers, found, clock = trainer.loggers, trainer.state.stage, (epochs.completed, steps.completed)
        trainer.loggers = [silent_logger(trainer)] if loggers else []
        setattr(trainer, "training" if stage == "train" else "validating", True)
        try:
            yield
        finally:
            trainer.loggers, trainer.state.stage = loggers, found
            set_clock(*clock)

    return Surroundings(
        device=trainer.strategy.root_device,
        prepare=prepare,
        train_context=trainer.precision_plugin.train_step_context,
        val_context=trainer.precision_plugin.val_step_context,
        set_clock=set_clock,
        precision=str(trainer.precision),
        as_stage=as_stage,
    )


def is_low(surroundings: Surroundings, module: nn.Module) -> bool:
    """Whether the run computes in 16 bits, by autocast or by its parameters."""
    return surroundings.precision.startswith(("16", "bf16")) or any(
        param.dtype in SIXTEEN_BITS for param in module.parameters()
    )


def in_half(surroundings: Surroundings) -> bool:
    """Whether that is float16, whose derivatives overflow as well."""
    return surroundings.precision.startswith("16")


def widened(module: nn.Module, surroundings: Surroundings) -> AbstractContextManager[Surroundings]:
    """:func:`in_float32` for a run in 16 bits; any other keeps its surroundings."""
    return in_float32(module, surroundings) if is_low(surroundings, module) else nullcontext(surroundings)


@contextmanager
def in_float32(module: nn.Module, surroundings: Surroundings) -> Iterator[Surroundings]:
    """Within the block the module's parameters and buffers are float32, and nothing is cast down.

    Yields:
        Surroundings to evaluate the module in.
    """
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.dtype in SIXTEEN_BITS]
    dtypes = [tensor.dtype for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield replace(
            surroundings,
            prepare=lambda batch, number: as_float32(surroundings.prepare(batch, number)),
            train_context=_uncast,
            val_context=_uncast,
            precision="32-true",
        )
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


@contextmanager
def _uncast() -> Iterator[None]:
    """No autocast on any device, and new tensors in float32."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)
