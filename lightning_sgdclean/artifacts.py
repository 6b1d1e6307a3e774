# SPDX-License-Identifier: Apache-2.0
"""Hand the ranking to the loggers of a Trainer: files, figure and a table of the worst samples."""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sgdclean.errors import SGDInfluenceWarning
from lightning_sgdclean.figures import plot_influences
from lightning_sgdclean.ranking import Ranking
from lightning_sgdclean.ranking_csv import COLUMNS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_TAG = "sgd_influence/influences"
TABLE_TAG = "sgd_influence/worst"
FIGURE_NAME = "influence.png"

_NUM_WORST = 10
_MAX_ID_LENGTH = 80


@dataclass(frozen=True)
class _Results:
    ranking: Ranking
    files: tuple[Path, ...]
    figure: "Figure | None"
    step: int


def publish(loggers: Iterable[Any], ranking: Ranking, files: Sequence[Path], step: int, unit: str) -> None:
    """Give every logger that is known here the files, the figure and the table of the worst samples.

    Nothing is raised for a logger that fails: the others are served, and a warning tells. To be called in
    one process only (rank 0).

    Args:
        loggers: ``trainer.loggers``, of either Lightning package. They are recognised by class name.
        ranking: The ranking that ``files`` hold.
        files: Existing files, ``influence.csv`` first.
        step: ``trainer.global_step``, under which figure and table are logged.
        unit: Name of the objective, for the figure's labels.

    Warns:
        SGDInfluenceWarning: If a logger is unknown or failed, or the figure could not be drawn.
    """
    problems: list[str] = []
    known = []
    for logger in loggers:
        handler = _handler_of(logger)
        if handler is None:
            problems.append(f"{_name_of(logger)} is not a logger that the influences can be given to; skipped.")
        elif handler is not _nothing:
            known.append((logger, handler))
    figure = _figure(ranking, unit, problems) if known else None
    results = _Results(ranking, tuple(files), figure, step)
    for logger, handler in known:
        try:
            handler(logger, results)
        except Exception as error:
            problems.append(f"{_name_of(logger)} did not take the influences: {type(error).__name__}: {error}")
    # At the end and once each: where warnings are errors, the first of them must not cost the others theirs.
    for problem in dict.fromkeys(problems):
        warnings.warn(problem, SGDInfluenceWarning, stacklevel=2)


def worst_table(ranking: Ranking, n: int = _NUM_WORST) -> str:
    """The ``n`` most harmful samples as a Markdown table; ids are shown as they are, never interpreted."""
    count = len(ranking.harmful(n))
    columns = (ranking.rank, ranking.sample_id, ranking.influence, ranking.effect, ranking.visits)
    lines = ["| " + " | ".join(COLUMNS) + " |", "| ---: | :--- | ---: | :--- | ---: |"]
    for rank, sample, influence, effect, visits in zip(*(column[:count] for column in columns), strict=True):
        lines.append(f"| {rank} | {_literal(str(sample))} | {influence:.6g} | {effect} | {visits} |")
    if count == 0:
        lines = ["No sample is harmful."]
    return "\n".join(lines) + "\n"


def _to_tensorboard(logger: Any, results: _Results) -> None:
    _copy_files(results.files, logger.log_dir)
    experiment = logger.experiment
    if results.figure is not None:
        experiment.add_figure(FIGURE_TAG, results.figure, global_step=results.step, close=False)
    experiment.add_text(TABLE_TAG, worst_table(results.ranking), global_step=results.step)
    experiment.flush()


def _to_csv_logger(logger: Any, results: _Results) -> None:
    _copy_files(results.files, logger.log_dir)
    if results.figure is not None:
        filesystem, root = _open_folder(logger.log_dir)
        with filesystem.open(f"{root}/{FIGURE_NAME}", "wb") as file:
            results.figure.savefig(file, format="png", dpi=120)


def _nothing(logger: Any, results: _Results) -> None:
    """For loggers that log nowhere."""


# Another logger is one more function here. Names, not classes: nothing has to be imported to compare them,
# and the loggers of pytorch_lightning, of lightning.pytorch and the user's subclasses are found alike.
_HANDLERS: dict[str, Callable[[Any, _Results], None]] = {
    "TensorBoardLogger": _to_tensorboard,
    "CSVLogger": _to_csv_logger,
    "DummyLogger": _nothing,
}


def _handler_of(logger: Any) -> Callable[[Any, _Results], None] | None:
    names = (base.__name__ for base in type(logger).__mro__)
    return next((_HANDLERS[name] for name in names if name in _HANDLERS), None)


def _name_of(logger: Any) -> str:
    return f"{type(logger).__module__}.{type(logger).__qualname__}"


def _figure(ranking: Ranking, unit: str, problems: list[str]) -> "Figure | None":
    try:
        return plot_influences(ranking.influence, unit)
    except ImportError:
        problems.append("The loggers got no figure: matplotlib is missing (pip install lightning-sgdclean[plot]).")
    except Exception as error:
        problems.append(f"The loggers got no figure: {type(error).__name__}: {error}")
    return None


def _open_folder(log_dir: str) -> tuple[Any, str]:
    # Lightning's loggers write through fsspec: log_dir may be an address (s3://...) and no folder here.
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    filesystem, root = url_to_fs(str(log_dir))
    filesystem.makedirs(root, exist_ok=True)
    return filesystem, str(root)


def _copy_files(files: Iterable[Path], log_dir: str) -> None:
    filesystem, root = _open_folder(log_dir)
    for file in files:
        target = f"{root}/{file.name}"
        if os.path.exists(target) and os.path.samefile(file, target):
            continue  # the run directory is the logger's own
        filesystem.put_file(str(file), target)


def _literal(text: str) -> str:
    """Text that Markdown and HTML show as it is: punctuation as entities, control characters escaped."""
    if len(text) > _MAX_ID_LENGTH:
        text = text[: _MAX_ID_LENGTH - 1] + "…"
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(c if c.isalnum() or c == " " or not c.isascii() else f"&#{ord(c)};" for c in shown)
