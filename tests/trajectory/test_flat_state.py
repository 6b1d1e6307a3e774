# SPDX-License-Identifier: Apache-2.0
"""Rows for states come one behind the other, and those that do are one tensor."""

import json

import torch

from lightning_sgdclean.trajectory import flat_state as state_rows
from lightning_sgdclean.trajectory.flat_state import (
    DTYPES,
    Flattener,
    StateRows,
    flatten,
    nbytes_of,
    stretches,
    unflatten,
)
from lightning_sgdclean.trajectory.records import State
from small_steps import state


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


def test_flatten_and_unflatten_are_inverse():
    layout, flat = flatten(state(3.0, True))
    assert set(flat) == {"float32", "int64"}
    back = unflatten(json.loads(json.dumps(layout)), flat)
    assert torch.equal(back.params["a"], torch.full((2, 3), 3.0))
    assert back.params["b"].shape == ()


def test_complex_tensors_are_held_as_pairs():
    one = State({"odd": torch.ones(3)}, {"freqs": torch.polar(torch.ones(4), torch.arange(4.0)), "z": torch.tensor(1j)})
    layout, flat = flatten(one)
    assert set(flat) == {"float32"}
    assert nbytes_of(layout) == one.nbytes == flat["float32"].nbytes
    back = unflatten(json.loads(json.dumps(layout)), flat)
    assert all(torch.equal(back.buffers[name], tensor) for name, tensor in one.buffers.items())


def buffer_for(dtype, length):
    return torch.empty(length, dtype=DTYPES[dtype])


def test_a_flattener_sees_what_became_of_the_tensors_of_a_state():
    params = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    flattener, now = Flattener(), State(params, {"n": torch.tensor(1)})

    def agrees():
        found, truth = flattener.flatten(now, buffer_for), flatten(now)
        assert found[0] == truth[0]
        return all(torch.equal(found[1][dtype], tensor) for dtype, tensor in truth[1].items())

    assert agrees()
    params["a"].add_(1)
    assert agrees()
    params["a"].data = torch.full((2, 3), 5.0)  # another memory
    assert agrees()
    params["b"].data = params["b"].data.reshape(2, 2)  # another shape
    assert agrees()
    params["a"].t_()  # not contiguous: no view of it can be kept
    assert agrees()
    params["a"].mul_(2)
    assert agrees()
    now.buffers["n"].add_(1)
    assert agrees()


def test_a_flattener_sees_another_state():
    flattener, one = Flattener(), torch.arange(4.0)
    states = [{"a": one}, {"a": torch.ones(4)}, {"b": one}, {"a": one, "b": torch.ones(2)}, {"a": one.view(2, 2).T}]
    for params in states:
        found, truth = flattener.flatten(State(params), buffer_for), flatten(State(params))
        assert found[0] == truth[0]
        assert torch.equal(found[1]["float32"], truth[1]["float32"])
