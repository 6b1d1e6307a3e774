# SPDX-License-Identifier: Apache-2.0
"""Which samples are shown, and how they are fetched."""

import dataclasses
import io
import weakref

import numpy as np
import pytest
import torch

from lightning_sgdclean.report.samples import fetch_shown, ids_to_show
from rankings import ranking_of

PIL = pytest.importorskip("PIL.Image")
RANDOM = np.random.default_rng(0)


def test_the_worst_and_the_best_are_shown_and_never_the_same_twice():
    ranking = ranking_of(np.array([-2.0, -1.0, 0.0, 1.0, 2.0]))
    assert ids_to_show(ranking) == [0, 1, 4, 3]
    assert ids_to_show(ranking, 1, 1) == [0, 4]


def test_the_label_is_told_apart_from_the_rest():
    rows, complaints = fetch_shown([("some text", 3), ("other", 1)], [1, 0])
    assert complaints == []
    assert [(row.sample_id, row.label, row.appearance.text) for row in rows] == [(1, 1, "other"), (0, 3, "some text")]


def test_ids_that_are_no_positions_are_looked_up():
    rows, _ = fetch_shown(["a", "b"], ["second", "first"], {"first": 0, "second": 1})
    assert [row.appearance.text for row in rows] == ["b", "a"]


def test_render_decides_what_is_shown():
    rows, _ = fetch_shown([(torch.tensor([104, 105]), 1)], [0], render=lambda s: "".join(map(chr, s[0].tolist())))
    assert (rows[0].appearance.text, rows[0].label) == ("hi", 1)


def test_a_sample_that_fails_costs_only_itself_and_is_reported():
    class Moody:
        def __getitem__(self, index):
            if index == 1:
                raise OSError("disk <gone>")
            return "fine", 0

    rows, complaints = fetch_shown(Moody(), [0, 1, 2])
    assert [row.appearance.text for row in rows] == ["fine", "", "fine"]
    assert rows[1].appearance.note == "OSError: disk <gone>"
    assert complaints == ["1 of 3 samples could not be shown; sample 1: OSError: disk <gone>"]


class Lazy:
    """Samples of which one cannot be shown, which comes out only when it is looked at."""

    def __init__(self, odd):
        self.odd = odd

    def __getitem__(self, index):
        return (self.odd, 1) if index == 1 else ("fine", 0)


def truncated_picture():
    file = io.BytesIO()
    PIL.fromarray(RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    return PIL.open(io.BytesIO(file.getvalue()[:-4000]))  # lazy: the pixels are read later


def half_filled():
    @dataclasses.dataclass
    class Record:
        name: str
        age: int = dataclasses.field(init=False)

    return Record("ann")


@pytest.mark.parametrize(
    ("odd", "error"), [(truncated_picture, "OSError"), (half_filled, "AttributeError")], ids=["picture", "dataclass"]
)
def test_a_sample_that_fails_while_it_is_looked_at_costs_only_itself(odd, error):
    rows, complaints = fetch_shown(Lazy(odd()), [0, 1, 2])
    assert [row.appearance.text for row in rows] == ["fine", "", "fine"]
    assert [row.label for row in rows] == [0, 1, 0]
    assert rows[1].appearance.note.startswith(f"{error}: ")
    assert complaints[0].startswith(f"1 of 3 samples could not be shown; sample 1: {error}: ")


def test_one_sample_is_held_at_a_time():
    alive = weakref.WeakSet()

    class Large:
        def __getitem__(self, index):
            assert len(alive) <= 1  # the one before may still have its name
            tensor = torch.zeros(3, 300, 300)
            alive.add(tensor)
            return tensor, index

    rows, complaints = fetch_shown(Large(), range(20))
    assert complaints == []
    assert all(row.appearance.picture for row in rows)
