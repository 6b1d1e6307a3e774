# SPDX-License-Identifier: Apache-2.0
"""The one place that imports Lightning, under either of its names, and what a Trainer is asked in several wings."""

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_sgdclean.adjoint.optimizers import update_of
from lightning_sgdclean.base.errors import UnsupportedTrainingError

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


LIGHTNING_MODULES = ("lightning.", "pytorch_lightning.")  # where a hook comes from that nobody has overridden


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
        if hook in vars(owner) or not getattr(type(owner), hook).__module__.startswith(LIGHTNING_MODULES)
    ]


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


def shown_bar(trainer: Any) -> Any:
    """The Trainer's progress bar, or None where it shows none, so that we show none either."""
    bar = trainer.progress_bar_callback
    return None if bar is None or getattr(bar, "is_disabled", False) else bar
