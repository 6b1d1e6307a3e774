# SPDX-License-Identifier: Apache-2.0
"""Which states are kept, and in which order the others are recomputed: pure integers.

State ``i`` lies before step ``i``, so that ``n`` steps have the states 0 to ``n``. A walk backwards
visits them last first. Those on disk are read; a state between two of them is recomputed forward from
the last one before it that is at hand, and on the way there some are held in memory for the visits to
come. Which ones, a *split* says: all where they fit, else few of them, and steps are repeated.

:func:`revolve` repeats as few steps as can be for what memory holds (Griewank and Walther 2000);
:func:`tree` holds a path of the tree that REPLAY replays lazily (Engstrom et al. 2025).
"""

from collections.abc import Callable, Iterator, Sequence
from math import comb, isqrt
from typing import Literal

Policy = Literal["every", "sqrt"] | int
Move = tuple[Literal["load", "recall", "step", "hold", "drop", "check", "visit"], int]
Split = Callable[[int, int, int], list[int]]


def interval_of(policy: Policy, num_steps: int | None) -> int | None:
    """Steps from one snapshot to the next.

    Args:
        policy: ``"every"``, ``"sqrt"`` (as many snapshots as steps between two) or the number itself.
        num_steps: Length of the window, or None where it cannot be known.

    Returns:
        The interval, or None for one that grows: see :func:`is_snapshot`.
    """
    if policy == "every":
        return 1
    if policy == "sqrt":
        return None if num_steps is None else max(1, isqrt(max(0, num_steps - 1)) + 1)
    return policy


def is_snapshot(position: int, interval: int | None) -> bool:
    """Whether the state at ``position`` (counted from where snapshots began) is kept.

    Without an interval those at the quarter squares 0, 1, 2, 4, 6, 9, 12, 16, ... are: of ``n`` states
    about ``2 sqrt(n)``, with gaps of at most ``sqrt(n)``, whatever ``n`` will turn out to be.
    """
    if interval is not None:
        return position % interval == 0
    root = isqrt(4 * position + 1)
    return root * root // 4 == position


def num_snapshots(num_steps: int, interval: int | None) -> int:
    """How many states of a run of ``num_steps`` are kept: those at the intervals, and the last."""
    if interval is None:
        return isqrt(4 * num_steps - 1) + 1
    return -(-num_steps // interval) + 1


def revolve(slots: int) -> Split:
    """Hold at most ``slots`` states, and repeat as few steps as that allows.

    Griewank, Walther: *Algorithm 799: revolve*, ACM TOMS 26(1), 2000.
    """

    def split(base: int, target: int, held: int) -> list[int]:
        marks = []
        for snapshots in range(slots - held + 1, 1, -1):  # the base counts as one
            length = target - base + 1
            if length <= 2:  # the target itself is handed out at once
                break
            repeats = _repeats(length, snapshots)
            base += min(comb(snapshots + repeats - 1, snapshots), length - comb(snapshots + repeats - 2, snapshots - 1))
            marks.append(base)
        return marks

    return split


def tree(arity: int) -> Split:
    """Hold where ``arity`` equal parts begin, and likewise within the part at work.

    Engstrom et al.: *Optimizing ML Training with Metagradient Descent*, 2025 (REPLAY's lazy tree).
    """

    def split(base: int, target: int, held: int) -> list[int]:
        marks: list[int] = []
        while (length := target - base + 1) > 1:
            parts = {base + -(-length * part // arity) for part in range(1, arity)}
            marks += sorted(mark for mark in parts if mark <= target)
            base = marks[-1]
        return [mark for mark in marks if mark < target]

    return split


def _repeats(length: int, snapshots: int) -> int:
    """Times that the most repeated of ``length`` states is computed."""
    repeats = 1
    while comb(snapshots + repeats, snapshots) < length:
        repeats += 1
    return repeats


def repeated_steps(length: int, slots: int) -> int:
    """Steps that :func:`revolve` makes to visit ``length`` states backwards, the first being on disk."""
    repeats = _repeats(length, slots + 1)
    return repeats * length - comb(slots + 1 + repeats, slots + 2)


def reversal(kept: Sequence[int], first: int, last: int, split: Split) -> Iterator[Move]:
    """Visit the states ``last``, ``last - 1``, ..., ``first``, with the moves that make them.

    There is one state at work, and some are held. A move is a word and the state that it is about:

    - ``load i``, ``recall i``: the state at work is ``i``, from disk or as it was held;
    - ``step i``: the one at work, ``i``, becomes ``i + 1`` by repeating step ``i``;
    - ``hold i``: hold a copy of the one at work; ``drop i``: forget it;
    - ``check i``: repeat step ``i - 1`` and compare with the kept state ``i``, which ends the segment;
      the state at work stays ``i - 1``;
    - ``visit i``: hand it out.

    Args:
        kept: States on disk, ascending.
        first: Last state to visit.
        last: First state to visit; it need not be kept.
        split: Which states to hold on the way from one (not included) to another, given how many are held.

    Raises:
        ValueError: If no state is kept at or before ``first``.
    """
    if not kept or kept[0] > first:
        raise ValueError(f"state {first} cannot be recomputed: the first one kept is {kept[0] if kept else None}")
    stop: int | None = next((index for index in kept if index > last), None)
    for start in reversed([index for index in kept if index <= last]):
        top = last if stop is None else min(last, stop - 1)
        ends = stop if stop is not None and start < top == stop - 1 else None
        yield from _segment(start, max(first, start), top, ends, split)
        if start <= first:
            return
        stop = start


def _segment(start: int, first: int, last: int, end: int | None, split: Split) -> Iterator[Move]:
    """Visit ``last`` to ``first`` from the kept state ``start``; ``end`` is the next one kept, to be checked once."""
    held = [start]  # this one lies on disk
    for target in range(last, first - 1, -1):
        while held[-1] > target:
            yield "drop", held.pop()
        base = held[-1]
        yield "load" if base == start else "recall", base
        marks = set(split(base, target, len(held) - 1))
        for index in range(base, target):
            yield "step", index
            if index + 1 in marks:
                yield "hold", index + 1
                held.append(index + 1)
        if end == target + 1:
            yield "check", end
        yield "visit", target
    while len(held) > 1:
        yield "drop", held.pop()
