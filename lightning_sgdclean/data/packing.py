# SPDX-License-Identifier: Apache-2.0
"""Any batch as JSON and plain tensors, and back, without pickle: no code runs because a file says so.

Classes are written by name and found again among those that a batch of this process was seen to be
made of; never is a name from a file imported.
"""

import copyreg
import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sgdclean.base.errors import UnsupportedTrainingError
from lightning_sgdclean.data.batches import extras_of, is_wrapper, samples_of
from lightning_sgdclean.data.kinds import kind_of, reduced

Classes = dict[str, type]
_NUMBERS = frozenset("?bhilqBfde")  # NumPy's type characters that torch has, too, and safetensors writes
_DEPTH = 64  # nothing that training_step unpacks is nested deeper
_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}


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
            be copied from their parts (see Python's ``copy``), around tensors, arrays, strings, numbers, None, and
            what :mod:`~lightning_sgdclean.data.kinds` knows. What occurs twice, or holds itself, does so afterwards.
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


def content_ids(batch: Any) -> list[str]:
    """An id for each sample of a batch: 16 hexadecimal digits, of what the batch holds of it.

    Equal samples have equal ids, in any batch, run and process; of a million different ones, two are named alike with
    a chance of one in thirty million. What changes a sample changes its id: random augmentation, padding to another
    length, another precision.

    Args:
        batch: As ``training_step`` gets it; see :func:`~lightning_sgdclean.data.batches.samples_of`.

    Raises:
        SampleIdError: If part of it cannot be told apart by samples, or their number is not clear.
        UnsupportedTrainingError: If what it holds of a sample cannot be packed.
    """
    return [_content_id(pack_batch(sample, {})) for sample in samples_of(batch)]


def _content_id(packed: PackedBatch) -> str:
    about = [packed.skeleton, [(str(tensor.dtype), list(tensor.shape)) for tensor in packed.tensors]]
    found = hashlib.blake2b(json.dumps(about).encode(), digest_size=8)
    for tensor in packed.tensors:
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class _Packer:
    def __init__(self, classes: Classes) -> None:
        self.tensors: list[Tensor] = []
        self._classes = classes
        # By id, what an object has become; and the object, so that the id stays its own.
        self._met: dict[int, tuple[dict[str, Any], Any]] = {}
        self._half_made: set[int] = set()  # of which nothing is there before all of its parts are
        self._num_again = 0

    def pack(self, value: Any, depth: int) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return {"value": value}
        if depth > _DEPTH:
            raise _cannot_keep(value, f"nested more than {_DEPTH} levels deep")
        if id(value) in self._met:
            return self._again(value)
        found: dict[str, Any] = {}
        self._met[id(value)] = found, value
        found |= self._apart(value, depth)
        return found

    def _again(self, value: Any) -> Any:
        if id(value) in self._half_made:
            raise _cannot_keep(value, "which holds itself")
        first, _ = self._met[id(value)]
        if "as" not in first:
            first["as"] = self._num_again
            self._num_again += 1
        return {"again": first["as"]}

    def _apart(self, value: Any, depth: int) -> dict[str, Any]:
        if isinstance(value, Tensor):
            return self._tensor(value, depth)
        kind = kind_of(type(value))
        if kind is not None and kind.make is not None and not isinstance(value, np.generic):
            return {"kind": self._name(type(value)), "parts": self._before(value, [kind.parts(value)], depth)[0]}
        if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and kind is None):
            return self._array(value, depth)
        if type(value) is tuple:
            return {"tuple": self._before(value, value, depth)}
        if type(value) is list:
            return {"list": self._all(value, depth)}
        if type(value) is dict:
            return {"dict": self._pairs(value.items(), depth)}
        if isinstance(value, type):
            return {"type": self._name(value)}
        return self._object(value, depth)

    def _all(self, values: Iterable[Any], depth: int) -> list[Any]:
        return [self.pack(item, depth + 1) for item in values]

    def _pairs(self, items: Iterable[Any], depth: int) -> list[Any]:
        return [[self.pack(key, depth + 1), self.pack(item, depth + 1)] for key, item in items]

    def _before(self, value: Any, parts: Iterable[Any], depth: int) -> list[Any]:
        """Parts that have to be there before the value can be made, so that none of them may hold it."""
        self._half_made.add(id(value))
        packed = self._all(parts, depth)
        self._half_made.discard(id(value))
        return packed

    def _hold(self, tensor: Tensor) -> int:
        self.tensors.append(tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format))
        return len(self.tensors) - 1

    def _array(self, value: Any, depth: int) -> dict[str, Any]:
        array = np.array(value)
        packed: dict[str, Any]
        if array.dtype.char in _NUMBERS and array.dtype.isnative:
            packed = {"array": self._hold(torch.from_numpy(array))}
        elif array.dtype.char == "O":
            packed = {"objects": self._before(value, array.ravel(), depth), "shape": list(array.shape)}
        elif array.dtype.hasobject:
            raise _cannot_keep(value, f"of dtype {array.dtype}")
        else:  # strings, dates, records, other byte orders
            held = self._hold(torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy()))
            descr = self.pack(np.lib.format.dtype_to_descr(array.dtype), depth + 1)
            packed = {"bytes": held, "dtype": descr, "shape": list(array.shape)}
        if isinstance(value, np.generic):
            return {"number": packed["array"]} if "array" in packed else packed | {"scalar": True}
        if type(value) not in (np.ndarray, np.memmap):
            packed |= {"class": self._name(type(value)), "attributes": self.pack(vars(value), depth + 1)}
        return packed

    def _tensor(self, value: Tensor, depth: int) -> dict[str, Any]:
        if value.grad_fn is not None:
            raise _cannot_keep(value, "with a graph behind it")
        packed: dict[str, Any]
        if value.is_nested:
            layout = str(value.layout).removeprefix("torch.")
            packed = {"nested": self._before(value, value.detach().unbind(), depth), "layout": layout}
        elif value.is_quantized or is_wrapper(value):
            raise _cannot_keep(value, "which is quantized" if value.is_quantized else "which computes for itself")
        elif value.layout in (torch.sparse_coo, *_COMPRESSED):
            packed = self._sparse(value.detach(), depth)
        elif value.layout is torch.strided:
            packed = self._strided(value)
        else:
            raise _cannot_keep(value, f"of layout {value.layout}")
        if value.requires_grad:
            packed["requires_grad"] = True
        extras = {} if value.is_nested else extras_of(value)
        if type(value) is not Tensor and not value.is_nested:
            packed |= {"class": self._name(type(value)), "attributes": self._before(value, [extras], depth)[0]}
        elif extras:
            packed["attributes"] = self._before(value, [extras], depth)[0]
        return packed

    def _strided(self, value: Tensor) -> dict[str, Any]:
        packed: dict[str, Any] = {"device": value.device.type}
        plain = value.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
        if plain.is_complex():
            packed["complex"], plain = True, torch.view_as_real(plain)
        elif not plain.is_contiguous() and plain.clone().stride() == plain.stride():  # channels last, transposed
            packed["stride"] = list(plain.stride())
        return {"tensor": self._hold(plain), **packed}

    def _sparse(self, value: Tensor, depth: int) -> dict[str, Any]:
        names = _COMPRESSED.get(value.layout)
        if names is None:
            parts, is_coalesced = [value._indices(), value._values()], value.is_coalesced()
        else:
            parts, is_coalesced = [*(getattr(value, name)() for name in names), value.values()], False
        layout = str(value.layout).removeprefix("torch.")
        packed = self._before(value, parts, depth)
        return {"sparse": packed, "layout": layout, "size": list(value.shape), "coalesced": is_coalesced}

    def _object(self, value: Any, depth: int) -> dict[str, Any]:
        """Python's protocol for copies: a class, arguments, a state, and entries of a list or dict."""
        kind = type(value)
        try:
            function, args, *rest = reduced(value)
        except Exception as error:  # theirs, of any kind
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
            "args": self._before(value, args, depth),
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
