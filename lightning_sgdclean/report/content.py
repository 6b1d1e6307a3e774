# SPDX-License-Identifier: Apache-2.0
"""What the page's script is given, as JSON that nothing can leave."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_sgdclean.data.datasets import ClassNames, names_by_label
from lightning_sgdclean.data.labels import Label
from lightning_sgdclean.ranking.groups import bin_edges, effects_by_group, has_size, stretched_ticks
from lightning_sgdclean.ranking.ranking import Ranking, run_id
from lightning_sgdclean.report.samples import Labels, Shown

_MAX_POINTS = 300  # of the running sum
_MAX_GROUPS = 1000
_PLACE_IN_FILE = re.compile(r"\[-?\d+\]$")


def histogram(influence: NDArray[np.float64]) -> dict[str, Any] | None:
    """How many samples have which influence.

    Returns:
        ``edges`` of the bars, 0 among them, ``counts`` between them, and for a heavy tail the ``stretch`` of its
        asinh scale and that scale's ``ticks``; exact zeros are counted apart as ``zeros``. None where there is
        nothing to draw.
    """
    if not has_size(influence):
        return None
    edges, stretch = bin_edges(influence)
    counts = np.histogram(influence[influence < 0], edges)[0] + np.histogram(influence[influence > 0], edges)[0]
    return {
        "edges": short(edges),
        "counts": counts.tolist(),
        "zeros": int((influence == 0).sum()),
        "stretch": short([stretch])[0],
        "ticks": short(stretched_ticks(edges, stretch)) if stretch else [],
    }


def running_sum(influence: NDArray[np.float64]) -> dict[str, Any] | None:
    """Influences added up from the most harmful sample on, thinned to some hundred points.

    Returns:
        ``ranks`` and ``sums`` of the points, the turning point ``harmful`` (how many are) among them.
    """
    if not has_size(influence):
        return None
    sums = np.concatenate([[0.0], np.cumsum(influence)])
    harmful = int((influence < 0).sum())
    ranks = np.unique(np.linspace(0, len(influence), _MAX_POINTS).round().astype(int))
    # The first samples carry most: they get points of their own.
    early = np.unique(np.geomspace(1, len(influence), _MAX_POINTS // 3).astype(int))
    ranks = np.unique(np.concatenate([ranks, early, [harmful]]))
    return {"ranks": ranks.tolist(), "sums": short(sums[ranks]), "harmful": harmful}


def concentration(influence: NDArray[np.float64]) -> float | None:
    """Share of all harm that the most harmful hundredth of the samples does; None without harm."""
    harm = -influence[influence < 0]
    total = float(harm.sum())
    worst = max(1, round(len(influence) / 100))
    return float(harm[:worst].sum()) / total if total > 0 else None


def tally(influence: NDArray[np.float64], groups: Sequence[int]) -> list[dict[str, Any]]:
    """What each group did, the one that was most harmful together first.

    Args:
        influence: ``(N,)``.
        groups: Number of each sample's group, -1 for none.

    Returns:
        For each group with samples: ``group``, ``count``, ``harmful`` (how many are), ``harm`` (sum of the negative
        influences) and ``help`` (sum of the positive ones).
    """
    return [
        {
            "group": effect.group,
            "count": effect.num_samples,
            "harmful": effect.num_harmful,
            "harm": short([effect.harm])[0],
            "help": short([effect.help])[0],
        }
        for effect in effects_by_group(groups, influence.tolist())
        if effect.group >= 0
    ]


def coded(values: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Different values in the order of their names, and each value's place among them; -1 for None."""
    found = {value for value in values if value is not None}
    distinct = sorted(found, key=lambda value: (isinstance(value, str), value))
    place = {value: i for i, value in enumerate(distinct)}
    return distinct, [-1 if value is None else place[value] for value in values]


def groups_of_sources(sources: Sequence[str | None]) -> list[str | None]:
    """The part of a union, or the folder of a file, that samples come from."""
    return [None if source is None else _PLACE_IN_FILE.sub("", _folder(source)) for source in sources]


def is_grouping(distinct: Sequence[Any], num_samples: int) -> bool:
    """Whether so many different values make groups worth comparing."""
    return 2 <= len(distinct) <= min(_MAX_GROUPS, max(2, num_samples // 2))


def short(values: Any) -> list[float]:
    """Numbers with six digits, which is what a page can show; signs and zeros stay."""
    return [float(f"{value:.6g}") for value in np.asarray(values, dtype=np.float64).tolist()]


def _folder(source: str) -> str:
    cut = max(source.rfind("/"), source.rfind("\\"))
    return source[:cut] if cut > 0 else source


NUM_FIRST, NUM_LAST = 200_000, 50_000  # rows that a page holds of a longer ranking
_LARGEST_NUMBER = 2**53 - 1  # that JavaScript can tell from its neighbours
_OWN = ("label", "prediction", "loss", "source")


def page_data(
    ranking: Ranking,
    shown: Sequence[Shown] = (),
    labels: Labels | None = None,
    class_names: ClassNames | None = None,
) -> dict[str, Any]:
    """Everything that the page's script needs.

    Args:
        ranking: The ranking; of its further columns ``label``, ``prediction``, ``loss`` and ``source`` are shown, and
            any that sorts the samples into groups.
        shown: The samples that there is more of than a row.
        labels: The dataset's label of each sample of the ranking, by rank.
        class_names: Names of labels: a sequence for ``0, 1, ...``, or a mapping.
    """
    names = names_by_label(class_names)
    kept = _kept_rows(len(ranking))
    columns = _columns(ranking)
    known = _known_labels(ranking, shown, list(labels) if labels is not None else columns.get("label"))
    fields = {"label": known[0], "prediction": columns.get("prediction")} | _grouping_columns(ranking, columns)
    place = {name: i for i, name in enumerate(ranking.sample_id[kept].tolist())}
    return {
        "run": run_id(ranking),
        "num": len(ranking),
        "skipped": {"after": NUM_FIRST, "count": len(ranking) - len(kept)},
        "textIds": ranking.sample_id.dtype == object,
        "ids": _ids(ranking.sample_id[kept]),
        "influence": short(ranking.influence[kept]),
        "visits": ranking.visits[kept].tolist(),
        "loss": _numbers(columns["loss"], kept) if "loss" in columns else None,
        "disagrees": _disagreement(columns, kept),
        "labelsAreOfDataset": labels is not None,
        "classesOf": known[1],
        "fields": [_field(name, values, ranking, kept, names) for name, values in fields.items() if values is not None],
        "samples": {
            place[row.sample_id]: _sample(row, names) | _measured(ranking, kept[place[row.sample_id]])
            for row in shown
            if row.sample_id in place
        },
        "choices": _choices(labels, shown, names),
        "histogram": histogram(ranking.influence),
        "runningSum": running_sum(ranking.influence),
        "concentration": concentration(ranking.influence),
        "counts": {
            "harmful": int((ranking.influence < 0).sum()),
            "helpful": int((ranking.influence > 0).sum()),
        },
    }


def embedded(data: dict[str, Any]) -> str:
    """JSON that nothing in it can leave: no ``<``, ``>`` or ``&``, and ASCII only."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _kept_rows(num: int) -> NDArray[np.int64]:
    if num <= NUM_FIRST + NUM_LAST:
        return np.arange(num)
    return np.concatenate([np.arange(NUM_FIRST), np.arange(num - NUM_LAST, num)])


def _ids(ids: NDArray[Any]) -> list[Any]:
    found: list[Any] = ids.tolist()
    if ids.dtype != object and len(ids) and max(abs(min(found)), abs(max(found))) > _LARGEST_NUMBER:
        return [str(name) for name in found]
    return found


def _columns(ranking: Ranking) -> dict[str, list[Any]]:
    """The further columns as plain values, None where unknown."""
    return {
        name: _whole([None if value == "" or value != value else value for value in column.tolist()])
        for name, column in ranking.columns.items()
    }


def _whole(values: list[Any]) -> list[Any]:
    """Class numbers that an unknown one among them made floats; a column with any other float is measured."""
    if all(value is None or (isinstance(value, float) and value.is_integer()) for value in values):
        return [None if value is None else int(value) for value in values]
    return values


def _known_labels(ranking: Ranking, shown: Sequence[Shown], listed: list[Any] | None) -> tuple[list[Any] | None, str]:
    """Labels by rank, and whose classes they are: of ``all`` samples, of those ``shown``, ``measured`` or ``none``."""
    whose = "all"
    if listed is None or all(label is None for label in listed):
        label_of = {row.sample_id: row.target if row.label is None else row.label for row in shown}
        listed, whose = [label_of.get(name) for name in ranking.sample_id.tolist()], "shown"
    labels = [label for label in listed if label is not None]
    if not labels:
        return None, "none"
    if any(isinstance(label, float) for label in labels):
        return (listed, "measured") if whose == "all" else (None, "measured")
    return (listed, whose) if whose == "all" or is_grouping(coded(labels)[0], len(labels)) else (None, "none")


def _grouping_columns(ranking: Ranking, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    if "source" in columns:
        found["source"] = groups_of_sources(columns["source"])
    for name, column in ranking.columns.items():
        if name not in _OWN and column.dtype.kind in "iO":
            found[name] = columns[name]
    return {name: values for name, values in found.items() if is_grouping(coded(values)[0], len(values))}


def _field(
    name: str, values: list[Any], ranking: Ranking, kept: NDArray[np.int64], names: Mapping[str, str]
) -> dict[str, Any]:
    """A column that the page shows: as numbers of its different values where they make groups, else as it is."""
    distinct, codes = coded(values)
    groups = is_grouping(distinct, len(values)) and not any(isinstance(value, float) for value in distinct)
    named = names if name in ("label", "prediction") else {}
    if not groups:
        texts = [None if values[i] is None else _name(values[i], named) for i in kept.tolist()]
        return {"name": name, "values": None, "texts": texts}
    return {
        "name": name,
        "values": [{"text": str(value), "name": _name(value, named)} for value in distinct],
        "codes": [codes[i] for i in kept.tolist()],
        "tally": tally(ranking.influence, codes),
    }


def _name(value: Any, names: Mapping[str, str]) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return names.get(text, text)


def _sample(row: Shown, names: Mapping[str, str]) -> dict[str, Any]:
    """One shown sample; what is unknown or empty is left out."""
    label = row.target if row.label is None else row.label
    seen = {
        "label": None if label is None else _name(label, names),
        "labelText": None if row.label is None else str(row.label),
        "prediction": None if row.prediction is None else _name(row.prediction, names),
        "loss": _finite(row.loss),
        "disagrees": _differs(row.target, row.prediction),
        "source": row.source,
    }
    content = {**asdict(row.appearance), **seen}
    return {name: value for name, value in content.items() if value not in (None, "", (), (0, 0))}


def _measured(ranking: Ranking, rank: int) -> dict[str, Any]:
    """What further columns of numbers say of a sample: influences on other objectives and by epoch, say."""
    found = [
        (name.replace(":", " "), f"{column[rank]:.3g}".replace("-", "\u2212"))
        for name, column in ranking.columns.items()
        if name not in _OWN and column.dtype.kind == "f" and not np.isnan(column[rank])
    ]
    return {"more": found} if found else {}


def _differs(target: Label | None, prediction: Label | None) -> bool | None:
    """Whether the model predicts another class; None where that is unknown, or a measured value is predicted."""
    if target is None or prediction is None or isinstance(target, float) or isinstance(prediction, float):
        return None
    return str(target) != str(prediction)


def _disagreement(columns: Mapping[str, list[Any]], kept: NDArray[np.int64]) -> str | None:
    """One letter a row: ``y`` where the model predicts another class, ``n`` where not, ``-`` where unknown."""
    if "label" not in columns or "prediction" not in columns:
        return None
    letters = {True: "y", False: "n", None: "-"}
    label, prediction = columns["label"], columns["prediction"]
    return "".join(letters[_differs(label[i], prediction[i])] for i in kept.tolist())


def _choices(labels: Labels | None, shown: Sequence[Shown], names: Mapping[str, str]) -> list[dict[str, str]]:
    """What a sample may be relabelled to, in the dataset's terms.

    Empty where these are not known, since the loss may be given others, or no classes: any may then be typed.
    """
    known = {label for label in [*(labels or ()), *(row.label for row in shown)] if label is not None}
    if not known or any(isinstance(label, float) for label in known):
        return []
    named = {int(text) if _is_number(text) else text for text in names}
    if all(isinstance(label, str) for label in known):
        known |= set(names.values()) if known <= set(names.values()) else set()
        named = set()
    distinct, _ = coded([*known, *named])
    if len(distinct) > max(50, 2 * len(names)) and labels is None:
        return []
    return [{"text": str(label), "name": _name(label, names)} for label in distinct]


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _numbers(values: list[Any], kept: NDArray[np.int64]) -> list[float | None]:
    return [None if values[i] is None else float(f"{values[i]:.6g}") for i in kept.tolist()]
