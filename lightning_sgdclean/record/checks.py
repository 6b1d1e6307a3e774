# SPDX-License-Identifier: Apache-2.0
"""What must hold of a Trainer and its module for a run to be followed: one function a precondition."""

import inspect
import pkgutil
import warnings
from collections.abc import Callable
from typing import Any

from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset

from lightning_sgdclean.adjoint.optimizers import update_of
from lightning_sgdclean.base.errors import ObjectiveError, SampleIdError, SGDInfluenceWarning, UnsupportedTrainingError
from lightning_sgdclean.ranking.parquet import pyarrow

_LIGHTNING = ("lightning.", "pytorch_lightning.")  # where a hook comes from that nobody has overridden


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Is an option of the callback one of those that there are?"""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_count(name: str, value: Any) -> None:
    """Is an option a number of things?"""
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} must be a whole number, 0 or more, got {value!r}.")


FORMATS = ("csv", "parquet")
FURTHER_COLUMNS = ("label", "prediction", "loss", "source", "by_epoch", "relabel")


def check_objective(objective: Any) -> None:
    """One callable, several by name, or none.

    Raises:
        ValueError: If it is something else.
    """
    several = isinstance(objective, dict)
    if several and not objective:
        raise ValueError("objective is an empty dict; expected callables (pl_module, batch) -> scalar by name.")
    for name, one in objective.items() if several else [("objective", objective)]:
        if not isinstance(name, str) or not name:
            raise ValueError(f"objective has the name {name!r}; expected text.")
        if not callable(one) and (several or one is not None):
            where = f"objective[{name!r}]" if several else "objective"
            raise ValueError(f"{where} must be a callable (pl_module, batch) -> scalar, got {type(one).__name__}.")


def check_columns(columns: Any) -> None:
    """Names of further columns that there are.

    Raises:
        ValueError: If one is unknown.
    """
    unknown = [columns] if isinstance(columns, str) else [name for name in columns if name not in FURTHER_COLUMNS]
    if unknown:
        raise ValueError(f"columns holds {unknown[0]!r}; expected a sequence of some of {', '.join(FURTHER_COLUMNS)}.")


def check_formats(formats: Any) -> None:
    """Files that the ranking can be written as, and what that needs.

    Raises:
        ValueError: If one is unknown.
        ImportError: If pyarrow is needed and not installed.
    """
    unknown = [formats] if isinstance(formats, str) else [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"formats holds {unknown[0]!r}; expected a sequence of some of {', '.join(FORMATS)}.")
    if "parquet" in formats:
        pyarrow()


def check_render(render: Any) -> None:
    """What the page shows of a sample.

    Raises:
        ValueError: If it cannot be called.
    """
    if render is not None and not callable(render):
        raise ValueError(f"render must be a callable from a sample to what is shown, got {type(render).__name__}.")


def loaders_given(given: Any) -> Any:
    """Loaders for the objective, in a list, tuple or dict or alone; one that is an import path, as in YAML, is made.

    Raises:
        ValueError: If something is no loader, or nothing can be found at an import path.
    """
    if isinstance(given, dict):
        return {name: loaders_given(one) for name, one in given.items()}
    if isinstance(given, list | tuple):
        return [loaders_given(one) for one in given]
    found = given
    if isinstance(given, str):
        try:
            found = pkgutil.resolve_name(given)
        except (ValueError, ImportError, AttributeError) as error:
            raise ValueError(
                f"val_dataloaders is {given!r}, at which nothing can be imported ({error}). Expected loaders, or the "
                "import path of a loader or of a function that makes it."
            ) from error
        found = found() if inspect.isroutine(found) else found
    if found is not None and (isinstance(found, str | type) or not hasattr(found, "__iter__")):
        raise ValueError(
            f"val_dataloaders must be loaders such as torch's DataLoader, got {given!r} of type {type(found).__name__}."
        )
    return found


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
    if not has_objective and str(type(module).validation_step.__module__).startswith(_LIGHTNING):
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


def check_optimizers(trainer: Any) -> None:
    """Once the optimizers exist.

    Raises:
        UnsupportedTrainingError: Not exactly one, or one whose step has no transpose.
    """
    optimizers = trainer.optimizers
    if len(optimizers) != 1:
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers) or "none"
        raise UnsupportedTrainingError(
            f"configure_optimizers gave {len(optimizers)} optimizers ({names}); exactly one can be followed. "
            "Put all parameters into groups of one optimizer."
        )
    update_of(optimizers[0])


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


_MODULE_HOOKS = (
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
)
_CALLBACK_HOOKS = ("on_after_backward", "on_before_optimizer_step")


def gradient_hooks(trainer: Any, module: Any) -> list[str]:
    """Hooks of the user's own that could edit gradients, e.g. ``Net.on_before_optimizer_step``."""
    owners = [(module, _MODULE_HOOKS), *((callback, _CALLBACK_HOOKS) for callback in trainer.callbacks)]
    return [
        f"{type(owner).__name__}.{hook}"
        for owner, hooks in owners
        for hook in hooks
        if hook in vars(owner) or not getattr(type(owner), hook).__module__.startswith(_LIGHTNING)
    ]


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


def one_loader(trainer: Any) -> Callable[[Any], Any]:
    """Once the training loaders exist.

    Returns:
        What makes the loader's batch what ``training_step`` gets: ``{"a": batch}`` for a loader given in a dict.

    Raises:
        UnsupportedTrainingError: There are several.
    """
    combined = trainer.fit_loop._combined_loader
    num = len(combined.flattened)
    if num != 1:
        raise UnsupportedTrainingError(
            f"There are {num} training loaders; exactly one can be followed, since in a batch of several a row has "
            "several samples. Give one loader over one dataset whose items are pairs, or over a ConcatDataset."
        )
    _, shape = tree_flatten(combined.iterables)
    return lambda batch: tree_unflatten([batch], shape)


def check_validation(trainer: Any, has_objective: bool, has_loaders: bool) -> None:
    """Before the first step: is there anything to validate on?

    Raises:
        ObjectiveError: If the Trainer never validates and no loaders were given.
    """
    if has_loaders or trainer.enable_validation:
        return
    what = "val_dataloaders=" if has_objective else "a validation loader to fit (or val_dataloaders=)"
    raise ObjectiveError(f"The Trainer has nothing to validate on (no loader, or limit_val_batches=0). Give {what}.")
