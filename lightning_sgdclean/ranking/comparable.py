# SPDX-License-Identifier: Apache-2.0
"""May runs be compared: are their influences of one kind, and are their ids of the same samples?"""

import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from lightning_sgdclean.base.errors import SGDInfluenceWarning
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
