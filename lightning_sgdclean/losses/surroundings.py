# SPDX-License-Identifier: Apache-2.0
"""Make a Trainer into the few callables that a replay needs of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_sgdclean.base.lightning import silent_logger
from lightning_sgdclean.losses.evaluate import Surroundings


def shown_bar(trainer: Any) -> Any:
    """The Trainer's progress bar, or None where it shows none, so that we show none either."""
    bar = trainer.progress_bar_callback
    return None if bar is None or getattr(bar, "is_disabled", False) else bar


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
