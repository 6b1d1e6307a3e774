# SPDX-License-Identifier: Apache-2.0
"""What must hold of a Trainer and its module for a run to be followed: one function a precondition."""

import inspect
import warnings
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_sgdclean.base.errors import ObjectiveError, SampleIdError, SGDInfluenceWarning, UnsupportedTrainingError
from lightning_sgdclean.base.lightning import LIGHTNING_MODULES


def check_module(trainer: Any, module: Any, has_objective: bool) -> None:
    """Before anything is set up: the module's own ways.

    Raises:
        UnsupportedTrainingError: Manual optimization, ``dataloader_iter`` or several processes.
        ObjectiveError: Nothing to validate by.
    """
    if not module.automatic_optimization:
        raise UnsupportedTrainingError(
            "The module optimizes manually (automatic_optimization=False), so what a step is made of cannot be seen. "
            "Return the loss from training_step and let Lightning optimize."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise UnsupportedTrainingError(
            "training_step takes dataloader_iter, so batches cannot be told apart. Take (batch, batch_idx) instead."
        )
    if trainer.world_size > 1:
        raise UnsupportedTrainingError(
            f"Training runs in {trainer.world_size} processes; only one is followed. Use Trainer(devices=1)."
        )
    if not has_objective and str(type(module).validation_step.__module__).startswith(LIGHTNING_MODULES):
        raise ObjectiveError("The module has no validation_step. Write one that logs the loss, or give objective=.")


def check_alone(trainer: Any, kind: type) -> None:
    """Before anything is set up: two of them would take each other's batches.

    Raises:
        UnsupportedTrainingError: The Trainer has several callbacks of this kind.
    """
    num = sum(isinstance(callback, kind) for callback in trainer.callbacks)
    if num > 1:
        raise UnsupportedTrainingError(
            f"The Trainer has {num} {kind.__name__} callbacks; only one can watch a training. For several objectives "
            "give it objective={name: callable, ...}; for other windows, engines or options rank the recorded run "
            "again: lightning_sgdclean.retrace(run_dir, model, ...)."
        )


def check_callbacks(trainer: Any) -> list[str]:
    """Once all callbacks are known: does another one move the weights or the optimizer's groups?

    Returns:
        Names of callbacks that put averaged weights in the place of the trained ones.

    Raises:
        UnsupportedTrainingError: A callback that adds parameters to the optimizer during the run.
    """
    averaging = []
    for callback in trainer.callbacks:
        names = {base.__name__ for base in type(callback).__mro__}
        if "BaseFinetuning" in names:
            raise UnsupportedTrainingError(
                f"{type(callback).__name__} adds parameters to the optimizer during the run, which is not followed. "
                "Give the optimizer all parameters from the start, frozen ones with a learning rate of zero."
            )
        if names & {"StochasticWeightAveraging", "WeightAveraging"}:
            averaging.append(type(callback).__name__)
            warnings.warn(
                f"{type(callback).__name__} replaces the weights when training ends. The ranking is of the weights "
                "after the last optimizer step, not of the averaged ones.",
                SGDInfluenceWarning,
                stacklevel=2,
            )
    return averaging


def best_model_checkpoint(trainer: Any) -> Any:
    """The Trainer's ModelCheckpoint, which must know what is best.

    Raises:
        UnsupportedTrainingError: If there is none, or none that monitors a value and keeps a model.
    """
    callback = trainer.checkpoint_callback
    if callback is None or getattr(callback, "monitor", None) is None or getattr(callback, "save_top_k", 1) == 0:
        found = "no ModelCheckpoint" if callback is None else "a ModelCheckpoint that keeps no best model"
        raise UnsupportedTrainingError(
            f'at="best" ends the walk at the best model, but the Trainer has {found}. '
            'Add ModelCheckpoint(monitor=...) to its callbacks, or use at="last".'
        )
    return callback


def check_train_loader(loader: Any, has_sample_ids: bool, may_keep: bool) -> None:
    """Once the training loader exists.

    Raises:
        SampleIdError: Its samples have no positions, and no ``sample_ids`` names them or they may not be kept.
        UnsupportedTrainingError: Batches arrive in another order than they are drawn, or it is no DataLoader.
    """
    is_stream = not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset)
    if is_stream and has_sample_ids and not may_keep:
        raise SampleIdError(
            f"The training data are a stream ({type(getattr(loader, 'dataset', loader)).__name__}), whose batches can "
            'only be kept, but keep_batches=False. Leave it at "auto".'
        )
    if not isinstance(loader, DataLoader):
        if has_sample_ids:
            return
        raise SampleIdError(
            f"The training data come from a {type(loader).__name__}, not a torch DataLoader, so samples have no "
            "positions. Give sample_ids=, a callable from the batch to its samples' ids."
        )
    if isinstance(loader.dataset, IterableDataset) and not has_sample_ids:
        raise SampleIdError(
            f"{type(loader.dataset).__name__} is an IterableDataset, whose samples have no positions. "
            "Give sample_ids=, a callable from the batch to its samples' ids."
        )
    if not getattr(loader, "in_order", True):
        raise UnsupportedTrainingError(
            "The training loader has in_order=False: batches arrive in another order than they are drawn. "
            "Use in_order=True."
        )


def check_validation(trainer: Any, has_objective: bool, has_loaders: bool) -> None:
    """Before the first step: is there anything to validate on?

    Raises:
        ObjectiveError: If the Trainer never validates and no loaders were given.
    """
    if has_loaders or trainer.enable_validation:
        return
    what = "val_dataloaders=" if has_objective else "a validation loader to fit (or val_dataloaders=)"
    raise ObjectiveError(f"The Trainer has nothing to validate on (no loader, or limit_val_batches=0). Give {what}.")
