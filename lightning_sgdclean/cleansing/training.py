# SPDX-License-Identifier: Apache-2.0
"""A training that can be made again and again: what it consists of, how it begins, and what it measures."""

import hashlib
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.parameter import is_lazy

Loop = Literal["val", "test"]
_STEPS = {"val": "validation_step", "test": "test_step"}
_DEFAULTS = ("lightning.pytorch.core.", "pytorch_lightning.core.")  # where hooks come from that nobody has overridden


class Training(NamedTuple):
    """What ``Trainer.fit`` and ``Trainer.test`` are called with: a Trainer, and the rest under Lightning's names.

    Attributes:
        trainer: A fresh Trainer.
        model: A fresh LightningModule.
        datamodule: Its data, unless loaders or the module give them.
        train_dataloaders: Loader for training.
        val_dataloaders: Loaders for validation.
        test_dataloaders: Loaders for the test.
    """

    trainer: Any
    model: Any
    datamodule: Any = None
    train_dataloaders: Any = None
    val_dataloaders: Any = None
    test_dataloaders: Any = None

    def fit(self) -> None:
        """Train."""
        self.trainer.fit(
            self.model,
            train_dataloaders=self.train_dataloaders,
            val_dataloaders=self.val_dataloaders,
            datamodule=self.datamodule,
        )

    def measure(self, loop: Loop, ckpt_path: str | None) -> dict[str, float | None]:
        """What validation or test loop logs, by name; None for NaN and infinities, which JSON does not have."""
        data = getattr(self, f"{loop}_dataloaders")
        results = {"val": self.trainer.validate, "test": self.trainer.test}[loop](
            self.model,
            dataloaders=data,
            datamodule=self.datamodule if data is None else None,
            ckpt_path=ckpt_path,
            verbose=False,
        )
        values = {name: float(value) for result in results for name, value in result.items()}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def check(self, loops: tuple[Loop, ...]) -> None:
        """Before the first step: has it the steps and the data for these loops?

        Raises:
            ValueError: If not.
        """
        for loop in loops:
            owners = [owner for owner in (self.model, self.datamodule) if owner is not None]
            has_data = getattr(self, f"{loop}_dataloaders") is not None or any(
                _is_overridden(owner, f"{loop}_dataloader") for owner in owners
            )
            if not has_data or not _is_overridden(self.model, _STEPS[loop]):
                needed = f"{loop}_dataloaders (of Training, module or DataModule)" if not has_data else _STEPS[loop]
                purpose = {
                    "val": "How many samples to remove is chosen by what validation logs",
                    "test": "What that gains is measured by what the test logs, on data that ranking has not seen",
                }[loop]
                raise ValueError(f"{purpose}: {type(self.model).__name__} has no {needed}.")


Build = Callable[..., Training]


def takes_without(build: Build) -> bool:
    """Whether ``build`` leaves samples out by itself."""
    return "without" in inspect.signature(build).parameters


def weights_checksum(model: Any) -> str:
    """SHA-256 over everything in the module's ``state_dict``."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, torch.Tensor) and not is_lazy(value):
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_overridden(owner: Any, hook: str) -> bool:
    method = vars(owner).get(hook, getattr(type(owner), hook, None))
    return method is not None and not str(getattr(method, "__module__", "")).startswith(_DEFAULTS)
