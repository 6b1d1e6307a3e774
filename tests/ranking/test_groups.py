# SPDX-License-Identifier: Apache-2.0
"""Influences summed by group."""

import re

import numpy as np
import pytest
import torch

from lightning_sgdclean.ranking.ranking import Ranking


def make(ids: list, influence: list[float] | None = None) -> Ranking:
    influence = [float(i) for i in range(len(ids))] if influence is None else influence
    return Ranking.from_influence(ids, influence, [1] * len(ids))


def test_by_sums_groups_and_puts_the_most_harmful_first() -> None:
    ranking = make([0, 1, 2, 3], [1.0, -3.0, 1.5, -0.5])
    sums = ranking.by(["cat", "dog", "cat", "owl"])
    assert list(sums.items()) == [("dog", -3.0), ("owl", -0.5), ("cat", 2.5)]


def test_by_orders_ties_by_the_text_of_the_group() -> None:
    assert list(make([0, 1, 2], [1.0, 1.0, 1.0]).by([10, 9, "b"])) == [10, 9, "b"]


def test_by_sums_without_rounding_on_the_way() -> None:
    assert make([0, 1, 2], [1e16, 1.0, -1e16]).by([0, 0, 0]) == {0: 1.0}


@pytest.mark.parametrize(
    "groups",
    [
        [7, 8, 7],
        (7, 8, 7),
        np.array([7, 8, 7]),
        torch.tensor([7, 8, 7]),
        {0: 7, 1: 8, 2: 7},
        {0: torch.tensor(7), 1: torch.tensor(8), 2: np.int64(7)},
        [torch.tensor(7), torch.tensor(8), torch.tensor(7)],
    ],
    ids=["list", "tuple", "array", "tensor", "dict", "dict of tensors", "list of tensors"],
)
def test_by_takes_groups_in_every_form(groups: object) -> None:
    sums = make([0, 1, 2], [1.0, -1.0, 2.0]).by(groups)
    assert sums == {8: -1.0, 7: 3.0}
    assert {type(group) for group in sums} == {int}


def test_by_takes_a_series_by_its_labels_and_str_ids_by_a_mapping() -> None:
    pandas = pytest.importorskip("pandas")
    assert make([5, 3], [-1.0, 2.0]).by(pandas.Series(["x", "y"], index=[3, 5])) == {"y": -1.0, "x": 2.0}
    assert make(["a", "b"], [-1.0, 2.0]).by({"a": 0, "b": 1}) == {0: -1.0, 1: 2.0}


@pytest.mark.parametrize("groups", [["x"], np.array([0]), torch.tensor([0]), {0: "x"}])
@pytest.mark.parametrize("sample", [3, -1])
def test_by_names_the_id_without_a_group(groups: object, sample: int) -> None:
    with pytest.raises(KeyError, match=f"^{sample}$"):
        make([0, sample]).by(groups)


def test_by_refuses_what_makes_no_groups() -> None:
    with pytest.raises(TypeError, match="groups must be a mapping"):
        make(["a"]).by(["x"])
    with pytest.raises(ValueError, match="The group of sample 0 is NaN"):
        make([0]).by([float("nan")])
    with pytest.raises(ValueError, match=re.escape("found an array of shape (2, 3)")):
        make([0]).by(torch.zeros(2, 3))
