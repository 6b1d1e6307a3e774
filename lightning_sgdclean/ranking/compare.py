# SPDX-License-Identifier: Apache-2.0
"""Several runs over the same samples compared, sample by sample and run by run."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lightning_sgdclean.base.run_directory import read_summary
from lightning_sgdclean.ranking.agreement import kendall_tau, share_of_lowest, spearman, top_k_jaccard
from lightning_sgdclean.ranking.comparable import check_labels, check_summaries
from lightning_sgdclean.ranking.comparison import Comparison, Matrix
from lightning_sgdclean.ranking.ranking import Ranking

Run: TypeAlias = "str | os.PathLike[str] | Ranking"


def compare(runs: "Iterable[Run] | Mapping[str, Run]", *, worst: float = 0.05, ends: int = 10) -> Comparison:
    """Compare runs over the same training samples, which differ in their seeds say.

    Args:
        runs: Two or more run directories, CSV files or rankings; or such by name.
        worst: What counts as a run's worst samples: a share of its samples if below 1, else their number.
        ends: How many samples at each end the Jaccard index looks at.

    Returns:
        Every sample that any run drew, the systematically harmful ones first.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there are fewer than two runs, two of one name, ids of two types, runs without a common
            sample, samples whose labels differ from run to run, run directories that differ in objective, size of the
            dataset, epochs of the window or kind of engine, or ``worst`` or ``ends`` is no such number.
    """
    rankings = _loaded(runs)
    if not worst > 0 or ends < 1:
        raise ValueError(f"Expected worst above 0 and ends of 1 or more, found {worst} and {ends}.")
    ids = sorted(set().union(*(ranking.sample_id.tolist() for ranking in rankings.values())))
    row_of = {name: row for row, name in enumerate(ids)}
    influence, rank, in_worst = (np.full((len(ids), len(rankings)), np.nan) for _ in range(3))
    visits = np.zeros(len(ids), dtype=np.int64)
    counts = []
    for run, ranking in enumerate(rankings.values()):
        rows = [row_of[name] for name in ranking.sample_id.tolist()]
        counts.append(_number_of_worst(worst, len(ranking)))
        influence[rows, run] = ranking.influence
        rank[rows, run] = stats.rankdata(ranking.influence)
        in_worst[rows, run] = share_of_lowest(ranking.influence, counts[-1]) * (ranking.influence < 0)
        visits[rows] += ranking.visits
    order = np.lexsort((np.nanmean(rank, axis=1), -np.nansum(in_worst, axis=1)))
    names = np.array(ids, dtype=object if isinstance(ids[0], str) else np.int64)
    columns = names[order], influence[order], rank[order], in_worst[order], visits[order]
    return Comparison(tuple(rankings), tuple(counts), *columns, _agreement(influence, ends), _num_shared(influence))


def _number_of_worst(worst: float, size: int) -> int:
    if worst < 1:
        return max(1, round(worst * size))
    if worst != int(worst) or worst > size:
        raise ValueError(f"Expected worst as a share below 1 or as a number up to {size}, found {worst}.")
    return int(worst)


def _loaded(runs: "Iterable[Run] | Mapping[str, Run]") -> dict[str, Ranking]:
    if isinstance(runs, Mapping):
        named = [(str(name), run) for name, run in runs.items()]
    elif isinstance(runs, str | os.PathLike | Ranking):
        raise ValueError("Expected two or more runs in a list, found a single one.")
    else:
        named = [(_name_of(run, number), run) for number, run in enumerate(runs, start=1)]
    twice = [name for name, times in Counter(name for name, _ in named).items() if times > 1]
    if len(named) < 2 or twice:
        found = f"{twice[0]!r} more than once" if twice else f"{len(named)}"
        raise ValueError(f"Expected two or more runs of different names, found {found}.")
    check_summaries(_summaries(dict(named)))
    rankings = {name: run if isinstance(run, Ranking) else Ranking.load(run) for name, run in named}
    _check_ids(rankings)
    check_labels(rankings)
    return rankings


def _name_of(run: Run, number: int) -> str:
    return f"run {number}" if isinstance(run, Ranking) else os.fspath(run)


def _check_ids(rankings: dict[str, Ranking]) -> None:
    kinds = {name: "str" if ranking.sample_id.dtype == object else "int" for name, ranking in rankings.items()}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{kind} in {name}" for name, kind in kinds.items())
        raise ValueError(f"Expected sample ids of one type in all runs, found {found}.")
    common = set.intersection(*(set(ranking.sample_id.tolist()) for ranking in rankings.values()))
    if not common:
        raise ValueError("The runs have no sample in common. Expected runs over one dataset, with the same ids.")


def _summaries(runs: "dict[str, Run]") -> dict[str, dict[str, Any]]:
    """What is known of the runs. Rankings in memory are taken as they are."""
    folders = {name: Path(run) for name, run in runs.items() if not isinstance(run, Ranking)}
    return {name: read_summary(path if path.is_dir() else path.parent) for name, path in folders.items()}


def _agreement(influence: Matrix, ends: int) -> dict[str, Matrix]:
    measures: dict[str, Callable[[Matrix, Matrix], float]] = {
        "kendall_tau": kendall_tau,
        "spearman": spearman,
        "top_k_jaccard": lambda a, b: top_k_jaccard(a, b, k=ends),
    }
    num = influence.shape[1]
    found = {name: np.eye(num) for name in measures}
    for first, second in combinations(range(num), 2):
        pair = influence[:, [first, second]]
        pair = pair[~np.isnan(pair).any(1)]
        for name, measure in measures.items():
            try:
                value = measure(pair[:, 0], pair[:, 1])
            except ValueError:  # too few samples, or all of one influence
                value = np.nan
            found[name][first, second] = found[name][second, first] = value
    return found


def _num_shared(influence: Matrix) -> NDArray[np.int64]:
    present = (~np.isnan(influence)).astype(np.int64)
    shared: NDArray[np.int64] = present.T @ present
    return shared
