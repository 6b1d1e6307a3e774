# SPDX-License-Identifier: Apache-2.0
"""TensorBoard: images, a table as text, and the files beside the event file."""

from typing import Any

from lightning_sgdclean.report.folder import copy_files
from lightning_sgdclean.report.markdown import worst_table
from lightning_sgdclean.report.results import Parts, Results, tag


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
