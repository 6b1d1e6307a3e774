# SPDX-License-Identifier: Apache-2.0
"""Samples by group, and influences by bar."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_MANY = 200  # different labels
Groups: TypeAlias = Mapping[Any, Any] | Sequence[Any] | NDArray[Any] | Tensor


@dataclass(frozen=True)
class GroupEffect:
    """What the samples of one group did together.

    Attributes:
        group: Its name.
        total: Sum of their influences; negative: harmful together.
        harm: Sum of the negative influences.
        help: Sum of the positive ones.
        num_harmful: Samples with a negative influence.
        num_samples: All of them.
    """

    group: Any
    total: float
    harm: float
    help: float
    num_harmful: int
    num_samples: int


def groups_of(sample_ids: Sequence[int | str], groups: Groups) -> list[Any]:
    """The group of each sample.

    Args:
        sample_ids: Ids, ints or str.
        groups: A mapping from id to group (also a pandas Series indexed by id), or a sequence, array or tensor ``(M,)``
            in which integer ids are positions.

    Raises:
        KeyError: If there is no group for an id.
        TypeError: If ids are str and ``groups`` is not a mapping.
        ValueError: If a group is NaN, or an array of groups is not one-dimensional.
    """
    is_mapping = hasattr(groups, "keys")  # a pandas Series too: it is indexed by label, not by position
    entries: Any = groups
    if not is_mapping and isinstance(groups, Tensor | np.ndarray):
        if groups.ndim != 1:
            raise ValueError(f"Expected one group per sample, found an array of shape {tuple(groups.shape)}.")
        entries = groups.tolist()
    return [_group_of(sample, entries, is_mapping) for sample in sample_ids]


def _group_of(sample: int | str, groups: Any, is_mapping: bool) -> Any:
    if not is_mapping and isinstance(sample, str):
        raise TypeError(f"Sample ids are str ({sample!r}), so groups must be a mapping from id to group.")
    if not is_mapping and not 0 <= cast(int, sample) < len(groups):
        raise KeyError(sample)
    group = groups[sample]
    group = group.item() if isinstance(group, Tensor | np.generic) else group  # tensors hash by identity
    if isinstance(group, float) and math.isnan(group):
        raise ValueError(f"The group of sample {sample!r} is NaN, which equals no other group.")
    return group


def effects_by_group(groups: Sequence[Any], influence: Sequence[float]) -> list[GroupEffect]:
    """What each group did, the one with the lowest sum of influences first, ties by the group's name.

    Args:
        groups: The group of each sample.
        influence: The samples' influences.
    """
    members: dict[Any, list[float]] = {}
    for group, value in zip(groups, influence, strict=True):
        members.setdefault(group, []).append(value)
    effects = [_effect_of(group, values) for group, values in members.items()]
    return sorted(effects, key=lambda effect: (effect.total, str(effect.group)))


def _effect_of(group: Any, influence: Sequence[float]) -> GroupEffect:
    """What the samples with these influences did together."""
    harmful = [value for value in influence if value < 0]
    helped = math.fsum(value for value in influence if value > 0)
    return GroupEffect(group, math.fsum(influence), math.fsum(harmful), helped, len(harmful), len(influence))


def labels_if_few(labels: "NDArray[Any] | None") -> list[Any] | None:
    """A column of labels as groups, or None if there is none or its values are so many that they were measured."""
    found = [] if labels is None else ["unknown" if label != label else label for label in labels.tolist()]
    return found if 0 < len(set(found)) <= _MANY else None


TOO_SMALL = 1e-280  # matplotlib cannot place ticks on such an axis
_HEAVY_TAIL = 30.0  # largest over median size from which equal bins would show little but one bar
_TICK_GAP = 0.11  # of the axis, so that labels do not run into each other


def bin_edges(influence: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Edges of the bars, 0 among them, so that no bar mixes harmful and helpful samples.

    Returns:
        The edges, and for a heavy tail the size up to which the scale is about linear (else 0).
    """
    size = np.abs(influence[influence != 0])
    typical = max(float(np.median(size)), TOO_SMALL)
    stretch = typical if size.max() > _HEAVY_TAIL * typical else 0.0
    ends = np.array([min(influence.min(), 0.0), max(influence.max(), 0.0)])
    low, high = np.arcsinh(ends / stretch) if stretch else ends
    width = (high - low) / int(np.clip(np.sqrt(len(influence)), 8, 60))
    edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)
    # Rounding may leave the outermost sample a hair outside its bar.
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    if stretch:
        edges = stretch * np.sinh(edges)
        edges[0], edges[-1] = min(edges[0], ends[0]), max(edges[-1], ends[1])
    return edges, stretch


def stretched_ticks(edges: NDArray[np.float64], stretch: float) -> list[float]:
    """Where a stretched scale has its marks: powers of ten from the outside in, as many as have room."""
    low, high = np.arcsinh(edges[[0, -1]] / stretch)
    ticks = [0.0]
    for sign, end in ((-1, -edges[0]), (1, edges[-1])):
        outermost = math.inf
        for power in range(math.floor(math.log10(end)), -300, -1) if end > 0 else ():
            position = math.asinh(10.0**power / stretch)
            if position < _TICK_GAP * (high - low):
                break
            if outermost - position > _TICK_GAP * (high - low):
                ticks.append(sign * 10.0**power)
                outermost = position
    return sorted(ticks)


def has_size(influence: NDArray[np.float64]) -> bool:
    """Whether there is anything to draw."""
    return len(influence) > 0 and bool(np.abs(influence).max() > TOO_SMALL)
