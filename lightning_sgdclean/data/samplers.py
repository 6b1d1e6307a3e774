# SPDX-License-Identifier: Apache-2.0
"""Which samples made up each batch: a proxy around the loader's sampler notes what it hands out."""

import operator
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from lightning_sgdclean.base.errors import SampleIdError
from lightning_sgdclean.trajectory.records import Positions


class _NotingIterator:
    def __init__(self, inner: Iterator[Any], drawn: deque[Any]) -> None:
        self._inner = inner
        self.drawn = drawn

    def __iter__(self) -> "_NotingIterator":
        return self

    def __next__(self) -> Any:
        drawn = next(self._inner)
        # A copy: a dataset may change the list that it is handed.
        is_many = isinstance(drawn, Iterable) and not isinstance(drawn, str | bytes) and getattr(drawn, "ndim", 1) != 0
        if is_many and iter(drawn) is drawn:
            raise SampleIdError(
                f"The sampler yields a {type(drawn).__name__}, which can be read only once. Let it yield lists."
            )
        self.drawn.append([_position(item) for item in drawn] if is_many else _position(drawn))
        return drawn


class _StatefulNotingIterator(_NotingIterator):
    def state_dict(self) -> Any:
        return self._inner.state_dict()  # type: ignore[attr-defined]

    def load_state_dict(self, state: Any) -> None:
        self._inner.load_state_dict(state)  # type: ignore[attr-defined]


class NotingSampler:
    """A stand-in for a sampler or batch sampler that behaves like it and notes what it yields.

    One queue an iterator: what workers had prefetched of an abandoned iterator is forgotten with it, and
    whoever else goes through the loader meanwhile draws into a queue of their own.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._drawn: deque[Positions] = deque()

    def __iter__(self) -> Iterator[Any]:
        # Not a generator: a sampler that draws random numbers in __iter__ must do so now, as it would alone.
        iterator = iter(self._inner)
        self._drawn = deque()
        wrap = _StatefulNotingIterator if _is_stateful(iterator) else _NotingIterator
        return wrap(iterator, self._drawn)

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self._inner, name)

    @property
    def inner(self) -> Any:
        """The user's own sampler."""
        return self._inner

    def next_positions(self, iterator: Any = None) -> Positions:
        """Dataset positions of the batch that the loader delivers next; a single one if it was drawn alone.

        Args:
            iterator: The sampler's iterator that the batch was drawn from; by default the latest.

        Raises:
            SampleIdError: If a batch was delivered that the sampler never drew, or whose positions are neither
                int nor str.
        """
        queue = iterator.drawn if isinstance(iterator, _NotingIterator) else self._drawn
        if not queue:
            raise SampleIdError(
                "A training batch arrived that the loader's sampler did not draw, so its samples are unknown. "
                "Expected one draw a batch; give sample_ids=, a callable from the batch to its samples' ids."
            )
        drawn = queue.popleft()
        odd = [item for item in (drawn if isinstance(drawn, list) else [drawn]) if not isinstance(item, int | str)]
        if odd:
            raise SampleIdError(
                f"The sampler drew {odd[0]!r} of type {type(odd[0]).__name__}; a dataset's position must be an int or "
                "a str to serve as a sample's id."
            )
        return drawn


class _StatefulNotingSampler(NotingSampler):
    # Real methods: a runtime protocol check does not see what __getattr__ would find.
    def state_dict(self) -> Any:
        return self._inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._inner.load_state_dict(state)


def _position(item: Any) -> Any:
    """An index as a plain int where it is one, be it a tensor's, NumPy's or the user's own."""
    return operator.index(item) if hasattr(item, "__index__") and not isinstance(item, bool) else item


def _is_stateful(candidate: Any) -> bool:
    return callable(getattr(candidate, "state_dict", None)) and callable(getattr(candidate, "load_state_dict", None))


def _sampler_name(loader: "DataLoader[Any]") -> str:
    return "batch_sampler" if loader.batch_sampler is not None else "sampler"


def note_samples(loader: "DataLoader[Any]") -> NotingSampler:
    """Put a noting proxy around the loader's sampler (once) and return it; nothing else changes."""
    name = _sampler_name(loader)
    sampler = getattr(loader, name)
    if isinstance(sampler, NotingSampler):
        return sampler
    noting = (_StatefulNotingSampler if _is_stateful(sampler) else NotingSampler)(sampler)
    object.__setattr__(loader, name, noting)  # DataLoader forbids assignment after its construction
    return noting


def stop_noting(loader: "DataLoader[Any]") -> None:
    """Give the loader its own sampler back."""
    name = _sampler_name(loader)
    sampler = getattr(loader, name)
    if isinstance(sampler, NotingSampler):
        object.__setattr__(loader, name, sampler.inner)
