# SPDX-License-Identifier: Apache-2.0
"""Other processes: a Python that starts from nothing, and a copy of this one, which is there at once."""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def search_path():
    """What ``PYTHONPATH`` has to be for a new Python to find the package, the helpers and the test modules."""
    return os.pathsep.join(filter(None, sys.path))


def python(*words, check=True, environment=None, **options):
    """Run a new Python with these words behind its name; what has become of it."""
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.run(command, check=check, env=environment, capture_output=True, text=True, timeout=120, **options)


def forked(act, cwd=None, environment=None, encoding="utf-8", terminal=None):
    """Call a function in a copy of this process, which need not import anything first; what has become of it.

    What it returns, or exits with, is the exit code. It has streams, warnings and a working directory of its own.

    Args:
        act: Called without arguments.
        cwd: Where.
        environment: Variables that are others there; None removes one.
        encoding: Of what it writes.
        terminal: The descriptor of a terminal that it writes to; nothing is captured then.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams = [terminal] * 2 if terminal else [out.fileno(), err.fileno()]
        child = _fork(act, cwd, environment or {}, encoding, *streams)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for stream in (out, err):
            stream.seek(0)
        return subprocess.CompletedProcess([], code, out.read().decode(encoding), err.read().decode(encoding))


def killed(act, when, after=0.0):
    """Call a function in a copy of this process and kill that, so long after it wrote a line that begins so.

    Args:
        act: Called without arguments.
        when: The line's beginning. It must come.
        after: Seconds.
    """
    heard, said = os.pipe()
    child = _fork(act, None, {}, "utf-8", said, said)
    os.close(said)
    with open(heard, encoding="utf-8") as lines:
        written = list(itertools.takewhile(lambda line: not line.startswith(when), lines))
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == -signal.SIGKILL, "".join(written)


def _fork(*life):
    """The number of a copy of this process that leads that life."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)  # threads of others are no matter here
        child = os.fork()
    if child == 0:
        _become(*life)
    return child


def _become(act, cwd, environment, encoding, out, err):
    """The life of the copy."""
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115 - closed with the process
        sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
        warnings.resetwarnings()  # here a warning is an error; elsewhere torch's deprecations, say, are not even shown
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        os.chdir(cwd or os.getcwd())
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        code = act() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
