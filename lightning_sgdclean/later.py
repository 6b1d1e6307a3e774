# SPDX-License-Identifier: Apache-2.0
"""Retrace a recorded run on another day, in another process, without training again."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sgdclean import checks
from lightning_sgdclean._lightning import CALLBACK_BASES, quiet_trainer
from lightning_sgdclean.after_fit import RecordedRun, rank_run
from lightning_sgdclean.errors import ObjectiveError, RunDirectoryError, SGDInfluenceWarning
from lightning_sgdclean.packing import Classes, classes_of
from lightning_sgdclean.randomness import untouched_randomness
from lightning_sgdclean.ranking import Ranking
from lightning_sgdclean.recorder import hyper_parameters, trained_parameters
from lightning_sgdclean.store import Trajectory
from lightning_sgdclean.surroundings import surroundings_of
from lightning_sgdclean.walk import RetraceOptions


def retrace(
    run_dir: str | Path,
    model: Any,
    *,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: Any = None,
    monitor: str = "val_loss",
    mode: Literal["min", "max"] = "min",
    objective: Callable[[Any, Any], Any] | None = None,
    epochs: int | Literal["all"] = 1,
    curvature: Literal["exact", "finite", "none"] = "exact",
    finite_radius: float = 0.01,
    sample_losses: Callable[[Any, Any], Tensor] | None = None,
    on_mismatch: Literal["raise", "warn"] = "raise",
    tolerance: float | None = None,
    retrace_precision: Literal["auto", "run", "float32"] = "auto",
) -> Ranking:
    """Rank the samples of a run from its recorded trajectory: another objective, window or engine, no training.

    A quiet Trainer is made with the precision and the kind of device that the run had; it takes no step.

    Args:
        run_dir: The run directory, with its ``trajectory``.
        model: The LightningModule, made as for the run. Its trained weights do not matter and are left as they are;
            weights that the run did not train have to be those of the run.
        train_dataloaders: The training data, as ``fit`` got them.
        val_dataloaders: The data that the objective is the mean over.
        datamodule: Instead of the two.
        monitor: As for :class:`SGDInfluence`, and so are the rest.
        mode: See there.
        objective: See there.
        epochs: See there; the window has to lie in what was kept.
        curvature: See there.
        finite_radius: See there.
        sample_losses: See there.
        on_mismatch: See there.
        tolerance: See there.
        retrace_precision: See there.

    Returns:
        The ranking; nothing is written.

    Raises:
        RunDirectoryError: If the directory holds no whole trajectory, or that of another model or optimizer.
        SGDInfluenceError: One of its other subclasses, as from ``fit``.
    """
    trajectory = Trajectory(Path(run_dir) / "trajectory")
    options = RetraceOptions(
        monitor=monitor,
        mode=mode,
        objective=objective,
        val_dataloaders=val_dataloaders,
        epochs=epochs,
        curvature=curvature,
        finite_radius=finite_radius,
        sample_losses=sample_losses,
        on_mismatch=on_mismatch,
        tolerance=tolerance,
        retrace_precision=retrace_precision,
    )
    if datamodule is None and val_dataloaders is None:
        raise ObjectiveError("There is nothing to validate on. Give val_dataloaders= or a datamodule=.")
    at_end = _AtEnd(Path(run_dir), trajectory, options)
    trainer = quiet_trainer(model, trajectory.trained, at_end)
    with untouched_randomness(trainer.strategy.root_device):
        trainer.fit(model, train_dataloaders, datamodule=datamodule)
    assert at_end.ranking is not None
    return at_end.ranking


class _AtEnd(*CALLBACK_BASES):  # type: ignore[misc]
    """Ranks where a fit has come to its end, which one without epochs does at once."""

    def __init__(self, run_dir: Path, trajectory: Trajectory, options: RetraceOptions) -> None:
        super().__init__()
        self._run_dir, self._trajectory, self._options = run_dir, trajectory, options
        self.ranking: Ranking | None = None

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Rank."""
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
        self.ranking, _, complaints = rank_run(trainer, pl_module, run, options)
        for text in complaints:
            warnings.warn(text, SGDInfluenceWarning, stacklevel=2)

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
    live = {name: list(param.shape) for name, param in trained_parameters(module, optimizer).items()}
    recorded = trajectory.shapes("param")
    other = sorted({*live} ^ {*recorded}) or [name for name in live if live[name] != recorded[name]]
    if other:
        raise RunDirectoryError(
            f"The run was of another model: the trained parameter {other[0]!r} has shape "
            f"{recorded.get(other[0], 'none')} in the trajectory and {live.get(other[0], 'none')} in this model."
        )
    groups = next((step.groups for step in reversed(trajectory.steps) if step.is_update), [])
    if [group["params"] for group in groups] != [group["params"] for group in hyper_parameters(module, optimizer)]:
        raise RunDirectoryError("The optimizer of this model has its parameters in other groups than the run's had.")
