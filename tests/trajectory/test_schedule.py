# SPDX-License-Identifier: Apache-2.0
"""The schedules, against moves written by hand, closed forms, a search over all of them, and a million steps."""

from functools import cache
from itertools import pairwise
from math import comb, isqrt

import pytest

from lightning_sgdclean.trajectory.schedule import (
    interval_of,
    is_snapshot,
    num_snapshots,
    repeated_steps,
    reversal,
    revolve,
    tree,
)
from machine import Machine

EVERYTHING = revolve(10**9)


def moves(words):
    """``"load 2, step 2"`` as the moves it stands for."""
    return [(word, int(index)) for word, index in (move.split() for move in words.split(","))]


@cache
def fewest_steps(length, slots):
    """By trying every place for the next state to hold."""
    if length == 1:
        return 0
    if slots == 0:
        return length * (length - 1) // 2
    return min(
        place + fewest_steps(length - place, slots - 1) + fewest_steps(place, slots) for place in range(1, length)
    )


def test_every_state_kept_is_read_and_nothing_recomputed():
    assert list(reversal([0, 1, 2], 0, 2, EVERYTHING)) == moves("load 2, visit 2, load 1, visit 1, load 0, visit 0")


def test_two_levels_recompute_each_segment_once_and_check_its_end():
    assert list(reversal([0, 3, 5], 0, 5, EVERYTHING)) == moves(
        "load 5, visit 5,"
        "load 3, step 3, check 5, visit 4, load 3, visit 3,"
        "load 0, step 0, hold 1, step 1, check 3, visit 2, recall 1, visit 1, drop 1, load 0, visit 0"
    )


def test_segment_larger_than_memory_is_subdivided():
    assert list(reversal([0, 6], 0, 5, revolve(1))) == moves(
        "load 0, step 0, step 1, step 2, hold 3, step 3, step 4, check 6, visit 5,"
        "recall 3, step 3, visit 4, recall 3, visit 3, drop 3,"
        "load 0, step 0, hold 1, step 1, visit 2, recall 1, visit 1, drop 1, load 0, visit 0"
    )


def test_nothing_held_starts_over_for_every_state():
    assert list(reversal([0], 0, 3, revolve(0))) == moves(
        "load 0, step 0, step 1, step 2, visit 3, load 0, step 0, step 1, visit 2,"
        "load 0, step 0, visit 1, load 0, visit 0"
    )


def test_tree_of_two_holds_one_path():
    assert list(reversal([0], 0, 7, tree(2))) == moves(
        "load 0, step 0, step 1, step 2, step 3, hold 4, step 4, step 5, hold 6, step 6, visit 7,"
        "recall 6, visit 6, drop 6, recall 4, step 4, visit 5, recall 4, visit 4, drop 4,"
        "load 0, step 0, step 1, hold 2, step 2, visit 3, recall 2, visit 2, drop 2,"
        "load 0, step 0, visit 1, load 0, visit 0"
    )


def test_window_may_begin_and_end_between_kept_states():
    assert list(reversal([0, 3, 6, 9], 4, 7, EVERYTHING)) == moves(
        "load 6, step 6, visit 7, load 6, visit 6,"
        "load 3, step 3, hold 4, step 4, check 6, visit 5, recall 4, visit 4, drop 4"
    )
    with pytest.raises(ValueError, match="state 2 cannot be recomputed: the first one kept is 3"):
        list(reversal([3, 6], 2, 6, EVERYTHING))


@pytest.mark.parametrize("slots", [0, 1, 2, 3, 5, 8])
def test_revolve_makes_the_fewest_steps_that_its_memory_allows(slots):
    for length in range(1, 60):
        machine = Machine([0]).run(reversal([0], 0, length - 1, revolve(slots)))
        assert machine.visited == list(range(length))[::-1]
        assert machine.steps == repeated_steps(length, slots) == fewest_steps(length, slots)
        assert machine.most_held <= slots


@pytest.mark.parametrize(("arity", "depth"), [(2, 1), (2, 5), (3, 4), (4, 3), (10, 2)])
def test_tree_repeats_depth_times_and_holds_a_path(arity, depth):
    length = arity**depth
    machine = Machine([0]).run(reversal([0], 0, length - 1, tree(arity)))
    assert machine.visited == list(range(length))[::-1]
    assert machine.steps == depth * (arity - 1) * length // arity
    assert machine.most_held <= depth * (arity - 1)


@pytest.mark.parametrize("arity", [2, 3, 7])
def test_tree_visits_runs_of_any_length(arity):
    for length in range(1, 40):
        assert Machine([0]).run(reversal([0], 0, length - 1, tree(arity))).visited == list(range(length))[::-1]


@pytest.mark.parametrize("interval", [1, 2, 3, 7, 20, None])
def test_every_state_of_the_window_is_visited_once_and_last_first(interval):
    kept = [index for index in range(20) if is_snapshot(index, interval)]
    for first in range(20):
        for last in range(first, 20):
            for split in (EVERYTHING, revolve(1), tree(3)):
                machine = Machine(kept).run(reversal(kept, first, last, split))
                assert machine.visited == list(range(first, last + 1))[::-1]


def test_growing_gaps_are_the_quarter_squares():
    kept = [index for index in range(31) if is_snapshot(index, None)]
    assert kept == [0, 1, 2, 4, 6, 9, 12, 16, 20, 25, 30]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 99, 100, 101, 1000])
def test_growing_gaps_keep_two_roots_and_leave_gaps_of_one(num_steps):
    kept = sorted({index for index in range(num_steps) if is_snapshot(index, None)} | {num_steps})
    assert len(kept) == num_snapshots(num_steps, None) <= 2 * isqrt(num_steps) + 2
    assert max(after - before for before, after in pairwise(kept)) <= max(1, isqrt(num_steps))


def test_intervals_of_the_policies():
    assert [interval_of("sqrt", num) for num in (1, 4, 5, 100, 101, 10**6)] == [1, 2, 3, 10, 11, 1000]
    assert interval_of("every", 100) == 1
    assert interval_of(7, None) == 7
    assert interval_of("sqrt", None) is None
    for num_steps in range(1, 50):
        for interval in (1, 2, 3, 7, 60):
            kept = {index for index in range(num_steps) if is_snapshot(index, interval)} | {num_steps}
            assert num_snapshots(num_steps, interval) == len(kept)


def test_a_million_steps_cost_what_the_closed_forms_say():
    num_steps = 10**6
    interval = interval_of("sqrt", num_steps)
    kept = range(0, num_steps + 1, interval)
    machine = Machine(kept).run(reversal(kept, 0, num_steps, revolve(20)))
    assert len(kept) == num_snapshots(num_steps, interval) == 1001
    assert machine.checks == 1000
    assert machine.steps == 1000 * repeated_steps(interval, 20)
    assert machine.most_held == 20
    assert len(machine.visited) == num_steps + 1
    assert repeated_steps(interval, 20) < 3 * interval  # 20 of 1,000 states held: fewer than three times
    assert repeated_steps(interval, interval) == interval - 1  # all held: once, the last one in the check
    assert comb(20 + 1 + 2, 2) < interval <= comb(20 + 1 + 3, 3)
