# SPDX-License-Identifier: Apache-2.0
"""Write the page of a run anew, with samples of the training data if it is said where these are."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from lightning_sgdclean.base.files import read_summary
from lightning_sgdclean.cli.check import add_classes

NAME = "report"
HELP = "write the page report.html of a run"

_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
_IN_WORDS = {
    "picture": "pictures",
    "text": "texts",
    "features": "values",
    "label": "labels",
    "prediction": "predictions",
    "loss": "losses",
}


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
    from lightning_sgdclean.report.page import PAGE_NAME, write_report

    dataset = _dataset(arguments)
    if dataset is not None:
        _check_ids(arguments.run_dir)
    before = _shown_on(arguments.run_dir / PAGE_NAME)
    page = write_report(arguments.run_dir, dataset)
    lost = before - _shown_on(page)
    if lost:
        *most, last = [words for name, words in _IN_WORDS.items() if name in lost]
        print(
            f"note: the page that was here also showed {', '.join(most)}{' and ' if most else ''}{last} of samples. "
            "--config or --dataset brings samples back; predictions and losses are those of columns= of the run.",
            file=sys.stderr,
        )
    print(page)
    return 0


def _check_ids(run_dir: Path) -> None:
    """Names lead to samples only by a mapping, for which there is no word on a command line."""
    if read_summary(run_dir).get("dataset_size", 0) is None:
        raise ValueError(
            "The run's sample ids are names, not positions in its dataset. In Python: lightning_sgdclean.write_report("
            f"{str(run_dir)!r}, dataset, positions={{id: position, ...}}). Or call this without --dataset and --config."
        )


def _shown_on(page: Path) -> set[str]:
    """What a page shows of samples, as keys of the words above; nothing where it cannot be read."""
    try:
        found = _DATA.search(page.read_text(encoding="utf-8", errors="replace"))
        samples = json.loads(found[1])["samples"].values() if found else []
        return {name for sample in samples for name in sample} & set(_IN_WORDS)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return set()


def _dataset(arguments: argparse.Namespace) -> Any:
    if arguments.dataset is None and arguments.config is None:
        return None
    from lightning_sgdclean.base.lightning import without_chatter
    from lightning_sgdclean.cli.configured import ConfiguredTraining, imported

    if arguments.config is not None:
        with without_chatter():
            return ConfiguredTraining(arguments.config, arguments.model, arguments.data).dataset()
    found = imported(arguments.dataset)
    return found() if callable(found) and not hasattr(found, "__getitem__") else found
