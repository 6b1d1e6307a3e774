# SPDX-License-Identifier: Apache-2.0
"""`compare`: several runs over the same samples, compared if they can be."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lightning_sgdclean.base.errors import SGDInfluenceWarning
from lightning_sgdclean.base.summary import read_summary
from lightning_sgdclean.ranking.agreement import kendall_tau, share_of_lowest, spearman, top_k_jaccard
from lightning_sgdclean.ranking.comparison import Comparison, Matrix
from lightning_sgdclean.ranking.ranking import Ranking

Read = Callable[[Mapping[str, Any]], Any]


def _objective(summary: Mapping[str, Any]) -> str:
    return f"{summary['objective']['name']} ({summary['objective']['mode']})"


def _size(summary: Mapping[str, Any]) -> Any:
    return "names instead of positions" if summary["dataset_size"] is None else summary["dataset_size"]


def _epochs(summary: Mapping[str, Any]) -> str:
    return json.dumps(summary["options"]["epochs"])


def _curvature(summary: Mapping[str, Any]) -> str:
    return "without curvature" if summary["engine"] == "none" else "with curvature"


_MUST_AGREE: dict[str, Read] = {
    "influences on one objective": _objective,
    "training datasets of one size": _size,
    "windows of the same epochs": _epochs,
    "engines of one kind": _curvature,
}
_SHOULD_AGREE: dict[str, Read] = {
    "The runs were ranked by different engines, whose influences differ a little": lambda summary: summary["engine"],
    "The runs were ranked over windows of different length, and the longer one weighs more in the means": (
        lambda summary: f"{summary['window']['num_steps']} steps"
    ),
}


def check_summaries(summaries: Mapping[str, Mapping[str, Any]]) -> None:
    """Are influences of one kind, as far as the runs' summaries say? Those of different kinds have no mean.

    Args:
        summaries: What each run's ``summary.json`` holds; what is missing there is not asked for.

    Raises:
        ValueError: If they are of objectives, datasets, windows or engines that have nothing in common.
    """
    for expected, read in _MUST_AGREE.items():
        found = _differing(summaries, read)
        if found:
            raise ValueError(
                f"Expected {expected}, found {found}. To compare them all the same, give rankings: Ranking.load(run)."
            )
    for complaint, read in _SHOULD_AGREE.items():
        found = _differing(summaries, read)
        if found:
            warnings.warn(f"{complaint}: {found}.", SGDInfluenceWarning, stacklevel=4)


def _differing(summaries: Mapping[str, Mapping[str, Any]], read: Read) -> str:
    """What the runs say, in words, if it is not the same."""
    said = {}
    for name, summary in summaries.items():
        try:
            said[name] = read(summary)
        except (KeyError, TypeError):  # of another version, or written by hand
            continue
    return ", ".join(f"{value} in {name}" for name, value in said.items()) if len(set(said.values())) > 1 else ""


def check_labels(rankings: Mapping[str, Ranking]) -> None:
    """Has each id the same label in all runs, where the rankings have such a column?

    Raises:
        ValueError: If not: then it is not the same sample.
    """
    seen: dict[Any, tuple[Any, str]] = {}
    for name, ranking in rankings.items():
        labels = ranking.columns["label"].tolist() if "label" in ranking.columns else []
        known = {
            sample: label
            for sample, label in zip(ranking.sample_id.tolist(), labels, strict=False)
            if label == label and label != ""
        }
        others = [sample for sample, label in known.items() if sample in seen and seen[sample][0] != label]
        if others:
            first = others[0]
            raise ValueError(
                f"{len(others)} samples have another label in {name} than in other runs; the first is {first}, with "
                f"{known[first]} and, in {seen[first][1]}, {seen[first][0]}. Expected ids of the same samples, which "
                "positions in splits that were drawn anew are not. Split alike, or rank with sample_ids=. Where labels "
                "were changed on purpose, leave the column out: Ranking.from_influence(r.sample_id, r.influence, "
                "r.visits)."
            )
        seen |= {sample: (label, name) for sample, label in known.items() if sample not in seen}


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
