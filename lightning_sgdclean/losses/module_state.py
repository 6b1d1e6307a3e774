# SPDX-License-Identifier: Apache-2.0
"""What a module keeps in itself besides parameters and buffers: noted, and put back."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_sgdclean.base.errors import SGDInfluenceError, UnsupportedTrainingError
from lightning_sgdclean.losses.contents import (
    EMPTY,
    Content,
    are_same,
    are_same_arrays,
    base_of,
    holds,
    holds_life,
    is_of_library,
    is_of_user,
    members_of,
    memory_of,
    namespace_of,
    random_state_of,
    refill,
    set_slot,
    slots_of,
    write_changed,
)

_TENSORS = frozenset({"_parameters", "_buffers", "_modules"})
_TORCHS = frozenset(vars(nn.Module()))  # attributes that every module has; hooks come and go by handles of their own
_NUMBERS = (bool, int, float, str)
_PLAIN = (*_NUMBERS, bytes, complex, type(None), type)
_MANY = 1000  # members of a container, from which on tensors in it are noted by identity alone
_MOST_SECONDS = 10
_ROOM = 1 << 30  # bytes of copies of what lies in containers


class Attributes:
    """The plain attributes of a module and its submodules, as they were when this was made.

    Noted are which object each attribute is, the members of lists, dicts, sets and deques (nested, too), the content
    of tensors and arrays, and the states of random generators. Objects of the user's, or of a library, are followed
    if they are data: if they hold nothing that has a life of its own; see
    :mod:`lightning_sgdclean.losses.contents`. So are modules that are not registered. Nothing else is followed.
    Tensors in long containers are noted by identity alone: a list of all losses so far would be slow to copy.

    Attributes:
        written: Names of the tensors that had to be put back.
    """

    def __init__(self, module: nn.Module) -> None:
        self._namespaces: list[tuple[dict[str, Any], dict[str, Any], frozenset[str]]] = []
        self._slots: list[tuple[Any, Any, Any]] = []
        self._containers: list[tuple[Any, Any, Any]] = []
        self._tensors: list[Content] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._draws: list[tuple[Callable[[Any], Any], Any]] = []
        self._alive: list[_Moving] = []
        self._seen: set[int] = set()
        self._room, self._num_restored, self._since = _ROOM, 0, time.perf_counter()
        self.written: set[str] = set()
        # These, and views of them, a replay writes to itself.
        self._replayed = {memory for tensor in _tensors_of(module) if (memory := memory_of(tensor)) is not None}
        storages = [tensor.untyped_storage() for tensor in _tensors_of(module) if memory_of(tensor) is not None]
        self._replayed_bytes = [(one.data_ptr(), one.data_ptr() + one.nbytes()) for one in storages]
        self._todo: list[tuple[str, Any, bool]] = []
        self._note_module(type(module).__name__, module, is_registered=True)
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():  # what a subclass adds may fail
            while self._todo:
                self._note(*self._todo.pop())

    def _note_module(self, where: str, module: nn.Module, is_registered: bool = False) -> None:
        for part in module.modules():
            if id(part) in self._seen and part is not module:
                continue
            self._seen.add(id(part))
            self._note_namespace(where if part is module else type(part).__name__, vars(part), _TENSORS, _TORCHS)
            if not is_registered:
                self._todo += [(where, tensor, False) for tensor in _tensors_of(part, recurse=False)]

    def _note_namespace(
        self,
        where: str,
        live: dict[str, Any],
        left: frozenset[str] = frozenset(),
        shallow: frozenset[str] = frozenset(),
    ) -> None:
        saved = {name: value for name, value in live.items() if name not in left}
        self._namespaces.append((live, saved, left))
        self._todo += [(f"{where}.{name}", value, False) for name, value in saved.items() if name not in shallow]

    def _note(self, where: str, value: Any, is_within: bool) -> None:
        kind = type(value)  # isinstance would ask the object, and a proxy answers for another one
        if id(value) in self._seen or issubclass(kind, _PLAIN):
            return
        self._seen.add(id(value))
        if issubclass(kind, Tensor):
            self._note_tensor(where, value, is_within)
        elif issubclass(kind, np.ndarray):
            self._note_array(value, is_within)
        elif issubclass(kind, nn.Module):
            self._note_module(where, value)
        elif (members := members_of(value)) is not None:
            self._note_members(where, value, members)
        elif draw := random_state_of(value):
            self._draws.append(draw)
        elif is_of_user(value) and not holds_life(value):
            self._note_held(where, value)
        elif is_of_user(value) or not is_of_library(kind):
            self._alive.append(_Moving(where, value))

    def _note_held(self, where: str, value: Any) -> None:
        namespace = namespace_of(value)
        if namespace:
            self._note_namespace(where, namespace)
        elif namespace is not None:
            self._namespaces.append((namespace, {}, frozenset()))
        for slot in slots_of(value):
            try:
                found = slot.__get__(value)
            except AttributeError:
                found = EMPTY
            self._slots.append((slot, value, found))
            self._todo.append((f"{where}.{slot.__name__}", found, False))

    def _note_members(self, where: str, value: Any, members: list[Any]) -> None:
        base = base_of(value)
        if base is not None:
            content = dict(base.items(value)) if issubclass(base, dict) else members
            self._containers.append((base, value, content))
        is_long = len(members) > _MANY
        left = (*_PLAIN, Tensor, np.ndarray) if is_long else _PLAIN
        self._todo += [(where, member, True) for member in members if not issubclass(type(member), left)]
        if type(value).__module__ not in ("builtins", "collections"):  # then it may have attributes, too
            self._note_held(where, value)

    def _note_tensor(self, where: str, tensor: Tensor, is_within: bool) -> None:
        if memory_of(tensor) in self._replayed:
            return
        attributes = namespace_of(tensor)
        if attributes:
            self._note_namespace(where, attributes)
        content = Content(where, tensor, self._room, is_within)
        if is_within:
            self._room -= content.nbytes
        self._tensors.append(content)

    def _note_array(self, array: Any, is_within: bool) -> None:
        if not array.flags.writeable or (is_within and array.nbytes > self._room):
            return
        begin, end = _span_of(array)
        if any(begin < until and since < end for since, until in self._replayed_bytes):  # tensor.numpy() is a view
            return
        self._room -= array.nbytes if is_within else 0
        self._arrays.append((array, np.array(array, subok=False)))

    def restore(self) -> None:
        """Put everything back, the very objects. What did not change is not written to: it may be part of a graph."""
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            self._restore()

    def _restore(self) -> None:
        self._num_restored += 1
        for moving in self._alive:
            moving.look()
        for live, saved, left in self._namespaces:
            for name in [name for name in live if name not in saved and name not in left]:
                del live[name]
            live.update(saved)
        for slot, owner, value in self._slots:
            set_slot(slot, owner, value)
        for base, live, content in self._containers:
            if not holds(base, live, content):
                refill(base, live, content)
        self.written |= {content.where for content in self._tensors if content.put_back()}
        for array, content in self._arrays:
            if not are_same_arrays(array, content):
                np.copyto(array, content)

    def end(self) -> None:
        """Put everything back, random generators, too: between two evaluations they would hide what a loss draws."""
        self.restore()
        for put_back, state in self._draws:
            put_back(state)

    def check(self) -> None:
        """Could everything be put back that ``training_step`` changes, as far as was seen?

        Raises:
            UnsupportedTrainingError: Naming what changed each time and cannot be put back.
        """
        moving: list[_Moving | Content] = [*self._alive]
        moving += [content for content in self._tensors if content.copy is None]
        moved = [each for each in moving if each.num_moves >= max(2, self._num_restored)]
        if any(isinstance(each, _Moving) for each in moved):  # a thread may have done it: does it go on?
            took = (time.perf_counter() - self._since) / self._num_restored
            for each in self._alive:
                each.look()
            time.sleep(min(max(2 * took, 0.1), _MOST_SECONDS))
            moved = [each for each in moved if not (isinstance(each, _Moving) and each.look())]
        if moved:
            raise UnsupportedTrainingError(
                f"training_step changes {moved[0].in_words} each time it is called. This callback calls it more often "
                "and puts back what it changed, but not here: the object holds what has a life of its own (a lock, a "
                "thread, a queue, an open file, a Trainer), or cannot be copied. Change it in on_train_batch_end, or "
                "keep the number as an attribute of the module."
            )


def _span_of(array: Any) -> tuple[int, int]:
    """Where an array's numbers lie in memory, from the first byte to behind the last."""
    low = high = array.__array_interface__["data"][0]
    for offset in ((num - 1) * stride for num, stride in zip(array.shape, array.strides, strict=True)):
        low, high = min(low, low + offset), max(high, high + offset)
    return low, high + array.itemsize


class _Moving:
    """An object that is not put back: does ``training_step`` change its numbers?"""

    def __init__(self, where: str, value: Any) -> None:
        self._where, self._live = where, namespace_of(value) or {}
        self._numbers, self._name, self.num_moves = self._now(), "", 0

    def _now(self) -> dict[str, Any]:
        return {name: value for name, value in [*self._live.items()] if type(value) in _NUMBERS}

    def look(self) -> bool:
        """Whether a number changed since the last look."""
        before, now = self._numbers, self._now()
        changed = [name for name in now if name not in before or before[name] != now[name]] if before != now else []
        if changed:
            self._numbers, self._name, self.num_moves = now, changed[0], self.num_moves + 1
        return bool(changed)

    @property
    def in_words(self) -> str:
        """What changed, by name."""
        return f"{self._where}.{self._name}"


def _tensors_of(module: nn.Module, recurse: bool = True) -> list[Tensor]:
    return [*module.parameters(recurse), *module.buffers(recurse)]


@contextmanager
def untouched_module(module: nn.Module, *, checks: bool = False) -> Iterator[Callable[[], None]]:
    """Leave the module as it was found: parameters, buffers, modes, metric states, its lists.

    Args:
        module: The module.
        checks: Whether to refuse at the end what ``training_step`` changed and nobody could put back.

    Yields:
        A callable that restores all but parameters and buffers already now, so that a module that
        collects its losses in a list does not collect those of every replayed step.

    Raises:
        UnsupportedTrainingError: If ``training_step`` writes into a tensor that its own loss is made of, or see above.
    """
    attributes = Attributes(module)
    owners = [(part, name, buffer) for part in module.modules() for name, buffer in part._buffers.items()]
    tensors = [*module.parameters(), *(buffer for *_, buffer in owners if buffer is not None)]
    contents = [tensor.detach().clone() for tensor in tensors]
    try:
        yield attributes.restore
        if checks:
            attributes.check()
    except RuntimeError as error:
        if isinstance(error, SGDInfluenceError) or "modified by an inplace operation" not in str(error):
            raise
        pairs = zip(tensors, contents, strict=True)
        moved = {id(tensor) for tensor, content in pairs if not are_same(tensor, content)}
        names = [name for name, buffer in module.named_buffers() if id(buffer) in moved]
        raise _written_in_place([*sorted(attributes.written), *names]) from error
    finally:
        attributes.end()
        for part, name, buffer in owners:
            part._buffers[name] = buffer
        for tensor, content in zip(tensors, contents, strict=True):
            write_changed(tensor, content)


def _written_in_place(names: list[str]) -> UnsupportedTrainingError:
    found = ", ".join(names) or "a tensor"
    return UnsupportedTrainingError(
        f"training_step writes in place to a tensor that its loss is made of ({found}), so the loss cannot be "
        "differentiated once the tensor is put back. Make a new tensor instead: self.mean = 0.9 * self.mean + ..., not "
        "self.mean.mul_(0.9).add_(...)."
    )


@contextmanager
def own_gradients(module: nn.Module) -> Iterator[None]:
    """Within the block no parameter has a gradient; afterwards each has its own again, the very object."""
    gradients = [(param, param.grad) for param in module.parameters()]
    for param, _ in gradients:
        param.grad = None
    try:
        yield
    finally:
        for param, gradient in gradients:
            param.grad = None
            param.grad = gradient
