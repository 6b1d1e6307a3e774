# SPDX-License-Identifier: Apache-2.0
"""CSVLogger: the files and the figures, beside its ``metrics.csv``."""

from typing import Any

from lightning_sgdclean.report.folder import copy_files
from lightning_sgdclean.report.results import Parts, Results


def parts_for_csv_logger(logger: Any, results: Results) -> Parts:
    """What a CSVLogger gets."""
    return {
        "files": lambda: copy_files(logger, results.files),
        "figures": lambda: copy_files(logger, [drawing.file for drawing in results.drawings]),
    }
