# SPDX-License-Identifier: Apache-2.0
"""Small batches are read a few at a time: what runs but once in a step finds the processor's caches full of training.

Reading is to take a batch's fingerprint and to decide whether it is kept. Done alone it takes four times as long as
right after another, which is a percent or two of a step of some milliseconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_sgdclean.fingerprints import Fingerprint, fingerprint
from lightning_sgdclean.trajectory import MicroBatch

_MOST, _MOST_BYTES = 16, 8 << 20  # that wait
_TRIALS = 4  # batches seen to be the same once training has gone on, before any may wait

Read = Callable[[MicroBatch, Any], Fingerprint]


@dataclass
class _Waiting:
    micro: MicroBatch
    batch: Any
    tensors: list[Tensor]
    versions: list[int]  # torch counts what is done to a tensor in place


class Waiting:
    """Hands batches on to be read, at once or together with those that follow.

    A batch waits only where it is made of plain tensors that are sure to stay as they are: where batches before it did.
    One that is written to while it waits has no fingerprint, and no batch waits any more; its replay is held against
    its loss alone.

    Args:
        read: Takes in a batch.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._waiting: list[_Waiting] = []
        self._nbytes = 0
        self._stay = True
        self._trials = 0
        self._last: tuple[Any, Fingerprint] | None = None

    def take(self, micro: MicroBatch, batch: Any, may_wait: bool) -> None:
        """A batch, about to be trained on.

        Raises:
            Exception: What ``read`` raises, of this batch or one that waited.
        """
        self._try()
        tensors = _plain_tensors(batch)
        nbytes = sum(tensor.nbytes for tensor in tensors)
        is_small = self._stay and 0 < nbytes <= _MOST_BYTES // _MOST
        if may_wait and is_small and self._trials >= _TRIALS:
            self._waiting.append(_Waiting(micro, _held(batch), tensors, [tensor._version for tensor in tensors]))
            if len(self._waiting) >= _MOST:
                self.read_all()
            return
        self.read_all()
        found = self._read(micro, batch)
        if is_small and self._trials < _TRIALS:
            self._last = _held(batch), found

    def read_all(self) -> None:
        """Read all that wait.

        Raises:
            Exception: What ``read`` raises.
        """
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if [tensor._version for tensor in one.tensors] == one.versions:
                self._read(one.micro, one.batch)
            else:
                self._stay = False

    def _try(self) -> None:
        """Is the last batch, after a step was made of it and the next one was loaded, still what it was?"""
        if self._last is None:
            return
        (batch, before), self._last = self._last, None
        now = fingerprint(batch, len(before.rows))
        self._trials += 1
        self._stay = self._stay and now.setting == before.setting and bool((now.rows == before.rows).all())


def _plain_tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch that is made of nothing else, and none of another."""
    items = list(batch.values()) if type(batch) is dict else batch if type(batch) in (list, tuple) else [batch]
    return list(items) if all(type(item) is Tensor for item in items) else []


def _held(batch: Any) -> Any:
    """The same tensors in a container of our own."""
    return type(batch)(batch) if type(batch) in (dict, list) else batch
