# SPDX-License-Identifier: Apache-2.0
"""Small batches are read a few at a time: what runs but once in a step finds the processor's caches full of training.

Reading is to take a batch's fingerprint and to decide whether it is kept. Done alone it takes four times as long as
right after another, which is a percent or two of a step of some milliseconds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from lightning_sgdclean.trajectory.records import MicroBatch

_MOST, _MOST_BYTES = 32, 16 << 20  # that wait


class Taken(NamedTuple):
    """A batch that is to be read.

    Attributes:
        micro: What is known of it.
        batch: Itself, or a copy.
        drew: Whether its loading drew random numbers; see :class:`~lightning_sgdclean.record.keeping.RandomnessWatch`.
    """

    micro: MicroBatch
    batch: Any
    drew: bool | None = None


class Waiting:
    """Hands batches on to be read, at once or together with those that follow.

    Only a small batch of plain tensors waits, as a copy: a training step may write to it, and a loader fill its memory
    again.

    Args:
        read: Takes in batches, in their order.
    """

    def __init__(self, read: Callable[[list[Taken]], None]) -> None:
        self._read = read
        self._waiting: list[Taken] = []

    def take(self, taken: Taken, may_wait: bool) -> None:
        """A batch, about to be trained on.

        Raises:
            Exception: What ``read`` raises, of this batch or one that waited.
        """
        copied = _small_copy(taken.batch) if may_wait else None
        self._waiting.append(taken if copied is None else Taken(taken.micro, copied, taken.drew))
        if copied is None or len(self._waiting) >= _MOST:
            self.read_all()

    def read_all(self) -> None:
        """Read all that wait.

        Raises:
            Exception: What ``read`` raises.
        """
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._read(waiting)


def _small_copy(batch: Any) -> Any:
    """A copy of a batch that is made of plain tensors and nothing else, or None if it is not, or large."""
    kind = type(batch)
    parts = list(batch.values()) if kind is dict else batch if kind in (list, tuple) else [batch]
    if not parts or not all(type(part) is Tensor and not part.requires_grad for part in parts):
        return None
    if sum(part.nbytes for part in parts) > _MOST_BYTES // _MOST:
        return None
    copies = [part.clone() for part in parts]
    if kind is dict:
        return dict(zip(batch, copies, strict=True))
    return kind(copies) if kind in (list, tuple) else copies[0]
