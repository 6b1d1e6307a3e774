# SPDX-License-Identifier: Apache-2.0
"""A dataset some of whose samples have another label."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

_NAMES = ("label", "labels", "target", "targets", "y")
_WAY_OUT = "Give set_label=, a callable (sample, label) -> sample."


class RelabelledDataset(Dataset[Any]):
    """The dataset, with other labels for some positions.

    Args:
        dataset: With positions.
        labels: New label by position.
        set_label: Callable ``(sample, label)`` to the sample with that label; by default :func:`with_label`.
        expected: Label by position that the sample has to have so far; not asked of a ``set_label`` of one's own.

    Raises:
        IndexError: If there is no such position.
        TypeError, ValueError: When a sample is asked for whose label is not plain, or another one than expected.
    """

    def __init__(
        self,
        dataset: Any,
        labels: Mapping[int, Any],
        set_label: Callable[[Any, Any], Any] | None = None,
        expected: Mapping[int, Any] | None = None,
    ) -> None:
        size = len(dataset)
        beyond = [position for position in labels if not 0 <= position < size]
        if beyond:
            raise IndexError(
                f"Sample id {beyond[0]} is no position in the training loader's dataset of {size} samples."
            )
        self._dataset, self._labels, self._set_label = dataset, dict(labels), set_label or with_label
        self._expected = dict(expected or {}) if set_label is None else {}
        if hasattr(dataset, "__getitems__"):
            self.__getitems__ = self._getitems  # torch's fetcher asks whether there is one

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, position: int) -> Any:
        return self._changed(position, self._dataset[position])

    def _getitems(self, positions: list[int]) -> list[Any]:
        samples = self._dataset.__getitems__(positions)
        return [self._changed(position, sample) for position, sample in zip(positions, samples, strict=True)]

    def _changed(self, position: int, sample: Any) -> Any:
        if position not in self._labels:
            return sample
        if position in self._expected and float(sample[_place_of_label(sample)]) != float(self._expected[position]):
            raise ValueError(
                f"The loss held sample {position} to the label {self._expected[position]}, but where its label seems "
                f"to stand there is {sample[_place_of_label(sample)]}. {_WAY_OUT}"
            )
        return self._set_label(sample, self._labels[position])

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)


def with_label(sample: Any, label: Any) -> Any:
    """The sample with another label, where it is plain which part of it that is.

    Second of a tuple or list (also a named one), or the entry of a mapping named ``label``, ``labels``, ``target``,
    ``targets`` or ``y``. The new label is of the old one's type.

    Raises:
        TypeError: If it is not plain.
    """
    place = _place_of_label(sample)
    label = _alike(sample[place], label)
    if isinstance(sample, Mapping):
        return {**sample, place: label}
    parts = [sample[0], label, *sample[2:]]
    return type(sample)(*parts) if hasattr(sample, "_fields") else type(sample)(parts)


def _place_of_label(sample: Any) -> Any:
    """Index or key of the label."""
    if isinstance(sample, tuple | list) and len(sample) > 1:
        return 1
    names = [name for name in _NAMES if name in sample] if isinstance(sample, Mapping) else []
    if len(names) == 1:
        return names[0]
    found = f"entries {', '.join(map(str, sample))}" if isinstance(sample, Mapping) else type(sample).__name__
    raise TypeError(f"Where the label of a sample stands is not plain: found {found}. {_WAY_OUT}")


def _alike(old: Any, label: Any) -> Any:
    """The label in the type of the old one."""
    if isinstance(old, Tensor) and old.numel() == 1:
        return torch.full_like(old, label)
    if isinstance(old, np.ndarray | np.generic) and old.size == 1:
        return np.full_like(old, label)[()]
    if isinstance(old, bool | int | float):
        return type(old)(label)
    raise TypeError(f"Expected a label that is one number, found a {type(old).__name__}. {_WAY_OUT}")
