# SPDX-License-Identifier: Apache-2.0
"""Any batch as JSON and plain tensors, and back, without pickle: no code runs because a file says so.

Classes are written by name and found again among those that a batch of this process was seen to be
made of; never is a name from a file imported.
"""

import copyreg
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sgdclean.base.errors import RunDirectoryError, UnsupportedTrainingError

Classes = dict[str, type]
_NUMBERS = frozenset("?bhilqBfde")  # NumPy's type characters that torch has, too, and safetensors writes
_DEPTH = 64  # nothing that training_step unpacks is nested deeper; what is holds itself


@dataclass
class PackedBatch:
    """A batch taken apart.

    Attributes:
        skeleton: Everything but the tensors, as JSON holds it.
        tensors: Strided tensors, contiguous and sharing nothing, on the CPU. Empty while they were not yet read.
    """

    skeleton: Any
    tensors: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors)


def pack_batch(batch: Any, classes: Classes) -> PackedBatch:
    """Take a batch apart; its tensors are copied.

    Args:
        batch: Any nesting of dicts, lists, tuples, named tuples, dataclasses and further classes that can
            be copied from their parts (see Python's ``copy``), around tensors, arrays, strings, numbers, None.
        classes: Takes up the classes met, by their names.

    Raises:
        UnsupportedTrainingError: If it holds anything else; says what.
    """
    packer = _Packer(classes)
    return PackedBatch(packer.pack(batch, 0), packer.tensors)


def classes_of(batch: Any) -> Classes:
    """The classes by name that a batch drawn in this process is made of, as far as it can be packed."""
    classes: Classes = {}
    with suppress(UnsupportedTrainingError):
        pack_batch(batch, classes)
    return classes


class _Packer:
    def __init__(self, classes: Classes) -> None:
        self.tensors: list[Tensor] = []
        self._classes = classes

    def pack(self, value: Any, depth: int) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return {"value": value}
        if depth > _DEPTH:
            raise _cannot_keep(value, "which holds itself")
        if isinstance(value, Tensor):
            return self._tensor(value, depth)
        if isinstance(value, np.ndarray | np.generic) and value.dtype.char in _NUMBERS:
            is_array = isinstance(value, np.ndarray)
            return {"array" if is_array else "number": self._hold(torch.from_numpy(np.array(value)))}
        if type(value) in (list, tuple):
            return {type(value).__name__: self._all(value, depth)}
        if type(value) is dict:
            return {"dict": self._pairs(value.items(), depth)}
        return self._object(value, depth)

    def _all(self, values: Iterable[Any], depth: int) -> list[Any]:
        return [self.pack(item, depth + 1) for item in values]

    def _pairs(self, items: Iterable[Any], depth: int) -> list[Any]:
        return [self._all(pair, depth) for pair in items]

    def _hold(self, tensor: Tensor) -> int:
        self.tensors.append(tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format))
        return len(self.tensors) - 1

    def _tensor(self, value: Tensor, depth: int) -> Any:
        if value.layout is not torch.strided or value.is_nested or value.is_quantized:
            raise _cannot_keep(value, f"of layout {value.layout}")
        if value.grad_fn is not None:
            raise _cannot_keep(value, "with a graph behind it")
        packed: dict[str, Any] = {"device": value.device.type}
        plain = value.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
        if plain.is_complex():
            packed["complex"], plain = True, torch.view_as_real(plain)
        elif not plain.is_contiguous() and plain.clone().stride() == plain.stride():  # channels last, transposed
            packed["stride"] = list(plain.stride())
        if value.requires_grad:
            packed["requires_grad"] = True
        if type(value) is not Tensor:
            packed |= {"class": self._name(type(value)), "attributes": self.pack(vars(value), depth + 1)}
        return {"tensor": self._hold(plain), **packed}

    def _object(self, value: Any, depth: int) -> Any:
        """Python's protocol for copies: a class, arguments, a state, and entries of a list or dict."""
        kind = type(value)
        try:
            function, args, *rest = value.__reduce_ex__(2)
        except (TypeError, ValueError) as error:
            raise _cannot_keep(value, f"({error})") from error
        if function is copyreg.__newobj__ and args[0] is kind:  # type: ignore[attr-defined]
            made, args = "new", args[1:]
        elif function is kind:
            made = "call"
        else:
            raise _cannot_keep(value, "which is made by a function of its own")
        state, items, pairs = (*rest, None, None, None)[:3]
        return {
            made: self._name(kind),
            "args": self._all(args, depth),
            "state": self.pack(state, depth + 1),
            "items": self._all(items or (), depth),
            "pairs": self._pairs(pairs or (), depth),
        }

    def _name(self, kind: type) -> str:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if self._classes.setdefault(name, kind) is not kind:
            raise UnsupportedTrainingError(
                f"A training batch holds objects of two different classes that are both called {name}. "
                "Give them different names."
            )
        return name


def _cannot_keep(value: Any, why: str) -> UnsupportedTrainingError:
    kind = type(value)
    return UnsupportedTrainingError(
        f"A training batch holds a {kind.__module__}.{kind.__qualname__} {why}, which cannot be kept without pickle. "
        "Expected tensors, NumPy arrays, strings and numbers in dicts, lists, tuples, named tuples, dataclasses or "
        "classes that are copied by their attributes."
    )


def unpack_batch(packed: PackedBatch, classes: Classes, device: torch.device) -> Any:
    """Undo :func:`pack_batch`; the tensors are fresh copies.

    Args:
        packed: What was packed, perhaps in another process.
        classes: Classes by name, as :func:`pack_batch` met them in this process.
        device: For the tensors that were not on the CPU.

    Raises:
        RunDirectoryError: If it names a class that is not among ``classes``.
    """

    def many(values: list[Any]) -> list[Any]:
        return [unpack(value) for value in values]

    def unpack(skeleton: Any) -> Any:
        kind, value = next(iter(skeleton.items()))
        if kind == "value":
            return value
        if kind == "tensor":
            return _tensor_again(packed.tensors[value], skeleton, device, classes, unpack)
        if kind == "array":
            return packed.tensors[value].numpy().copy()
        if kind == "number":
            return packed.tensors[value].numpy().copy()[()]
        if kind == "list":
            return many(value)
        if kind == "tuple":
            return tuple(many(value))
        if kind == "dict":
            return {key: item for key, item in map(many, value)}  # noqa: C416 - pairs are lists
        made = _class_named(value, classes)
        args = many(skeleton["args"])
        return _completed(made.__new__(made, *args) if kind == "new" else made(*args), skeleton, unpack)

    return unpack(packed.skeleton)


def _completed(made: Any, skeleton: Any, unpack: Any) -> Any:
    """Give a new object its state and its entries, as ``copy.copy`` does."""
    state = unpack(skeleton["state"])
    if state is not None:
        if hasattr(made, "__setstate__"):
            made.__setstate__(state)
        else:
            attributes, slots = state if isinstance(state, tuple) else (state, {})
            made.__dict__.update(attributes or {})
            for name, value in (slots or {}).items():
                object.__setattr__(made, name, value)  # also of a frozen dataclass
    for item in skeleton["items"]:
        made.append(unpack(item))
    for key, item in skeleton["pairs"]:
        made[unpack(key)] = unpack(item)
    return made


def _tensor_again(stored: Tensor, skeleton: Any, device: torch.device, classes: Classes, unpack: Any) -> Tensor:
    tensor = torch.view_as_complex(stored.clone()) if skeleton.get("complex") else stored.clone()
    if "stride" in skeleton:
        tensor = torch.empty_strided(tensor.shape, skeleton["stride"], dtype=tensor.dtype).copy_(tensor)
    if skeleton["device"] != "cpu":
        tensor = tensor.to(device)
    if "class" in skeleton:
        tensor = tensor.as_subclass(_class_named(skeleton["class"], classes))
        tensor.__dict__.update(unpack(skeleton["attributes"]))
    return tensor.requires_grad_(skeleton.get("requires_grad", False))


def _class_named(name: str, classes: Classes) -> type:
    if name not in classes:
        raise RunDirectoryError(
            f"A stored batch holds a {name}, which no batch of this process is made of. Retrace it with the loader "
            "that it was trained on."
        )
    return classes[name]
