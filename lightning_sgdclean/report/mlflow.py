# SPDX-License-Identifier: Apache-2.0
"""MLflow: files and figures as artifacts of the run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_sgdclean.report.results import GROUP, Parts, Results


def parts_for_mlflow(logger: Any, results: Results) -> Parts:
    """What an MLFlowLogger gets; it ends its run itself, after fit."""
    return {
        "files": lambda: _log_artifacts(logger, results.files),
        "figures": lambda: _log_artifacts(logger, [drawing.file for drawing in results.drawings]),
    }


def _log_artifacts(logger: Any, files: Iterable[Path]) -> None:
    for file in files:
        logger.experiment.log_artifact(logger.run_id, str(file), artifact_path=GROUP)
