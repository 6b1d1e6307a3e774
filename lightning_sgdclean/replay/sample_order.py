# SPDX-License-Identifier: Apache-2.0
"""Prove that the loss's rows belong to the ids that were drawn.

In a few batches samples are replaced before they are collated, to see which row of the loss moves. In every batch of a
collate function of the user's own, the samples are collated once more in another order, to see that its rows follow.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sgdclean.base.errors import NAME_THEM, ReplayMismatchError, SampleIdError
from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.base.randomness import random_state, set_random_state, untouched_randomness
from lightning_sgdclean.data.batches import batch_parts, cloned, has_row_each, of_one_shape, samples_first
from lightning_sgdclean.data.fetching import (
    collate_items,
    fetch_batch,
    fetch_items,
    fetched_variants,
    has_own_collate,
)
from lightning_sgdclean.data.fingerprints import Fingerprint, batch_digest, fingerprint
from lightning_sgdclean.losses.own_loss import check_own_loss
from lightning_sgdclean.losses.verified import VerifiedSplit
from lightning_sgdclean.replay.replay import Replay
from lightning_sgdclean.trajectory.records import MicroBatch, Step

_NOT_PROVED = "Whether the collate function keeps the samples in their order could not be found out."
_BY_CHANCE = 1e-6  # that samples which are sorted had been drawn in that order, in all batches probed


def prove_ids(
    replay: Replay,
    steps: list[Step],
    loader_of: Callable[[MicroBatch], Any],
    prepare: Callable[[Any], Any],
    has_names: bool = False,
) -> list[str]:
    """Probe a few batches of the window, more of them the smaller they are.

    Args:
        replay: Runs the steps again; its split is proved on the window's first batch, unless the fit proved it.
        steps: The window.
        loader_of: The loader that a batch came from.
        prepare: Makes a loader's batch what ``training_step`` gets.
        has_names: Whether ids were read from the batches, and so are those of its rows anyway.

    Returns:
        Why it could not be found out, if it could not.

    Raises:
        LossSplitError: If rows move with other ids than theirs.
        ReplayMismatchError: If the samples cannot be fetched again and were not kept.
    """
    split = replay.split
    if split is None:  # the user says which loss is whose
        check_own_loss(replay.batch(steps[0], 0), replay.fidelity.on_mismatch)
        return []
    if not split.is_proved:
        several = ((step, i) for step in steps for i, micro in enumerate(step.micro) if len(micro.ids) > 1)
        split.prove(replay.batch(*next(several, (steps[0], 0))))  # a batch of one sample shows no order
    has_names = has_names or are_names(steps)
    complaints: dict[str, None] = {}
    for step in _probed(steps):
        before = replay.micro(step, 0)
        # Without positions nothing can be fetched; ids that were read from the batch are those of its rows.
        if has_names or not isinstance(before.positions, list) or before.positions != before.ids:
            continue
        complaint = _prove(replay, split, before, _foreign(before.positions, steps), loader_of(before), prepare)
        complaints |= {complaint: None} if complaint else {}
    return list(complaints)


def are_names(steps: list[Step]) -> bool:
    """Whether ids were read from the batches by ``sample_ids=``: somewhere they are not the positions drawn."""
    drawn = ((micro.ids, micro.positions) for step in steps for micro in step.micro)
    return any(ids != (positions if isinstance(positions, list) else [positions]) for ids, positions in drawn)


def _prove(
    replay: Replay,
    split: VerifiedSplit,
    before: MicroBatch,
    others: list[SampleId],
    loader: Any,
    prepare: Callable[[Any], Any],
) -> str | None:
    assert isinstance(before.positions, list)
    device = replay.surroundings.device
    try:
        variant = fetched_variants(
            loader, before.positions, others, prepare, reseed=lambda: set_random_state(before.random, device)
        )
    except ReplayMismatchError as error:
        if before.batch is None:
            raise
        return f"{_NOT_PROVED} {error}"
    none = torch.zeros(len(before.ids), dtype=torch.bool)
    if not torch.equal(*(batch_digest(variant(none), len(none)) for _ in range(2))):
        return f"{_NOT_PROVED} Collated twice from the same random state, the same samples give different batches."
    split.prove_ids(replay.batch_of(before, variant(none)), of_one_shape(variant, len(none)))
    return None


def _probed(steps: list[Step]) -> list[Step]:
    """Steps spread over the window, so many that sorted batches are hardly in their old order in all of them."""
    num = max(len(step.micro[0].ids) for step in steps)
    wanted = math.ceil(-math.log(_BY_CHANCE) / math.lgamma(num + 1)) if num > 1 else 1
    return steps[:: max(1, len(steps) // wanted)][:wanted]


def _foreign(positions: list[SampleId], steps: list[Step]) -> list[SampleId]:
    """What to replace each sample by: its neighbour, or for a batch of one, a sample of another batch."""
    if len(positions) > 1:
        return [*positions[-1:], *positions[:-1]]
    drawn = (other.positions for step in steps for other in step.micro)
    return next((other for other in drawn if isinstance(other, list) and other != positions), positions)[:1]


_MOST = 4  # classes of equal rows that are looked into, and samples of each


class CollateProof:
    """Fetches batches again, and sees once for each that collating gave every sample a row of its own, in their order.

    A collate function may replace, swap, drop or repeat samples only where one of them cannot be read: in a batch
    out of thousands. So every batch is looked at, and by its data: the samples are collated again in another order
    and in other company, and the rows must follow. torch's own function needs no proof. Where a batch has no row a
    sample (a graph, say), or the function draws random numbers, this shows less, and :func:`prove_ids` more.

    Args:
        has_names: Whether ids were read from the batches, and so are those of its rows anyway.
    """

    def __init__(self, has_names: bool) -> None:
        self._has_names = has_names
        self._proved: set[tuple[int, int, int]] = set()
        self._spare: tuple[Any, list[Any]] = None, []  # a sample of another batch, and the loader that it is of

    def fetched(self, loader: Any, micro: MicroBatch) -> Any:
        """The batch, fetched again.

        Raises:
            SampleIdError: If one of its rows is not that of the sample drawn for it.
            ReplayMismatchError: As :func:`~lightning_sgdclean.data.fetching.fetch_batch`.
        """
        assert micro.positions is not None
        if not self._is_due(loader, micro):
            return fetch_batch(loader, micro.positions)
        collated = self._collated(loader, micro)
        collated.prove()
        return collated.batch()

    def check_kept(self, loader: Any, micro: MicroBatch) -> None:
        """Likewise of a batch that was kept, by what its samples are now.

        Raises:
            SampleIdError: As :meth:`fetched`.
        """
        if not self._is_due(loader, micro):
            return
        try:
            with untouched_randomness(_CPU):
                collated = self._collated(loader, micro)
        except ReplayMismatchError:  # such as only a worker can make; prove_ids warns of it
            return
        collated.prove()

    def _collated(self, loader: Any, micro: MicroBatch) -> "_Collated":
        spare = self._spare[1] if self._spare[0] is loader else []
        collated = _Collated(loader, micro, spare)
        self._spare = loader, collated.items[:1]
        return collated

    def _is_due(self, loader: Any, micro: MicroBatch) -> bool:
        key = micro.epoch, micro.batch_idx, micro.global_step
        if self._has_names or key in self._proved or not has_own_collate(loader):
            return False
        self._proved.add(key)
        return isinstance(micro.positions, list) and micro.positions == micro.ids and len(micro.ids) > 1


_CPU = torch.device("cpu")


class _Collated:
    """The samples of a batch, collated as they were drawn, and again in other orders and companies.

    Args:
        loader: The loader.
        micro: The batch.
        spare: Samples of another batch, for one that has too few.
    """

    def __init__(self, loader: Any, micro: MicroBatch, spare: list[Any]) -> None:
        assert isinstance(micro.positions, list)
        self._loader, self._micro, self._num = loader, micro, len(micro.positions)
        self.items = [*fetch_items(loader, micro.positions), *spare]
        self._own = list(range(self._num))
        batch, self._draws = self._collate(self._own)
        # Read at once: the next batch may be put into the memory of this one.
        self._found = fingerprint(batch, self._num)
        parts = batch_parts(batch, self._num)
        self._dims = [samples_first(part, self._num)[1] for part in parts]
        self._parts = self._prints(parts)
        # Numbers so fine that two samples hardly share them; labels they may.
        self._is_fine = [isinstance(part, Tensor) and part.is_floating_point() for part in parts]
        self._by_row: list[bool] | None = None

    def prove(self) -> None:
        """Collate in other orders, and in other companies.

        Raises:
            SampleIdError: If a row does not follow its sample.
        """
        for order in _orders(self._num, self._micro.batch_idx):
            self._expect(order, self._own, can_fail=True)
        for row, order in self._without_doubles():
            self._expect(order, [row], can_fail=len(set(order)) > 1)

    def _prints(self, parts: list[Any]) -> list[Fingerprint]:
        return [fingerprint(samples_first(part, self._num)[0], self._num) for part in parts]

    def batch(self) -> Any:
        """The samples as they were drawn."""
        return self._collate(self._own)[0]

    def _collate(self, order: list[int]) -> tuple[Any, bool]:
        """The samples of these places as a batch, and whether that drew random numbers; from one random state."""
        with untouched_randomness(_CPU):
            before = random_state(_CPU)
            batch = collate_items(self._loader, [cloned(self.items[place]) for place in order])
            after = random_state(_CPU)
        return batch, not all(torch.equal(before[name], after[name]) for name in before)

    def _expect(self, order: list[int], rows: list[int], can_fail: bool) -> None:
        """Do these rows of the samples in another order follow them?"""
        try:
            batch, _ = self._collate(order)
        except ReplayMismatchError:  # a function that cannot do with a sample twice, say
            if can_fail:
                return
            raise self._refusal(rows[0]) from None
        found = fingerprint(batch, self._num)
        is_permutation = sorted(order) == self._own
        if found.setting != self._found.setting and not is_permutation:
            return  # padded to another length, say
        if found.setting == self._found.setting and np.array_equal(
            found.rows[rows], self._found.rows[[order[row] for row in rows]]
        ):
            return
        parts = self._prints(batch_parts(batch, self._num))
        off = sorted(self._off(order, parts) & {*rows})
        if off and self._is_certain(found, order, off, is_double=len(rows) == 1):
            raise self._refusal(order[off[0]])

    def _off(self, order: list[int], parts: list[Fingerprint]) -> set[int]:
        """Rows that are others than their samples', in a part of the batch that surely has a row for each."""
        off: set[int] = set()
        pairs = zip(parts, self._parts, strict=True) if len(parts) == len(self._parts) else ()
        for number, (now, then) in enumerate(pairs):
            wanted = np.array(
                [then.rows[place] if place < self._num else now.rows[row] for row, place in enumerate(order)]
            )
            # One that stays as it was numbers the rows, whatever they hold.
            is_off = now.setting == then.setting and not np.array_equal(now.rows, then.rows)
            if is_off and not np.array_equal(now.rows, wanted) and self._has_row_each(number):
                off |= {*np.flatnonzero(now.rows != wanted).tolist()}
        return off

    def _has_row_each(self, number: int) -> bool:
        """Whether a part is shorter by one with a sample less: it may have as many rows by chance, nodes say."""
        if self._by_row is None:
            self._by_row = [True] * len(self._parts)
            for out in self._own[:8]:
                try:
                    fewer, _ = self._collate([place for place in self._own if place != out])
                except ReplayMismatchError:
                    continue
                parts = batch_parts(fewer, self._num - 1)
                is_alike = len(parts) == len(self._parts)
                for i, was in enumerate(self._by_row):
                    self._by_row[i] = was and is_alike and has_row_each(parts[i], self._num - 1, self._dims[i])
        return self._by_row[number]

    def _is_certain(self, found: Fingerprint, order: list[int], off: list[int], is_double: bool) -> bool:
        """Whether that is no randomness of the collate function: what it draws, rows have by their place.

        Of a random one only rows that were equal, or few that are copies of others, are held against it.
        """
        if np.array_equal(fingerprint(self.batch(), self._num).digest, self._found.digest) and (
            is_double or not self._draws
        ):
            return True
        copies = [row for row in off if found.rows[row] in np.delete(self._found.rows, order[row])]
        return copies == off and 2 * len(off) <= self._num

    def _without_doubles(self) -> Iterator[tuple[int, list[int]]]:
        """For samples that differ but have equal rows: each without the others, which it may be a copy of."""
        fine = [part.rows for part, is_fine in zip(self._parts, self._is_fine, strict=True) if is_fine]
        for rows in [self._found.rows, *fine]:
            _, kind, counts = np.unique(rows, return_inverse=True, return_counts=True)
            is_telling = (counts > 1) & ((counts < self._num) | (self._num == 2) | (rows is self._found.rows))
            for number in np.flatnonzero(is_telling & rows.any())[:_MOST]:
                yield from self._without_others(np.flatnonzero(kind == number).tolist())

    def _without_others(self, alike: list[int]) -> Iterator[tuple[int, list[int]]]:
        prints = {place: int(batch_digest(self.items[place], 1)) for place in alike}
        outside = next((place for place in range(len(self.items)) if place not in prints), None)
        for row in alike[:_MOST]:
            others = [place for place in alike if prints[place] != prints[row]]
            if others:
                instead = row if outside is None else outside
                yield row, [instead if place in others else place for place in self._own]

    def _refusal(self, place: int) -> SampleIdError:
        collate, micro = self._loader.collate_fn, self._micro
        name = getattr(collate, "__qualname__", type(collate).__qualname__)
        return SampleIdError(
            f"In batch {micro.batch_idx} of epoch {micro.epoch} the row of sample {micro.ids[place]!r} is not its own: "
            f"collated in another order or company, the sample has another one. The collate function {name} replaces, "
            f"swaps or drops samples there. {NAME_THEM} Or let the dataset replace what cannot be read."
        )


def _orders(num: int, seed: int) -> Iterator[list[int]]:
    """Places of samples to collate: in another order, and some of them several times; more the fewer there are."""
    own = list(range(num))
    if num == 2:
        yield from ([1, 0], [0, 0], [1, 1])
        return
    source = torch.Generator().manual_seed(seed)
    # In steps that part any two neighbours, which such a function may well exchange.
    steps = [step for step in range(2, num - 1) if math.gcd(step, num) == 1]
    if steps:
        step, start = steps[seed % len(steps)], int(torch.randint(num, (), generator=source))
        yield [(start + step * place) % num for place in own]
    for number in range(bool(steps), 2 + 8 // num):
        order = own
        while order == own:
            drawn = (
                torch.randint(num, (num,), generator=source) if number % 2 else torch.randperm(num, generator=source)
            )
            order = drawn.tolist()
        yield order
