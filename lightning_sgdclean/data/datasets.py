# SPDX-License-Identifier: Apache-2.0
"""What a dataset tells of its samples: where they come from, their classes, labels and pictures."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.data.labels import Label, RelabelledDataset, label_of, likely_place_of_label, plain_label


class Part(NamedTuple):
    """What one dataset contributes, when the subsets and unions around it are taken away.

    Attributes:
        dataset: The dataset, neither a Subset nor a ConcatDataset.
        path: Which part of a union it is, which part of a union within that part, and so on.
        positions: The positions in it; None for all.
        rows: For each of these, its index among the positions that were asked for.
    """

    dataset: Any
    path: tuple[int, ...]
    positions: Sequence[Any] | None
    rows: Sequence[int] | None


def innermost_parts(dataset: Any, positions: Sequence[Any] | None = None) -> Iterator[Part]:
    """Follow positions through Subset and ConcatDataset, however nested, to the datasets that hold the samples.

    Args:
        dataset: Any dataset.
        positions: Positions in it; by default all.

    Returns:
        One part for each way that leads to at least one of the positions. Rows are those of ``positions``, or else of
        the outermost subset on the way.

    Raises:
        IndexError, TypeError, ValueError: If there is no such position.
    """
    return _parts(dataset, (), positions, None if positions is None else range(len(positions)))


def _parts(
    dataset: Any, path: tuple[int, ...], positions: Sequence[Any] | None, rows: Sequence[int] | None
) -> Iterator[Part]:
    if isinstance(dataset, Subset):
        indices = dataset.indices
        if positions is None or rows is None:
            yield from _parts(dataset.dataset, path, indices, range(len(indices)))
        else:
            yield from _parts(dataset.dataset, path, [int(indices[position]) for position in positions], rows)
    elif isinstance(dataset, ConcatDataset):
        if positions is None or rows is None:
            for number, inner in enumerate(dataset.datasets):
                yield from _parts(inner, (*path, number), None, None)
        else:
            for number, (within, their_rows) in sorted(_by_part(dataset, positions, rows).items()):
                yield from _parts(dataset.datasets[number], (*path, number), within, their_rows)
    else:
        yield Part(dataset, path, positions, rows)


def _by_part(
    union: "ConcatDataset[Any]", positions: Sequence[Any], rows: Sequence[int]
) -> dict[int, tuple[list[int], list[int]]]:
    """Positions and rows by the number of the part that they lead to, positions counted from its start."""
    ends, size = union.cumulative_sizes, len(union)
    found: dict[int, tuple[list[int], list[int]]] = {}
    for position, row in zip(map(int, positions), rows, strict=True):
        if not -size <= position < size:
            raise IndexError(f"Position {position} of {size} samples.")
        from_start = position % size
        number = bisect_right(ends, from_start)
        within, their_rows = found.setdefault(number, ([], []))
        within.append(from_start - (ends[number - 1] if number else 0))
        their_rows.append(row)
    return found


def innermost_datasets(dataset: Any) -> Iterator[Any]:
    """All datasets behind Subset and ConcatDataset, also those that no position leads to; positions are not read."""
    if isinstance(dataset, Subset):
        yield from innermost_datasets(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from innermost_datasets(part)
    else:
        yield dataset


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
    try:
        ((inner, path, positions, _),) = innermost_parts(dataset, [position])
    except (IndexError, TypeError, ValueError):
        return None
    assert positions is not None
    return _file_of(inner, positions[0]) or f"{' '.join(['dataset', '.'.join(map(str, path))]).strip()}[{positions[0]}]"


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
    found = [_class_names(inner) for inner in innermost_datasets(dataset)]
    return found[0] if found and all(names == found[0] for names in found) else []


def _class_names(dataset: Any) -> list[str]:
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
    listings = {id(inner): _listing_of(inner) for inner in innermost_datasets(dataset)}
    if None in listings.values():
        return None
    labels: list[Label | None] = [None] * len(positions)
    for inner, _, within, rows in innermost_parts(dataset, positions):
        listing = listings[id(inner)]
        assert listing is not None and within is not None and rows is not None  # noqa: PT018 - positions were given
        for row, position in zip(rows, within, strict=True):
            labels[row] = plain_label(listing[position])
    for i in range(0, len(positions), max(1, len(positions) // _NUM_CHECKED)):
        sample = dataset[positions[i]]
        if labels[i] is None or label_of(sample, likely_place_of_label(sample)) != labels[i]:
            return None
    return labels


def _listing_of(dataset: Any) -> Sequence[Any] | None:
    """The label of each sample, in order, as the dataset itself has it."""
    if isinstance(dataset, RelabelledDataset):  # whose attributes are those of the dataset with the old labels
        return None
    if isinstance(dataset, TensorDataset):
        columns = [tensor for tensor in dataset.tensors[1:] if tensor.ndim == 1]
        return columns[0].tolist() if columns else None
    for name in _LABEL_ATTRIBUTES:
        values = getattr(dataset, name, None)
        values = values.tolist() if isinstance(values, Tensor | np.ndarray) and values.ndim == 1 else values
        if isinstance(values, list | tuple) and len(values) == len(dataset):
            return values
    return None


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
