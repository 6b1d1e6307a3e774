# SPDX-License-Identifier: Apache-2.0
"""Compare runs over the same samples: which of these are harmful in run after run, and how far do the runs agree?"""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sgdclean.cli.look import whole_number
from lightning_sgdclean.cli.terminal import table, wrapped

if TYPE_CHECKING:
    from lightning_sgdclean.ranking.comparison import Comparison

NAME = "compare"
HELP = "compare runs over the same samples"

_COLUMNS = ("sample_id", "worst_share", "mean_influence", "mean_rank", "noise", "num_runs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("first", metavar="RUN", help="run directory, or a ranking saved as CSV or Parquet")
    parser.add_argument("others", metavar="RUN", nargs="+", help="further ones")
    parser.add_argument(
        "--worst",
        type=float,
        default=0.05,
        metavar="W",
        help="what counts as a run's worst samples: a share below 1, else a number (0.05)",
    )
    parser.add_argument("--top", type=whole_number, default=10, metavar="N", help="how many samples to show (10)")
    parser.add_argument("-o", "--output", type=_csv_file, metavar="FILE", help="a .csv for the whole table")
    parser.add_argument("--json", action="store_true", help="as JSON: the agreement, and the samples")


def run(arguments: argparse.Namespace) -> int:
    """Compare, and print."""
    from lightning_sgdclean.ranking.compare import compare

    found = compare([arguments.first, *arguments.others], worst=arguments.worst)
    if arguments.output is not None:
        found.save(arguments.output)
    rows = _rows(found, arguments.top)
    if arguments.json:
        print(json.dumps(_as_json(found, rows), indent=2))
        return 0
    print(wrapped(str(found)))
    if rows:
        print()
        print(table(_COLUMNS, rows))
    return 0


def _csv_file(text: str) -> Path:
    if Path(text).suffix != ".csv":
        raise argparse.ArgumentTypeError(f"{text} does not end in .csv")
    return Path(text)


def _rows(found: "Comparison", top: int) -> list[list[Any]]:
    columns = (getattr(found, name)[:top].tolist() for name in _COLUMNS)
    return [list(row) for row in zip(*columns, strict=True)]


def _as_json(found: "Comparison", rows: list[list[Any]]) -> dict[str, Any]:
    samples = [dict(zip(_COLUMNS, map(_known, row), strict=True)) for row in rows]
    agreement = {
        name: [[_known(value) for value in row] for row in values.tolist()] for name, values in found.agreement.items()
    }
    return {"runs": list(found.names), "agreement": agreement, "samples": samples}


def _known(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value
