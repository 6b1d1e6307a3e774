# SPDX-License-Identifier: Apache-2.0
"""The random state of a process: read it, set it, and leave it as it was found."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

RandomState = dict[str, Tensor]


def random_state(device: torch.device) -> RandomState:
    """Random states of torch (CPU and ``device``), NumPy's global generator and Python's ``random``.

    Returns:
        Tensors by name, small enough to keep one set a micro-batch (about 10 kB).
    """
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.from_numpy(np.array((version, *words), dtype=np.int64)),
        "python_gauss": torch.from_numpy(np.array([] if gauss is None else [gauss], dtype=np.float64)),
        "numpy": torch.from_numpy(np.append(keys, position).astype(np.int64)),
        "numpy_gauss": torch.from_numpy(np.array([has_gauss, cached], dtype=np.float64)),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Undo whatever was drawn since :func:`random_state` returned ``state``."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *keys, position = state["numpy"].tolist()
    has_gauss, cached = state["numpy_gauss"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, int(has_gauss), cached))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def untouched_randomness(device: torch.device) -> Iterator[None]:
    """Whatever the block draws, the random state afterwards is that before it."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)
