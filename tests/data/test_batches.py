# SPDX-License-Identifier: Apache-2.0
"""Batches copied, and batches in which some samples have given their place to others."""

import numpy as np
import torch
from torch import nn

from lightning_sgdclean.data.batches import cloned, of_one_shape, with_neighbours
from lightning_sgdclean.losses.loss_functions import replacement_masks
from structures import Node, Pair, Slotted


def test_a_copy_shares_nothing_but_what_the_batch_itself_shares():
    x = torch.arange(6.0).reshape(2, 3)
    batch = {"x": x, "again": x, "n": Node(x[0]), "a": np.zeros(2), "p": Pair(torch.ones(2), [Slotted(torch.ones(2))])}
    copy = cloned(batch)
    for tensor in (x, batch["a"], batch["p"].x, batch["p"].y[0].x):
        tensor.__iadd__(1)
    assert torch.equal(copy["x"], torch.arange(6.0).reshape(2, 3))
    assert copy["x"] is copy["again"]
    assert torch.equal(copy["n"].x, torch.arange(3.0))
    assert copy["n"].me is copy["n"]
    assert not copy["a"].any()
    assert copy["p"].x.tolist() == copy["p"].y[0].x.tolist() == [1, 1]


def test_a_copy_of_a_view_does_not_copy_what_lies_behind_it():
    assert cloned([torch.zeros(1000, 1000)[3]])[0].untyped_storage().nbytes() == 4000


def test_what_cannot_be_copied_is_shared():
    batch = [(letter for letter in "ab"), torch.zeros(2)]
    assert cloned(batch) is batch


def test_neighbours_take_the_place_of_samples_in_nested_batches():
    mask = torch.tensor([True, False, True])
    batch = {
        "x": torch.arange(6).view(3, 2),
        "time first": torch.arange(6).view(2, 3),
        "names": ["a", "b", "c"],
        "sequences": [torch.arange(2), torch.arange(4), torch.arange(1)],
        "other": torch.arange(4),
        "pair": (torch.arange(3), 1.5),
    }
    changed = with_neighbours(batch, mask)
    assert changed["x"].tolist() == [[4, 5], [2, 3], [2, 3]]
    assert changed["time first"].tolist() == [[2, 1, 1], [5, 4, 4]]
    assert changed["names"] == ["c", "b", "b"]
    assert [len(sequence) for sequence in changed["sequences"]] == [1, 4, 4]
    assert changed["other"].tolist() == [0, 1, 2, 3]
    assert changed["pair"][0].tolist() == [2, 1, 1]
    assert batch["x"].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_variants_before_collating_keep_the_padded_length():
    items = [torch.arange(length) for length in (2, 5, 3, 1)]

    def variant(replaced):
        chosen = [items[i - 1] if replaced[i] else items[i] for i in range(4)]
        return nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-1)

    shaped = of_one_shape(variant, 4)
    for mask in replacement_masks(4):
        assert shaped(mask).shape == (4, 5)
    assert shaped(torch.tensor([True, False, True, False]))[0].tolist() == [0, -1, -1, -1, -1]
