# SPDX-License-Identifier: Apache-2.0
"""How fast training goes, seen from outside at its first batches."""

from statistics import median
from time import perf_counter

_ENOUGH = 10


class Pace:
    """Time from the beginning of a batch to that of the next one: loading, training and recording.

    The median of the first ten, since the very first prepares a lot, and a rehearsal falls between two of them.

    Attributes:
        seconds: That time, or None before it is known.
    """

    def __init__(self) -> None:
        self.seconds: float | None = None
        self._last: float | None = None
        self._found: list[float] = []

    def batch_begins(self) -> bool:
        """Take the time.

        Returns:
            Whether this was the last one needed.
        """
        if self.seconds is not None:
            return False
        now = perf_counter()
        if self._last is not None:
            self._found.append(now - self._last)
        self._last = now
        if len(self._found) < _ENOUGH:
            return False
        self.seconds = median(self._found)
        return True

    def is_interrupted(self) -> None:
        """More than loading happens before the next batch: validation, or another epoch."""
        self._last = None


def in_time(seconds: float) -> str:
    """A duration in the unit that reads well, e.g. ``3.2 min``."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{1000 * seconds:.3g} ms"
