# SPDX-License-Identifier: Apache-2.0
"""What a dataset says of its labels without fetching samples: names of the classes, and the labels of all samples."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.data.labels import Label, label_of, likely_place_of_label, plain_label

ClassNames = Mapping[Any, str] | Sequence[str]

_LABEL_ATTRIBUTES = ("targets", "labels", "_labels")
_NUM_CHECKED = 32  # samples that are fetched to see whether what a dataset lists is what it delivers


def class_names_of(dataset: Any) -> list[str]:
    """Names of the classes ``0, 1, ...``: ``dataset.classes``, also behind Subset and ConcatDataset; [] if unknown.

    Datasets of the datasets library have them in ``features``.
    """
    while isinstance(dataset, Subset | ConcatDataset):
        if isinstance(dataset, Subset):
            dataset = dataset.dataset
            continue
        found = [class_names_of(part) for part in dataset.datasets]
        return found[0] if found and all(names == found[0] for names in found) else []
    names = getattr(dataset, "classes", None)
    if names is None:
        features = getattr(dataset, "features", None)
        kinds = features.values() if isinstance(features, Mapping) else ()
        listed = [kind.names for kind in kinds if isinstance(getattr(kind, "names", None), list)]
        names = listed[0] if len(listed) == 1 else None
    return [str(name) for name in names] if isinstance(names, list | tuple) else []


def names_by_label(names: "ClassNames | None") -> dict[str, str]:
    """Class names by the label as text."""
    if names is None:
        return {}
    entries = names.items() if isinstance(names, Mapping) else enumerate(names)
    return {str(plain_label(label)): str(name) for label, name in entries}


def listed_labels(dataset: Any, positions: Sequence[Any]) -> list[Label | None] | None:
    """The labels at these positions, where the dataset lists them so that no sample has to be fetched.

    Looked for are ``targets`` and ``labels``, the tensors of a TensorDataset, and these behind Subset and
    ConcatDataset. Some samples are fetched, and where one has another label than was listed the list is not used.

    Returns:
        One label a position, or None where there is no such list.
    """
    with untouched_randomness(torch.device("cpu")):
        try:
            return _checked_labels(dataset, positions)
        except Exception:  # the user's dataset, which may raise anything; its labels are then not known
            return None


def _checked_labels(dataset: Any, positions: Sequence[Any]) -> list[Label | None] | None:
    label_at = _label_getter(dataset)
    if label_at is None:
        return None
    labels = [label_at(position) for position in positions]
    for i in range(0, len(positions), max(1, len(positions) // _NUM_CHECKED)):
        sample = dataset[positions[i]]
        if labels[i] is None or label_of(sample, likely_place_of_label(sample)) != labels[i]:
            return None
    return labels


def _label_getter(dataset: Any) -> Callable[[Any], Label | None] | None:
    if isinstance(dataset, Subset):
        inner, indices = _label_getter(dataset.dataset), dataset.indices
        return None if inner is None else lambda position: inner(indices[position])
    if isinstance(dataset, ConcatDataset):
        return _getter_of_union(dataset)
    if isinstance(dataset, TensorDataset):
        found = [tensor for tensor in dataset.tensors[1:] if tensor.ndim == 1]
        return _listed(found[0].tolist()) if found else None
    for name in _LABEL_ATTRIBUTES:
        values = getattr(dataset, name, None)
        values = values.tolist() if isinstance(values, Tensor | np.ndarray) and values.ndim == 1 else values
        if isinstance(values, list | tuple) and len(values) == len(dataset):
            return _listed(values)
    return None


def _listed(values: Sequence[Any]) -> Callable[[Any], Label | None]:
    return lambda position: plain_label(values[position])


def _getter_of_union(dataset: "ConcatDataset[Any]") -> Callable[[Any], Label | None] | None:
    getters, ends = [_label_getter(part) for part in dataset.datasets], dataset.cumulative_sizes
    if None in getters:
        return None

    def label_at(position: Any) -> Label | None:
        part = bisect_right(ends, position)
        getter = getters[part]
        assert getter is not None
        return getter(position - (ends[part - 1] if part else 0))

    return label_at
