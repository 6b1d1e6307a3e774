# SPDX-License-Identifier: Apache-2.0
"""Python in a process of its own, which finds the package, the helpers and the test modules as this one does."""

import os
import subprocess
import sys


def search_path():
    """What ``PYTHONPATH`` has to be there."""
    return os.pathsep.join(filter(None, sys.path))


def python(code, *arguments, check=True, **options):
    """Run code, with arguments behind its name; what has become of it."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=check, env=environment, capture_output=True, text=True, timeout=120, **options)
