# SPDX-License-Identifier: Apache-2.0
"""Samples by group (label, source, annotator): which group each is in, and what the groups did together."""

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
