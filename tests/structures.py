# SPDX-License-Identifier: Apache-2.0
"""The structures of a batch that a plain tuple or dict does not stand for."""

from dataclasses import dataclass
from typing import Any, NamedTuple


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
