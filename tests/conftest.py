# SPDX-License-Identifier: Apache-2.0
"""Every test starts alike and leaves nothing behind: seeds, folder, random state, dtype, registered optimizers."""

import logging
import os

import pytest
import torch

from lightning_sgdclean.adjoint import optimizers
from lightning_sgdclean.base.randomness import random_state, set_random_state

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
