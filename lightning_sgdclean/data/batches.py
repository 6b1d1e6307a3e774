# SPDX-License-Identifier: Apache-2.0
"""What a batch is made of, whatever its nesting: copies of it, its rows, and variants with samples replaced."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_sgdclean.base.errors import SampleIdError
from lightning_sgdclean.data.kinds import is_cached, is_opaque, kind_of


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes that an object holds itself, those in slots included.

    What a property has cached is none of them, nor has an object any that is taken apart by value
    (:mod:`~lightning_sgdclean.data.kinds`).
    """
    kind = type(value)
    if kind_of(kind) is not None:
        return {}
    named = ((base, vars(base).get("__slots__", ())) for base in kind.__mro__)
    slots = [_mangled(name, base) for base, names in named for name in ([names] if isinstance(names, str) else names)]
    held = {name: getattr(value, name) for name in slots if name not in _TECHNICAL and hasattr(value, name)}
    own = getattr(value, "__dict__", {})
    return held | {name: entry for name, entry in own.items() if not is_cached(kind, name)}


_TECHNICAL = frozenset({"__dict__", "__weakref__"})


def _mangled(name: str, owner: type) -> str:
    is_private = name.startswith("__") and not name.endswith("__")
    return f"_{owner.__name__.lstrip('_')}{name}" if is_private else name


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is of a class that computes for itself, and need not hold numbers of its own."""
    kind = type(tensor)
    return kind is not Tensor and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def extras_of(tensor: Tensor) -> dict[str, Any]:
    """The attributes that somebody hung on a tensor."""
    return {} if is_wrapper(tensor) else vars(tensor)


def leaves_of(value: Any, above: tuple[int, ...] = ()) -> Iterator[Any]:
    """Everything in a batch that is not made of parts, in order."""
    if id(value) in above:
        return
    inside = (*above, id(value))
    if isinstance(value, Tensor):
        yield value
        if extras := extras_of(value):
            yield from leaves_of(extras, inside)
    elif isinstance(value, type):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from leaves_of(item, inside)
    elif attributes := attributes_of(value):
        yield from leaves_of(attributes, inside)
    else:
        yield value


def cloned(batch: Any) -> Any:
    """A batch of fresh tensors in fresh containers: what is done to it, the original does not feel.

    A tensor that occurs twice does so in the copy. What cannot be copied is shared.
    """
    return _changed(batch, _cloned, lambda: batch)


def _changed(batch: Any, change: Callable[[Any], Any], otherwise: Callable[[], Any]) -> Any:
    """A copy of a batch with other tensors and arrays in it; something else where it cannot be copied."""
    # Not deepcopy's way with tensors: of a view it would copy all that lies behind.
    leaves = [leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor | np.ndarray)]
    try:
        seen: dict[int, Any] = {id(leaf): made for leaf in leaves if (made := change(leaf)) is not None}
        for leaf in leaves:
            if isinstance(leaf, Tensor) and seen[id(leaf)] is not leaf and (extras := extras_of(leaf)):
                vars(seen[id(leaf)]).update(copy.deepcopy(extras, seen))
        return copy.deepcopy(batch, seen)
    except Exception:  # theirs, of any kind: a generator, a lock, a file
        return otherwise()


def _cloned(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return None  # by deepcopy
    copied = _of_class(leaf.detach().clone(), leaf)
    return copied.requires_grad_() if leaf.requires_grad else copied


def _of_class(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor if type(tensor) is type(other) or is_wrapper(other) else tensor.as_subclass(type(other))


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
    if isinstance(batch, np.ndarray) or is_opaque(batch):
        return _taken_with_neighbours(batch, replaced)
    if isinstance(batch, PackedSequence):
        return _sequences_with_neighbours(batch, replaced)
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
    for name in [name for name in getattr(changed, "__dict__", {}) if name not in attributes]:
        del changed.__dict__[name]  # what a property has cached is of other samples
    for name, value in attributes.items():
        object.__setattr__(changed, name, with_neighbours(value, replaced, inside))  # also of a frozen dataclass
    return changed


def _with_neighbours(batch: Tensor, replaced: Tensor) -> Tensor:
    dims = range(min(2, batch.ndim)) if is_dense(batch) else ()
    dim = next((dim for dim in dims if batch.shape[dim] == len(replaced)), None)
    if dim is None:
        changed = batch.clone()
    else:
        shape = [-1 if d == dim else 1 for d in range(batch.ndim)]
        changed = torch.where(replaced.to(batch.device).view(shape), batch.roll(1, dim), batch)
    changed = _of_class(changed, batch)
    for name, value in extras_of(batch).items():
        # A list that is as long as the batch may name columns.
        setattr(changed, name, with_neighbours(value, replaced) if isinstance(value, Tensor) else value)
    return changed


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but its numbers, one beside the other."""
    return tensor.layout is torch.strided and not tensor.is_nested and not is_wrapper(tensor)


def _taken_with_neighbours(batch: Any, replaced: Tensor) -> Any:
    """Of an array, or a table, or the like."""
    num, kind = len(replaced), kind_of(type(batch))
    places = (np.arange(num) - replaced.cpu().numpy()) % num
    if kind is None:
        dim = next((dim for dim in range(min(2, batch.ndim)) if batch.shape[dim] == num), None)
        return batch.copy() if dim is None else batch.take(places, dim)
    return batch if kind.take is None or len(batch) != num else kind.take(batch, places)


def _sequences_with_neighbours(batch: PackedSequence, replaced: Tensor) -> PackedSequence:
    """Each marked sequence overwritten by the one before it, as far as both reach; lengths stay."""
    padded, lengths = pad_packed_sequence(batch, batch_first=True)
    if len(lengths) != len(replaced):
        return batch
    reach = torch.minimum(lengths, lengths.roll(1)).unsqueeze(1)
    is_other = replaced.cpu().unsqueeze(1) & (torch.arange(padded.shape[1]) < reach)
    is_other = is_other.to(padded.device).view(*is_other.shape, *[1] * (padded.ndim - 2))
    changed = torch.where(is_other, padded.roll(1, 0), padded)
    return pack_padded_sequence(changed, lengths, batch_first=True, enforce_sorted=batch.sorted_indices is None)


def tensor_shapes(batch: Any) -> list[tuple[int, ...]]:
    """Shapes of all tensors in a batch, in order."""
    tensors = (leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor))
    return [(tensor.size(0),) if tensor.is_nested else tuple(tensor.shape) for tensor in tensors]


def of_one_shape(variant: Variant, num: int) -> Variant:
    """A variant that never replaces a sample without which the batch has other shapes, as the longest of a padded one.

    A shorter batch could not be compared with this one, entry by entry.
    """
    wanted = tensor_shapes(variant(torch.zeros(num, dtype=torch.bool)))

    def shaped(replaced: Tensor) -> Any:
        replaced, batch = replaced.clone(), variant(replaced)
        for sample in replaced.nonzero().flatten().tolist():
            if tensor_shapes(batch) == wanted:
                break
            replaced[sample] = False
            batch = variant(replaced)
        return batch

    return shaped


def is_entry_each(items: list[Any] | tuple[Any, ...], num: int) -> bool:
    """Whether a sequence has one entry a sample; not so two tensors ``(x, y)`` of two samples, with rows themselves."""
    kinds = {(type(item), item.ndim, item.dtype) if isinstance(item, Tensor) else type(item) for item in items}
    return len(items) == num > 0 and len(kinds) == 1 and not all(is_by_row(item, num) for item in items)


SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def as_float32(batch: Any) -> Any:
    """The batch with its 16-bit tensors widened."""
    return _widened(batch, lambda leaf: summable(leaf) if isinstance(leaf, Tensor) else None)


def as_float64(batch: Any) -> Any:
    """The batch with all its tensors and arrays of floats in float64."""
    return _widened(batch, _as_double)


def _as_double(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf.astype(np.float64) if leaf.dtype.kind == "f" else None
    return leaf.double() if leaf.is_floating_point() else leaf


def _widened(batch: Any, widen: Callable[[Any], Any]) -> Any:
    return _changed(batch, widen, lambda: apply_to_collection(batch, Tensor, widen))


def summable(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.float() if tensor.dtype in SIXTEEN_BITS else tensor


def is_by_row(item: Any, num: int) -> bool:
    """Whether a tensor or a sequence has a row for each of ``num`` samples."""
    if isinstance(item, Tensor):
        return is_dense(item) and item.ndim > 0 and item.shape[0] == num > 0
    return isinstance(item, list | tuple) and len(item) == num > 0


def batch_parts(batch: Any, num: int, above: tuple[int, ...] = ()) -> list[Any]:
    """What a batch of ``num`` samples is made of: tensors, sequences with an entry a sample, and single values."""
    if isinstance(batch, Tensor) or id(batch) in above:
        return [batch]
    if isinstance(batch, Mapping):
        inner = list(batch.values())
    elif isinstance(batch, list | tuple):
        inner = [] if is_entry_each(batch, num) else list(batch)
    else:
        inner = [] if callable(batch) else list(attributes_of(batch).values())
    return [part for value in inner for part in batch_parts(value, num, (*above, id(batch)))] or [batch]


def samples_first(part: Any, num: int) -> tuple[Any, int]:
    """A part of a batch with samples in the first dimension, and which dimension they had: the second in time-first."""
    is_second = isinstance(part, Tensor) and is_dense(part) and part.ndim > 1 and part.shape[0] != num == part.shape[1]
    return (part.transpose(0, 1), 1) if is_second else (part, 0)


def has_row_each(part: Any, num: int, dim: int = 0) -> bool:
    """Whether a part of a batch has a row along a dimension, or an entry, for each of ``num`` samples."""
    if isinstance(part, list | tuple):
        return is_entry_each(part, num)
    if isinstance(part, Tensor) and part.is_nested:  # it has no shape
        return dim == 0 and part.size(0) == num
    return int(getattr(part, "ndim", 0)) > dim and part.shape[dim] == num


def samples_of(batch: Any) -> list[list[Any]]:
    """What a batch holds of each of its samples: rows and entries.

    Raises:
        SampleIdError: If part of it, more than a number or a word, has no row a sample, or their number is not clear.
    """
    num = _num_samples(batch)
    samples: list[list[Any]] = [[] for _ in range(num)]
    for part in batch_parts(batch, num):
        first, _ = samples_first(part, num)
        if _has_rows(first, num):
            for place, sample in enumerate(samples):
                sample.append(first[place] if not hasattr(first, "iloc") else np.array(first.iloc[place]).tolist())
        elif not _is_single(part):
            raise SampleIdError(
                _NOT_BY_CONTENT.format(f"holds a {type(part).__name__} without a row for each of {num}")
            )
    if not any(samples):
        raise SampleIdError(_NOT_BY_CONTENT.format("has no row for any of its"))
    return samples


_NOT_BY_CONTENT = (
    "A training batch {} samples, so they cannot be named by their content. Give sample_ids=, a callable from the "
    'batch to its samples\' ids, instead of "content".'
)


def _num_samples(batch: Any) -> int:
    """``B``: the length of all tensors and arrays, or of the list of samples that a batch is."""
    is_listed = isinstance(batch, list | tuple) and is_entry_each(batch, len(batch))
    if is_listed and not isinstance(batch[0], Tensor | np.ndarray | list | tuple):
        return len(batch)
    others = [leaf for leaf in leaves_of(batch) if isinstance(leaf, np.ndarray) or hasattr(leaf, "iloc")]
    shapes = [shape for shape in [*tensor_shapes(batch), *(leaf.shape for leaf in others)] if shape]
    fitting = {shape[0] for shape in shapes if all(shape[0] in other[:2] for other in shapes)}
    if len(fitting) != 1:
        raise SampleIdError(_NOT_BY_CONTENT.format("has tensors of different lengths: it is not clear how many"))
    return int(fitting.pop())


def _has_rows(part: Any, num: int) -> bool:
    # An Index of pandas may name columns.
    known = isinstance(part, Tensor | np.ndarray | list | tuple) or hasattr(part, "iloc")
    return known and has_row_each(part, num)


def _is_single(part: Any) -> bool:
    size = (part.numel() if is_dense(part) else 2) if isinstance(part, Tensor) else getattr(part, "size", 2)
    return isinstance(part, str | int | float | complex | type | None) or size == 1
