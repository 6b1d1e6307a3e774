# SPDX-License-Identifier: Apache-2.0
"""Run the user's own ``training_step`` again, outside the training loop, and leave no trace of it."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sgdclean.base.errors import LossSplitError
from lightning_sgdclean.losses.apart import SamplesApart
from lightning_sgdclean.losses.lookups import RefusedLookups
from lightning_sgdclean.losses.module_state import Attributes
from lightning_sgdclean.losses.other_labels import LabelledWeights, OtherLabels
from lightning_sgdclean.losses.running_statistics import BatchStatistic, RunningStatistics
from lightning_sgdclean.losses.weighting import Plan, SampleWeights, Term

SampleLosses = Callable[[Any, Any], Tensor]


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


@contextmanager
def untouched_module(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Leave the module as it was found: parameters, buffers, modes, metric states, its lists.

    Yields:
        A callable that restores all but parameters and buffers already now, so that a module that
        collects its losses in a list does not collect those of every replayed step.
    """
    attributes = Attributes(module)
    owners = [(part, name, buffer) for part in module.modules() for name, buffer in part._buffers.items()]
    tensors = [*module.parameters(), *(buffer for *_, buffer in owners if buffer is not None)]
    contents = [tensor.detach().clone() for tensor in tensors]
    try:
        yield attributes.restore
    finally:
        attributes.restore()
        for part, name, buffer in owners:
            part._buffers[name] = buffer
        with torch.no_grad():
            for tensor, content in zip(tensors, contents, strict=True):
                tensor.copy_(content)


@contextmanager
def logging_to(module: Any, receive: Callable[..., None]) -> Iterator[None]:
    """Within the block ``self.log`` and ``self.log_dict`` of the module go to ``receive(name, value, **options)``."""

    def log_dict(dictionary: Any, *args: Any, **options: Any) -> None:
        for name, value in dictionary.items():
            receive(name, value, *args, **options)

    module.__dict__.update(log=receive, log_dict=log_dict)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            module.__dict__.pop(name, None)


def eagerly() -> AbstractContextManager[Any]:
    """Run compiled parts of the module as they were written: what was compiled without our watchers passes by them."""
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


def _ignore(*_: Any, **__: Any) -> None:
    """Log nowhere."""


def takes_batch_idx(step: Callable[..., Any]) -> bool:
    """Whether ``training_step`` or ``validation_step`` wants a ``batch_idx``, as Lightning decides it."""
    parameters = inspect.signature(step).parameters
    return "batch_idx" in parameters or len(parameters) >= 2


@dataclass
class Evaluated:
    """One training loss with its graph; running statistics that it moved, and read; loss calls that were seen."""

    loss: Tensor
    updates: list[BatchStatistic]
    terms: list[Term]
    leaves: dict[str, Tensor] = field(default_factory=dict)


def training_loss(
    module: Any,
    batch: Any,
    batch_idx: int,
    weights: Tensor,
    surroundings: Surroundings,
    sample_losses: SampleLosses | None = None,
    samples_apart: bool = False,
    plan: Plan | None = None,
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
    norms = SamplesApart() if samples_apart else RunningStatistics(module)
    weighing = SampleWeights(weights, plan, references)
    if others is not None:
        weighing = LabelledWeights(weights, plan, references, others)
    with eagerly(), logging_to(module, _ignore), surroundings.train_context(), norms, RefusedLookups(module):
        if sample_losses is not None:
            loss = _mean_of(sample_losses(module, batch), weights)
        else:
            with weighing:
                loss = _loss_of_step(module, batch, batch_idx)
    return Evaluated(loss, norms.updates, weighing.terms, norms.leaves)


def weighted_training_loss(
    module: Any,
    batch: Any,
    batch_idx: int,
    weights: Tensor,
    surroundings: Surroundings,
    sample_losses: SampleLosses | None,
    plan: Plan | None,
) -> tuple[Tensor, list[Term]]:
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
            return _loss_of_step(module, batch, batch_idx), weighing.terms


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
