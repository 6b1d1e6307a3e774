# SPDX-License-Identifier: Apache-2.0
"""Modules that others wrote; each file needs the package that it is named after, if it is named after one."""

from importlib.util import find_spec
from pathlib import Path

collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if path.stem not in ("test_tutorials", "test_optimizers_of_packages")
    and find_spec(path.stem.removeprefix("test_")) is None
]
