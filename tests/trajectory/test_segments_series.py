# SPDX-License-Identifier: Apache-2.0
"""Which states a segment holds, said in short and in full."""

import random

import pytest

from lightning_sgdclean.trajectory.segments import in_full, in_short

CASES = {
    "none": ([], []),
    "one": ([(7, 0)], [[7, 1, 1, 0]]),
    "every step's": ([(n, 1) for n in range(256, 512)], [[256, 256, 1, 1]]),
    "one in five": ([(10, 0), (15, 0), (20, 0)], [[10, 3, 5, 0]]),
    "another layout from the second on": ([(0, 0), (1, 1), (2, 1)], [[0, 1, 1, 0], [1, 2, 1, 1]]),
    "another distance": ([(0, 0), (4, 0), (8, 0), (9, 0)], [[0, 3, 4, 0], [9, 1, 1, 0]]),
}


@pytest.mark.parametrize(("states", "rows"), CASES.values(), ids=CASES.keys())
def test_states_at_equal_distances_make_one_row(states, rows):
    assert in_short(states) == rows
    assert in_full(rows) == states


def test_any_states_are_found_again():
    rng = random.Random(0)
    for _ in range(200):
        numbers = sorted(rng.sample(range(40), rng.randrange(20)))
        states = [(number, rng.randrange(2)) for number in numbers]
        assert in_full(in_short(states)) == states
