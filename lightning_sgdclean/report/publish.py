# SPDX-License-Identifier: Apache-2.0
"""The ranking handed to the Trainer's loggers, none of which costs another one anything."""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.ranking.figures import Exhibit, plot_samples, save_png
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.report.destinations import (
    GROUP,
    Drawing,
    Parts,
    Results,
    numbers_of,
    parts_for_comet,
    parts_for_csv_logger,
    parts_for_mlflow,
    parts_for_tensorboard,
    parts_for_wandb,
)

_T = TypeVar("_T")
_PartsFor: TypeAlias = Callable[[Any, Results], Parts]


# Names, not classes: nothing has to be imported to compare them, and the loggers of pytorch_lightning, of
# lightning.pytorch and the user's subclasses are found alike.
_KNOWN: dict[str, _PartsFor] = {
    "TensorBoardLogger": parts_for_tensorboard,
    "WandbLogger": parts_for_wandb,
    "MLFlowLogger": parts_for_mlflow,
    "CometLogger": parts_for_comet,
    "CSVLogger": parts_for_csv_logger,
}
_SILENT = "DummyLogger"


def publish(
    loggers: Iterable[Any],
    ranking: Ranking,
    files: Sequence[Path],
    *,
    summary: Mapping[str, Any],
    step: int,
    pictures: Callable[[], Sequence[Exhibit]] = list,
) -> list[str]:
    """Give every logger the numbers, and those known here files, figures, table and pictures as they can hold them.

    Nothing is raised for a logger that fails: the others are served, and of that one what it takes.
    To be called in one process only (rank 0), before the loggers are finalized. Random states are left as they were.

    Args:
        loggers: ``trainer.loggers``, of either Lightning package. They are recognised by class name.
        ranking: The ranking that ``files`` hold.
        files: Existing files, ``influence.csv`` first.
        summary: What ``summary.json`` holds.
        step: ``trainer.global_step``, under which all is logged.
        pictures: Gives the worst samples with their pictures; called only if there is a logger.

    Returns:
        Complaints, each in words: of a logger that is unknown or failed, of a figure that could not be drawn.
    """
    audible = [logger for logger in loggers if _SILENT not in _names_of(logger)]
    if not audible:
        return []
    problems: list[str] = []
    with untouched_randomness(torch.device("cpu")), tempfile.TemporaryDirectory() as folder:
        exhibits = _attempt("pictures", pictures, problems) or ()
        drawings = _draw(ranking, summary, exhibits, Path(folder), problems)
        numbers = {f"{GROUP}/{name}": value for name, value in numbers_of(ranking, summary).items()}
        results = Results(ranking, tuple(files), drawings, tuple(exhibits), numbers, step)
        for logger in audible:
            problems += _serve(logger, results)
    return list(dict.fromkeys(problems))


def _serve(logger: Any, results: Results) -> list[str]:
    """Hand over part after part; what went wrong, in words."""
    name = f"{type(logger).__module__}.{type(logger).__qualname__}"
    parts_for = next((_KNOWN[base] for base in _names_of(logger) if base in _KNOWN), None)
    if parts_for is None and not callable(getattr(logger, "log_metrics", None)):
        return [f"{name} is not a logger that the influences can be given to; skipped."]
    parts: Parts = {"numbers": lambda: logger.log_metrics(results.numbers, step=results.step)}
    failed: dict[str, list[str]] = {}
    for part, hand_over in (parts | (parts_for(logger, results) if parts_for else {})).items():
        try:
            hand_over()
        except Exception as error:  # theirs, of any kind
            failed.setdefault(f"{type(error).__name__}: {error}", []).append(part)
    problems = [f"{name} did not take the influences' {', '.join(lost)}: {why}" for why, lost in failed.items()]
    if parts_for is None and not problems:
        known = ", ".join(_KNOWN)
        return [f"{name} is not known here: it got the influences' numbers, but no files. Known are {known}."]
    return problems


def _names_of(logger: Any) -> list[str]:
    return [base.__name__ for base in type(logger).__mro__]


def _draw(
    ranking: Ranking, summary: Mapping[str, Any], exhibits: Sequence[Exhibit], folder: Path, problems: list[str]
) -> tuple[Drawing, ...]:
    """The figures, drawn once for all loggers."""
    unit = summary.get("objective", {}).get("name", "the objective")
    figures: dict[str, Callable[[], Any]] = {"influence": lambda: ranking.plot(unit)}
    if exhibits:
        figures["worst_samples"] = lambda: plot_samples(exhibits)
    drawings = []
    for name, plot in figures.items():
        file = folder / f"{name}.png"
        pixels = _attempt("figure", partial(_save, plot, file), problems)
        if pixels is not None:
            drawings.append(Drawing(name, file, pixels))
    return tuple(drawings)


def _save(plot: Callable[[], Any], file: Path) -> NDArray[np.uint8]:
    return save_png(plot(), file)


def _attempt(what: str, make: Callable[[], _T], problems: list[str]) -> _T | None:
    try:
        return make()
    except Exception as error:  # of any kind: pictures come from the user's dataset
        problems.append(f"The loggers got no {what}: {type(error).__name__}: {error}")
        return None
