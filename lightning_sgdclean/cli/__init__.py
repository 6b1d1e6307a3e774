# SPDX-License-Identifier: Apache-2.0
"""The command ``sgdclean``: look at runs, clean by them, and try a configuration before it is trained.

Exit codes: 0, 1 if something was refused or could not be done, 2 for a wrong call. Errors are one line on stderr.
"""

import argparse
import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_sgdclean import __version__
from lightning_sgdclean.base.errors import SGDInfluenceWarning, printable
from lightning_sgdclean.cli.terminal import RUN_HELP, csv_file, one_line, table_file, whole_number


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Its words; by default those that the process was called with.

    Returns:
        The exit code.
    """
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # ids are written in any alphabet, terminals are not
    if not {"", os.getcwd()} & {*sys.path}:
        sys.path.insert(0, os.getcwd())  # as for a script that lies here: import paths are those of the user's modules
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note  # type: ignore[assignment]
            module = import_module(f"lightning_sgdclean.cli.{arguments.module}")  # show needs no torch, check does
            code: int = getattr(module, arguments.command)(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # the user's code is run, too: of any kind
        if arguments.debug:
            traceback.print_exc()
        print(f"sgdclean {arguments.command}: {one_line(error)}", file=sys.stderr)
        return 1
    return code


def _note(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Our own warnings in one line on stderr; those of others are for the authors of the code that is run."""
    if issubclass(category, SGDInfluenceWarning):
        print(f"note: {' '.join(printable(str(message)).split())}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sgdclean", description="Training samples ranked by the harm they did: look, compare, clean."
    )
    parser.add_argument("--version", action="version", version=f"lightning-sgdclean {__version__}")
    parser.add_argument("--debug", action="store_true", help="show where in the code an error comes from")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, declare, told) in COMMANDS.items():
        added = commands.add_parser(name, help=told, description=inspect.getdoc(declare))
        declare(added)
        added.set_defaults(module=module)
    return parser


def _show(parser: argparse.ArgumentParser) -> None:
    """Show the worst samples of a run, and what was run."""
    parser.add_argument("run_dir", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--top", type=whole_number, default=10, metavar="N", help="how many samples (10)")
    parser.add_argument("--json", action="store_true", help="as JSON: the summary, and the samples")


def _report(parser: argparse.ArgumentParser) -> None:
    """Write the page of a run anew, with samples of the training data if it is said where these are."""
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--dataset", metavar="PATH", help="import path of the training data, or of what makes them")
    data.add_argument("--config", metavar="CONFIG", type=Path, help="LightningCLI configuration whose data to show")
    _classes(parser)


def _clean(parser: argparse.ArgumentParser) -> None:
    """Write the ids of the samples that are left when the most harmful ones of a run are dropped."""
    parser.add_argument("run_dir", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--drop", type=whole_number, required=True, metavar="N", help="how many, by rank")
    parser.add_argument("-o", "--output", type=table_file, required=True, metavar="FILE", help="a .csv or .parquet")
    parser.add_argument(
        "--of",
        type=whole_number,
        metavar="M",
        help="size of the data set, if the run's summary does not say: what was not drawn in the window is kept, too",
    )


def _compare(parser: argparse.ArgumentParser) -> None:
    """Compare runs over the same samples: which are harmful in run after run, and how far do the runs agree?"""
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
    parser.add_argument("-o", "--output", type=csv_file, metavar="FILE", help="a .csv for the whole table")
    parser.add_argument("--json", action="store_true", help="as JSON: the agreement, and the samples")


def _check(parser: argparse.ArgumentParser) -> None:
    """Try out a LightningCLI configuration: train a few steps, retrace them, and say what would come of the whole.

    Nothing of it is kept. If the training cannot be followed, that is the result, and the exit code is 1.
    """
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file, as for `fit --config`")
    _classes(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def _cleanse(parser: argparse.ArgumentParser) -> None:
    """Find out whether a LightningCLI configuration trains better without the samples that rank first.

    It is trained over several seeds, with all samples, without the worst and without as many random ones. A call that
    was interrupted goes on where it was. The exit code is 1 if nothing can be concluded.
    """
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
    _classes(parser)


def _classes(parser: argparse.ArgumentParser) -> None:
    """Declare what completes a configuration."""
    parser.add_argument(
        "--model", metavar="CLASS", help="the LightningModule's import path, if CONFIG has no class_path"
    )
    parser.add_argument("--data", metavar="CLASS", help="likewise of the DataModule")


# Where each command is, what declares its arguments, and what it does.
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], str]] = {
    "show": ("look", _show, "show the worst samples of a run"),
    "report": ("look", _report, "write the page report.html of a run"),
    "clean": ("look", _clean, "write the ids of the samples to keep"),
    "compare": ("look", _compare, "compare runs over the same samples"),
    "check": ("train", _check, "try out a LightningCLI configuration"),
    "cleanse": ("train", _cleanse, "does a configuration gain from removing the worst samples?"),
}
