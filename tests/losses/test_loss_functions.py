# SPDX-License-Identifier: Apache-2.0
"""Rules for whose row is whose, from what moves when samples are replaced."""

import pytest
import torch

from lightning_sgdclean.losses.loss_functions import OwnerRule, codes_of, consistent_rules, owners_by, replacement_masks


@pytest.mark.parametrize("num", [2, 3, 5, 32, 64, 70, 71, 1000])
def test_what_moves_with_several_samples_is_never_taken_for_another_samples(num):
    codes = codes_of(replacement_masks(num)).tolist()
    assert len(set(codes)) == num
    pairs = codes[:40]
    assert all(a | b not in codes for a in pairs for b in pairs if a != b)
    assert len(replacement_masks(num)) <= 2 + 1.3 * num.bit_length()


@pytest.mark.parametrize(
    ("layout", "shape", "owners"),
    [
        (OwnerRule(0, outer=1), (4,), [0, 1, 2, 3]),
        (OwnerRule(0, outer=1), (8,), [0, 0, 1, 1, 2, 2, 3, 3]),
        (OwnerRule(0, inner=1), (8,), [0, 1, 2, 3, 0, 1, 2, 3]),
        (OwnerRule(1, outer=1), (3, 4), [0, 1, 2, 3]),
        (OwnerRule(0, outer=2), (16,), [0, 0, 1, 1, 2, 2, 3, 3] * 2),
        (OwnerRule(0, inner=2), (16,), [0, 0, 1, 1, 2, 2, 3, 3] * 2),
    ],
)
def test_rule_of_the_owners_is_found_and_holds_for_other_lengths(layout, shape, owners):
    codes = codes_of(replacement_masks(4))
    view = [-1 if dim == layout.dim else 1 for dim in range(len(shape))]
    seen = codes[torch.tensor(owners)].view(view).expand(shape).clone()
    found = consistent_rules(seen, codes)
    assert layout in found
    assert owners_by(found, shape, 4).flatten().tolist() == owners
    seen.view(-1)[0] = 0  # a row that did not move, as in padding, speaks for no one
    assert layout in consistent_rules(seen, codes)


def test_rules_that_part_ways_on_another_length_give_no_owner():
    codes = codes_of(replacement_masks(3))
    found = consistent_rules(codes.clone(), codes)
    assert owners_by(found, (3,), 3).tolist() == [0, 1, 2]
    assert owners_by(found, (6,), 3) is None
    assert owners_by(found, (5,), 3) is None


def test_rules_of_one_of_several_loaders():
    """Two views of the second loader's three samples, one beside the other, behind two of the first one."""
    codes = codes_of(replacement_masks(5))
    seen = codes[torch.tensor([2, 3, 4, 2, 3, 4])]
    rules = consistent_rules(seen, codes, [2, 3])
    assert {(rule.part, rule.inner, rule.outer) for rule in rules} == {(1, 1, None), (1, None, 2)}
    assert owners_by(frozenset(rules), (12,), 9, [5, 4]) is None  # one view of three, or three of one: it is not known
    assert owners_by(frozenset([OwnerRule(0, inner=1, part=1)]), (8,), 9, [5, 4]).tolist() == [5, 6, 7, 8] * 2
    assert OwnerRule(0, outer=1, part=2).owners((3,), 3, [3]) is None  # there is no third loader
    assert OwnerRule(0, outer=1, part=1).owners((3,), 3, [3, 0]) is None  # it is at its end
