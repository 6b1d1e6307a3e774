# SPDX-License-Identifier: Apache-2.0
"""What a batch is made of, whatever its nesting, and copies of it."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

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
    copied = tensor.detach().clone()
    return copied.requires_grad_() if tensor.requires_grad else copied
