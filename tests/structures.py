# SPDX-License-Identifier: Apache-2.0
"""The structures of a batch that a plain tuple or dict does not stand for."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass(slots=True)
class Slotted:
    x: Any


class Node:
    """An object that holds itself."""

    def __init__(self, x):
        self.x, self.me = x, self


class Wrapping(Tensor):
    """A tensor class that computes for itself, and does not tell of what."""

    factor = 1

    @staticmethod
    def __new__(cls, inner):
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*[cls.factor * arg.inner if isinstance(arg, cls) else arg for arg in args], **(kwargs or {}))
