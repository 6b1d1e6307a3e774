# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases: an Artifact of the files, a Table, the page, the figures, and the pictures of the worst samples."""

from typing import Any

from lightning_sgdclean.report.results import GROUP, Parts, Results, tag, worst_rows

_ROWS = 100


def parts_for_wandb(logger: Any, results: Results) -> Parts:
    """What a WandbLogger gets; it finishes its run itself, after fit."""
    return {
        "files": lambda: _log_artifact(logger.experiment, results),
        "page": lambda: _log_page(logger, results),
        "figures": lambda: _log_drawings(logger, results),
        "table": lambda: _log_table(logger, results),
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


def _log_table(logger: Any, results: Results) -> None:
    names, rows = worst_rows(results.ranking, _ROWS)
    logger.log_table(tag("worst"), columns=names, data=rows, step=results.step)


def _log_pictures(logger: Any, results: Results) -> None:
    if results.exhibits:
        pictures = [exhibit.pixels for exhibit in results.exhibits]
        captions = ["\n".join(exhibit.lines) for exhibit in results.exhibits]
        logger.log_image(tag("worst_pictures"), pictures, step=results.step, caption=captions)
