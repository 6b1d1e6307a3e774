# SPDX-License-Identifier: Apache-2.0
"""Write the page of a run anew, with samples of the training data if it is said where these are."""

import argparse
from pathlib import Path
from typing import Any

from lightning_sgdclean.cli.check import add_classes

NAME = "report"
HELP = "write the page report.html of a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--dataset", metavar="PATH", help="import path of the training data, or of what makes them")
    data.add_argument("--config", metavar="CONFIG", type=Path, help="LightningCLI configuration whose data to show")
    add_classes(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write."""
    if not arguments.run_dir.is_dir():
        raise FileNotFoundError(f"There is no run directory at {arguments.run_dir}.")
    from lightning_sgdclean.page.building import write_report

    print(write_report(arguments.run_dir, _dataset(arguments)))
    return 0


def _dataset(arguments: argparse.Namespace) -> Any:
    if arguments.dataset is None and arguments.config is None:
        return None
    from lightning_sgdclean._lightning import without_chatter
    from lightning_sgdclean.configured import ConfiguredTraining, imported

    if arguments.config is not None:
        with without_chatter():
            return ConfiguredTraining(arguments.config, arguments.model, arguments.data).dataset()
    found = imported(arguments.dataset)
    return found() if callable(found) and not hasattr(found, "__getitem__") else found
