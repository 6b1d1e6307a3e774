# SPDX-License-Identifier: Apache-2.0
"""What a dataset tells of its samples: where they come from, their classes, labels and pictures."""

import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.data.labels import Label, label_of, likely_place_of_label, plain_label


def source_of(dataset: Any, position: int) -> str | None:
    """What leads to the sample at this position without the datasets that were wrapped around its own.

    Args:
        dataset: Any dataset; Subset and ConcatDataset are seen through, however nested.
        position: A position in it.

    Returns:
        The sample's file, where the innermost dataset lists one (``samples``, as ImageFolder has it); else
        ``dataset[7]``, or ``dataset 1[7]`` in the second part of a union, ``dataset 1.0[7]`` in a union within it.
        None where the position is none.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> numbers = TensorDataset(torch.arange(10))
        >>> source_of(ConcatDataset([numbers, Subset(numbers, [7, 8])]), 11)
        'dataset 1[8]'
    """
    parts: list[str] = []
    try:
        while True:
            if isinstance(dataset, Subset):
                dataset, position = dataset.dataset, int(dataset.indices[position])
            elif isinstance(dataset, ConcatDataset):
                position = position + len(dataset) if position < 0 else position
                part = bisect_right(dataset.cumulative_sizes, position)
                parts.append(str(part))
                position -= dataset.cumulative_sizes[part - 1] if part else 0
                dataset = dataset.datasets[part]
            else:
                break
    except (IndexError, TypeError, ValueError):
        return None
    return _file_of(dataset, position) or f"{' '.join(['dataset', '.'.join(parts)]).strip()}[{position}]"


def _file_of(dataset: Any, position: int) -> str | None:
    """The file that ``dataset.samples`` names at this position, if it is a list of as many files as samples."""
    samples = getattr(dataset, "samples", None)
    try:
        if not isinstance(samples, list) or len(samples) != len(dataset):
            return None
        entry = samples[position]
        path = entry[0] if isinstance(entry, tuple | list) else entry
        return os.fspath(path) if isinstance(path, str | os.PathLike) and Path(path).is_file() else None
    except (IndexError, TypeError, ValueError, OSError):
        return None


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


_SMALLEST = 4  # pixels a side; what is flatter is a table or a vector
_CHANNELS = (1, 3, 4)


def picture_of(sample: Any) -> NDArray[np.uint8] | None:
    """The first picture in a sample, however the sample is nested.

    A picture is a PIL image, or a tensor or array ``(C, H, W)``, ``(H, W, C)`` with 1, 3 or 4 channels, or ``(H, W)``,
    of 4 pixels a side at least. Fractions from 0 to 1 and whole numbers from 0 to 255 are taken as they are; values
    that reach beyond (normalised images) are stretched, the smallest to black and the largest to white.

    Args:
        sample: What ``dataset[position]`` gives.

    Returns:
        Grey values ``(H, W)`` or colours ``(H, W, 3)``, or None if there is no picture.
    """
    if isinstance(sample, Mapping):
        return _first(list(sample.values()))
    if isinstance(sample, list | tuple):
        return _first(sample)
    values = picture_values(sample)
    if values is None:
        return None
    colours = values[..., 0] if values.shape[2] == 1 else values[..., :3]  # transparency is not shown
    return np.ascontiguousarray(_as_bytes(colours))


def picture_values(value: Any) -> NDArray[Any] | None:
    """The picture that a single value is, its numbers as they are.

    Args:
        value: A PIL image, a tensor or an array, as for :func:`picture_of`.

    Returns:
        Numbers ``(H, W, C)`` with 1, 3 or 4 channels, or None if it is no picture.
    """
    if isinstance(value, Tensor | np.ndarray):
        return _from_array(value)
    is_pil = hasattr(value, "convert") and hasattr(value, "getbands")  # without importing PIL, nor pixels of others
    return _from_pil(value) if is_pil else None


def _first(parts: Any) -> NDArray[np.uint8] | None:
    return next((found for part in parts if (found := picture_of(part)) is not None), None)


def _from_pil(image: Any) -> NDArray[Any] | None:
    if image.mode.startswith(("I", "F")):  # 16 bits and more, which converting would cut off
        return _from_array(np.asarray(image))
    clear = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    grey = image.mode in ("1", "L")
    return _from_array(np.asarray(image.convert("RGBA" if clear else "L" if grey else "RGB")))


def _from_array(values: Tensor | NDArray[Any]) -> NDArray[Any] | None:
    if not 2 <= values.ndim <= 3:
        return None
    array = _to_numpy(values) if isinstance(values, Tensor) else values
    if array is None or array.dtype.kind not in "buif":
        return None
    if array.ndim == 2:
        array = array[..., None]
    elif array.shape[0] in _CHANNELS and min(array.shape[1:]) >= _SMALLEST:
        array = np.moveaxis(array, 0, -1)
    if array.shape[2] not in _CHANNELS or min(array.shape[:2]) < _SMALLEST:
        return None
    return array


def _to_numpy(tensor: Tensor) -> NDArray[Any] | None:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return None
    tensor = tensor.detach().cpu()
    found: NDArray[Any] = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return found


def _as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    values = np.nan_to_num(array.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    top = 1.0 if array.dtype.kind in "bf" else 255.0
    if low < 0.0 or high > top:
        values, top = values - low, max(high - low, 1e-300)
    return (values / top * 255).round().astype(np.uint8)
