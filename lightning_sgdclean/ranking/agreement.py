# SPDX-License-Identifier: Apache-2.0
"""How far two columns of influences agree, and how well influences point at samples known to be wrong."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

Column: TypeAlias = Sequence[Any] | NDArray[Any] | Tensor


def kendall_tau(a: Column, b: Column) -> float:
    """Kendall's rank correlation, tau-b: pairs in the same order against pairs in opposite order.

    Args:
        a: Influences, shape ``(N,)``, in the same order of samples as ``b``.
        b: Influences, shape ``(N,)``.

    Returns:
        A number from -1 to 1; pairs tied in one column count for neither order, and the scale allows for them.

    Raises:
        TypeError: If a column holds anything but numbers.
        ValueError: If a column is not a row of finite numbers or is constant, or the lengths differ.
    """
    return float(stats.kendalltau(*_two_columns(a, b), variant="b").statistic)


def spearman(a: Column, b: Column) -> float:
    """Spearman's rank correlation, tied values sharing their average rank.

    Args:
        a: Influences, shape ``(N,)``, in the same order of samples as ``b``.
        b: Influences, shape ``(N,)``.

    Returns:
        A number from -1 to 1.

    Raises:
        TypeError: If a column holds anything but numbers.
        ValueError: If a column is not a row of finite numbers or is constant, or the lengths differ.
    """
    return float(stats.spearmanr(*_two_columns(a, b)).statistic)


def lds(predicted: Column, real: Column) -> float:
    """Linear datamodeling score: Spearman's correlation over subsets of the samples.

    Park et al., *TRAK: Attributing Model Behavior at Scale*, ICML 2023.

    Args:
        predicted: Sum of the influences of the samples in each of ``M`` random subsets, shape ``(M,)``.
        real: What leaving out each subset really did to the objective, shape ``(M,)``.

    Returns:
        A number from -1 to 1.

    Raises:
        TypeError: If a column holds anything but numbers.
        ValueError: If a column is not a row of finite numbers or is constant, or the lengths differ.
    """
    return spearman(predicted, real)


def top_k_jaccard(a: Column, b: Column, k: int = 10) -> float:
    """Jaccard index of the samples at both ends: the ``k`` lowest together with the ``k`` highest.

    The measure of Hara, Nitanda and Maehara, NeurIPS 2019. Samples that tie for the last places at an end share
    them: each belongs to it in part, and the index is the sum of the smaller over the sum of the larger parts.

    Args:
        a: Influences, shape ``(N,)``, in the same order of samples as ``b``.
        b: Influences, shape ``(N,)``.
        k: Samples at each end.

    Returns:
        A number from 0 (no sample in common) to 1 (the same ones).

    Raises:
        TypeError: If a column holds anything but numbers, or ``k`` is no integer.
        ValueError: If ``k`` is below 1 or above ``N / 2``, a column is not a row of finite numbers or is constant, or
            the lengths differ.
    """
    first, second = _two_columns(a, b)
    if not 1 <= k <= len(first) // 2:
        raise ValueError(f"Expected k from 1 to half the samples, found k={k} and {len(first)} samples.")
    ends = [share_of_lowest(column, k) + share_of_lowest(-column, k) for column in (first, second)]
    return float(np.minimum(*ends).sum() / np.maximum(*ends).sum())


def mislabel_auroc(influence: Column, is_wrong: Column) -> float:
    """Probability that a wrong sample has a lower (more harmful) influence than a right one, ties counting half.

    Args:
        influence: Influences, shape ``(N,)``; negative means harmful.
        is_wrong: Whether each sample is known to be wrong, shape ``(N,)``: bool, or 0 and 1.

    Returns:
        1.0 if all wrong samples rank first, about 0.5 if the ranking says nothing of them.

    Raises:
        TypeError: If ``influence`` holds anything but numbers, or ``is_wrong`` other than bool, 0 and 1.
        ValueError: If either is not a row of finite numbers, their lengths differ, or no sample, or every one, is
            wrong.
    """
    harm, wrong = _harm_and_wrong(influence, is_wrong)
    if wrong.all() or not wrong.any():
        raise ValueError(f"Expected wrong and right samples, found {wrong.sum()} wrong among {len(wrong)}.")
    ranks = stats.rankdata(harm)
    wrongs = int(wrong.sum())
    above = ranks[wrong].sum() - wrongs * (wrongs + 1) / 2  # Mann and Whitney's U
    return float(above / (wrongs * (len(wrong) - wrongs)))


def precision_at_k(influence: Column, is_wrong: Column, k: int) -> float:
    """Share of wrong samples among the ``k`` with the lowest influence.

    Args:
        influence: Influences, shape ``(N,)``; negative means harmful.
        is_wrong: Whether each sample is known to be wrong, shape ``(N,)``: bool, or 0 and 1.
        k: How many of the most harmful samples to look at.

    Returns:
        A number from 0 to 1. Samples that tie for the last places share them, as in the mean over all ways to choose.

    Raises:
        TypeError: If ``influence`` holds anything but numbers, ``is_wrong`` other than bool, 0 and 1, or ``k`` is no
            integer.
        ValueError: If either is not a row of finite numbers, their lengths differ, or ``k`` is not from 1 to ``N``.
    """
    harm, wrong = _harm_and_wrong(influence, is_wrong)
    if not 1 <= k <= len(harm):
        raise ValueError(f"Expected k from 1 to the number of samples, found k={k} and {len(harm)} samples.")
    return float(share_of_lowest(-harm, k)[wrong].sum() / k)


def share_of_lowest(values: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """How much of each sample belongs to the ``k`` lowest: 1, 0, or where it ties for the last places, a part."""
    border = np.partition(values, k - 1)[k - 1]
    below, tied = values < border, values == border
    share: NDArray[np.float64] = below + tied * ((k - below.sum()) / tied.sum())
    return share


def _harm_and_wrong(influence: Column, is_wrong: Column) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    harm, wrong = -_column(influence, "influence"), _column(is_wrong, "is_wrong")
    _same_length({"influence": harm, "is_wrong": wrong})
    if not np.isin(wrong, (0, 1)).all():
        raise TypeError("Expected is_wrong to say yes or no of each sample: bool, or 0 and 1.")
    return harm, wrong.astype(np.bool_)


def _two_columns(a: Column, b: Column) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    columns = {"a": _column(a, "the first column"), "b": _column(b, "the second column")}
    _same_length(columns)
    for name, column in zip(("first", "second"), columns.values(), strict=True):
        if len(column) < 2 or (column == column[0]).all():
            raise ValueError(
                f"Agreement is not defined for a column without two different values: all {len(column)} of the "
                f"{name} column are {column[0] if len(column) else 'missing'}."
            )
    return columns["a"], columns["b"]


def _same_length(columns: dict[str, NDArray[np.float64]]) -> None:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        found = " and ".join(f"{length} in {name}" for name, length in lengths.items())
        raise ValueError(f"Expected one entry for each sample in the same order, found {found}.")


def _column(values: Column, name: str) -> NDArray[np.float64]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double().numpy() if values.is_floating_point() else values.numpy()  # NumPy has no bfloat16
    array = np.asarray(values)
    if array.dtype.kind not in "fiub" and array.size:
        raise TypeError(f"Expected {name} as numbers, found {array.dtype}.")
    if array.ndim != 1:
        raise ValueError(f"Expected {name} as one row of numbers, found shape {array.shape}.")
    bad = np.flatnonzero(~np.isfinite(array.astype(np.float64)))
    if len(bad):
        raise ValueError(f"Expected {name} as finite numbers, found {array[bad[0]]} at position {bad[0]}.")
    return array.astype(np.float64)
