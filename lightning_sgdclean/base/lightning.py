# SPDX-License-Identifier: Apache-2.0
"""The one place that imports Lightning, under whichever of its two names it is installed."""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

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
