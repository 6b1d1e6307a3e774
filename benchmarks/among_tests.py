# SPDX-License-Identifier: Apache-2.0
"""Lets a benchmark import the trainings that the tests look at, from wherever it is started."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path += [str(folder) for folder in (TESTS, TESTS / "zoo", TESTS / "fits", TESTS / "adjoint")]
