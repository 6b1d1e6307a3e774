# SPDX-License-Identifier: Apache-2.0
"""The random state of a process: read it, set it, and leave it as it was found."""

import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sgdclean.errors import UnsupportedTrainingError

RandomState = dict[str, Tensor]
_TWISTER_BYTES = 4 * 625


def random_state(device: torch.device) -> RandomState:
    """Random states of torch (CPU and ``device``), NumPy's global generator and Python's ``random``.

    Returns:
        Tensors by name, each of the same length at any time.
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
        self._python, self._numpy = (
            _Watched(_python_generator, _python_address),
            _Watched(np.random.get_bit_generator, _numpy_address),  # type: ignore[attr-defined]
        )

    def now(self) -> RandomState:
        """The random state, as :func:`random_state` gives it."""
        found = {"torch": torch.get_rng_state()}
        if self._device.type == "cuda":
            found["cuda"] = torch.cuda.get_rng_state(self._device)
        if self._python.has_moved():
            version, words, gauss = random.getstate()
            python = np.array((version, *words), dtype=np.int64)
            found["python"] = torch.from_numpy(python)
            found["python_gauss"] = torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64)
            self._python.has_state(np.roll(python[1:], 1), waiting=gauss is not None)
        if self._numpy.has_moved():
            _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
            numpy = np.append(keys, position).astype(np.int64)
            found["numpy"] = torch.from_numpy(numpy)
            found["numpy_gauss"] = torch.tensor([has_gauss, cached], dtype=torch.float64)
            self._numpy.has_state(numpy, waiting=bool(has_gauss))
        before = self._state
        moved = {name: now for name, now in found.items() if name not in before or not now.equal(before[name])}
        self._state = before | moved
        return self._state


class _Watched:
    """Tells whether a Mersenne twister has moved, by its memory: to ask for its state takes 10 times as long.

    What lies there is trusted only where it was seen to be the whole of the state.

    Args:
        find: Gives the generator.
        address_of: Gives the address of its 624 words and its position.
    """

    def __init__(self, find: Callable[[], Any], address_of: Callable[[Any], int]) -> None:
        self._find, self._address_of = find, address_of
        self._generator: Any = None
        self._known: bytes | None = None

    def has_moved(self) -> bool:
        generator = self._find()
        if generator is not self._generator:
            self._memory = (ctypes.c_char * _TWISTER_BYTES).from_address(self._address_of(generator))
            self._generator, self._known = generator, None
        return self._known is None or self._memory.raw != self._known

    def has_state(self, words: "np.ndarray[Any, Any]", waiting: bool) -> None:
        """The state as it was asked for, in the order of its memory, and whether a normal number waits besides."""
        known = words.astype(np.uint32).tobytes()
        self._known = known if known == self._memory.raw and not waiting else None


def _python_generator() -> Any:
    return random._inst


def _python_address(generator: Any) -> int:
    return id(generator) + object.__basicsize__


def _numpy_address(generator: Any) -> int:
    if not isinstance(generator, np.random.MT19937):
        raise UnsupportedTrainingError(
            f"NumPy's global generator is a {type(generator).__name__}; only its own MT19937 is followed. Leave out "
            "np.random.set_bit_generator, and draw from a np.random.Generator of your own."
        )
    return int(generator.ctypes.state_address)


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Undo whatever was drawn since :func:`random_state` returned ``state``."""
    torch.set_rng_state(state["torch"].clone())  # torch takes a row of a larger tensor for its first one
    version, *words = state["python"].tolist()
    has_gauss, gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss if has_gauss else None))
    *keys, position = state["numpy"].tolist()
    has_gauss, cached = state["numpy_gauss"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, int(has_gauss), cached))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].clone(), device)


@contextmanager
def untouched_randomness(device: torch.device) -> Iterator[None]:
    """Whatever the block draws, the random state afterwards is that before it."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)
