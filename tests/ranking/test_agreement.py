# SPDX-License-Identifier: Apache-2.0
"""Measures of agreement against counting pairs and sets by hand, and against other libraries."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics.functional import kendall_rank_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import binary_auroc

from lightning_sgdclean.ranking.agreement import (
    kendall_tau,
    lds,
    mislabel_auroc,
    precision_at_k,
    spearman,
    top_k_jaccard,
)


def columns(seed, size=40, ties=False):
    draw = np.random.default_rng(seed)
    a = draw.normal(size=size)
    b = a + draw.normal(size=size)
    return (np.round(a), np.round(b)) if ties else (a, b)


def wrong_ones(seed, size=40):
    return np.random.default_rng(100 + seed).random(size) < 0.3


def tau_by_pairs(a, b):
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in combinations(range(len(a)), 2)]
    in_a, in_b = sum(s != 0 for s, _ in signs), sum(s != 0 for _, s in signs)
    return sum(s * t for s, t in signs) / (in_a * in_b) ** 0.5


def average_ranks(values):
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


def lowest_sets(values, k):
    """Every way to choose the k lowest."""
    border = np.sort(values)[k - 1]
    below = [i for i, value in enumerate(values) if value < border]
    tied = [i for i, value in enumerate(values) if value == border]
    return [set(below) | set(rest) for rest in combinations(tied, k - len(below))]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_tau_counts_pairs(seed, ties):
    a, b = columns(seed, ties=ties)
    assert kendall_tau(a, b) == pytest.approx(tau_by_pairs(a, b), abs=1e-12)
    theirs = kendall_rank_corrcoef(torch.tensor(a), torch.tensor(b), variant="b")
    assert kendall_tau(a, b) == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_spearman_correlates_average_ranks(seed, ties):
    a, b = columns(seed, ties=ties)
    by_hand = np.corrcoef(average_ranks(a), average_ranks(b))[0, 1]
    assert spearman(a, b) == lds(a, b) == pytest.approx(by_hand, abs=1e-12)
    assert spearman(a, b) == pytest.approx(float(spearman_corrcoef(torch.tensor(a), torch.tensor(b))), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_jaccard_compares_both_ends(seed):
    a, b = columns(seed)
    ends = [set(np.argsort(column)[:7]) | set(np.argsort(column)[-7:]) for column in (a, b)]
    assert top_k_jaccard(a, b, k=7) == pytest.approx(len(ends[0] & ends[1]) / len(ends[0] | ends[1]))


def test_jaccard_of_tied_samples_does_not_depend_on_their_order():
    a, b = columns(0, ties=True)
    shuffled = np.random.default_rng(0).permutation(len(a))
    assert top_k_jaccard(a, b) == pytest.approx(top_k_jaccard(a[shuffled], b[shuffled]))
    assert top_k_jaccard(a, a) == 1
    assert top_k_jaccard([0, 0, 1, 1], [0, 0, 2, 2], k=1) == 1
    assert top_k_jaccard([0, 0, 1, 2], [0, 3, 4, 5], k=1) == pytest.approx((0.5 + 1) / (1 + 0.5 + 1))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_auroc_counts_pairs_of_wrong_and_right(seed, ties):
    influence, wrong = columns(seed, ties=ties)[0], wrong_ones(seed)
    pairs = [(w < r) + (w == r) / 2 for w, r in product(influence[wrong], influence[~wrong])]
    assert mislabel_auroc(influence, wrong) == pytest.approx(np.mean(pairs), abs=1e-12)
    between = torch.tensor(stats.rankdata(-influence) / len(influence))  # torchmetrics squashes what is not in 0 to 1
    assert mislabel_auroc(influence, wrong) == pytest.approx(float(binary_auroc(between, torch.tensor(wrong).int())))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 5, 12, 40])
def test_precision_is_the_mean_over_all_ways_to_break_ties(seed, k):
    influence, wrong = columns(seed)[0], wrong_ones(seed)
    assert precision_at_k(influence, wrong, k) == pytest.approx(wrong[np.argsort(influence)[:k]].mean())
    influence, wrong, k = np.round(influence[:15]), wrong[:15], min(k, 15)
    ways = [wrong[list(chosen)].mean() for chosen in lowest_sets(influence, k)]
    assert precision_at_k(influence, wrong, k) == pytest.approx(np.mean(ways))


def test_the_most_harmful_sample_is_the_lowest():
    assert mislabel_auroc([-2.0, -1.0, 0.0, 3.0], [True, True, False, False]) == 1
    assert mislabel_auroc([-2.0, -1.0, 0.0, 3.0], [0, 0, 1, 1]) == 0
    assert precision_at_k([-2.0, -1.0, 0.0, 3.0], [1, 1, 0, 0], k=2) == 1


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x).bfloat16()])
def test_sequences_arrays_and_tensors_are_taken(make):
    a, b = make([1.0, 2.0, 3.0, 4.0]), make([1.0, 3.0, 2.0, 4.0])
    assert kendall_tau(a, b) == pytest.approx(2 / 3)
    assert spearman(a, b) == pytest.approx(0.8)
    assert top_k_jaccard(a, b, k=1) == 1
    assert mislabel_auroc(a, make([1, 0, 1, 0])) == pytest.approx(3 / 4)


def test_large_numbers_that_a_sigmoid_would_make_equal_are_told_apart():
    assert mislabel_auroc([-33.0, -32.0, -31.0, -30.0], [0, 1, 0, 0]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("measure", [kendall_tau, spearman, lds, lambda a, b: top_k_jaccard(a, b, k=1)])
@pytest.mark.parametrize(
    ("a", "b", "error", "says"),
    [
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], ValueError, "all 3 of the first column are 1.0"),
        ([1.0, 2.0, 3.0], [5, 5, 5], ValueError, "all 3 of the second column are 5.0"),
        ([1.0, float("nan"), 3.0], [1.0, 2.0, 3.0], ValueError, "the first column as finite numbers, found nan at pos"),
        ([1.0, 2.0, 3.0], [1.0, float("inf"), 3.0], ValueError, "found inf at position 1"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], ValueError, "found 2 in a and 3 in b"),
        ([[1.0, 2.0]], [1.0, 2.0], ValueError, r"found shape \(1, 2\)"),
        ([], [], ValueError, "all 0 of the first column are missing"),
        (["x", "y"], [1.0, 2.0], TypeError, "the first column as numbers, found <U1"),
    ],
)
def test_columns_without_an_answer_are_refused(measure, a, b, error, says):
    with pytest.raises(error, match=says):
        measure(a, b)


def test_counts_and_marks_without_an_answer_are_refused():
    with pytest.raises(ValueError, match="found k=3 and 5 samples"):
        top_k_jaccard(range(5), range(5), k=3)
    with pytest.raises(ValueError, match="found k=0 and 5 samples"):
        precision_at_k(range(5), [0, 1, 0, 1, 0], k=0)
    with pytest.raises(ValueError, match="found 0 wrong among 2"):
        mislabel_auroc([1.0, 2.0], [0, 0])
    with pytest.raises(ValueError, match="found 2 wrong among 2"):
        mislabel_auroc([1.0, 2.0], [True, True])
    with pytest.raises(TypeError, match="yes or no"):
        mislabel_auroc([1.0, 2.0], [0, 2])
    with pytest.raises(ValueError, match="found 2 in influence and 3 in is_wrong"):
        precision_at_k([1.0, 2.0], [0, 1, 1], k=1)
