# SPDX-License-Identifier: Apache-2.0
"""Where a sample comes from: the way from a position in a dataset to the innermost one behind subsets and unions."""

import os
from bisect import bisect_right
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Subset


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
