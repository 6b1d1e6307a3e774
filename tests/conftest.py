# SPDX-License-Identifier: Apache-2.0
"""Every test starts alike and leaves nothing behind: seeds, folder, random state, dtype, registered optimizers.

The cases that many tests look at are trained once.
"""

import logging
import os
import shutil

import pytest
import torch

from cases import CASES
from commands import EXAMPLE
from lightning_sgdclean.adjoint import optimizers
from lightning_sgdclean.base.randomness import random_state, set_random_state
from processes import python
from reference import ranked

# The tests' networks are tiny. One thread, here and in the processes that tests start, adds in one order everywhere.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(optimizers, "_REGISTERED", {})
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    state = random_state(torch.device("cpu"))
    torch.manual_seed(0)
    yield
    set_random_state(state, torch.device("cpu"))
    assert torch.get_default_dtype() is torch.float32


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """A function of the name of a case, and of options: the callback after that case was trained with it.

    Each is trained once. Tests read what it left, and change nothing.
    """
    runs = {}

    def recorded(name, **options):
        key = (name, *sorted(options.items()))
        if key not in runs:
            runs[key] = ranked(CASES[name], dirpath=tmp_path_factory.mktemp("recorded") / "run", **options)
        return runs[key]

    return recorded


@pytest.fixture(scope="session")
def trained_example(tmp_path_factory):
    """A copy of the example of a LightningCLI in which it was trained as a user trains it, from a shell."""
    folder = tmp_path_factory.mktemp("example") / "lightning_cli"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    python("main.py", "fit", "--config", "config.yaml", cwd=folder)
    return folder


@pytest.fixture
def example(trained_example, tmp_path):
    """A copy of it for one test."""
    return shutil.copytree(trained_example, tmp_path / "example")
