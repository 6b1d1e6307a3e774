# SPDX-License-Identifier: Apache-2.0
"""A batch of several loaders: whose a row is, and samples replaced by others of their own loader."""

from collections import namedtuple

import pytest
import torch

from lightning_sgdclean.data.parts import loader_parts, neighbour_variant, part_and_row

Pair = namedtuple("Pair", ["first", "second"])
A, B = torch.arange(2.0), torch.arange(10.0, 13.0)


@pytest.mark.parametrize(
    "batch", [{"a": A, "b": B}, [A, B], (A, B), Pair(A, B)], ids=lambda batch: type(batch).__name__
)
def test_a_sample_is_replaced_by_another_one_of_its_loader(batch):
    changed = neighbour_variant(batch, [2, 3])(torch.tensor([True, False, False, True, True]))
    assert type(changed) is type(batch)
    assert [part.tolist() for part in loader_parts(changed)] == [[1, 1], [10, 10, 11]]
    assert [part.tolist() for part in loader_parts(batch)] == [[0, 1], [10, 11, 12]]


def test_a_loader_at_its_end_has_no_samples():
    changed = neighbour_variant([None, B], [0, 3])(torch.tensor([True, False, False]))
    assert changed[0] is None
    assert changed[1].tolist() == [12, 11, 12]


def test_the_loader_of_each_row():
    assert [part_and_row([2, 0, 3], row) for row in range(5)] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    with pytest.raises(IndexError):
        part_and_row([2, 0, 3], 5)
