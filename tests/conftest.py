# SPDX-License-Identifier: Apache-2.0
"""Every test starts alike and leaves nothing behind: seeds, folder, random state, dtype, registered optimizers."""

import logging

import pytest
import torch

from lightning_sgdclean import optimizers
from lightning_sgdclean.randomness import random_state, set_random_state


@pytest.fixture(autouse=True)
def alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(optimizers, "_REGISTERED", {})
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    state, threads = random_state(torch.device("cpu")), torch.get_num_threads()
    torch.set_num_threads(1)  # the tests' networks are tiny
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    set_random_state(state, torch.device("cpu"))
    assert torch.get_default_dtype() is torch.float32
