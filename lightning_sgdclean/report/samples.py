# SPDX-License-Identifier: Apache-2.0
"""The samples that the page shows, as plain rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.data.batches import attributes_of, is_entry_each
from lightning_sgdclean.data.datasets import listed_labels
from lightning_sgdclean.data.fetching import has_own_collate
from lightning_sgdclean.data.labels import Label, label_of, likely_place_of_label
from lightning_sgdclean.data.parts import loader_parts, part_and_row
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.replay.replay import OpenedRun
from lightning_sgdclean.report.appearance import Appearance, Parts, Render, appearances_of, parts_of
from lightning_sgdclean.trajectory.records import MicroBatch, Step

Labels = Sequence[Label | None]

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


_DEPTH = 16  # nothing that a person wants to see is nested deeper; what is holds itself


class RunSamples:
    """Samples by id, each as it was last drawn.

    Args:
        this: The run, opened.

    Attributes:
        dataset: The dataset that all samples come from; None if there are several, or it has no positions.
    """

    def __init__(self, this: OpenedRun) -> None:
        self._this = this
        self._visits: dict[SampleId, tuple[Step, int, int]] = {
            name: (step, number, row)
            for step in this.steps
            for number, micro in enumerate(step.micro)
            for row, name in enumerate(micro.ids)
        }
        loaders = {micro.loader: this.loader_of(micro) for step in this.steps for micro in step.micro}
        datasets = {id(dataset): dataset for dataset in map(_dataset_of, loaders.values())}
        self.dataset = next(iter(datasets.values())) if len(datasets) == 1 else None

    def __getitem__(self, name: SampleId) -> Any:
        """The sample.

        Raises:
            Exception: What the dataset raises, where the batch was not kept.
            LookupError: If it is of a stream, and its batch was not kept.
        """
        step, number, row = self._visits[name]
        micro = step.micro[number]
        dataset = _dataset_of(self._this.loader_of(micro))
        try:
            if dataset is None:
                raise LookupError("it came from a stream and cannot be fetched again")
            return dataset[self._position(micro, row)]
        except Exception:  # the user's dataset, which may raise anything
            if micro.batch is None:
                raise
        content, num = self._this.replay.content_of(step, number), len(micro.ids)
        if micro.sizes:
            part, row = part_and_row(micro.sizes, row)
            content, num = loader_parts(content)[part], micro.sizes[part]
        return row_of(content, row, num)

    def labels(self, ranking: Ranking) -> Labels | None:
        """The dataset's label of each sample by rank, where no sample has to be fetched for that."""
        if self.dataset is None:
            return None
        visits = [self._visits[name] for name in ranking.sample_id.tolist()]
        try:
            positions = [self._position(step.micro[number], row) for step, number, row in visits]
        except LookupError:
            return None
        return listed_labels(self.dataset, positions)

    def _position(self, micro: MicroBatch, row: int) -> Any:
        """Where the sample of a row lies in the dataset.

        Raises:
            LookupError: If that is not known: a row that ``sample_ids=`` named, a collate function may have moved.
        """
        drawn = micro.positions if isinstance(micro.positions, list) else [micro.positions]
        is_moved = has_own_collate(self._this.loader_of(micro)) and micro.ids != drawn
        if is_moved or micro.positions is None or len(drawn) != len(micro.ids):
            raise LookupError("it is known by its name, and not where in the dataset it lies")
        return drawn[row]


def row_of(batch: Any, row: int, num: int, depth: int = 0) -> Any:
    """A sample out of a collated batch of ``num`` samples: the same nesting, of what there is one a sample.

    Tensors with a first or else second dimension of length ``num``, and lists of ``num`` entries, have a row a sample;
    anything else is nobody's and left out, as None.
    """
    if depth > _DEPTH:
        return None
    if isinstance(batch, Tensor):
        first_two = range(0 if batch.is_nested else min(2, batch.ndim))
        dim = next((dim for dim in first_two if batch.shape[dim] == num), None)
        return None if dim is None else batch.select(dim, row)
    if isinstance(batch, list | tuple):
        if is_entry_each(batch, num):
            return batch[row]
        return [row_of(item, row, num, depth + 1) for item in batch]
    inner = batch if isinstance(batch, Mapping) else {} if callable(batch) else attributes_of(batch)
    return {key: row_of(value, row, num, depth + 1) for key, value in inner.items()} or None


def _dataset_of(loader: Any) -> Any:
    """The loader's dataset, if its samples can be asked for by position."""
    is_map = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    return loader.dataset if is_map else None
