# SPDX-License-Identifier: Apache-2.0
"""Retrace a recorded run on another day, in another process, without training again."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_sgdclean.after_fit import rank_opened
from lightning_sgdclean.base.errors import warn_of
from lightning_sgdclean.base.lightning import shown_bar
from lightning_sgdclean.base.options import Options
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.replay.reopened import reopened


def retrace(
    run_dir: str | Path,
    model: Any,
    *,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: Any = None,
    monitor: str = "val_loss",
    mode: Literal["min", "max"] = "min",
    objective: dict[str, Callable[[Any, Any], Any]] | Callable[[Any, Any], Any] | None = None,
    limit_val_batches: float | None = None,
    epochs: int | Literal["all"] = 1,
    at: Literal["last", "best"] = "last",
    curvature: Literal["exact", "finite", "none"] = "exact",
    finite_radius: float = 0.01,
    sample_losses: Callable[[Any, Any], Tensor] | None = None,
    on_mismatch: Literal["raise", "warn"] = "raise",
    tolerance: float | None = None,
    retrace_precision: Literal["auto", "run", "float32"] = "auto",
    verify: int = 0,
    rerank: int = 0,
    columns: Sequence[Literal["label", "prediction", "loss", "source", "by_epoch", "relabel"]] = (),
    trainer: Any = None,
) -> Ranking:
    """Rank the samples of a run from its recorded trajectory: another objective, window or engine, no training.

    Where it is killed, the next call with the same arguments goes on from about there, to the same bits.

    Args:
        run_dir: The run directory, with its ``trajectory``.
        model: The LightningModule, made as for the run. Its trained weights do not matter and are left as they are;
            weights that the run did not train have to be those of the run.
        train_dataloaders: The training data, as ``fit`` got them.
        val_dataloaders: The data that the objective is the mean over. Where its value is not the one that the fit
            logged, a warning tells.
        datamodule: Instead of the two.
        monitor: As for :class:`SGDInfluence`, and so are the rest.
        mode: See there.
        objective: See there.
        limit_val_batches: How many validation batches of each loader count, or as a float which share; by default as
            many as the fit took.
        epochs: See there; the window has to lie in what was kept.
        at: See there; ``"best"`` needs a run that was recorded with it.
        curvature: See there.
        finite_radius: See there.
        sample_losses: See there.
        on_mismatch: See there.
        tolerance: See there.
        retrace_precision: See there.
        verify: See there; the samples chosen have a column ``real``.
        rerank: See there.
        columns: See there.
        trainer: The Trainer to retrace under; it takes no step, and is afterwards as it was. By default a quiet one
            with the precision and the kind of device that the run had.

    Returns:
        The ranking; nothing is written.

    Raises:
        ValueError: If an option is wrong.
        RunDirectoryError: If the directory holds no whole trajectory, or that of another model or optimizer.
        SGDInfluenceError: One of its other subclasses, as from ``fit``.
    """
    options = Options(
        monitor=monitor,
        mode=mode,
        objective=objective,
        epochs=epochs,
        at=at,
        curvature=curvature,
        finite_radius=finite_radius,
        sample_losses=sample_losses,
        on_mismatch=on_mismatch,
        tolerance=tolerance,
        retrace_precision=retrace_precision,
        verify=verify,
        rerank=rerank,
        columns=columns,
    )
    ranking, _, complaints = reopened(
        run_dir,
        model,
        options,
        lambda this: rank_opened(this, bar=None if trainer is None else shown_bar(trainer)),
        train_dataloaders=train_dataloaders,
        val_dataloaders=val_dataloaders,
        datamodule=datamodule,
        limit_val_batches=limit_val_batches,
        trainer=trainer,
    )
    warn_of(complaints)
    return ranking


def call_of(run_dir: Path | None, options: Options) -> str:
    """The call of :func:`retrace` that ranks a run as its fit would have; ``...`` stands for what the fit was given."""
    taken = inspect.signature(retrace).parameters
    others = [one for one in fields(options) if one.name in taken and one.name != "val_dataloaders"]
    given = {one.name: getattr(options, one.name) for one in others}
    differing = [f"{one.name}={_as_written(given[one.name])}" for one in others if given[one.name] != one.default]
    arguments = [repr(str(run_dir)), "model", "train_dataloaders=...", "val_dataloaders=...", *differing]
    return f"lightning_sgdclean.retrace({', '.join(arguments)})"


def _as_written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: ..." for name in value) + "}"
    return "..." if callable(value) else repr(value)
