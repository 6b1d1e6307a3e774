# SPDX-License-Identifier: Apache-2.0
"""Show the worst samples of a run, and what was run."""

import argparse
import json
from collections.abc import Callable
from typing import Any

from lightning_sgdclean.base.files import without_nan
from lightning_sgdclean.cli.terminal import RUN_HELP, FinishedRun, facts, read_run, table

NAME = "show"
HELP = "show the worst samples of a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--top", type=whole_number, default=10, metavar="N", help="how many samples (10)")
    parser.add_argument("--json", action="store_true", help="as JSON: the summary, and the samples")


def run(arguments: argparse.Namespace) -> int:
    """Print."""
    found = read_run(arguments.run_dir)
    samples = found.records(0, arguments.top)
    if arguments.json:
        content = {"run": str(found.file.parent), "summary": found.summary, "samples": samples}
        print(json.dumps(without_nan(content), indent=2, allow_nan=False))
        return 0
    print(facts(_facts(found)))
    if samples:
        print()
        print(table(list(samples[0]), [list(sample.values()) for sample in samples]))
    return 0


def whole_number(text: str) -> int:
    """A number from 0 on, for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def _facts(found: FinishedRun) -> list[tuple[str, str]]:
    num, harmful = len(found.table.sample_id), found.num_harmful
    helpful = sum(influence > 0 for influence in found.table.influence)
    summary = found.summary
    pairs: list[tuple[str, Callable[[], str]]] = [
        ("objective", lambda: _objective(summary["objective"])),
        ("window", lambda: summary["window"]["words"]),
        ("end point", lambda: summary["end_point"]),
        ("replay", lambda: summary["replay"]["words"]),
    ]
    lines = [("run", str(found.file.parent))]
    for name, value in pairs:
        try:
            lines.append((name, value()))
        except (KeyError, TypeError):  # another version's summary, or none
            continue
    return [*lines, ("samples", f"{num}: {harmful} harmful, {helpful} helpful")]


def _objective(objective: dict[str, Any]) -> str:
    return f"{objective['name']} = {objective['recomputed']:.6g}, should be {_WANTED[objective['mode']]}"


_WANTED = {"min": "low", "max": "high"}
