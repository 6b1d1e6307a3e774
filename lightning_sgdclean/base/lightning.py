# SPDX-License-Identifier: Apache-2.0
"""The one place that imports Lightning, under either name, and what a Trainer must be like to be followed."""

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Generic, TypeVar

from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_sgdclean.base.errors import ObjectiveError, UnsupportedTrainingError

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _installed() -> list[ModuleType]:
    found = []
    for name in _NAMES:
        try:
            found.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):  # installed but broken: say so
                raise
    if not found:
        raise ModuleNotFoundError("lightning-sgdclean needs pytorch-lightning (or lightning): pip install either.")
    return found


_PACKAGES = _installed()


# A class that inherits from the Callback of both packages is accepted by both Trainers and both CLIs.
CALLBACK_BASES: tuple[Any, ...] = tuple(package.Callback for package in _PACKAGES)


def batch_size_of(batch: Any) -> int:
    """Number of samples in a batch, found as ``self.log`` finds it.

    Raises:
        Exception: Lightning's own error if the batch holds no tensor to measure.
    """
    module = importlib.import_module(f"{_PACKAGES[0].__name__}.utilities.data")
    return int(module.extract_batch_size(batch))


def silent_logger(trainer: Any) -> Any:
    """A logger that swallows everything, from the package that the Trainer comes from."""
    root = next((p.__name__ for p in _PACKAGES if type(trainer).__module__.startswith(p.__name__)), _NAMES[-1])
    return importlib.import_module(f"{root}.loggers.logger").DummyLogger()


def quiet_trainer(module: Any, trained: dict[str, str]) -> Any:
    """A Trainer from the module's own package that shows and writes nothing, on the kind of device of the run.

    Args:
        module: The LightningModule that it is for.
        trained: ``precision`` and ``device`` of the run.
    """
    package = next((p for p in _PACKAGES if isinstance(module, p.LightningModule)), _PACKAGES[0])
    return package.Trainer(
        accelerator="gpu" if trained["device"] == "cuda" else trained["device"],
        devices=1,
        precision=trained["precision"],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def package_of(module_class: type) -> ModuleType:
    """The package that a LightningModule comes from.

    Raises:
        TypeError: If the class is none.
    """
    for package in _PACKAGES:
        if issubclass(module_class, package.LightningModule):
            return package
    raise TypeError(f"{module_class.__module__}.{module_class.__qualname__} is no LightningModule.")


def seed_everything(seed: int) -> None:
    """Lightning's own, workers included."""
    _PACKAGES[0].seed_everything(seed, workers=True, verbose=False)


@contextmanager
def without_chatter() -> Iterator[None]:
    """Silence what Lightning tells of every Trainer; warnings and errors still come."""
    loggers = [logging.getLogger(name) for name in (*_NAMES, "lightning", "lightning.fabric", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.level, logging.WARNING))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


T = TypeVar("T")


class CopiesResults(dict[str, Any]):
    """Results of the last fit of a callback or of its deep copies, which share it: some packages train with copies."""

    def __deepcopy__(self, memo: Any) -> "CopiesResults":
        return self


class OfLastFit(Generic[T]):
    """An attribute with what a callback's last fit led to; of one that never fitted itself, what its copies' did."""

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, callback: Any, owner: type) -> T:
        own = {} if callback is None else vars(callback)
        found: T = own.get(f"_own_{self._name}", own.get("_of_copies", {}).get(self._name, self._default))
        return found

    def __set__(self, callback: Any, value: T) -> None:
        callback._of_copies[self._name] = vars(callback)[f"_own_{self._name}"] = value


LIGHTNING_MODULES = ("lightning.", "pytorch_lightning.")  # where a hook comes from that nobody has overridden


def check_optimizers(trainer: Any) -> None:
    """Once the optimizers exist.

    Raises:
        UnsupportedTrainingError: Not exactly one.
    """
    optimizers = trainer.optimizers
    if len(optimizers) != 1:
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers) or "none"
        raise UnsupportedTrainingError(
            f"configure_optimizers gave {len(optimizers)} optimizers ({names}); exactly one can be followed. "
            "Put all parameters into groups of one optimizer."
        )


_MODULE_HOOKS = (
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
)
_CALLBACK_HOOKS = ("on_after_backward", "on_before_optimizer_step")
_BETWEEN_STEPS = (
    *(f"on_train_{what}_{end}" for what in ("epoch", "batch") for end in ("start", "end")),
    *("on_before_zero_grad", "on_validation_start", "on_validation_end"),
)


@dataclass(frozen=True)
class Hooks:
    """Hooks of the user's own, e.g. ``Net.on_before_optimizer_step``, by what they could do.

    Attributes:
        edit: Those that could edit gradients.
        between: Those that run between steps, and could move weights, the batch or what the module keeps.
    """

    edit: list[str] = field(default_factory=list)
    between: list[str] = field(default_factory=list)


def hooks_of(trainer: Any, module: Any) -> Hooks:
    """The hooks of the module, and of the callbacks that the Trainer has now."""
    between = [name for owner in (module, *trainer.callbacks) for name in _own(owner, _BETWEEN_STEPS)]
    return Hooks(gradient_hooks(trainer, module), between)


def gradient_hooks(trainer: Any, module: Any) -> list[str]:
    """Hooks of the user's own that could edit gradients, e.g. ``Net.on_before_optimizer_step``."""
    owners = [(module, _MODULE_HOOKS), *((callback, _CALLBACK_HOOKS) for callback in trainer.callbacks)]
    return [name for owner, hooks in owners for name in _own(owner, hooks)]


def transfer_hooks(trainer: Any) -> list[str]:
    """Hooks of the user's own that get a batch before ``training_step`` does."""
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    owners = [owner for owner in (trainer.lightning_module, trainer.datamodule) if owner is not None]
    return [name for owner in owners for name in _own(owner, hooks)]


def _own(owner: Any, hooks: Sequence[str]) -> list[str]:
    """Those that were written by the user."""
    others = (*LIGHTNING_MODULES, "lightning_sgdclean.")
    return [
        f"{type(owner).__name__}.{hook}"
        for hook in hooks
        if hook in vars(owner) or not getattr(type(owner), hook).__module__.startswith(others)
    ]


def combined_loader(trainer: Any) -> Any:
    """The Trainer's training loaders, once they exist, as the CombinedLoader that it makes of them."""
    return trainer.fit_loop._combined_loader


def training_loader(trainer: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Once the training loaders exist.

    Returns:
        The loader, or of several the CombinedLoader that the Trainer makes of them; and what makes the loader's batch
        what ``training_step`` gets: ``{"a": batch}`` for a loader given in a dict.
    """
    combined = combined_loader(trainer)
    if len(combined.flattened) != 1:
        return combined, lambda batch: batch
    _, shape = tree_flatten(combined.iterables)
    return combined.flattened[0], lambda batch: tree_unflatten([batch], shape)


def shown_bar(trainer: Any) -> Any:
    """The Trainer's progress bar, or None where it shows none, so that we show none either."""
    bar = trainer.progress_bar_callback
    return None if bar is None or getattr(bar, "is_disabled", False) else bar


def rich_columns(bar: Any) -> list[Any]:
    """The columns of a RichProgressBar, made anew."""
    return list(bar.configure_columns(bar.trainer))


def check_module(trainer: Any, module: Any, has_objective: bool) -> None:
    """Before anything is set up: the module's own ways.

    Raises:
        UnsupportedTrainingError: ``dataloader_iter`` or several processes.
        ObjectiveError: Nothing to validate by.
    """
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


def check_callbacks(trainer: Any) -> list[Any]:
    """Once all callbacks are known: does another one move the weights or the optimizer's groups?

    Returns:
        Callbacks that put averaged weights in the place of the trained ones.

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
            averaging.append(callback)
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


def check_validation(trainer: Any, has_objective: bool, has_loaders: bool) -> None:
    """Before the first step: is there anything to validate on?

    Raises:
        ObjectiveError: If the Trainer never validates and no loaders were given.
    """
    if has_loaders or trainer.enable_validation:
        return
    what = "val_dataloaders=" if has_objective else "a validation loader to fit (or val_dataloaders=)"
    raise ObjectiveError(f"The Trainer has nothing to validate on (no loader, or limit_val_batches=0). Give {what}.")


def clipping_of(trainer: Any) -> tuple[str, float] | None:
    """How the Trainer clips gradients: ``"norm"`` or ``"value"``, and at what."""
    if not trainer.gradient_clip_val:
        return None
    algorithm = trainer.gradient_clip_algorithm or "norm"
    return str(getattr(algorithm, "value", algorithm)), float(trainer.gradient_clip_val)


def is_at_end_of_epoch(trainer: Any) -> bool:
    """Whether the batch at work is the epoch's last."""
    loop = trainer.fit_loop.epoch_loop
    return bool(loop.batch_progress.is_last_batch) or loop.batch_idx + 1 >= trainer.num_training_batches
