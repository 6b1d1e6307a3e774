# SPDX-License-Identifier: Apache-2.0
"""The ranking: order, refusals, what is kept without its worst, and the id of its run."""

import copy
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from lightning_sgdclean.ranking.ranking import Ranking, run_id
from rankings import ranking_of


def make(ids: list, influence: list[float] | None = None) -> Ranking:
    influence = [float(i) for i in range(len(ids))] if influence is None else influence
    return Ranking.from_influence(ids, influence, [1] * len(ids))


# --- order and attributes


def test_most_negative_influence_has_rank_one() -> None:
    ranking = Ranking.from_influence([5, 6, 7], [0.1, -2.0, -1.0], [1, 2, 3])
    assert ranking.sample_id.tolist() == [6, 7, 5]
    assert ranking.influence.tolist() == [-2.0, -1.0, 0.1]
    assert ranking.visits.tolist() == [2, 3, 1]
    assert ranking.rank.tolist() == [1, 2, 3]
    assert ranking.effect == ["harmful", "harmful", "helpful"]


def test_ties_of_integer_ids_are_ordered_as_numbers() -> None:
    assert make([10, 9, 100, -1], [0.5] * 4).sample_id.tolist() == [-1, 9, 10, 100]


def test_ties_of_str_ids_are_ordered_as_text() -> None:
    assert make(["10", "9", "100"], [0.5] * 3).sample_id.tolist() == ["10", "100", "9"]


def test_positive_and_negative_zero_tie_and_have_no_effect() -> None:
    ranking = make([3, 2, 1], [0.0, -0.0, 0.0])
    assert ranking.sample_id.tolist() == [1, 2, 3]
    assert ranking.effect == ["none"] * 3


def test_arrays_have_the_promised_types() -> None:
    ranking = make([1, 2])
    assert (ranking.sample_id.dtype, ranking.influence.dtype) == (np.int64, np.float64)
    assert (ranking.visits.dtype, ranking.rank.dtype) == (np.int64, np.int64)
    assert make(["a"]).sample_id.dtype == object


@pytest.mark.parametrize(
    "ids",
    [
        [False, True],
        [np.bool_(False), np.int16(1)],
        np.array([0, 1], dtype=np.uint8),
        torch.tensor([0, 1]),
        range(2),
    ],
    ids=["bool", "numpy scalars", "numpy array", "tensor", "range"],
)
def test_every_kind_of_integer_id_becomes_a_python_int(ids: object) -> None:
    ranking = Ranking.from_influence(ids, [-1.0, -2.0], [1, 1])
    assert ranking.harmful(2) == [1, 0]
    assert {type(sample) for sample in ranking.harmful(2)} == {int}


def test_numpy_text_ids_become_python_str() -> None:
    ranking = Ranking.from_influence(np.array(["a", "b"]), [-1.0, -2.0], [1, 1])
    assert ranking.harmful(2) == ["b", "a"]
    assert {type(sample) for sample in ranking.harmful(2)} == {str}


def test_tensors_of_any_floating_type_are_taken() -> None:
    influence = torch.tensor([0.5, -0.25], dtype=torch.bfloat16, requires_grad=True)
    ranking = Ranking.from_influence([0, 1], influence, torch.tensor([1, 2]))
    assert ranking.influence.tolist() == [-0.25, 0.5]


def test_the_arrays_cannot_be_changed_nor_reach_the_caller() -> None:
    influence = np.array([1.0, 2.0])
    ranking = Ranking.from_influence([0, 1], influence, [1, 1])
    influence[:] = 0.0
    assert ranking.influence.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="read-only"):
        ranking.influence[0] = 3.0


def test_equality_is_by_content() -> None:
    assert make([1, 2]) == make([1, 2])
    assert make([1, 2]) != make([1, 3])
    assert make([1, 2]) != make(["1", "2"])
    assert make([1]) != make([1, 2])
    assert make([1]) != "ranking"


def test_copies_and_pickles_are_equal() -> None:
    ranking = make(["b", "a"])
    assert copy.deepcopy(ranking) == ranking
    assert pickle.loads(pickle.dumps(ranking)) == ranking


def test_harmful_and_helpful_stop_at_the_sign() -> None:
    ranking = make([1, 2, 3, 4, 5], [-1.0, 0.0, 2.0, -3.0, 5.0])
    assert ranking.harmful(1) == [4]
    assert ranking.harmful(10) == [4, 1]
    assert ranking.helpful(1) == [5]
    assert ranking.helpful(10) == [5, 3]
    assert ranking.harmful(0) == ranking.helpful(0) == []


def test_ties_of_helpful_samples_ascend_too() -> None:
    assert make([3, 1, 2], [1.0, 1.0, 1.0]).helpful(2) == [1, 2]


def test_a_negative_number_of_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected n to be 0 or more, found -1"):
        make([1]).harmful(-1)


def test_an_empty_ranking_works(tmp_path: Path) -> None:
    ranking = make([])
    assert (len(ranking), ranking.harmful(3), ranking.by({})) == (0, [], {})
    assert repr(ranking) == "Ranking(0 samples: 0 harmful, 0 helpful)"
    assert Ranking.load(ranking.save(tmp_path / "influence.csv")) == ranking


def test_repr_is_short_whatever_the_ids_are() -> None:
    assert repr(make([4, 5], [-0.125, 0.0])) == "Ranking(2 samples: 1 harmful, 0 helpful; worst 4 with -0.125)"
    assert len(repr(make(["x" * 10_000], [-1.0]))) < 120


# --- refusals


@pytest.mark.parametrize(
    ("ids", "influence", "visits", "message"),
    [
        ([1, 2], [0.0, float("nan")], [1, 1], "finite influences, found nan for sample 2 (1 of 2"),
        ([1, 2], [float("inf"), -float("inf")], [1, 1], "finite influences, found inf for sample 1 (2 of 2"),
        ([1, 2, 1], [0.0] * 3, [1] * 3, "every sample id once, found 1 twice"),
        (["a", "a"], [0.0] * 2, [1] * 2, "every sample id once, found 'a' twice"),
        ([0, False], [0.0] * 2, [1] * 2, "every sample id once, found 0 twice"),
        ([1, 2], [0.0], [1, 1], "found 2 ids, 1 influences and 2 numbers of visits"),
        ([1], [0.0], [], "found 1 ids, 1 influences and 0 numbers of visits"),
        ([1, "a", "b"], [0.0] * 3, [1] * 3, "of one type, found 1 integers and 2 str"),
        ([2**63], [0.0], [1], "9223372036854775808 does not fit into 64 bits"),
        (["\ud800"], [0.0], [1], r"'\ud800' cannot be written as UTF-8"),
        ([1], [[0.0]], [1], "one row of numbers, found shape (1, 1)"),
        ([1], ["0.5"], [1], "influence as numbers, found <U3"),
        ([1], [0.0], [1.5], "visits as whole numbers, found float64"),
        ([1], [0.0], [-1], "Sample 1 has -1 visits"),
    ],
)
def test_impossible_input_is_refused_with_what_was_found(
    ids: list, influence: list, visits: list, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Ranking.from_influence(ids, influence, visits)


@pytest.mark.parametrize("sample", [1.0, None, b"a", (1,), np.float32(1), np.datetime64("2020-01-01")])
def test_ids_of_other_types_are_refused(sample: object) -> None:
    with pytest.raises(TypeError, match="Expected sample ids of type int or str, found"):
        make([sample])


# --- keep


DATASET = TensorDataset(torch.arange(6))


def test_keep_leaves_out_the_first_of_the_ranking() -> None:
    ranking = make([4, 0, 2], [-3.0, -2.0, 1.0])
    subset = ranking.keep(DATASET, drop=2)
    assert list(subset.indices) == [1, 2, 3, 5]
    assert [int(sample) for (sample,) in subset] == [1, 2, 3, 5]


def test_keep_without_drop_is_everything_and_with_all_only_the_unranked() -> None:
    ranking = make([4, 0, 2], [-3.0, -2.0, 1.0])
    assert list(ranking.keep(DATASET, drop=0).indices) == [0, 1, 2, 3, 4, 5]
    assert list(ranking.keep(DATASET, 3).indices) == [1, 3, 5]


@pytest.mark.parametrize(
    ("drop", "message"), [(-1, "drop to be 0 or more, found -1"), (4, "drop 4 samples: the ranking holds 3")]
)
def test_keep_refuses_to_drop_more_or_less_than_there_is(drop: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([4, 0, 2]).keep(DATASET, drop=drop)


@pytest.mark.parametrize("sample", [6, -1])
def test_keep_refuses_ids_that_are_no_positions(sample: int) -> None:
    with pytest.raises(IndexError, match=f"Sample id {sample} is no position in a dataset of 6 samples"):
        make([0, sample]).keep(DATASET, drop=0)


def test_keep_refuses_str_ids() -> None:
    with pytest.raises(TypeError, match="positions in the dataset, found str ids"):
        make(["0"]).keep(DATASET, drop=0)


class _Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(6))

    def __len__(self) -> int:
        return 6


class _NoLength(Dataset):
    pass


@pytest.mark.parametrize("dataset", [_Stream(), _NoLength()], ids=["iterable", "no length"])
def test_keep_refuses_datasets_without_positions(dataset: Dataset) -> None:
    with pytest.raises(TypeError, match="a dataset with a length and positions, found _"):
        make([0]).keep(dataset, drop=0)


# --- the id of its run


def test_the_id_of_a_run_survives_the_csv_and_further_columns(tmp_path):
    ranking = ranking_of(np.random.default_rng(0).standard_t(1.5, 3000) * 1e-5)
    assert run_id(Ranking.load(ranking.save(tmp_path / "influence.csv"))) == run_id(ranking)
    assert run_id(ranking.with_columns({"label": [1] * len(ranking)})) == run_id(ranking)


def test_other_rankings_have_other_ids():
    influence = np.array([-1.0, 0.5])
    rankings = [
        ranking_of(influence),
        ranking_of(influence, ["0", "1"]),
        ranking_of(influence, [0, 2]),
        ranking_of(np.nextafter(influence, 0)),
        Ranking.from_influence([0, 1], influence, [1, 2]),
    ]
    assert len({run_id(ranking) for ranking in rankings}) == len(rankings)
