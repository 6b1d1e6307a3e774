# SPDX-License-Identifier: Apache-2.0
"""Random states are read whole, cheaply where nothing moved, and set again."""

import json
import random

import numpy as np
import pytest
import torch

from lightning_sgdclean.base.errors import UnsupportedTrainingError
from lightning_sgdclean.base.randomness import (
    RandomStates,
    from_plain_text,
    has_drawn,
    in_plain_text,
    random_state,
    set_random_state,
    untouched_randomness,
)

CPU = torch.device("cpu")
DRAWS = {
    "torch": lambda: float(torch.rand(1)),
    "torch, normal": lambda: float(torch.randn(1)),
    "python": random.random,
    "python, normal": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy, normal": np.random.randn,
    "numpy, seeded": lambda: np.random.seed(3) or np.random.randn(),
    "python, seeded": lambda: random.seed(3) or random.random(),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_what_was_read_cheaply_is_what_is_read_anew(draw):
    states = RandomStates(CPU)
    for number in range(1400):  # further than one round of the twister's 624 words
        now, anew = states.now(), random_state(CPU)
        assert now.keys() == anew.keys()
        assert all(now[name].equal(anew[name]) for name in anew), number
        draw()


def test_what_did_not_move_is_the_same_object_but_for_torch_s_which_is_as_soon_read():
    random.seed(0)  # else half of a pair of normal numbers may be left of another test, and then nothing is known
    np.random.seed(0)
    states = RandomStates(CPU)
    before = states.now()
    assert {name for name, now in states.now().items() if now is not before[name]} == {"torch"}
    np.random.rand()
    moved = {name for name, now in states.now().items() if now is not before[name]}
    assert moved == {"torch", "numpy", "numpy_gauss"}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_a_state_that_is_set_gives_the_same_numbers_again(draw):
    draw()  # leaves half of a pair of normal numbers
    state = random_state(CPU)
    with untouched_randomness(CPU):
        first = [draw() for _ in range(5)]
    assert [draw() for _ in range(5)] == first
    set_random_state(state, CPU)
    assert [draw() for _ in range(5)] == first


def test_a_state_may_be_a_row_of_a_larger_tensor():
    states = [random_state(CPU)]
    first = torch.rand(1), random.random(), np.random.rand()
    states.append(random_state(CPU))
    second = torch.rand(1), random.random(), np.random.rand()
    rows = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    for number, drawn in ((1, second), (0, first)):
        set_random_state({name: tensor[number] for name, tensor in rows.items()}, CPU)
        assert (torch.rand(1), random.random(), np.random.rand()) == drawn


def test_another_generator_in_the_place_of_numpys_is_refused():
    own = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        with pytest.raises(UnsupportedTrainingError, match="is a PCG64; only its own MT19937 is followed"):
            random_state(CPU)
    finally:
        np.random.set_bit_generator(own)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_a_state_that_was_written_as_text_gives_the_same_numbers(draw):
    random.gauss(0, 1)
    np.random.randn()  # half of a pair of normal numbers is left in each
    with untouched_randomness(CPU):
        state = random_state(CPU)
        then, text = draw(), json.dumps(in_plain_text(state))
        assert has_drawn(state, random_state(CPU))
        read = from_plain_text(json.loads(text))
        set_random_state(read, CPU)
        assert not has_drawn(state, random_state(CPU))
        assert draw() == then
