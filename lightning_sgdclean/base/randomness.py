# SPDX-License-Identifier: Apache-2.0
"""The random state of a process: read it, set it, and leave it as it was found."""

import base64
import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sgdclean.base.errors import UnsupportedTrainingError

RandomState = dict[str, Tensor]
_TWISTER_BYTES, _GLANCE = 4 * 625, 4 * 9


def random_state(device: torch.device) -> RandomState:
    """Random states of torch (CPU and ``device``), NumPy's global generator and Python's ``random``.

    Returns:
        Tensors by name, each of the same length at any time.
    """
    return RandomStates(device).now()


class RandomStates:
    """Reads the random state again and again; what of NumPy's and Python's did not move is the same object as before.

    These stand still from one batch to the next, mostly, and to turn their states into tensors would take longer than
    all else that is recorded of a small step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._python: RandomState = {}
        self._numpy: RandomState = {}
        self._python_watch = _Watch(_python_generator, _python_address, position_first=True)
        self._numpy_watch = _Watch(np.random.get_bit_generator, _numpy_address)  # type: ignore[attr-defined]

    def now(self) -> RandomState:
        """The random state, as :func:`random_state` gives it."""
        if self._python_watch.has_moved():
            self._read_python()
        if self._numpy_watch.has_moved():
            self._read_numpy()
        found = {"torch": torch.default_generator.get_state(), **self._python, **self._numpy}
        if self._device.type == "cuda":
            found["cuda"] = torch.cuda.get_rng_state(self._device)
        return found

    def _read_python(self) -> None:
        version, words, gauss = random.getstate()
        numbers = np.array((version, *words), dtype=np.int64)
        waiting = torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64)
        self._python = {"python": torch.from_numpy(numbers), "python_gauss": waiting}
        self._python_watch.has_state(np.roll(numbers[1:], 1), is_whole=gauss is None)

    def _read_numpy(self) -> None:
        _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        numbers = np.append(keys, position).astype(np.int64)
        waiting = torch.tensor([has_gauss, cached], dtype=torch.float64)
        self._numpy = {"numpy": torch.from_numpy(numbers), "numpy_gauss": waiting}
        self._numpy_watch.has_state(numbers, is_whole=not has_gauss)


class _Watch:
    """Tells whether a Mersenne twister has moved, by its memory: to ask for its state takes 10 times as long.

    Each draw moves its position, and every 624th renews all of its words; so of these a few are looked at. What lies
    there is trusted only where it was seen to be the whole of the state.

    Args:
        find: Gives the generator.
        address_of: Gives the address of its 624 words and its position.
        position_first: Whether the position lies before the words.
    """

    def __init__(
        self, find: Callable[[], Any], address_of: Callable[[Any], int], *, position_first: bool = False
    ) -> None:
        self._find, self._address_of, self._skipped = (
            find,
            address_of,
            0 if position_first else _TWISTER_BYTES - _GLANCE,
        )
        self._generator: Any = None
        self._known: bytes | None = None

    def has_moved(self) -> bool:
        generator = self._find()
        if generator is not self._generator:
            address = self._address_of(generator)
            self._memory = (ctypes.c_char * _TWISTER_BYTES).from_address(address)
            self._glance = (ctypes.c_char * _GLANCE).from_address(address + self._skipped)
            self._generator, self._known = generator, None
        return self._glance.raw != self._known

    def has_state(self, words: "np.ndarray[Any, Any]", is_whole: bool) -> None:
        """The state as it was asked for, in the order of its memory, and whether there is nothing besides."""
        is_seen = is_whole and words.astype(np.uint32).tobytes() == self._memory.raw
        self._known = self._glance.raw if is_seen else None


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


def has_drawn(before: RandomState, after: RandomState) -> bool:
    """Whether random numbers were drawn between two random states."""
    return any(not torch.equal(tensor, after[name]) for name, tensor in before.items())


def in_plain_text(state: RandomState) -> dict[str, list[str]]:
    """A random state for a JSON file: of each tensor, its type and its bytes in base64."""
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    return {name: [str(one.dtype), base64.b64encode(one.tobytes()).decode()] for name, one in arrays.items()}


def from_plain_text(text: dict[str, list[str]]) -> RandomState:
    """Undo :func:`in_plain_text`."""
    found = {name: np.frombuffer(base64.b64decode(content), dtype=kind) for name, (kind, content) in text.items()}
    return {name: torch.from_numpy(array.copy()) for name, array in found.items()}


@contextmanager
def untouched_randomness(device: torch.device) -> Iterator[None]:
    """Whatever the block draws, the random state afterwards is that before it."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)
