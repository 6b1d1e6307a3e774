# SPDX-License-Identifier: Apache-2.0
"""What a batch is made of, whatever its nesting: copies of it, its rows, and variants with samples replaced."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes that an object holds itself, those in slots included."""
    slots = [name for kind in type(value).__mro__ for name in _names_of(vars(kind).get("__slots__", ()))]
    held = {name: getattr(value, name) for name in slots if name not in _TECHNICAL and hasattr(value, name)}
    return held | getattr(value, "__dict__", {})


_TECHNICAL = frozenset({"__dict__", "__weakref__"})


def _names_of(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def leaves_of(value: Any, above: tuple[int, ...] = ()) -> Iterator[Any]:
    """Everything in a batch that is not made of parts, in order."""
    if id(value) in above:
        return
    inside = (*above, id(value))
    if isinstance(value, Tensor | type):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves_of(item, inside)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves_of(item, inside)
    elif attributes := attributes_of(value):
        yield from leaves_of(attributes, inside)
    else:
        yield value


def cloned(batch: Any) -> Any:
    """A batch of fresh tensors in fresh containers: what is done to it, the original does not feel.

    A tensor that occurs twice does so in the copy. What cannot be copied is shared.
    """
    # Not deepcopy's way with tensors: of a view it would copy all that lies behind.
    tensors = (leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor))
    seen: dict[int, Any] = {id(leaf): _cloned(leaf) for leaf in tensors}
    try:
        return copy.deepcopy(batch, seen)
    except TypeError:
        return batch


def _cloned(tensor: Tensor) -> Tensor:
    copied = in_its_class(tensor, lambda plain: plain.detach().clone())
    return Tensor.requires_grad_(copied) if tensor.requires_grad else copied


def in_its_class(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """What a change makes of a tensor; of one of a user's subclass, its class and attributes (labels, say) again.

    What such a class makes of an operation of torch's may lack its attributes, and its methods fail for that.
    """
    kind = type(tensor)
    has_ways = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__  # it need not hold the numbers itself
    if has_ways or kind.__module__.partition(".")[0] == "torch":
        return change(tensor)
    with torch._C.DisableTorchFunctionSubclass():
        made = Tensor.as_subclass(change(Tensor.as_subclass(tensor, Tensor)), kind)
    try:
        vars(made).update(copy.deepcopy(vars(tensor)))
    except Exception:  # of whatever kind: what cannot be copied is shared
        vars(made).update(vars(tensor))
    return made


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
        return in_its_class(batch, torch.clone)
    mask = replaced.to(batch.device).view([-1 if d == dim else 1 for d in range(batch.ndim)])
    return in_its_class(batch, lambda plain: torch.where(mask, plain.roll(1, dim), plain))


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


def is_entry_each(items: list[Any] | tuple[Any, ...], num: int) -> bool:
    """Whether a sequence has one entry a sample; not so two tensors ``(x, y)`` of two samples, with rows themselves."""
    kinds = {(type(item), item.ndim, item.dtype) if isinstance(item, Tensor) else type(item) for item in items}
    return len(items) == num > 0 and len(kinds) == 1 and not all(_is_by_row(item, num) for item in items)


SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def as_float32(batch: Any) -> Any:
    """The batch with its 16-bit tensors widened."""
    return apply_to_collection(batch, Tensor, lambda tensor: in_its_class(tensor, summable))


def as_float64(batch: Any) -> Any:
    """The batch with all its tensors of floats in float64."""
    return apply_to_collection(
        batch,
        Tensor,
        lambda tensor: in_its_class(tensor, torch.Tensor.double) if tensor.is_floating_point() else tensor,
    )


def summable(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.float() if tensor.dtype in SIXTEEN_BITS else tensor


def _is_by_row(item: Any, num: int) -> bool:
    if isinstance(item, Tensor):
        return item.layout is torch.strided and not item.is_nested and item.ndim > 0 and item.shape[0] == num > 0
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
    is_second = isinstance(part, Tensor) and part.ndim > 1 and part.shape[0] != num == part.shape[1]
    return (part.transpose(0, 1), 1) if is_second and part.layout is torch.strided else (part, 0)


def has_row_each(part: Any, num: int, dim: int = 0) -> bool:
    """Whether a part of a batch has a row along a dimension, or an entry, for each of ``num`` samples."""
    if isinstance(part, list | tuple):
        return is_entry_each(part, num)
    return int(getattr(part, "ndim", 0)) > dim and part.shape[dim] == num
