# SPDX-License-Identifier: Apache-2.0
"""The samples that the page shows: the worst and the best, fetched from the dataset, as plain rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.data.labels import Label, label_of, likely_place_of_label
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.ranking.table import SampleId
from lightning_sgdclean.report.appearance import Appearance, Parts, Render, appearances_of, parts_of

NUM_WORST, NUM_BEST = 200, 60


@dataclass(frozen=True)
class Shown:
    """One sample of the page.

    Attributes:
        sample_id: Of the ranking.
        appearance: What there is to see of it.
        label: The label that the dataset gives it, None if unknown.
        target: The class or value that the loss held it to; the label, unless it was converted on the way.
        prediction: What the model now predicts, in the terms of ``target``.
        loss: The model's loss on it now.
        source: Where it comes from.
    """

    sample_id: SampleId
    appearance: Appearance = field(default_factory=Appearance)
    label: Label | None = None
    target: Label | None = None
    prediction: Label | None = None
    loss: float | None = None
    source: str | None = None


def ids_to_show(ranking: Ranking, num_worst: int = NUM_WORST, num_best: int = NUM_BEST) -> list[SampleId]:
    """The most harmful and the most helpful samples; those with an influence of exactly 0 are neither."""
    return [*ranking.harmful(num_worst), *ranking.helpful(num_best)]


def fetch_shown(
    dataset: Any,
    ids: Sequence[SampleId],
    positions: "Mapping[SampleId, Any] | None" = None,
    render: Render | None = None,
) -> tuple[list[Shown], list[str]]:
    """Ask the dataset for samples, one by one.

    Args:
        dataset: The training data, with ``dataset[position]``.
        ids: Which samples.
        positions: Where they lie in the dataset; by default ids are positions.
        render: What to show of a sample: from the sample to an image, text or a dict of these. By default it is found
            from the sample itself, without its label.

    Returns:
        One row a sample, random states left as they were; and complaints, each in words.
    """
    found: list[Parts] = []  # and not the samples, which may be large
    labels: list[Label | None] = []
    failures: list[str] = []
    with untouched_randomness(torch.device("cpu")):
        for name in ids:
            label = None
            try:
                sample = dataset[name if positions is None else positions[name]]
                place = likely_place_of_label(sample)
                label = label_of(sample, place)
                found.append(parts_of(without_label(sample, place, label) if render is None else render(sample)))
            except Exception as error:  # the user's dataset, sample or render=, which may raise anything
                failures.append(f"sample {name!r}: {type(error).__name__}: {error}")
                found.append(parts_of(error))
            labels.append(label)
    appearances, complaints = appearances_of(found)
    if failures:
        complaints.append(f"{len(failures)} of {len(ids)} samples could not be shown; {failures[0]}"[:500])
    rows = zip(ids, appearances, labels, strict=True)
    return [Shown(name, appearance, label, target=label) for name, appearance, label in rows], complaints


def without_label(sample: Any, place: int | str | None, label: Label | None) -> Any:
    """What is left of a sample when its label is shown elsewhere."""
    if label is None:
        return sample
    if isinstance(sample, Mapping):
        return {key: value for key, value in sample.items() if key != place}
    rest = [value for i, value in enumerate(sample) if i != place]
    return rest[0] if len(rest) == 1 else rest
