# SPDX-License-Identifier: Apache-2.0
"""The command ``sgdclean``, and the script of the example, each in a copy of this process."""

import runpy
import sys

from lightning_sgdclean import cli
from processes import ROOT, forked

EXAMPLE = ROOT / "examples" / "lightning_cli"


def sgdclean(*words, columns=80, **options):
    """The command; options are those of :func:`processes.forked`."""
    return forked(lambda: cli.main([*map(str, words)]), environment={"COLUMNS": str(columns)}, **options)


def main_py(folder, *words):
    """``python main.py`` in a folder that the example was copied to."""

    def act():
        sys.argv = ["main.py", *map(str, words)]
        sys.path.insert(0, str(folder))
        runpy.run_path("main.py", run_name="__main__")

    return forked(act, cwd=folder, environment={"COLUMNS": "100"})
