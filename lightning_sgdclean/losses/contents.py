# SPDX-License-Identifier: Apache-2.0
"""What the objects hold that a module leads to: which of them are data, and how their content is put back.

What is put back after a replayed step must be nobody else's. A future that goes back from "finished" to "running" is
waited for for ever. No list of such classes is complete, so the question is the other way round: what is surely data?
Python answers it for anything written in C, by refusing to pickle locks, files, sockets, generators and the like.
"""

import copyreg
import operator
import random
import sys
from argparse import Namespace
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import PurePath
from types import (
    BuiltinFunctionType,
    FunctionType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any
from weakref import CallableProxyType, ProxyType, ReferenceType

import numpy as np
import torch
from torch import Tensor

CONTAINERS = (OrderedDict, dict, list, set, deque)
_FRAMEWORKS = frozenset(
    {"torch", "torchmetrics", "torchdata", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_sgdclean"}
)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), PurePath, np.generic, np.dtype, torch.dtype, torch.device)
_ABSTRACT = frozenset(
    {"abc", "typing", "collections.abc", "numbers", "contextlib", "dataclasses"}
)  # bases without state
_DATA_OF_PYTHON = (SimpleNamespace, Namespace, UserDict, UserList)


_NEVER_WRITTEN_TO: tuple[Any, ...] = (
    *(FunctionType, BuiltinFunctionType, MethodType, type, ModuleType),
    *(ReferenceType, ProxyType, CallableProxyType),
    *(MappingProxyType, type({}.keys()), type({}.values()), type({}.items()), property),
)  # and not to be pickled, or not to be asked
_WITH_LIFE = frozenset(  # of these, some can be pickled, or send a stand-in
    {"asyncio", "concurrent", "multiprocessing", "queue", "select", "selectors", "socket", "sqlite3", "subprocess"}
    | {"tempfile", "threading", "ssl", "mmap"}
)


def base_of(value: Any) -> Any:
    """The container class of Python's own whose members an object has, be it a subclass; None if it is no container."""
    kind = type(value)  # isinstance would ask the object, and a proxy answers for another one
    return next((base for base in CONTAINERS if issubclass(kind, base)), None)


def members_of(value: Any) -> list[Any] | None:
    """What a container, a tuple or a frozenset holds, whatever its class overrides; None of anything else."""
    base: Any = base_of(value) or next((base for base in (tuple, frozenset) if issubclass(type(value), base)), None)
    if base is None:
        return None
    return [*(base.values(value) if issubclass(base, dict) else base.__iter__(value))]


def is_of_library(kind: type) -> bool:
    """Whether a class stands in Python's own library or in a framework, whoever uses it."""
    root = str(kind.__module__).partition(".")[0]
    return root in _FRAMEWORKS or root == "numpy" or root in sys.stdlib_module_names


def is_of_user(value: Any) -> bool:
    """Whether an object is of a class of the user's, or of a library, all the way up: no part of a framework."""
    for base in type(value).__mro__[:-1]:
        is_plain = base.__module__ in _ABSTRACT or base in _DATA_OF_PYTHON
        if is_of_library(base) and not is_plain:
            return False
    return type(value) is not object and not issubclass(type(value), type)


def namespace_of(value: Any) -> dict[str, Any] | None:
    """An object's own dict, not what a property of that name gives."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except Exception:  # it has none, or one of its own making
        return None
    return found if type(found) is dict else None


def slots_of(value: Any) -> Iterator[Any]:
    """The descriptors of an object's slots, by which they are read and set whatever the class overrides."""
    for base in type(value).__mro__[:-1]:
        if "__slots__" in vars(base):
            yield from (each for each in vars(base).values() if type(each) is MemberDescriptorType)


def held_by(value: Any) -> list[Any]:
    """What an object holds itself: in its dict, in its slots, and as a container."""
    found = [*(namespace_of(value) or {}).values()]
    for slot in slots_of(value):
        try:
            found.append(slot.__get__(value))
        except AttributeError:  # empty
            continue
    return found + (members_of(value) or [])


def holds_life(value: Any) -> bool:
    """Whether an object of the user's holds, itself or in containers, what has a life of its own.

    A lock, a thread, a queue, an open file: what else the object holds may belong with it, so that only both together
    could be put back, or another thread may be at work on it.
    """
    todo, seen = held_by(value), {id(value)}
    while todo:
        held = todo.pop()
        kind = type(held)
        if issubclass(kind, _PLAIN) or id(held) in seen:
            continue
        seen.add(id(held))
        members = members_of(held)
        if members is not None:
            todo.extend(members)
        elif not is_of_user(held) and is_alive(held):
            return True
    return False


def is_alive(value: Any, depth: int = 4) -> bool:
    """Whether an object that is not of a user's class is, or holds, what Python does not pickle."""
    kind = type(value)
    roots = {str(base.__module__).partition(".")[0] for base in kind.__mro__[:-1]}
    if roots & _WITH_LIFE:
        return True
    if roots & _FRAMEWORKS or issubclass(kind, (*_PLAIN, *_NEVER_WRITTEN_TO, np.ndarray)):
        return False
    if kind not in copyreg.dispatch_table:
        try:
            value.__reduce_ex__(2)
        except Exception:  # of whatever kind: it says that there can be no second one
            return True
    return depth > 0 and any(is_alive(held, depth - 1) for held in (namespace_of(value) or {}).values())


EMPTY = object()  # what a slot holds that was never set


class Content:
    """What a tensor holds, copied if it can be.

    Args:
        where: The tensor, by name.
        tensor: The tensor.
        room: Bytes that a copy may take of what lies within a container.
        is_within: Whether it does. There may be many such; whether they changed is then seen by torch's counter alone.

    Attributes:
        where: See there.
        copy: A plain tensor, or None.
        nbytes: What it takes.
        num_moves: How often the tensor was written to, where there is no copy.
    """

    def __init__(self, where: str, tensor: Tensor, room: int, is_within: bool) -> None:
        self.where, self._tensor, self._is_within = where, tensor, is_within
        self.num_moves, self._version = 0, _version_of(tensor)
        self.copy = copied(tensor) if not is_within or _bytes_of(tensor) <= room else None
        self.nbytes = 0 if self.copy is None else _bytes_of(self.copy)

    def put_back(self) -> bool:
        """Write its content into the tensor, if it holds another one; whether it did."""
        version = _version_of(self._tensor)
        is_written = version != self._version
        self._version = version
        if self.copy is None:
            self.num_moves += is_written
            return False
        if self._is_within and version is not None and not is_written:
            return False  # there may be many of them
        if are_same(self._tensor, self.copy):
            return False
        write(self._tensor, self.copy)
        self._version = _version_of(self._tensor)
        return True

    @property
    def in_words(self) -> str:
        """The tensor, by name."""
        return self.where


def memory_of(tensor: Tensor) -> int | None:
    """Where a tensor's memory begins, however it is viewed; None where it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):  # sparse, functional, not initialized
        return None


def _bytes_of(tensor: Tensor) -> int:
    """What its dense copy would take: a sparse tensor does not say it, one that waits for its shape has none."""
    try:
        return tensor.numel() * tensor.element_size()
    except Exception:  # of whatever kind
        return 0


def _version_of(tensor: Tensor) -> int | None:
    """Torch's count of the writes to a tensor; None where it does not count them."""
    try:
        with torch._C.DisableTorchFunctionSubclass():
            return tensor._version
    except Exception:  # inference tensors, or a subclass of whatever kind
        return None


def copied(tensor: Tensor) -> Tensor | None:
    """A plain copy, or None where there can be none that could be held against the tensor."""
    try:
        with torch._C.DisableTorchFunctionSubclass():
            copied = Tensor.clone(Tensor.detach(tensor))
        return copied if are_same(tensor, copied) else None
    except Exception:  # of a subclass, whatever kind
        return None


def are_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; NaN is one."""
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        if torch.equal(one, other):
            return True
        if one.shape != other.shape or not (one.is_floating_point() or one.is_complex()):
            return False
        return bool(((one == other) | ((one != one) & (other != other))).all())


def write(tensor: Tensor, content: Tensor) -> None:
    """Copy a content into a tensor, whatever its class."""
    inference = torch.inference_mode() if tensor.is_inference() else nullcontext()
    with inference, torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        Tensor.copy_(tensor, content)


def write_changed(tensor: Tensor, content: Tensor) -> bool:
    """Copy a content into a tensor where it holds another one: what did not change may be part of a graph.

    Returns:
        Whether it did.
    """
    if are_same(tensor, content):
        return False
    write(tensor, content)
    return True


def are_same_arrays(one: Any, other: Any) -> bool:
    """Whether two arrays of a shape hold the same bits, or the very same objects."""
    if one.dtype.hasobject:
        return all(map(operator.is_, one.flat, other.flat))
    return bool(one.tobytes() == other.tobytes())


def holds(base: Any, live: Any, content: Any) -> bool:
    """Whether a container has these very members, in this order."""
    if base.__len__(live) != len(content):
        return False
    if issubclass(base, dict) and not all(map(operator.is_, base.__iter__(live), content)):
        return False
    if base is set:
        known = {*map(id, content)}
        return all(id(member) in known for member in set.__iter__(live))
    return all(map(operator.is_, members_of(live) or [], members_of(content) or []))


def refill(base: Any, live: Any, content: Any) -> None:
    """Have a container hold these members, whatever its class overrides."""
    base.clear(live)
    if issubclass(base, dict):
        for key, value in content.items():
            base.__setitem__(live, key, value)
    elif base is set:
        set.update(live, content)
    else:
        base.extend(live, content)


def set_slot(slot: Any, owner: Any, value: Any) -> None:
    """Set or empty a slot, whatever its class overrides."""
    if value is not EMPTY:
        slot.__set__(owner, value)
        return
    try:
        slot.__delete__(owner)
    except AttributeError:  # still empty
        return


def random_state_of(value: Any) -> tuple[Callable[[Any], Any], Any] | None:
    """What puts a random generator's state back, and the state; None for anything else."""
    kind = type(value)
    if kind is random.Random:
        return value.setstate, value.getstate()
    if issubclass(kind, torch.Generator):
        return value.set_state, value.get_state()
    if kind is np.random.RandomState:
        return value.set_state, value.get_state()
    if kind is np.random.Generator:
        return lambda state: setattr(value.bit_generator, "state", state), value.bit_generator.state
    return None
