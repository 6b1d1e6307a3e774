# SPDX-License-Identifier: Apache-2.0
"""The random state of a process: read it, set it, and leave it as it was found."""

import ctypes
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sgdclean.errors import UnsupportedTrainingError

RandomState = dict[str, Tensor]


def random_state(device: torch.device) -> RandomState:
    """Random states of torch (CPU and ``device``), NumPy's global generator and Python's ``random``.

    Returns:
        Tensors by name, small enough to keep one set a micro-batch (about 10 kB).
    """
    return RandomStates(device).now()


class RandomStates:
    """Reads the random state again and again; a tensor of what did not move is the same object as before.

    Most generators stand still from one batch to the next, and to turn their states into tensors would take longer
    than all else that is recorded of a small step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._state: RandomState = {}
        self._python: tuple[Any, ...] | None = None
        self._numpy: bytes | None = None

    def now(self) -> RandomState:
        """The random state, as :func:`random_state` gives it."""
        found = {"torch": torch.get_rng_state()} | self._moved_python() | self._moved_numpy()
        if self._device.type == "cuda":
            found["cuda"] = torch.cuda.get_rng_state(self._device)
        moved = {
            name: now for name, now in found.items() if name not in self._state or not now.equal(self._state[name])
        }
        self._state = self._state | moved
        return self._state

    def _moved_python(self) -> RandomState:
        state = random.getstate()
        if state == self._python:
            return {}
        self._python = state
        version, words, gauss = state
        return {
            "python": torch.from_numpy(np.array((version, *words), dtype=np.int64)),
            "python_gauss": torch.from_numpy(np.array([] if gauss is None else [gauss], dtype=np.float64)),
        }

    def _moved_numpy(self) -> RandomState:
        words = _numpy_words()
        if words == self._numpy:
            return {}
        _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        # A normal number that waits is handed out without a move of the words.
        is_all = not has_gauss and words == keys.tobytes() + np.int32(position).tobytes()
        self._numpy = words if is_all else None
        return {
            "numpy": torch.from_numpy(np.append(keys, position).astype(np.int64)),
            "numpy_gauss": torch.from_numpy(np.array([has_gauss, cached], dtype=np.float64)),
        }


def _numpy_words() -> bytes:
    """NumPy's global generator as it lies in memory: 624 words and a position. To ask for them takes 70 us."""
    generator = np.random.get_bit_generator()
    if not isinstance(generator, np.random.MT19937):
        raise UnsupportedTrainingError(
            f"NumPy's global generator is a {type(generator).__name__}; only its own MT19937 is followed. Leave out "
            "np.random.set_bit_generator, and draw from a np.random.Generator of your own."
        )
    with generator.lock:
        return ctypes.string_at(generator.ctypes.state_address, 4 * 625)


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
