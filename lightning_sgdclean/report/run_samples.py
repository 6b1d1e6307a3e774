# SPDX-License-Identifier: Apache-2.0
"""The samples of a run by id: fetched from the dataset once more, or taken from the batches that were kept."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_sgdclean.data.batches import attributes_of
from lightning_sgdclean.data.classes import listed_labels
from lightning_sgdclean.data.fingerprints import is_entry_each
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.ranking.table import SampleId
from lightning_sgdclean.replay.open import OpenedRun
from lightning_sgdclean.report.content import Labels
from lightning_sgdclean.trajectory.records import MicroBatch, Step

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
            return dataset[_position(micro, row)]
        except Exception:  # the user's dataset, which may raise anything
            if micro.batch is None:
                raise
        return row_of(self._this.walk.batch_of(step, number), row, len(micro.ids))

    def labels(self, ranking: Ranking) -> Labels | None:
        """The dataset's label of each sample by rank, where no sample has to be fetched for that."""
        if self.dataset is None:
            return None
        visits = [self._visits[name] for name in ranking.sample_id.tolist()]
        return listed_labels(self.dataset, [_position(step.micro[number], row) for step, number, row in visits])


def row_of(batch: Any, row: int, num: int, depth: int = 0) -> Any:
    """A sample out of a collated batch of ``num`` samples: the same nesting, of what there is one a sample.

    Tensors with a first or else second dimension of length ``num``, and lists of ``num`` entries, have a row a sample;
    anything else is nobody's and left out, as None.
    """
    if depth > _DEPTH:
        return None
    if isinstance(batch, Tensor):
        dim = next((dim for dim in range(min(2, batch.ndim)) if batch.shape[dim] == num), None)
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


def _position(micro: MicroBatch, row: int) -> Any:
    return micro.positions[row] if isinstance(micro.positions, list) else micro.positions
