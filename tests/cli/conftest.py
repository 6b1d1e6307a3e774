# SPDX-License-Identifier: Apache-2.0
"""The example of a LightningCLI, once it was trained."""

import shutil

import pytest

from commands import EXAMPLE
from processes import python


@pytest.fixture(scope="session")
def trained_example(tmp_path_factory):
    """A copy of its folder in which it was trained as a user trains it, from a shell."""
    folder = tmp_path_factory.mktemp("example") / "lightning_cli"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    python("main.py", "fit", "--config", "config.yaml", cwd=folder)
    return folder


@pytest.fixture
def example(trained_example, tmp_path):
    """A copy of it for one test."""
    return shutil.copytree(trained_example, tmp_path / "example")
