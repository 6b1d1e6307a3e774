# SPDX-License-Identifier: Apache-2.0
"""What TensorBoard, CSV, W&B, MLflow and Comet loggers get of a ranking."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_sgdclean.base.errors import printable
from lightning_sgdclean.ranking.csv_files import guarded
from lightning_sgdclean.ranking.figures import Exhibit
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.ranking.table import COLUMNS

GROUP = "sgd_influence"
Parts: TypeAlias = dict[str, Callable[[], object]]  # what is handed over, in words, and the call that does it
_TOPS = (10, 100, 1000)


@dataclass(frozen=True)
class Drawing:
    """A figure that has been drawn.

    Attributes:
        name: ``influence`` or ``worst_samples``.
        file: Its PNG.
        pixels: The same, ``(H, W, 3)``.
    """

    name: str
    file: Path
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Results:
    """What there is to log.

    Attributes:
        ranking: The ranking.
        files: ``influence.csv``, ``summary.json``, and ``report.html`` where there is one.
        drawings: Its figures, if they could be drawn.
        exhibits: The worst samples with their pictures, if they have any.
        numbers: Worth plotting, by tag.
        step: The Trainer's ``global_step``.
    """

    ranking: Ranking
    files: tuple[Path, ...]
    drawings: tuple[Drawing, ...]
    exhibits: tuple[Exhibit, ...]
    numbers: dict[str, float]
    step: int


def tag(name: str) -> str:
    """A name among a logger's others."""
    return f"{GROUP}/{name}"


def numbers_of(ranking: Ranking, summary: Mapping[str, Any]) -> dict[str, float]:
    """Numbers worth plotting over runs, without those that are not finite.

    Returns:
        ``objective``; ``replay_loss_error`` and ``replay_update_error``; ``harm``, the sum of the negative influences;
        ``harmful_share``, the share of samples that have one; ``harm_in_worst_10`` (100, 1000), the share of the harm
        that the worst so many samples did.
    """
    found = {
        "objective": summary.get("objective", {}).get("recomputed"),
        "replay_loss_error": summary.get("replay", {}).get("loss_error"),
        "replay_update_error": summary.get("replay", {}).get("update_error"),
    }
    harmful = ranking.influence[ranking.influence < 0].tolist()  # the worst first
    harm = math.fsum(harmful)
    found |= {"harm": harm, "harmful_share": len(harmful) / len(ranking) if len(ranking) else None}
    for top in _TOPS:
        if harm < 0 and top <= len(ranking):
            found[f"harm_in_worst_{top}"] = math.fsum(harmful[:top]) / harm
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def worst_rows(ranking: Ranking, n: int) -> tuple[list[str], list[list[Any]]]:
    """Names of the columns, and the rows of the ``n`` most harmful samples; fewer if fewer are harmful."""
    count = len(ranking.harmful(n))
    columns = (ranking.rank, ranking.sample_id, ranking.influence, np.array(ranking.effect, object), ranking.visits)
    values = [column[:count].tolist() for column in (*columns, *ranking.columns.values())]
    return [*COLUMNS, *ranking.columns], [list(row) for row in zip(*values, strict=True)]


def copy_files(logger: Any, files: Iterable[Path]) -> None:
    """Copy files to where the logger keeps its own; what is there already is left as it is.

    Args:
        logger: One with a ``log_dir``.
        files: What to copy.
    """
    # Lightning's loggers write through fsspec: log_dir may be an address (s3://...) and no folder here.
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    filesystem, root = url_to_fs(str(logger.log_dir))
    filesystem.makedirs(root, exist_ok=True)
    for file in files:
        target = f"{root}/{file.name}"
        if os.path.exists(target) and os.path.samefile(file, target):
            continue  # the run directory is the logger's own
        filesystem.put_file(str(file), target)


_MAX_LENGTH = 80


def worst_table(ranking: Ranking, n: int = 10) -> str:
    """The ``n`` most harmful samples, most harmful first."""
    names, rows = worst_rows(ranking, n)
    if not rows:
        return "No sample is harmful.\n"
    head = [name if name in COLUMNS else _literal(name) for name in names]
    sides = [":---" if any(isinstance(row[i], str) for row in rows) else "---:" for i in range(len(names))]
    lines = [head, sides, *([_cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _literal(str(value))


def _literal(text: str) -> str:
    """Text that Markdown and HTML show as it is: punctuation as entities, control characters escaped."""
    if len(text) > _MAX_LENGTH:
        text = text[: _MAX_LENGTH - 1] + "…"
    plain = printable(text)
    return "".join(c if c.isalnum() or c == " " or not c.isascii() else f"&#{ord(c)};" for c in plain)


def parts_for_tensorboard(logger: Any, results: Results) -> Parts:
    """What a TensorBoardLogger gets."""
    return {
        "files": lambda: copy_files(logger, results.files),
        "figures": lambda: _add_drawings(logger.experiment, results),
        "table": lambda: _add_table(logger.experiment, results),
    }


def _add_drawings(writer: Any, results: Results) -> None:
    for drawing in results.drawings:
        writer.add_image(tag(drawing.name), drawing.pixels, results.step, dataformats="HWC")
    writer.flush()


def _add_table(writer: Any, results: Results) -> None:
    writer.add_text(tag("worst"), worst_table(results.ranking), results.step)
    writer.flush()


def parts_for_csv_logger(logger: Any, results: Results) -> Parts:
    """What a CSVLogger gets."""
    return {
        "files": lambda: copy_files(logger, results.files),
        "figures": lambda: copy_files(logger, [drawing.file for drawing in results.drawings]),
    }


_WANDB_ROWS = 100


def parts_for_wandb(logger: Any, results: Results) -> Parts:
    """What a WandbLogger gets; it finishes its run itself, after fit."""
    return {
        "files": lambda: _log_artifact(logger.experiment, results),
        "page": lambda: _log_page(logger, results),
        "figures": lambda: _log_drawings(logger, results),
        "table": lambda: _log_wandb_table(logger, results),
        "pictures": lambda: _log_pictures(logger, results),
    }


def _log_artifact(run: Any, results: Results) -> None:
    import wandb

    artifact = wandb.Artifact(f"{GROUP}-{run.id}", type="influence", metadata=results.numbers)
    for file in (*results.files, *(drawing.file for drawing in results.drawings)):
        artifact.add_file(str(file), name=file.name)
    run.log_artifact(artifact)


def _log_page(logger: Any, results: Results) -> None:
    import wandb

    for file in results.files:
        if file.suffix == ".html":
            page = wandb.Html(str(file), inject=False)  # inject=True would change its style
            logger.log_metrics({tag("report"): page}, step=results.step)


def _log_drawings(logger: Any, results: Results) -> None:
    for drawing in results.drawings:
        logger.log_image(tag(drawing.name), [str(drawing.file)], step=results.step)


def _log_wandb_table(logger: Any, results: Results) -> None:
    names, rows = worst_rows(results.ranking, _WANDB_ROWS)
    logger.log_table(tag("worst"), columns=names, data=rows, step=results.step)


def _log_pictures(logger: Any, results: Results) -> None:
    if results.exhibits:
        pictures = [exhibit.pixels for exhibit in results.exhibits]
        captions = ["\n".join(exhibit.lines) for exhibit in results.exhibits]
        logger.log_image(tag("worst_pictures"), pictures, step=results.step, caption=captions)


def parts_for_mlflow(logger: Any, results: Results) -> Parts:
    """What an MLFlowLogger gets; it ends its run itself, after fit."""
    return {
        "files": lambda: _log_artifacts(logger, results.files),
        "figures": lambda: _log_artifacts(logger, [drawing.file for drawing in results.drawings]),
    }


def _log_artifacts(logger: Any, files: Iterable[Path]) -> None:
    for file in files:
        logger.experiment.log_artifact(logger.run_id, str(file), artifact_path=GROUP)


_COMET_ROWS = 100


def parts_for_comet(logger: Any, results: Results) -> Parts:
    """What a CometLogger gets; the experiment stays open, as Lightning leaves it."""
    return {
        "files": lambda: _log_assets(logger.experiment, results),
        "figures": lambda: _log_images(logger.experiment, results),
        "table": lambda: _log_comet_table(logger.experiment, results),
    }


def _log_assets(experiment: Any, results: Results) -> None:
    for file in results.files:
        experiment.log_asset(str(file), file_name=tag(file.name), step=results.step)


def _log_images(experiment: Any, results: Results) -> None:
    for drawing in results.drawings:
        experiment.log_image(drawing.pixels, name=tag(drawing.name), step=results.step)


def _log_comet_table(experiment: Any, results: Results) -> None:
    names, rows = worst_rows(results.ranking, _COMET_ROWS)
    safe = [[guarded(value) for value in row] for row in rows]  # Comet makes a CSV of them
    experiment.log_table(tag("worst.csv"), tabular_data=safe, headers=[guarded(name) for name in names])
