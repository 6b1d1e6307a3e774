# SPDX-License-Identifier: Apache-2.0
"""Rows for states come one behind the other, and those that do are one tensor."""

import torch

from lightning_sgdclean.trajectory import flat_state as state_rows
from lightning_sgdclean.trajectory.flat_state import StateRows, stretches


def taken(rows, num, length=3):
    found = []
    for _ in range(num):
        row = rows.take("float32", length)
        row.fill_(len(found))
        found.append(row)
    return found


def test_rows_that_lie_one_behind_the_other_are_one_tensor_without_a_copy(monkeypatch):
    monkeypatch.setattr(state_rows, "_PIECE_ROWS", 4)
    held = taken(StateRows(), 6)
    whole = list(stretches(held))
    assert [tensor.tolist() for tensor in whole] == [[[float(n)] * 3 for n in range(4)], [[4.0] * 3, [5.0] * 3]]
    assert whole[0].data_ptr() == held[0].data_ptr()
    assert whole[0].is_contiguous()


def test_rows_used_again_still_follow_each_other(monkeypatch):
    monkeypatch.setattr(state_rows, "_PIECE_ROWS", 4)
    rows = StateRows()
    held = taken(rows, 8)
    for row in held[:6]:
        rows.give_back({"float32": row})
    again = taken(rows, 6)
    assert {row.data_ptr() for row in again} == {row.data_ptr() for row in held[:6]}
    assert [len(tensor) for tensor in stretches(again)] == [4, 2]


def test_a_row_that_is_missing_or_of_another_length_ends_a_stretch():
    rows = StateRows()
    held = taken(rows, 5)
    longer = taken(rows, 1, length=4)
    assert [tuple(tensor.shape) for tensor in stretches([*held[:2], *held[3:], *longer])] == [(2, 3), (2, 3), (1, 4)]
    assert list(stretches([])) == []


def test_a_large_state_has_memory_of_its_own():
    length = state_rows._PIECE_BYTES // 4 + 1
    row = StateRows().take("float32", length)
    assert row.untyped_storage().nbytes() == 4 * length


def test_nothing_is_kept_of_what_is_free_once_it_is_let_go():
    rows = StateRows()
    rows.give_back({"float32": torch.empty(3)})
    assert len(rows) == 1
    rows.clear()
    assert len(rows) == 0
