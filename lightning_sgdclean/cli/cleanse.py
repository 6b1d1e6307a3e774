# SPDX-License-Identifier: Apache-2.0
"""Find out whether a LightningCLI configuration trains better without the samples that rank first.

It is trained over several seeds, with all samples, without the worst and without as many random ones. A call that was
interrupted goes on where it was. The exit code is 1 if nothing can be concluded.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from lightning_sgdclean.cli.check import add_classes
from lightning_sgdclean.cli.terminal import wrapped

NAME = "cleanse"
HELP = "does a configuration gain from removing the worst samples?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file, as for `fit --config`")
    parser.add_argument("--metric", required=True, metavar="NAME", help="value that the test logs, which judges")
    parser.add_argument("--mode", choices=("min", "max"), default="min", help="what it should be (min)")
    parser.add_argument("--on", choices=("test", "val"), default="test", help="the loop that logs it (test)")
    parser.add_argument(
        "--drop",
        type=float,
        nargs="+",
        default=(0.01, 0.02, 0.05, 0.1),
        metavar="N",
        help="how many of the worst: shares below 1, or numbers (0.01 0.02 0.05 0.1)",
    )
    parser.add_argument(
        "--action",
        choices=("drop", "relabel"),
        default="drop",
        help="drop the worst, or relabel them by prediction (drop)",
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="S", help="how many seeds (5)")
    parser.add_argument("--random-draws", type=int, default=2, metavar="R", help="random removals for each (2)")
    parser.add_argument("--select", metavar="NAME", help="value that validation logs, which chooses how many to remove")
    parser.add_argument(
        "--select-mode", choices=("min", "max"), help="what that should be, unless metric or ranking tell"
    )
    parser.add_argument("--processes", type=int, default=1, metavar="P", help="trainings at a time (1)")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("cleansing"), metavar="DIR", help="for all files (cleansing)"
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    add_classes(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train, judge, and print."""
    if not arguments.config.is_file():
        raise FileNotFoundError(f"There is no configuration at {arguments.config}.")
    from lightning_sgdclean.cleansing.cleanse import cleanse
    from lightning_sgdclean.cli.configured import ConfiguredTraining

    build = ConfiguredTraining(arguments.config, arguments.model, arguments.data)
    with contextlib.redirect_stdout(sys.stderr):  # what the trainings print is not part of the result
        found = cleanse(
            build,
            metric=arguments.metric,
            mode=arguments.mode,
            on=arguments.on,
            drop=arguments.drop,
            action=arguments.action,
            seeds=arguments.seeds,
            random_draws=arguments.random_draws,
            select=arguments.select,
            select_mode=arguments.select_mode,
            processes=arguments.processes,
            dirpath=arguments.output,
        )
    if arguments.json:
        print((found.folder / "report.json").read_text(encoding="utf-8"), end="")
    else:
        print(wrapped(str(found)))
    return int(found.verdict.outcome == "undecided")
