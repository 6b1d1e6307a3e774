# SPDX-License-Identifier: Apache-2.0
"""Open a recorded run on another day, in another process: a quiet Trainer takes the place of the user's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn
from torch.optim import Optimizer

from lightning_sgdclean import checks
from lightning_sgdclean._lightning import CALLBACK_BASES, quiet_trainer
from lightning_sgdclean.errors import ObjectiveError, RunDirectoryError
from lightning_sgdclean.opened import OpenedRun, RecordedRun, opened
from lightning_sgdclean.packing import Classes, classes_of
from lightning_sgdclean.randomness import untouched_randomness
from lightning_sgdclean.recorder import hyper_parameters, trained_parameters
from lightning_sgdclean.store import Trajectory
from lightning_sgdclean.surroundings import surroundings_of
from lightning_sgdclean.walk import RetraceOptions

T = TypeVar("T")


def reopened(
    run_dir: str | Path,
    model: Any,
    options: RetraceOptions,
    use: Callable[[OpenedRun], T],
    *,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: Any = None,
) -> T:
    """What ``use`` makes of the run, opened without the Trainer that recorded it.

    A quiet Trainer is made with the precision and the kind of device that the run had; it takes no step.

    Raises:
        ObjectiveError: If there is nothing to validate on.
        RunDirectoryError: If the directory holds no whole trajectory, or that of another model or optimizer.
        SGDInfluenceError: One of its other subclasses, as from ``fit``.
    """
    trajectory = Trajectory(Path(run_dir) / "trajectory")
    if datamodule is None and val_dataloaders is None:
        raise ObjectiveError("There is nothing to validate on. Give val_dataloaders= or a datamodule=.")
    at_end = _AtEnd(Path(run_dir), trajectory, replace(options, val_dataloaders=val_dataloaders), use)
    trainer = quiet_trainer(model, trajectory.trained, at_end)
    with untouched_randomness(trainer.strategy.root_device):
        trainer.fit(model, train_dataloaders, datamodule=datamodule)
    return at_end.results[0]


class _AtEnd(*CALLBACK_BASES, Generic[T]):  # type: ignore[misc]
    """Opens the run where a fit has come to its end, which one without epochs does at once."""

    def __init__(
        self, run_dir: Path, trajectory: Trajectory, options: RetraceOptions, use: Callable[[OpenedRun], T]
    ) -> None:
        super().__init__()
        self._run_dir, self._trajectory, self._options, self._use = run_dir, trajectory, options, use
        self.results: list[T] = []

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Open, and use."""
        checks.check_optimizers(trainer)
        optimizer = trainer.optimizers[0]
        check_model(self._trajectory, pl_module, optimizer)
        loader = trainer.train_dataloader
        run = RecordedRun(
            self._run_dir,
            [loader] * (1 + max(micro.loader for step in self._trajectory.steps for micro in step.micro)),
            optimizer,
            logged={},
            hooks=checks.gradient_hooks(trainer, pl_module),
            averaging=[],
            best=None,
            classes=self._classes(trainer, pl_module, loader),
            as_delivered=checks.one_loader(trainer),
        )
        options = self._options
        if options.val_dataloaders is None:
            options = replace(options, val_dataloaders=trainer.datamodule.val_dataloader())
        with opened(trainer, pl_module, run, options) as this:
            self.results.append(self._use(this))

    def _classes(self, trainer: Any, module: Any, loader: Any) -> Classes:
        """What kept batches may be made of: what a batch of the loader is made of, as training_step would get it."""
        if all(micro.batch is None for step in self._trajectory.steps for micro in step.micro):
            return {}
        batch = next((batch for batch in loader if batch is not None), None)
        return classes_of(surroundings_of(trainer, module).prepare(checks.one_loader(trainer)(batch), 0))


def check_model(trajectory: Trajectory, module: nn.Module, optimizer: Optimizer) -> None:
    """Is the model, with its optimizer, one that the trajectory could be of?

    Raises:
        RunDirectoryError: Naming the first difference.
    """
    found, wanted = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}", trajectory.trained["optimizer"]
    if found != wanted:
        raise RunDirectoryError(
            f"The run was trained by {wanted}, but configure_optimizers of this model gives {found}."
        )
    params = trained_parameters(module, optimizer)
    live = {name: list(param.shape) for name, param in params.items()}
    recorded = trajectory.shapes("param")
    other = sorted({*live} ^ {*recorded}) or [name for name in live if live[name] != recorded[name]]
    if other:
        raise RunDirectoryError(
            f"The run was of another model: the trained parameter {other[0]!r} has shape "
            f"{recorded.get(other[0], 'none')} in the trajectory and {live.get(other[0], 'none')} in this model."
        )
    groups = next((step.groups for step in reversed(trajectory.steps) if step.is_update), [])
    if [group["params"] for group in groups] != [group["params"] for group in hyper_parameters(optimizer, params)]:
        raise RunDirectoryError("The optimizer of this model has its parameters in other groups than the run's had.")
