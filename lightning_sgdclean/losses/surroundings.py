# SPDX-License-Identifier: Apache-2.0
"""What stands for the Trainer around a module, and what is put back of its optimizer."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sgdclean.base.lightning import silent_logger
from lightning_sgdclean.losses.contents import write_changed
from lightning_sgdclean.losses.manual_steps import collecting


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
        widen: Brings a prepared batch to the precision to compute in.
        manual_steps: Context in which a ``training_step`` that optimizes by itself hands its losses over instead; None
            where Lightning optimizes.
    """

    device: torch.device
    prepare: Callable[[Any, int], Any]
    train_context: Callable[[], AbstractContextManager[Any]]
    val_context: Callable[[], AbstractContextManager[Any]]
    set_clock: Callable[[int, int], None]
    precision: str
    as_stage: Callable[[str], AbstractContextManager[Any]]
    widen: Callable[[Any], Any] = lambda batch: batch
    manual_steps: Callable[[], AbstractContextManager[Any]] | None = None


def surroundings_of(trainer: Any, module: Any) -> Surroundings:
    """What ``module`` saw around its steps under this Trainer."""
    epochs, loop, manual = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop, None
    steps = loop.automatic_optimization.optim_progress.optimizer.step.total
    if not module.automatic_optimization:
        steps = loop.manual_optimization.optim_step_progress.total
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        (optimizer,), wrappers = trainer.optimizers, trainer.strategy._lightning_optimizers
        manual = partial(collecting, module, optimizer, wrappers, schedulers)

    def prepare(batch: Any, dataloader_idx: int) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)

    def set_clock(epoch: int, global_step: int) -> None:
        epochs.completed, steps.completed = epoch, global_step

    @contextmanager
    def as_stage(stage: str) -> Iterator[None]:
        loggers, found, clock = trainer.loggers, trainer.state.stage, (epochs.completed, steps.completed)
        put_options_back = _options_of(trainer)
        trainer.loggers = [silent_logger(trainer)] if loggers else []
        setattr(trainer, "training" if stage == "train" else "validating", True)
        try:
            yield
        finally:
            trainer.loggers, trainer.state.stage = loggers, found
            set_clock(*clock)
            put_options_back()

    return Surroundings(
        device=trainer.strategy.root_device,
        prepare=prepare,
        train_context=trainer.precision_plugin.train_step_context,
        val_context=trainer.precision_plugin.val_step_context,
        set_clock=set_clock,
        precision=str(trainer.precision),
        as_stage=as_stage,
        manual_steps=manual,
    )


def _options_of(trainer: Any) -> Callable[[], None]:
    """Note the optimizers' options and the schedulers' state, which a ``training_step`` may move; puts them back."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return _noted([*groups, *(vars(config.scheduler) for config in trainer.lr_scheduler_configs)])


def _noted(settings: list[dict[str, Any]]) -> Callable[[], None]:
    """Note settings, and what the tensors and lists among them hold; puts them back."""
    noted = [(live, dict(live)) for live in settings]
    values = [value for _, saved in noted for value in saved.values()]
    tensors = [(value, value.detach().clone()) for value in values if isinstance(value, Tensor)]
    lists = [(value, value.copy()) for value in values if type(value) is list]

    def put_back() -> None:
        for live, saved in noted:
            live.clear()
            live.update(saved)
        for content, saved_content in lists:
            content[:] = saved_content
        for tensor, saved_tensor in tensors:
            write_changed(tensor, saved_tensor)

    return put_back


@contextmanager
def untouched_options(optimizer: Optimizer) -> Iterator[None]:
    """Within the block the optimizer makes no step; what is written to its groups meanwhile is put back."""
    put_options_back = _noted(optimizer.param_groups)
    own: dict[str, Any] = {name: vars(optimizer)[name] for name in ("step", "zero_grad") if name in vars(optimizer)}
    vars(optimizer).update(step=ignore, zero_grad=ignore)
    try:
        yield
    finally:
        for name in ("step", "zero_grad"):
            del vars(optimizer)[name]
        vars(optimizer).update(own)
        put_options_back()


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


def ignore(*_: Any, **__: Any) -> None:
    """Log nowhere."""
