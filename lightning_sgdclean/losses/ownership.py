# SPDX-License-Identifier: Apache-2.0
"""Which sample owns which entry of a loss's rows: seen by replacing samples, put as a rule for other batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, islice

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A rule that gives the owner of every index along one dimension: ``(index // inner) % B``.

    Exactly one of ``inner`` and ``outer`` is set; the other follows from the length of the dimension,
    which is ``outer * B * inner``. One row a sample, and flattened sequences with the batch first, are
    ``outer=1``; time first, and concatenated views, are ``inner=1``.

    Attributes:
        dim: The dimension.
        inner: How many consecutive entries a sample has, whatever the length.
        outer: How often the samples' order repeats, whatever the length.
    """

    dim: int
    inner: int | None = None
    outer: int | None = None

    def owners(self, shape: Sequence[int], num: int) -> Tensor | None:
        """Owner of each index along ``dim``, or None where the rule does not fit the shape."""
        if self.dim >= len(shape) or shape[self.dim] == 0 or shape[self.dim] % num:
            return None
        each = shape[self.dim] // num
        if each % (self.inner or self.outer or 1):
            return None
        inner = self.inner or each // (self.outer or 1)
        return (torch.arange(shape[self.dim]) // inner) % num


def candidate_layouts(shape: Sequence[int], num: int) -> list[Layout]:
    """All rules that fit a shape."""
    found = []
    for dim, length in enumerate(shape):
        if length == 0 or length % num:
            continue
        each = length // num
        for inner in (k for k in range(1, each + 1) if each % k == 0):
            found += [Layout(dim, outer=each // inner), Layout(dim, inner=inner)]
    return found


def owners_by(layouts: frozenset[Layout], shape: Sequence[int], num: int) -> Tensor | None:
    """Owner of each entry, ready to be broadcast to ``shape``; None where the rules do not fit or disagree."""
    if num == 1:
        return torch.zeros([1] * len(shape), dtype=torch.long)
    found: tuple[int, Tensor] | None = None
    for layout in layouts:
        owners = layout.owners(shape, num)
        if owners is None or (found is not None and (found[0] != layout.dim or not torch.equal(found[1], owners))):
            return None
        found = layout.dim, owners
    if found is None:
        return None
    return found[1].view([-1 if dim == found[0] else 1 for dim in range(len(shape))])


def replacement_masks(num: int) -> Tensor:
    """Groups of samples to replace, such that what moves with several samples cannot look like another's.

    Every sample is in exactly half of the groups, and no two in the same ones (Sperner: no set of such
    groups holds another, so a union of two samples' groups is nobody's).

    Returns:
        ``(m, num)`` of bool with ``m`` about ``log2(num)``; for one sample no groups.
    """
    if num < 2:
        return torch.zeros(0, num, dtype=torch.bool)
    size = next(m for m in range(2, 63) if math.comb(m, m // 2) >= num)
    masks = torch.zeros(size, num, dtype=torch.bool)
    for sample, groups in enumerate(islice(combinations(range(size), size // 2), num)):
        masks[list(groups), sample] = True
    return masks


def codes_of(masks: Tensor) -> Tensor:
    """The groups that each sample is in, as bits ``(num,)``."""
    return (masks.long() << torch.arange(len(masks))[:, None]).sum(0)


def consistent_layouts(seen: Tensor, codes: Tensor) -> frozenset[Layout]:
    """The rules that agree with every entry that moved.

    Args:
        seen: For each entry the groups, as bits, whose replacement moved it; 0 where nothing did.
        codes: :func:`codes_of`.
    """
    found = set()
    for layout in candidate_layouts(seen.shape, len(codes)):
        owners = owners_by(frozenset([layout]), seen.shape, len(codes))
        if owners is not None and bool(((seen == 0) | (seen == codes[owners])).all()):
            found.add(layout)
    return frozenset(found)
