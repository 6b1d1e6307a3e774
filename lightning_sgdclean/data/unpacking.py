# SPDX-License-Identifier: Apache-2.0
"""Packed batches put together again, and whether they, and copies, are what the batches were."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sgdclean.base.errors import RunDirectoryError, UnsupportedTrainingError
from lightning_sgdclean.data.batches import attributes_of, cloned, leaves_of
from lightning_sgdclean.data.fingerprints import batch_digest
from lightning_sgdclean.data.kinds import kind_of
from lightning_sgdclean.data.packing import Classes, PackedBatch, pack_batch


def unpack_batch(packed: PackedBatch, classes: Classes, device: torch.device) -> Any:
    """Undo :func:`~lightning_sgdclean.data.packing.pack_batch`; the tensors are fresh copies.

    Args:
        packed: What was packed, perhaps in another process.
        classes: Classes by name, as ``pack_batch`` met them in this process.
        device: For the tensors that were not on the CPU.

    Raises:
        RunDirectoryError: If it names a class that is not among ``classes``.
    """
    return _Unpacker(packed.tensors, classes, device).unpack(packed.skeleton)


class _Unpacker:
    def __init__(self, tensors: list[Tensor], classes: Classes, device: torch.device) -> None:
        self._tensors, self._classes, self._device = tensors, classes, device
        self._known: dict[int, Any] = {}  # what occurs again

    def unpack(self, skeleton: Any) -> Any:
        if "again" in skeleton:
            return self._known[skeleton["again"]]
        kind, value = next((kind, value) for kind, value in skeleton.items() if kind != "as")
        if kind == "value":
            return value
        if kind in ("new", "call"):
            return self._object(value, skeleton)
        ways: dict[str, Callable[[Any, Any], Any]] = {
            "list": self._list,
            "dict": self._dict,
            "tuple": self._tuple,
            "tensor": self._tensor,
            "array": self._array,
            "number": self._number,
            "kind": self._kind,
            "type": self._type,
            "objects": self._objects,
            "bytes": self._bytes,
            "nested": self._nested,
            "sparse": self._sparse,
        }
        return self._noted(ways[kind](value, skeleton), skeleton)

    def _noted(self, made: Any, skeleton: Any) -> Any:
        if "as" in skeleton:
            self._known[skeleton["as"]] = made
        return made

    def _many(self, values: list[Any]) -> list[Any]:
        return [self.unpack(value) for value in values]

    def _list(self, value: Any, skeleton: Any) -> Any:
        made: list[Any] = self._noted([], skeleton)
        made.extend(self.unpack(item) for item in value)
        return made

    def _dict(self, value: Any, skeleton: Any) -> Any:
        made: dict[Any, Any] = self._noted({}, skeleton)
        for pair in value:
            key, item = self._many(pair)  # the key first, as it was packed: it may occur again in the item
            made[key] = item
        return made

    def _object(self, value: Any, skeleton: Any) -> Any:
        cls: Any = self._class_named(value)
        args = self._many(skeleton["args"])
        made = self._noted(cls.__new__(cls, *args) if "new" in skeleton else cls(*args), skeleton)
        self._complete(made, skeleton)
        return made

    def _complete(self, made: Any, skeleton: Any) -> None:
        """Give a new object its state and its entries, as ``copy.copy`` does."""
        state = self.unpack(skeleton["state"])
        if state is not None:
            if hasattr(type(made), "__setstate__"):
                made.__setstate__(state)
            else:
                attributes, slots = state if isinstance(state, tuple) else (state, {})
                if attributes:
                    made.__dict__.update(attributes)
                for name, value in (slots or {}).items():
                    object.__setattr__(made, name, value)  # also of a frozen dataclass
        for item in skeleton["items"]:
            made.append(self.unpack(item))
        for pair in skeleton["pairs"]:
            key, item = self._many(pair)
            made[key] = item

    def _tuple(self, value: Any, skeleton: Any) -> Any:
        return tuple(self._many(value))

    def _type(self, value: Any, skeleton: Any) -> Any:
        return self._class_named(value)

    def _kind(self, value: Any, skeleton: Any) -> Any:
        cls = self._class_named(value)
        kind = kind_of(cls)
        if kind is None or kind.make is None:
            raise RunDirectoryError(f"A stored batch holds a {value}, which is not made of such parts.")
        return kind.make(cls, self.unpack(skeleton["parts"]))

    def _array(self, value: Any, skeleton: Any) -> Any:
        return self._of_array_class(self._tensors[value].numpy().copy(), skeleton)

    def _number(self, value: Any, skeleton: Any) -> Any:
        return self._tensors[value].numpy().copy()[()]

    def _objects(self, value: Any, skeleton: Any) -> Any:
        array = np.empty(len(value), dtype=object)
        for place, item in enumerate(value):
            array[place] = self.unpack(item)
        return self._of_array_class(array.reshape(skeleton["shape"]), skeleton)

    def _bytes(self, value: Any, skeleton: Any) -> Any:
        dtype, content = np.lib.format.descr_to_dtype(self.unpack(skeleton["dtype"])), self._tensors[value].numpy()
        array = np.frombuffer(content.tobytes(), dtype).copy() if content.size else np.zeros(skeleton["shape"], dtype)
        array = array.reshape(skeleton["shape"])
        return array[()] if skeleton.get("scalar") else self._of_array_class(array, skeleton)

    def _of_array_class(self, array: Any, skeleton: Any) -> Any:
        if "class" in skeleton:
            array = array.view(self._class_named(skeleton["class"]))
            array.__dict__.update(self.unpack(skeleton["attributes"]))
        return array

    def _tensor(self, value: Any, skeleton: Any) -> Any:
        stored = self._tensors[value]
        tensor = torch.view_as_complex(stored.clone()) if skeleton.get("complex") else stored.clone()
        if "stride" in skeleton:
            tensor = torch.empty_strided(tensor.shape, skeleton["stride"], dtype=tensor.dtype).copy_(tensor)
        if skeleton["device"] != "cpu":
            tensor = tensor.to(self._device)
        return self._of_tensor_class(tensor, skeleton)

    def _nested(self, value: Any, skeleton: Any) -> Any:
        layout = getattr(torch, skeleton["layout"])
        return self._of_tensor_class(torch.nested.nested_tensor(self._many(value), layout=layout), skeleton)

    def _sparse(self, value: Any, skeleton: Any) -> Any:
        size, layout, parts = skeleton["size"], getattr(torch, skeleton["layout"]), self._many(value)
        make: Any = torch.sparse_coo_tensor if layout is torch.sparse_coo else torch.sparse_compressed_tensor
        how = {"is_coalesced": skeleton["coalesced"]} if layout is torch.sparse_coo else {"layout": layout}
        made = make(*parts, size, check_invariants=True, **how)
        return self._of_tensor_class(made, skeleton)

    def _of_tensor_class(self, tensor: Tensor, skeleton: Any) -> Tensor:
        if "class" in skeleton:
            tensor = tensor.as_subclass(self._class_named(skeleton["class"]))
        if "attributes" in skeleton:
            tensor.__dict__.update(self.unpack(skeleton["attributes"]))
        return tensor.requires_grad_(skeleton.get("requires_grad", False))

    def _class_named(self, name: str) -> Any:
        if name not in self._classes:
            raise RunDirectoryError(
                f"A stored batch holds a {name}, which no batch of this process is made of. Retrace it with the "
                "loader that it was trained on."
            )
        return self._classes[name]


def pack_surely(batch: Any, num_samples: int, classes: Classes) -> PackedBatch:
    """Pack a batch, and see that it comes back as it was.

    Args:
        batch: See :func:`~lightning_sgdclean.data.packing.pack_batch`.
        num_samples: ``B``.
        classes: As there.

    Raises:
        UnsupportedTrainingError: If it cannot be packed, or comes back as another one; names what.
    """
    packed = pack_batch(batch, classes)
    if _why_not(batch, packed, num_samples, classes):
        known = dict(classes)
        kind, why = _culprit(batch, lambda part: _why_not(part, pack_batch(part, known), num_samples, known))
        raise UnsupportedTrainingError(
            f"A training batch holds a {kind}, which cannot be kept without pickle: put together again, {why}. "
            f"{_INSTEAD}"
        )
    return packed


_INSTEAD = "Put its tensors and numbers into the batch instead."


def check_copied(batch: Any, num_samples: int) -> None:
    """Does a copy of a batch hold what the batch holds?

    Raises:
        UnsupportedTrainingError: If not; names what.
    """
    if _differs(batch, num_samples):
        kind, why = _culprit(batch, lambda part: _differs(part, num_samples))
        raise UnsupportedTrainingError(f"A training batch holds a {kind}: copied (copy.deepcopy), {why}. {_INSTEAD}")


def _differs(value: Any, num: int) -> str:
    is_same = torch.equal(batch_digest(cloned(value), num), batch_digest(value, num))
    return "" if is_same else "it holds other data"


def _why_not(batch: Any, packed: PackedBatch, num: int, classes: Classes) -> str:
    """Why what comes back is not what was packed; empty if it is."""
    others = (leaf.device for leaf in leaves_of(batch) if isinstance(leaf, Tensor) and not leaf.is_cpu)
    try:
        back = unpack_batch(packed, classes, next(others, torch.device("cpu")))
        if not torch.equal(batch_digest(back, num), batch_digest(batch, num)):
            return "it holds other data"
        again = pack_batch(back, dict(classes))
    except Exception as error:  # theirs, of any kind
        return f"it fails ({type(error).__name__}: {error})"
    # As text: NaN is no number that equals itself.
    if json.dumps(again.skeleton) != json.dumps(packed.skeleton):
        return "it is made of other parts"
    pairs = zip(again.tensors, packed.tensors, strict=True)
    return "" if all(_bits(one).equal(_bits(other)) for one, other in pairs) else "it holds other data"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _culprit(batch: Any, why_not: Callable[[Any], str]) -> tuple[str, str]:
    """The class of the innermost part with which something is wrong, and what."""
    part, why = next(_culprits(batch, why_not, ()), (batch, why_not(batch)))
    return f"{type(part).__module__}.{type(part).__qualname__}", why


def _culprits(value: Any, why_not: Callable[[Any], str], above: tuple[int, ...]) -> Iterator[tuple[Any, str]]:
    if id(value) in above:
        return
    for part in _parts(value):
        yield from _culprits(part, why_not, (*above, id(value)))
    if why := why_not(value):
        yield value, why


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value
    elif not isinstance(value, Tensor | type):
        yield from attributes_of(value).values()
