# SPDX-License-Identifier: Apache-2.0
"""A derivative is wrong where quotients over two distances agree that it is; rounding and kinks are told apart."""

import math

import pytest
import torch

from lightning_sgdclean.adjoint.quotients import TOLERANCE, difference, shaken, towards

MOVES = (1e-8, 1e-9, 1e-7, 1e-6, 1e-5)


def quotient(function, at=1.0, size=1.0):
    """Central difference quotients of a function of one number."""
    return lambda e: ((function(at + e) - function(at - e)) / (2 * e), size / (2 * e))


def test_a_right_derivative_is_off_by_nothing_but_rounding():
    assert difference(math.cos(1.0), quotient(math.sin), MOVES) <= TOLERANCE


@pytest.mark.parametrize("factor", [1.001, 0.5, -1, 10, 1e4])
def test_a_wrong_one_is_off_by_how_wrong_it_is(factor):
    wrong = factor * math.cos(1.0)
    off = abs(wrong - math.cos(1.0)) / max(abs(wrong), math.cos(1.0))
    assert difference(wrong, quotient(math.sin), MOVES) == pytest.approx(off, rel=1e-3)


def test_a_kink_that_one_move_crosses_is_no_difference():
    def kinked(x):
        return math.sin(x) + 100 * max(0.0, x - 1.0 - 5e-9)

    assert difference(math.cos(1.0), quotient(kinked), MOVES) <= TOLERANCE


def test_noise_that_no_distance_gets_rid_of_cannot_be_told():
    source = torch.Generator().manual_seed(0)

    def noisy(x):
        return math.sin(x) + 1e-3 * float(torch.rand((), generator=source))

    assert difference(math.cos(1.0), quotient(noisy), MOVES) is None


def test_nothing_at_all_is_as_expected():
    assert difference(0.0, quotient(lambda x: 0.0, size=0.0), MOVES) == 0.0


def test_directions_are_as_long_as_what_is_moved_and_lean_where_they_should():
    source = torch.Generator().manual_seed(0)
    at, along = [torch.full((400,), 3.0, dtype=torch.float64)], [torch.ones(400, dtype=torch.float64)]
    (found,) = towards(source, at, along)
    cosine = float(found @ along[0] / found.norm() / along[0].norm())
    assert 0.6 < cosine < 0.8  # half random, half along
    assert float(found.norm()) == pytest.approx(math.sqrt(2) * float(at[0].norm()), rel=0.1)


def test_shaken_zeros_are_zeros_no_more_and_the_rest_hardly_moves():
    tensors = [torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)]
    shaken(tensors, torch.Generator().manual_seed(0))
    assert bool((tensors[0] != 0).all())
    assert float((tensors[1] - 1).abs().max()) < 0.01


def bent(width):
    """A slope of one at 1.0 that is gone within a width."""
    return lambda x: width * math.tanh((x - 1.0) / width)


def test_quotients_that_saturate_do_not_agree_on_a_difference_and_shorter_ones_tell():
    assert difference(1.0, quotient(bent(1e-10), size=1e-10), (1e-8, 1e-7, 1e-6)) is None
    assert difference(1.0, quotient(bent(1e-10), size=1e-10), (1e-8, 1e-9, 1e-12, 1e-13)) <= TOLERANCE
    assert difference(1.5, quotient(bent(1e-10), size=1e-10), (1e-8, 1e-12, 1e-13)) == pytest.approx(1 / 3, rel=1e-3)


def test_a_gradient_that_is_gone_is_a_difference():
    assert difference(1.0, quotient(lambda x: 0.0), MOVES) == 1.0


def test_a_distance_so_short_that_rounding_hides_everything_does_not_count():
    assert difference(1.0, quotient(bent(1e-10)), (1e-8, 1e-12, 1e-13)) is None
