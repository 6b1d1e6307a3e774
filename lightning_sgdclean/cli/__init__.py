# SPDX-License-Identifier: Apache-2.0
"""The command ``sgdclean``: look at runs, clean by them, and try a configuration before it is trained.

Exit codes: 0, 1 if something was refused or could not be done, 2 for a wrong call. Errors are one line on stderr.
"""

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from lightning_sgdclean import __version__
from lightning_sgdclean.base.errors import SGDInfluenceWarning
from lightning_sgdclean.cli import check, clean, cleanse, compare, report
from lightning_sgdclean.cli import look as show
from lightning_sgdclean.cli.terminal import one_line, printable

COMMANDS = (show, report, clean, compare, check, cleanse)


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
            code: int = arguments.run(arguments)
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
    for command in COMMANDS:
        added = commands.add_parser(command.NAME, help=command.HELP, description=command.__doc__)
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    return parser
