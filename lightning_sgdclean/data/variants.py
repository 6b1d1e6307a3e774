# SPDX-License-Identifier: Apache-2.0
"""Variants of a batch in which some samples are replaced by others, before they are collated or after."""

import copy
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.data.batches import attributes_of, cloned, leaves_of
from lightning_sgdclean.data.fingerprints import is_entry_each

Variant = Callable[[Tensor], Any]  # mask (B,) of bool -> the batch with the marked samples replaced


def with_neighbours(batch: Any, replaced: Tensor, above: tuple[int, ...] = ()) -> Any:
    """The batch with each marked sample's row overwritten by that of the sample before it.

    Args:
        batch: Nested mappings, lists, tuples and objects. Tensors with a first or else second dimension of
            length ``B``, and lists of ``B`` entries that are no batches themselves, have a row a sample.
        replaced: ``(B,)`` of bool.
        above: The objects that hold ``batch``.
    """
    num = len(replaced)
    if isinstance(batch, Tensor):
        return _with_neighbours(batch, replaced)
    if id(batch) in above:
        return batch  # a circle
    inside = (*above, id(batch))
    if isinstance(batch, list | tuple):
        if is_entry_each(batch, num):
            items = [batch[i - 1] if replaced[i] else batch[i] for i in range(num)]
        else:
            items = [with_neighbours(item, replaced, inside) for item in batch]
        if hasattr(batch, "_fields"):
            return type(batch)(*items)
        return tuple(items) if isinstance(batch, tuple) else items
    if isinstance(batch, MutableMapping):
        changed = copy.copy(batch)
        changed.update({key: with_neighbours(value, replaced, inside) for key, value in batch.items()})
        return changed
    if callable(batch) or not (attributes := attributes_of(batch)):
        return batch
    changed = copy.copy(batch)
    for name, value in attributes.items():
        object.__setattr__(changed, name, with_neighbours(value, replaced, inside))  # also of a frozen dataclass
    return changed


def _with_neighbours(batch: Tensor, replaced: Tensor) -> Tensor:
    dim = next((dim for dim in range(min(2, batch.ndim)) if batch.shape[dim] == len(replaced)), None)
    if dim is None or batch.layout is not torch.strided:
        return batch.clone()
    shape = [-1 if d == dim else 1 for d in range(batch.ndim)]
    return torch.where(replaced.to(batch.device).view(shape), batch.roll(1, dim), batch)


def tensor_shapes(batch: Any) -> list[tuple[int, ...]]:
    """Shapes of all tensors in a batch, in order."""
    return [tuple(leaf.shape) for leaf in leaves_of(batch) if isinstance(leaf, Tensor)]


def neighbour_variant(batch: Any) -> Variant:
    """:func:`with_neighbours` of a batch that ``training_step`` may write to."""
    return lambda replaced: with_neighbours(cloned(batch), replaced)


def of_one_shape(variant: Variant, num: int) -> Variant:
    """A variant that never replaces a sample without which the batch has other shapes, as the longest of a padded one.

    A shorter batch could not be compared with this one, entry by entry.
    """
    wanted = tensor_shapes(variant(torch.zeros(num, dtype=torch.bool)))

    def shaped(replaced: Tensor) -> Any:
        replaced = replaced.clone()
        batch = variant(replaced)
        for sample in replaced.nonzero().flatten().tolist():
            if tensor_shapes(batch) == wanted:
                break
            replaced[sample] = False
            batch = variant(replaced)
        return batch

    return shaped
