# SPDX-License-Identifier: Apache-2.0
"""Training loaders that note which samples they draw, or never draw some of them."""

import copy
import operator
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_sgdclean.base.errors import NAME_THEM, SampleIdError, UnsupportedTrainingError
from lightning_sgdclean.base.options import Positions
from lightning_sgdclean.base.resources import itself


class _NotingIterator:
    def __init__(self, inner: Iterator[Any]) -> None:
        self._inner = inner
        self._drawn: deque[Any] = deque()
        self._is_begun = False

    def __iter__(self) -> "_NotingIterator":
        return self

    def __next__(self) -> Any:
        drawn = next(self._inner)
        is_many = _is_many(drawn)  # then copied: a dataset may change the list that it is handed
        if is_many and iter(drawn) is drawn:
            raise SampleIdError(
                f"The sampler yields a {type(drawn).__name__}, which can be read only once. Let it yield lists."
            )
        self._drawn.append([_position(item) for item in drawn] if is_many else _position(drawn))
        return drawn

    def take(self, num_waiting: int | None, goes_on: bool) -> Any:
        """See :meth:`NotingSampler.next_positions`; where a pass goes on, its first draws are of an earlier one."""
        surplus = 0 if num_waiting is None else len(self._drawn) - num_waiting - 1
        taken = [self._drawn.popleft() for _ in range(min(max(surplus, 0) + 1, len(self._drawn)))]
        is_begun, self._is_begun = self._is_begun, True
        if surplus > 0 and (is_begun or not goes_on):
            raise SampleIdError(
                f"The loader's sampler drew {surplus + 1} batches since the last one that was trained on, expected "
                f"one: something takes batches out of the pass over the loader. {NAME_THEM}"
            )
        if not taken or surplus < 0:
            raise SampleIdError(_NOT_DRAWN)
        return taken[-1]


class _Stateful:
    # Real methods: a runtime protocol check does not see what __getattr__ would find.
    _inner: Any

    def state_dict(self) -> Any:
        return self._inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._inner.load_state_dict(state)


class _StatefulNotingIterator(_Stateful, _NotingIterator):
    pass


_NOT_DRAWN = f"A training batch arrived that the loader's sampler did not draw; expected one draw a batch. {NAME_THEM}"


class _StandIn:
    _inner: Any

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self._inner, name)


class NotingSampler(_StandIn):
    """A stand-in for a sampler or batch sampler that behaves like it and notes what it yields.

    One queue an iterator: what workers had prefetched of an abandoned iterator is forgotten with it, and
    whoever else goes through the loader meanwhile draws into a queue of their own.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._latest: _NotingIterator | None = None

    def __reduce__(self) -> Any:  # nobody asks what a copy of the loader draws
        return itself, (self._inner,)

    def __iter__(self) -> Iterator[Any]:
        # Not a generator: a sampler that draws random numbers in __iter__ must do so now, as it would alone.
        iterator = iter(self._inner)
        self._latest = (_StatefulNotingIterator if _is_stateful(iterator) else _NotingIterator)(iterator)
        return self._latest

    @property
    def inner(self) -> Any:
        """The user's own sampler."""
        return self._inner

    def next_positions(self, draws: Any = None, num_waiting: int | None = None) -> Positions:
        """Dataset positions of the batch that the loader delivers next; a single one if it was drawn alone.

        Args:
            draws: The sampler's iterator that the batch was drawn from; by default the latest.
            num_waiting: Batches of it that are drawn but not trained on yet, besides this one; None: unknown.

        Raises:
            SampleIdError: If the sampler drew other batches than those delivered, or positions that are neither int
                nor str.
        """
        # torchdata goes on from a checkpoint behind an islice, which passes over what was drawn before it.
        noting = self._latest if draws is None or isinstance(draws, islice) else draws
        if not isinstance(noting, _NotingIterator):
            raise SampleIdError(_NOT_DRAWN)
        drawn: Positions = noting.take(num_waiting, goes_on=isinstance(draws, islice))
        odd = [item for item in (drawn if isinstance(drawn, list) else [drawn]) if not isinstance(item, int | str)]
        if odd:
            raise SampleIdError(
                f"The sampler drew {odd[0]!r} of type {type(odd[0]).__name__}; a dataset's position must be an int or "
                f"a str to serve as a sample's id. {NAME_THEM}"
            )
        return drawn


class _StatefulNotingSampler(_Stateful, NotingSampler):
    pass


def _position(item: Any) -> Any:
    """An index as a plain int where it is one, be it a tensor's, NumPy's or the user's own."""
    return operator.index(item) if hasattr(item, "__index__") and not isinstance(item, bool) else item


def _is_many(drawn: Any) -> bool:
    return isinstance(drawn, Iterable) and not isinstance(drawn, str | bytes) and getattr(drawn, "ndim", 1) != 0


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
    sampler = getattr(loader, _sampler_name(loader))
    if isinstance(sampler, NotingSampler):
        object.__setattr__(loader, _sampler_name(loader), sampler.inner)


_WAY_OUT = "Leave the samples out yourself, where the loader is made."


class DrawnSamples(_StandIn):
    """The outermost sampler of a changed loader: passes on what is drawn, and sees to it that nothing dropped is.

    Attributes:
        num_draws: Positions or batches drawn so far.
    """

    def __init__(self, inner: Any, dropped: frozenset[int]) -> None:
        self._inner, self._dropped = inner, dropped
        self.num_draws = 0

    def __iter__(self) -> Iterator[Any]:
        return self._checked(iter(self._inner))  # now: a sampler may draw random numbers as it is asked to begin

    def _checked(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for drawn in iterator:
            self.num_draws += 1
            if not self._dropped.isdisjoint(_positions(drawn)):
                raise UnsupportedTrainingError(
                    f"{type(self._inner).__name__} draws samples that are to be left out. {_WAY_OUT}"
                )
            yield drawn


def without_samples(loader: "DataLoader[Any]", dropped: Iterable[int]) -> "DataLoader[Any]":
    """A copy of the loader that draws as it does, as if its dataset ended without those samples.

    The dataset stays whole, so positions keep their meaning. Shuffled or not, with replacement or with weights, in
    batches of the same size: whatever torch's samplers do is done with the samples that remain. A weighted sampler
    draws as many as before, if so many remain. Own samplers are followed if they draw each sample once.

    Args:
        loader: Over a dataset with positions.
        dropped: Positions in its dataset.

    Raises:
        UnsupportedTrainingError: If the loader's own way to draw cannot be followed, or it would draw nothing.
        IndexError: If there is no such position.
    """
    out = frozenset(int(position) for position in dropped)
    size = _size_of(loader)
    beyond = [position for position in out if not 0 <= position < size]
    if beyond:
        raise IndexError(f"Sample id {beyond[0]} is no position in the training loader's dataset of {size} samples.")
    kept = [position for position in range(size) if position not in out]
    fresh = _copied(loader)
    if loader.batch_sampler is None:
        sampler = DrawnSamples(_fewer(loader.sampler, kept, out, size), out)
        fresh.__dict__.update(sampler=sampler)
    else:
        batches = _fewer_batches(loader.batch_sampler, kept, out, size)
        fresh.__dict__.update(sampler=batches.sampler, batch_sampler=DrawnSamples(batches, out))
    if not kept or not len(fresh):
        raise UnsupportedTrainingError(f"Without {len(out)} of {size} samples the training loader has no batch left.")
    return fresh


def over_dataset(loader: "DataLoader[Any]", dataset: "Dataset[Any]") -> "DataLoader[Any]":
    """A copy of the loader that draws the same positions from another dataset of the same size."""
    fresh = _copied(loader)
    fresh.__dict__.update(dataset=dataset)
    return fresh


def _positions(drawn: Any) -> list[Any]:
    """What a sampler drew, one position or a batch of them, as plain numbers."""
    return [_position(item) for item in (drawn if _is_many(drawn) else [drawn])]


def _size_of(loader: Any) -> int:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        found = type(getattr(loader, "dataset", loader)).__name__
        raise UnsupportedTrainingError(f"The training data are a {found}, whose samples have no positions. {_WAY_OUT}")
    return len(loader.dataset)  # type: ignore[arg-type]


def _copied(loader: "DataLoader[Any]") -> "DataLoader[Any]":
    # Not made anew from its arguments: a subclass may take others, and DataLoader forbids assignment only.
    fresh = copy.copy(loader)
    fresh.__dict__.update(_iterator=None)  # persistent workers hold the other loader's dataset
    return fresh


def _fewer_batches(batches: Any, kept: list[int], out: frozenset[int], size: int) -> Any:
    if type(batches) is BatchSampler:
        sampler = _fewer(batches.sampler, kept, out, size)
        return BatchSampler(sampler, batches.batch_size, batches.drop_last)
    if not hasattr(batches, "sampler"):
        raise UnsupportedTrainingError(
            f"The batch sampler is a {type(batches).__name__} without an attribute sampler to be replaced. {_WAY_OUT}"
        )
    fresh = copy.copy(batches)
    fresh.sampler = _fewer(batches.sampler, kept, out, size)
    return fresh


def _fewer(sampler: Any, kept: list[int], out: frozenset[int], size: int) -> Any:
    """The sampler over the positions that are kept, in their order."""
    kind = type(sampler)
    if kind is SequentialSampler:
        return kept
    if kind is RandomSampler:
        fewer = RandomSampler(kept, sampler.replacement, sampler._num_samples, sampler.generator)
        return _Positions(fewer, kept)
    if kind is SubsetRandomSampler:
        return SubsetRandomSampler([i for i in sampler.indices if _positions(i)[0] not in out], sampler.generator)
    if kind is WeightedRandomSampler:
        return _weighted(sampler, out)
    if kind is BatchSampler:  # of a loader that does not batch by itself
        return _fewer_batches(sampler, kept, out, size)
    if isinstance(sampler, Sequence):
        return [i for i in sampler if _positions(i)[0] not in out]
    if hasattr(sampler, "__len__") and len(sampler) == size:
        return _Filtered(sampler, out)
    raise UnsupportedTrainingError(
        f"The sampler is a {kind.__name__} that does not draw each of the {size} samples once. {_WAY_OUT}"
    )


def _weighted(sampler: WeightedRandomSampler, out: frozenset[int]) -> WeightedRandomSampler:
    weights = sampler.weights.clone()
    weights[torch.tensor(sorted(out), dtype=torch.long)] = 0.0
    possible = int((weights > 0).sum())
    if not possible:
        raise UnsupportedTrainingError("No sample that remains has a positive weight in the WeightedRandomSampler.")
    num = sampler.num_samples if sampler.replacement else min(sampler.num_samples, possible)
    fresh = WeightedRandomSampler([1.0], num, sampler.replacement, sampler.generator)
    fresh.weights = weights  # as they are: the constructor takes a list of floats
    return fresh


class _Positions:
    """A sampler over places in a list, as one over the positions that stand there."""

    def __init__(self, inner: Any, positions: list[int]) -> None:
        self._inner, self._positions = inner, positions

    def __iter__(self) -> Iterator[int]:
        return (self._positions[place] for place in self._inner)

    def __len__(self) -> int:
        return len(self._inner)


class _Filtered(_StandIn):
    """A sampler of the user's own, which draws each sample once, without some of them."""

    def __init__(self, inner: Any, out: frozenset[int]) -> None:
        self._inner, self._out = inner, out

    def __iter__(self) -> Iterator[int]:
        return self._rest(iter(self._inner))

    def _rest(self, iterator: Iterator[int]) -> Iterator[int]:
        num = 0
        for position in iterator:
            if _positions(position)[0] not in self._out:
                num += 1
                yield position
        if num != len(self):
            raise UnsupportedTrainingError(
                f"{type(self._inner).__name__} drew {num} of the samples that remain, expected each of the {len(self)} "
                f"once. {_WAY_OUT}"
            )

    def __len__(self) -> int:
        return len(self._inner) - len(self._out)
